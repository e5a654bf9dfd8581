"""Orthogonalisation of a batch in half precision on the device, without waiting for it.

The Gram form of `newton_schulz` with restarts. In half precision R = X X^T is known to about eps of
its norm, and each step that it is followed through multiplies that error by a^2; so the steps are
split into runs that `gram_is_precise` allows, and X and R are computed anew after each:

    R = X X^T; Z = b R + c R^2; W <- a W + w Z + Z W, w <- a w; R <- a^2 R + 2 a R Z + R Z Z
    X <- w X + W X

Neither a I + Z nor w I + W is ever stored: a and w would take the bits of Z and W, which nearly
cancel them for large singular values. Products sum in float32 and round once.

A guard then looks at each result's norm. A matrix that has left the range a correct result can
have, or is not finite, is orthogonalised again in the standard form; the kernels of all others
return at once (`active`), so that nobody has to ask the device which they are.

`python -m bench.half_precision` emulates the products on a CPU. Five of Muon's steps, 128 x 192,
error against float64 relative to the result, float16 (bfloat16): 5e-3 (4e-2) for singular values
falling as 1/i and 1.1e-2 for equal ones, where the standard form in the same dtype has 3e-3
(2e-2) and 3e-3; of rank 8, where rounding of X gives it small singular values, both 3e-2 (3e-1).
Polar Express is harder on bfloat16: 8e-2 against 2e-2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.backends.base import DeviceBackend
from lowbit_muon.linalg.newton_schulz import Triple, composed_polynomial, gram_is_precise

# Beyond what rounding does to a norm (a few percent), far below what a divergent iteration does.
_GUARD_MARGIN = 1.25


def orthogonalize_batch(
    x: Tensor,  # float16 or bfloat16 [b, m, n], m <= n, contiguous
    norm: Tensor,  # float32 [b]
    coefficients: Sequence[Triple],
    backend: DeviceBackend,
    *,
    unit: float,
) -> Tensor:
    """U p(S) V^T of unit * x = U S V^T for each matrix, in x's dtype [b, m, n]; x is kept.

    norm: Frobenius norms of unit * x, at most one. unit lets entries of x be about one, where half
    precision is at its best.
    """
    result, scale = x, unit
    start = 0
    for length in restart_lengths(tuple(coefficients), x.dtype):
        run = coefficients[start : start + length]
        result = _run_of_steps(result, run, backend, scale)
        start, scale = start + length, 1.0
    low, high = _gain_bounds(tuple(coefficients))
    found = torch.linalg.vector_norm(result, dim=(1, 2), dtype=torch.float32)
    # (comparisons with NaN are false)
    good = found <= _GUARD_MARGIN * high * x.shape[1] ** 0.5
    good &= found * _GUARD_MARGIN >= low * norm
    standard_form(x, coefficients, backend, unit=unit, out=result, active=~good)
    return result


@functools.lru_cache(maxsize=64)
def restart_lengths(coefficients: tuple[Triple, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """How many steps each run takes: as many as `gram_is_precise` allows, and at least one."""
    lengths = []
    start = 0
    while start < len(coefficients):
        length = 1
        while start + length < len(coefficients) and gram_is_precise(
            coefficients[start : start + length + 1], dtype
        ):
            length += 1
        lengths.append(length)
        start += length
    return tuple(lengths)


@functools.lru_cache(maxsize=64)
def _gain_bounds(coefficients: tuple[Triple, ...]) -> tuple[float, float]:
    """(min p(s)/s, max |p(s)|) over singular values s in [0, 1]."""
    s = torch.linspace(0, 1, 4001, dtype=torch.float64, device="cpu")
    gain = composed_polynomial(s.square(), coefficients).abs()
    return float(gain.min()), float((gain * s).max())


def _run_of_steps(
    x: Tensor, coefficients: Sequence[Triple], backend: DeviceBackend, scale: float
) -> Tensor:
    """The steps of one run on scale * x."""
    r = backend.symmetric_product(x, alpha=scale * scale)
    w, w_diagonal = r, 1.0
    for step, (a, b, c) in enumerate(coefficients):
        z = backend.symmetric_product(r, r, addend=r, beta=b, alpha=c)
        if step + 1 < len(coefficients):
            rz = backend.symmetric_product(r, z)
            linear = torch.add(rz, r, alpha=a / 2)
            r = backend.symmetric_product(rz, z, addend=linear, beta=2 * a)
        if step == 0:
            w, w_diagonal = z, a
        else:
            linear = torch.add(w, z, alpha=w_diagonal / a)
            w = backend.symmetric_product(z, w, addend=linear, beta=a)
            w_diagonal *= a
    # the factor of x is rounded with the sum, once
    return backend.product(w, x, out=x.clone(), alpha=scale, beta=scale * w_diagonal)


def standard_form(
    x: Tensor,
    coefficients: Sequence[Triple],
    backend: DeviceBackend,
    *,
    unit: float,
    out: Tensor,
    active: Tensor,
) -> None:
    """X <- (a I + b A + c A^2) X, A = X X^T, into `out`, for the matrices that are active."""
    spare = torch.empty_like(x) if len(coefficients) > 1 else out
    gram = torch.empty(*x.shape[:2], x.shape[1], dtype=x.dtype, device=x.device)
    polynomial = torch.empty_like(gram)
    scale = unit
    for step, (a, b, c) in enumerate(coefficients):
        last = len(coefficients) - 1 - step
        target = out if last % 2 == 0 else spare
        backend.symmetric_product(x, alpha=scale * scale, out=gram, active=active)
        backend.symmetric_product(
            gram, gram, addend=gram, beta=b, alpha=c, out=polynomial, active=active
        )
        polynomial.diagonal(dim1=1, dim2=2).add_(a)
        x = backend.product(polynomial, x, out=target, alpha=scale, active=active)
        scale = 1.0
