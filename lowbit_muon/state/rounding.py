"""Updates of half-precision weights that do not lose what is below the weights' last bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.state.operands import SCRATCH_FLOATS

# Bits of the significand, the hidden one included, and the exponent of the smallest subnormal: the
# spacing of all subnormals.
_SIGNIFICAND = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
# A remainder counts 256ths of the spacing of its weight, so that the largest, 127, is less than
# half of it, and weight + remainder rounds to the weight again.
_PARTS = 256


@dataclass(frozen=True)
class Compensation:
    """Keeps what rounding to nearest left over of each weight, and adds it before the next update.

    A bfloat16 weight then has 16 significant bits and a float16 weight 19, for a byte an element.
    Compensated summation (Kahan, 1965), with its correction in 8 bits.
    """

    remainder: Tensor  # int8 [m, n], the short side first

    @staticmethod
    def applies_to(weight: Tensor) -> bool:
        """Whether rounding loses anything of such a weight's updates."""
        return weight.dtype in _SIGNIFICAND

    def rows(self, rows: slice) -> Compensation:
        """Of these rows of the weight."""
        return Compensation(self.remainder[rows])

    def update(
        self, weight: Tensor, update: Tensor, decay: float | Tensor, step_size: float | Tensor
    ) -> None:
        """weight + remainder <- decay * (weight + remainder) - step_size * update.

        weight, update: any float dtype [m, n], the short side first; the numbers may be tensors on
        their device.
        """
        remainder = self.remainder
        height = max(1, SCRATCH_FLOATS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            value = restore(weight[rows], remainder[rows])
            # (in half precision the product would lose what the remainder is for)
            value.mul_(decay).sub_(update[rows].float() * step_size)
            split(value, weight[rows], remainder[rows])

    def scale(self, weight: Tensor, factors: Tensor) -> None:
        """weight + remainder <- (weight + remainder) * factors; a factor of one changes no bit.

        weight: [m, n], in any order of its sides that is the remainder's, too; factors: float32,
        of a size that broadcasts to it.
        """
        factors = factors.expand(weight.shape)
        height = max(1, SCRATCH_FLOATS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            value = restore(weight[rows], self.remainder[rows]).mul_(factors[rows])
            split(value, weight[rows], self.remainder[rows])


# How a new weight is rounded, if not to the nearest: stochastically, with a seed, int32 of one
# element, or with what was left over.
Rounding = Tensor | Compensation


def update_weight(
    weight: Tensor,
    update: Tensor,
    decay: float | Tensor,
    step_size: float | Tensor,
    rounding: Rounding | None,
    backend: Backend,
    *,
    cautious: bool = False,
) -> None:
    """weight <- decay * weight - step_size * update, rounded once.

    cautious: decay only where weight * update >= 0; of weights that are `updated_by_kernels`.
    weight: any float dtype [m, n], the short side first; update: float32 or half precision; the
    numbers: one element each, on the weight's device, if they are tensors.
    """
    if isinstance(rounding, Compensation):
        rounding.update(weight, update, decay, step_size)
    elif not updated_by_kernels(weight, rounding):
        weight.mul_(decay).sub_(update.double() * step_size)
    else:
        backend.update_weight(
            weight,
            update,
            decay=_as_tensor(decay, weight),
            step_size=_as_tensor(step_size, weight),
            seed=rounding,
            cautious=cautious,
        )


def updated_by_kernels(weight: Tensor, rounding: Rounding | None) -> bool:
    """Whether `Backend.update_weight` updates such weights: not float64, nor with remainders."""
    return weight.dtype != torch.float64 and not isinstance(rounding, Compensation)


def _as_tensor(value: float | Tensor, weight: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float32, device=weight.device)


def rounding_seed(seed: int, parameter: int, matrix: int) -> int:
    """Where the seeds of a matrix's stochastic rounding start: different for each matrix.

    Odd constants of MurmurHash3 and xxHash spread neighbouring numbers.
    """
    return (seed * 0x85EBCA6B + parameter * 0xC2B2AE35 + matrix * 0x27D4EB2F) & 0x7FFFFFFF


def seed_of_step(start: int | Tensor, step: int | Tensor) -> Any:
    """The seed of a matrix in this step, below 2**31; ints or int64 tensors."""
    return (start + step * 0x9E3779B1) & 0x7FFFFFFF


def spacing(weight: Tensor) -> Tensor:
    """Distance from each weight to the next larger one in magnitude; float32."""
    bits, smallest = _SIGNIFICAND[weight.dtype]
    exponent = torch.frexp(weight.float()).exponent
    exponent = (exponent - bits).clamp_(min=smallest).masked_fill_(weight == 0, smallest)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def restore(weight: Tensor, remainder: Tensor) -> Tensor:
    """weight + remainder, float32, without rounding."""
    return remainder.float().mul_(spacing(weight)).div_(_PARTS).add_(weight)


def exact_weight(weight: Tensor, rounding: Rounding | None) -> Tensor:
    """A weight in float32, with what rounding left over of it; [m, n], the short side first."""
    if isinstance(rounding, Compensation):
        return restore(weight, rounding.remainder)
    return weight.float()


def split(value: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write float32 values as weights and remainders; `restore` gives them back, rounded.

    What is not finite in the weights' dtype has no remainder.
    """
    weight.copy_(value)
    parts = (value - weight).mul_(_PARTS).div_(spacing(weight))
    parts.nan_to_num_(0.0, 0.0, 0.0)
    remainder.copy_(parts.round_().clamp_(-127, 127))
