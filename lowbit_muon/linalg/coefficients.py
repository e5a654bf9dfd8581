"""Which odd quintic polynomials the iteration takes, and what is known of them beforehand."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype, is_real_number

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]

# Table 1 of arXiv 2505.16932 (minimax for singular values in [1e-3, 1]); the last line is the
# Newton-Schulz limit, which all further steps equal.
_POLAR_EXPRESS_EXACT: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The paper evaluates every polynomial but the last at x/1.01, so that rounding that pushes a
# singular value above one does not make it grow.
_SAFETY = 1.01

NS_COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # https://github.com/KellerJordan/Muon, the default of torch.optim.Muon
    "muon": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS_EXACT[:-1]),
        _POLAR_EXPRESS_EXACT[-1],
    ),
}


def resolve_coefficients(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each of `steps` steps.

    coefficients: a name in NS_COEFFICIENTS, one triple for every step, or a sequence of triples,
    of which the first `steps` are taken and the last repeats if there are fewer.
    Raises TypeError or ValueError naming the parameter.
    """
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if not 1 <= steps < 100:
        raise ValueError(f"steps: expected 1 to 99, got {steps}")
    triples = _triples(coefficients)[:steps]
    return triples + triples[-1:] * (steps - len(triples))


cached_coefficients = functools.lru_cache(maxsize=64)(resolve_coefficients)


def _triples(coefficients: Coefficients) -> tuple[Triple, ...]:
    if isinstance(coefficients, str):
        if coefficients not in NS_COEFFICIENTS:
            raise ValueError(
                f"coefficients: expected one of {sorted(NS_COEFFICIENTS)} or (a, b, c) or a "
                f"sequence of those, got {coefficients!r}"
            )
        return NS_COEFFICIENTS[coefficients]
    rows: Any = [coefficients] if _is_triple(coefficients) else coefficients
    if not isinstance(rows, Sequence) or not rows or not all(_is_triple(row) for row in rows):
        raise ValueError(
            "coefficients: expected (a, b, c) of finite numbers or a non-empty sequence of "
            f"those, got {coefficients!r}"
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 3
        and all(is_real_number(element) for element in value)
    )


@functools.lru_cache(maxsize=256)
def gram_is_precise(coefficients: tuple[Triple, ...], dtype: torch.dtype) -> bool:
    """Whether the Gram form in `dtype` is safe for these steps without a restart.

    Rounding gives R spurious eigenvalues of up to -eps where X has no direction at all. Each step
    multiplies them by a^2, and the iteration runs away once they near -1; R is not updated in the
    last step, so the growth is that of the others. Below 1/8 are six steps of either set in
    float32; the worst relative error found on steep and rank-deficient matrices of 64 to 512 rows
    is 1e-2 there, and 0.3 two steps later.
    """
    growth = math.prod(a * a for a, _, _ in coefficients[:-1])
    return growth * torch.finfo(dtype).eps <= 1 / 8


def composed_polynomial(eigenvalues: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """p_T(...p_1(s))/s with s = sqrt(eigenvalue), elementwise; finite at 0, where it is prod(a_t).

    eigenvalues: any shape and floating point dtype; those rounded below 0 count as 0. Computed in
    float64, returned in the dtype given.
    """
    square = eigenvalues.to(accumulation_dtype(eigenvalues.device)).clamp_min(0)
    value = torch.ones_like(square)
    for a, b, c in coefficients:
        factor = a + square * (b + square * c)
        value *= factor
        square = square * factor.square()
    return value.to(eigenvalues.dtype)


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
def gain_bounds(coefficients: tuple[Triple, ...]) -> tuple[float, float]:
    """(min p(s)/s, max |p(s)|) over singular values s in [0, 1]."""
    s = torch.linspace(0, 1, 4001, dtype=torch.float64, device="cpu")
    gain = composed_polynomial(s.square(), coefficients).abs()
    return float(gain.min()), float((gain * s).max())
