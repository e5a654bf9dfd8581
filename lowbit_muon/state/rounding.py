"""Updates of half-precision weights that do not lose what is below the weights' last bit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends.reference_device import DeviceReferenceBackend
from lowbit_muon.state.rows import SCRATCH_FLOATS
from lowbit_muon.state.stored import orient

# Bits of the significand, the hidden one included, and the exponent of the smallest subnormal: the
# spacing of all subnormals.
_SIGNIFICAND = {torch.bfloat16: (8, -133), torch.float16: (11, -24)}
# A remainder counts 256ths of the spacing of its weight, so that the largest, 127, is less than
# half of it, and weight + remainder rounds to the weight again.
_PARTS = 256


@dataclass(frozen=True)
class StochasticRounding:
    """Rounds bfloat16 weights up or down with bits that depend on the seed."""

    seed: int

    def update(self, weight: Tensor, update: Tensor, decay: float, step_size: float) -> None:
        """weight [m, n] <- decay * weight - step_size * update, rounded once."""

        def scalar(value: float, dtype: torch.dtype) -> Tensor:
            return torch.tensor(value, dtype=dtype, device=weight.device)

        DeviceReferenceBackend().update_weight(
            weight,
            update,
            decay=scalar(decay, torch.float32),
            step_size=scalar(step_size, torch.float32),
            seed=scalar(self.seed, torch.int32),
        )


@dataclass(frozen=True)
class Compensation:
    """Keeps what rounding to nearest left over of each weight, and adds it before the next update.

    A bfloat16 weight then has 16 significant bits and a float16 weight 19, for a byte an element.
    Compensated summation (Kahan, 1965), with its correction in 8 bits.
    """

    remainder: Tensor  # int8 [rows, columns]

    @staticmethod
    def applies_to(weight: Tensor) -> bool:
        """Whether rounding loses anything of such a weight's updates."""
        return weight.dtype in _SIGNIFICAND

    def update(
        self, weight: Tensor, update: Tensor, decay: float | Tensor, step_size: float | Tensor
    ) -> None:
        """weight + remainder <- decay * (weight + remainder) - step_size * update.

        weight, update: [m, n], the short side first; the numbers may be tensors on their device.
        """
        remainder = orient(self.remainder)
        height = max(1, SCRATCH_FLOATS // max(1, weight.shape[1]))
        for start in range(0, weight.shape[0], height):
            rows = slice(start, start + height)
            value = restore(weight[rows], remainder[rows])
            value.mul_(decay).sub_(update[rows] * step_size)
            split(value, weight[rows], remainder[rows])


def spacing(weight: Tensor) -> Tensor:
    """Distance from each weight to the next larger one in magnitude; float32."""
    bits, smallest = _SIGNIFICAND[weight.dtype]
    exponent = torch.frexp(weight.float()).exponent
    exponent = (exponent - bits).clamp_(min=smallest).masked_fill_(weight == 0, smallest)
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def restore(weight: Tensor, remainder: Tensor) -> Tensor:
    """weight + remainder, float32, without rounding."""
    return remainder.float().mul_(spacing(weight)).div_(_PARTS).add_(weight)


def split(value: Tensor, weight: Tensor, remainder: Tensor) -> None:
    """Write float32 values as weights and remainders; `restore` gives them back, rounded.

    What is not finite in the weights' dtype has no remainder.
    """
    weight.copy_(value)
    parts = (value - weight).mul_(_PARTS).div_(spacing(weight))
    parts.nan_to_num_(0.0, 0.0, 0.0)
    remainder.copy_(parts.round_().clamp_(-127, 127))
