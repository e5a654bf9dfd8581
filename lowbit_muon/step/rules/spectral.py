"""Largest singular values and odd polynomials of single matrices, without waiting for a device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_muon.step.rules.stage import TINY

# The golden ratio in units of 2^-32: its multiples modulo one are spread evenly.
_GOLDEN, _TURN = 0x9E3779B9, 1 << 32


class Leading(NamedTuple):
    """The largest singular value [], its left vector [rows] and its right one [columns]."""

    value: Tensor
    left: Tensor
    right: Tensor


def leading(x: Tensor, rounds: int) -> Leading:
    """By power iteration from a fixed vector, [rows, columns]; the value is never too large."""
    rows, columns = x.shape
    if rows > columns:
        value, left, right = leading(x.mT, rounds)
        return Leading(value, right, left)
    turns = torch.arange(1, rows + 1, device=x.device).mul_(_GOLDEN).remainder_(_TURN)
    u = turns.to(x.dtype).div_(_TURN).sub_(0.5)
    for _ in range(rounds):
        u = _unit(x @ (x.mT @ u))
    right = x.mT @ u
    return Leading(torch.linalg.vector_norm(right), u, _unit(right))


def odd_polynomial(x: Tensor, coefficients: Sequence[float | Tensor]) -> Tensor:
    """a X + b S X + c S^2 X + .. with S = X X^T: of singular values, a s + b s^3 + c s^5 + .."""
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    gram = wide @ wide.mT
    result = wide * coefficients[-1]
    for each in reversed(coefficients[:-1]):
        result = (gram @ result).add_(wide * each)
    return result if x.shape[0] <= x.shape[1] else result.mT


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x).clamp_min(TINY)
