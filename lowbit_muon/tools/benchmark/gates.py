"""What has to be right before it is timed: plain definitions, and how far from them is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends.modes import float32_products
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS

# Root of the mean squared error of a unit Gaussian in codes of so many bits (presets.py; 8 bits:
# tests/state/test_stored.py), and rounding of dense formats, two of them in a step.
CODING_ERROR = {2: 0.117**0.5, 3: 0.035**0.5, 4: 0.0098**0.5, 8: 0.01, 16: 2.0**-8, 32: 2.0**-22}
# Newton-Schulz in float32 is within 2.4e-3 of float64 in any order of its sums, and both sides of
# the comparison are in float32 (tests/step/test_device_step.py, NS_FLOAT32).
NEWTON_SCHULZ_FLOAT32 = 2 * 2.4e-3


class GateError(Exception):
    """A result that is too far from its definition to be timed."""


@dataclass(frozen=True)
class Passed:
    """A gate that let a result through: its relative error, and the largest that was allowed."""

    error: float
    allowed: float


def expect_close(what: str, found: Tensor, exact: Tensor, allowed: float) -> Passed:
    """Raise GateError unless ||found - exact|| <= allowed * ||exact||; NaN never passes."""
    error = relative_error(found, exact)
    if not error <= allowed:
        raise GateError(
            f"{what}: expected a relative error of at most {allowed:.1e}, got {error:.1e}"
        )
    return Passed(error, allowed)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """||found - exact||_F / ||exact||_F in float32."""
    return float((found.float() - exact.float()).norm() / exact.float().norm())


def allowed_stored_error(f: StateFormat) -> float:
    """Of a stored matrix that looks like a momentum; all zeros would give 1.

    Coded entries are close to normal, in short rows not quite: half as much again. Spectral formats
    multiply an error of y by up to 3, s = y^3. Levels companded by mu-law, as MuonQ's 15, lie a
    factor of (1 + mu)^(1/7) apart: at 256, rounding by half of that, +-0.4 of a value, is 0.23 in
    the mean, sqrt(2) times that for two factors, and half as much again.
    """
    if f.companded_scale:
        return 0.5
    slack = 1.0 if f.is_dense else 3.0 if f.spectral else 1.5
    return min(0.8, slack * CODING_ERROR[f.bits])


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of Muon's iteration in x's dtype, as plain as torch.optim.Muon writes them."""
    ((a, b, c),) = NS_COEFFICIENTS["muon"]
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


def exact_newton_schulz(x: Tensor) -> Tensor:
    """`newton_schulz` of float32 x, whatever precision the process allows its products."""
    with float32_products():
        return newton_schulz(x)


def allowed_update_error(x: Tensor) -> float:
    """Of an orthogonalised matrix like x: what the bfloat16 iteration of torch.optim.Muon leaves.

    Nothing is timed here that is further from float32 than what it replaces.
    """
    shipped = relative_error(newton_schulz(x.bfloat16()), exact_newton_schulz(x))
    return max(NEWTON_SCHULZ_FLOAT32, shipped)


def allowed_gram_error(decoded: Tensor, state_format: StateFormat) -> float:
    """Of X X^T beside float64, for a decoded X.

    A float32 sum of n products is off by n * 2^-24 of |X| |X|^T, of norm ||X||_F^2 at most; twice
    that for low-rank factors. Spectral formats are decoded by integer products with a matrix in two
    limbs, rounded by 2^-16 of a row's largest entry: sqrt(m) of them to the norm of a row, on both
    sides of the Gram matrix.
    """
    m, n = sorted(decoded.shape)
    x = decoded if decoded.shape[0] == m else decoded.mT
    size = float(x.square().sum() / (x @ x.mT).norm())
    limbs = 2 * math.sqrt(m) * 2.0**-16 if state_format.spectral else 0.0
    return 2 * n * 2.0**-24 * size + 2.0**-20 + limbs


def exact_update(
    momentum: Tensor, grad: Tensor, state_format: StateFormat, *, decay: float, nesterov: bool
) -> Tensor:
    """What a step takes from the weight at lr 1 and update scale 1, given the momentum before it.

    With `normalize` the gradient is divided by its norm and added to the decayed momentum
    (arXiv 2605.11396); else M <- decay*M + (1 - decay)*G, as in torch.optim.Muon.
    """
    weight = 1 / float(grad.norm()) if state_format.normalize else 1 - decay
    fresh = decay * momentum + weight * grad
    if nesterov:
        fresh = decay * fresh + weight * grad
    return exact_newton_schulz(fresh)
