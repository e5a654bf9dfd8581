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
_QUINTIC: tuple[Triple, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
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
    # NVIDIA-NeMo/Emerging-Optimizers, "quintic"
    "quintic": _QUINTIC,
    # four steps from a start by rows (`AlmostOrthogonal`): thib-s/flash-newton-schulz
    "turbo": _QUINTIC[1:],
    # CANS, as Emerging-Optimizers has it
    "cans": (
        (8.4703, -25.1081, 18.6293),
        (4.1828, -3.1087, 0.5806),
        (3.9619, -2.9541, 0.5630),
        (3.2866, -2.4647, 0.5074),
        (2.2737, -1.6447, 0.4162),
    ),
    # Emerging-Optimizers, "aol". It changes the sign of singular values above 0.884, where the
    # largest of a momentum in training lie, by norm or from that start: a step goes uphill.
    "aol": (
        (4.0098, -7.0585, 2.4635),
        (3.4585, -5.5479, 2.5959),
        (2.7573, -3.2939, 1.4254),
        (2.7215, -3.0494, 1.3169),
    ),
    # ten steps: eight of Muon's, then two that converge
    "deepseekv4": ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2,
    # third order (arXiv 2606.00371)
    "cubic5": (
        (3.3656576, -3.3420992, 0.0),
        (2.5744352, -1.4957376, 0.0),
        (2.5368962, -1.4312570, 0.0),
        (2.4418906, -1.2764040, 0.0),
        (2.2230472, -0.9630650, 0.0),
    ),
    # Arongil/lipschitz-transformers, six steps (arXiv 2507.13338)
    "lipschitz": tuple(
        (a / 1024, b / 1024, c / 1024)
        for a, b, c in (
            (3955, -8306, 5008),
            (3735, -6681, 3463),
            (3799, -6499, 3211),
            (4019, -6385, 2906),
            (2677, -3029, 1162),
            (2172, -1833, 682),
        )
    ),
    # twelve steps or so come close to the polar factor, but for small singular values
    "converging": ((2.0, -1.5, 0.5),),
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

    Nor may the first step take a large singular value to a small one, where those that follow are
    steep, so that what rounding adds to R there is lifted.
    """
    if _dips(coefficients[0]) and len(coefficients) > 1:
        return False
    growth = math.prod(a * a for a, _, _ in coefficients[:-1])
    return growth * torch.finfo(dtype).eps <= 1 / 8


def _dips(triple: Triple) -> bool:
    """Whether a step takes singular values of one half and more below a tenth."""
    a, b, c = triple
    values = (s * (a + s * s * (b + s * s * c)) for s in (0.5 + 0.01 * i for i in range(51)))
    return any(abs(value) < 0.1 for value in values)


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
