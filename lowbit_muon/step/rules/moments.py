"""Averages of squares, one an element, in 32 bits or in logarithmic codes of 8 bits.

Code c stands for s 2^(-(255 - c) STEP), c = 1 .. 255, where s is the smaller of two scales, one of
the element's row and one of its column: their largest averages, but for rounding. Code 0 stands for
zero, which is what an element has whose squares were all zero so far. What is positive stays
positive: below the smallest code, 2^-16 of s, it is that code. Above it one rounding is wrong by at
most half a step, a factor of 2^(STEP / 2) = 1.022 of the average, and 1.011 of its root, which is
what stages divide by.

An average moves by less than half a step where one square changes it by less than 2.2 %: with a
beta of 0.95 as long as the square is within 0.57 and 1.44 of the average, with 0.99 whenever it is
below 3.2 of it, so that an average could rise but never fall (from -log2(beta) <= STEP / 2, that
is beta >= 0.979, on). Therefore the codes of each step have another origin: scales are whole
numbers of steps above a phase of 0 to 1 steps, which only depends on the number of the step.
Differences between the phases of consecutive steps are those of turns by the golden ratio, the most
even sequence that there is, so that the roundings of an element add up to almost nothing: what is
added to an average in many steps, each time less than half a code, arrives.

The error that stays is that of the roundings of the last 1 / (1 - beta) steps. Independent ones,
uniform within half a step, of weights beta^k, would leave a standard deviation of
STEP ln(2) / sqrt(12 (1 - beta^2)) in the average's logarithm: 4.0 % with 0.95, 8.9 % with 0.99, and
half as much in the root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.stage import Matrices

OCTAVES = 16
# Between codes, in octaves.
STEP = OCTAVES / 254
# Scales are not smaller: 2^-16 of it is still a normal number.
_SMALLEST_SCALE = 1e-33
# Half the golden ratio in units of 2^-32: t^2 times it differs by odd multiples of it.
_HALF_GOLDEN = 0x4F1BBCDC
_TURN = 1 << 32


def moment_state(name: str, shape: tuple[int, int], bits: int) -> RuleState:
    """What is kept of averages [rows, columns]."""
    if bits == 32:
        return {name: Kept(shape)}
    rows, columns = _scale_names(name)
    return {
        name: Kept(shape, torch.uint8),
        rows: Kept((shape[0], 1)),
        columns: Kept((1, shape[1])),
    }


def averaged(matrices: Matrices, name: str, squares: Tensor, beta: float, bits: int) -> Tensor:
    """v <- beta v + (1 - beta) squares, kept in so many bits; v before it is, to be read only."""
    if bits == 32:
        return matrices.averaged(name, squares, beta)
    state, (rows, columns) = matrices.state, _scale_names(name)
    v = torch.lerp(squares, decoded(state[name], state[rows], state[columns]), beta)
    state[name], state[rows], state[columns] = encoded(v, matrices.steps)
    return v


def encoded(v: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8, scales of rows [b, rows, 1] and of columns [b, 1, columns]) of averages >= 0.

    v: float32 [b, rows, columns]. steps: the number of the step, [b, 1, 1].
    """
    origin = phase(steps)
    rows = _scales(v.amax(dim=2, keepdim=True), origin)
    columns = _scales(v.amax(dim=1, keepdim=True), origin)
    # -inf for zeros, and nan in rows and columns of them
    codes = (v / torch.minimum(rows, columns)).log2_().div_(STEP).add_(255).round_().clamp_(1, 255)
    return codes.masked_fill_(v == 0, 0).to(torch.uint8), rows, columns


def decoded(codes: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Inverse of `encoded`, float32."""
    v = (codes.float() - 255).mul_(STEP).exp2_().mul_(torch.minimum(rows, columns))
    return v.masked_fill_(codes == 0, 0.0)


def phase(steps: Tensor) -> Tensor:
    """t^2 times half the golden ratio modulo one, float32, by whole numbers that wrap around."""
    turns = (steps.long().square() * _HALF_GOLDEN) % _TURN
    return turns.float() / _TURN


def _scales(largest: Tensor, origin: Tensor) -> Tensor:
    """The next power of 2^STEP, from that of `origin` on; zeros for zeros."""
    places = largest.clamp_min(_SMALLEST_SCALE).log2_().div_(STEP).sub_(origin).ceil_()
    return places.add_(origin).mul_(STEP).exp2_().mul_(largest > 0)


def _scale_names(name: str) -> tuple[str, str]:
    return f"{name}_row_scales", f"{name}_column_scales"
