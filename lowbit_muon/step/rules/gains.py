"""Weights as gains times directions: gains by Adam, directions by all other stages of a rule.

A parameter stays one tensor, the product. Gains, their moments and what else is needed to take it
apart again are state of the rule: float32 vectors, zeros until the first step.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.stage import Stage, expect

# Of fhueb/angular-muown: the smallest gain, and that of rows of zeros, which have no norm to start
# from: the row norm of torch's linear layers when they are made.
_SMALLEST_ROW_GAIN = 1e-7
_GAIN_OF_ZEROS = 0.33**0.5
# Of swiss-ai/Megatron-LM-MoE.
_SMALLEST_AXIS_GAIN = 1e-8


class Factors(NamedTuple):
    """W = rows * V * columns, float32 [b, rows, 1] and [b, 1, columns], or a one in their place."""

    rows: Tensor
    columns: Tensor

    def directions(self, weights: Tensor) -> Tensor:
        """V of weights [b, rows, columns]."""
        return weights / self.rows / self.columns


class GainRates(NamedTuple):
    """Options of the group, and how many steps the gains have taken, with this one: [b, 1, 1].

    lr may be a tensor on the device.
    """

    lr: float | Tensor
    weight_decay: float
    steps: Tensor


@dataclass(frozen=True)
class Gains(Stage):
    """W = gains times V: the chain rule before the momentum, the product after the constraint.

    All stages between take V for the weights, and the loss's gradient by V for the gradient. Gains
    are stepped by Adam, with `rate` times the group's learning rate; its weight decay is theirs,
    decoupled, as AdamW has it (`weight_decay.OfGains`), since V has a size of its own.
    """

    needs_weights: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    rate: float = 1.0

    @abstractmethod
    def split(
        self, weights: Tensor, grads: Tensor, state: dict[str, Tensor], rates: GainRates
    ) -> tuple[Tensor, Factors]:
        """(gradients by V, what W was divided by), and a step of the gains.

        weights, grads: by W, [b, rows, columns], float32 and any float dtype. state: what the stage
        keeps, [b, ..] by name; all of it is replaced by new tensors.
        """

    @abstractmethod
    def product(self, directions: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The weights of new V [rows, columns], which may be overwritten.

        state: of this matrix alone, as `split` left it; may be written to.
        """

    def _stepped(
        self,
        name: str,
        gains: Tensor,
        grads: Tensor,
        state: dict[str, Tensor],
        rates: GainRates,
        smallest: float,
    ) -> None:
        """state[name] <- gains after a step of AdamW, not nearer to zero than `smallest`."""
        first = torch.lerp(grads, state[f"{name}_mean"], self.beta1)
        second = torch.lerp(grads.square(), state[f"{name}_square"], self.beta2)
        state[f"{name}_mean"], state[f"{name}_square"] = first, second
        root = (second / (1 - torch.pow(self.beta2, rates.steps))).sqrt_().add_(self.eps)
        change = first / (1 - torch.pow(self.beta1, rates.steps)) / root
        lr = rates.lr * self.rate
        state[name] = away_from_zero(gains * (1 - lr * rates.weight_decay) - lr * change, smallest)


@dataclass(frozen=True)
class RowGains(Gains):
    """W = g V / ||V|| by rows: Muown (arXiv 2605.10797), and AngularMuown (arXiv 2606.23637).

    With unit rows U = V / ||V||, dg = <G, U>, and dV = g / ||V|| (G - U dg), which is tangent to
    the spheres of rows. Gains start at the rows' norms, so that V is W. A row of zeros starts to
    move with a gain of sqrt(0.33), as AngularMuown has it. Of weights that something else changes
    between steps the directions count, and their rows get the norms of their gains back.

    keeps_sizes: Muown's V, whose rows turn the less the longer they are; without it V has rows of
    norm one after each step, as AngularMuown's.
    """

    kind: ClassVar[str] = "row_gains"
    keeps_sizes: bool = True

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        names = ["row_gain", "row_gain_mean", "row_gain_square"]
        if self.keeps_sizes:
            names.append("row_size")
        return {name: Kept((shape[0], 1)) for name in names}

    def split(
        self, weights: Tensor, grads: Tensor, state: dict[str, Tensor], rates: GainRates
    ) -> tuple[Tensor, Factors]:
        """See `Gains.split`."""
        norms, one = (
            torch.linalg.vector_norm(weights, dim=2, keepdim=True),
            rates.steps.new_ones(()),
        )
        is_zero = norms <= _SMALLEST_ROW_GAIN
        start = norms.masked_fill(is_zero, _GAIN_OF_ZEROS)
        gains = _started(state["row_gain"], start)
        sizes = _started(state["row_size"], start) if self.keeps_sizes else one
        if self.keeps_sizes:
            state["row_size"] = sizes.clone()
        # (rounded weights have other norms than gains, and tangents need rows of norm one)
        norms = torch.copysign(torch.where(is_zero, gains, norms), gains)
        unit, grads = weights / norms, grads.float()
        by_gain = (grads * unit).sum(dim=2, keepdim=True)
        self._stepped("row_gain", gains, by_gain, state, rates, _SMALLEST_ROW_GAIN)
        by_direction = (grads - unit.mul_(by_gain)).mul_(gains / sizes)
        return by_direction, Factors(norms / sizes, one)

    def product(self, directions: Tensor, state: dict[str, Tensor]) -> Tensor:
        """See `Gains.product`."""
        sizes = torch.linalg.vector_norm(directions, dim=1, keepdim=True)
        sizes = sizes.clamp_min_(_SMALLEST_ROW_GAIN)
        if self.keeps_sizes:
            state["row_size"].copy_(sizes)
        return directions.mul_(state["row_gain"] / sizes)


@dataclass(frozen=True)
class AxisGains(Gains):
    """W = r V c, with gains of rows, of columns or of both: magnitude-direction decoupling.

    arXiv 2606.25971; swiss-ai/Megatron-LM-MoE, megatron/core/optimizer/md_decoupling.py: dr =
    sum(V G c) over columns, dc = sum(V G r) over rows, dV = G r c. Gains start at one. V is held to
    its sphere by the rule's constraint.

    axis: "row", "column" or "both".
    """

    kind: ClassVar[str] = "axis_gains"
    axis: str = "both"
    beta2: float = 0.999

    def check(self) -> None:
        """See `Stage.check`."""
        axes = ("row", "column", "both")
        expect(self.axis in axes, "axis_gains: axis", f"one of {axes}", self.axis)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        shapes = {"row": (shape[0], 1), "column": (1, shape[1])}
        return {
            f"{axis}_gain{suffix}": Kept(shapes[axis])
            for axis in self._axes
            for suffix in ("", "_mean", "_square")
        }

    @property
    def _axes(self) -> tuple[str, ...]:
        return ("row", "column") if self.axis == "both" else (self.axis,)

    def split(
        self, weights: Tensor, grads: Tensor, state: dict[str, Tensor], rates: GainRates
    ) -> tuple[Tensor, Factors]:
        """See `Gains.split`."""
        one = rates.steps.new_ones(())
        gains = {axis: _started(state[f"{axis}_gain"], one) for axis in self._axes}
        factors = Factors(gains.get("row", one), gains.get("column", one))
        grads = grads.float()
        common = factors.directions(weights).mul_(grads)
        for axis, across, other in (("row", 2, factors.columns), ("column", 1, factors.rows)):
            if axis in gains:
                by_gain = (common * other).sum(dim=across, keepdim=True)
                name = f"{axis}_gain"
                self._stepped(name, gains[axis], by_gain, state, rates, _SMALLEST_AXIS_GAIN)
        return grads * factors.rows * factors.columns, factors

    def product(self, directions: Tensor, state: dict[str, Tensor]) -> Tensor:
        """See `Gains.product`."""
        for axis in self._axes:
            directions = directions.mul_(state[f"{axis}_gain"])
        return directions


def away_from_zero(x: Tensor, smallest: float) -> Tensor:
    """x with its magnitude raised to `smallest` where it is less, and its sign."""
    return torch.copysign(x.abs().clamp_min_(smallest), x)


def _started(kept: Tensor, start: Tensor) -> Tensor:
    """What is kept, or where it starts: zeros were never stepped (`away_from_zero`)."""
    return torch.where(kept == 0, start, kept)
