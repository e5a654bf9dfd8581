"""Float64 references of rules whose weights are gains times directions; see `oracles`.

Gains and directions are variables here, and the weight is their product; the library keeps the
product and takes it apart in each step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.base import Oracle


class Adam:
    """AdamW of one tensor: m, v averages of gradients and squares, both divided by 1 - beta^t."""

    def __init__(self, beta1: float, beta2: float, eps: float) -> None:
        self.beta1, self.beta2, self.eps, self.t = beta1, beta2, eps, 0
        self.m: Tensor | float = 0.0
        self.v: Tensor | float = 0.0

    def step(self, x: Tensor, grad: Tensor, lr: float, weight_decay: float) -> Tensor:
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad**2
        m, v = self.m / (1 - self.beta1**self.t), self.v / (1 - self.beta2**self.t)
        return x * (1 - lr * weight_decay) - lr * m / (v.sqrt() + self.eps)


def floored(x: Tensor, least: float) -> Tensor:
    """Not nearer to zero than `least`, on its own side."""
    return torch.where(x < 0, -1.0, 1.0) * x.abs().clamp_min(least)


@dataclass(kw_only=True, eq=False)
class Muown(Oracle):
    """Muown (arXiv 2605.10797; kcc-lion/muown, EO contrib/muown.py): W = g V / ||V|| by rows,
    U = V / ||V||, dg = <G, U>, dV = g / ||V|| (G - U dg), V <- V - eta s polar(u of dV),
    g by Adam(.9, .95, 1e-8) with eta and the weight decay. g and V start at ||W|| and W.

    Rows of zeros are AngularMuown's: g starts at sqrt(0.33), and no norm is below 1e-7.
    """

    lr: float = 3e-4
    scale: str = "match_rms_adamw"
    least: float = 1e-7

    def __post_init__(self) -> None:
        super().__post_init__()
        norms = self.weight.norm(dim=1, keepdim=True)
        self.g = torch.where(norms <= self.least, math.sqrt(0.33), norms)
        self.v = self.started(self.weight)
        self.sizes = self.g.clone()
        self.adam = Adam(0.9, 0.95, 1e-8)

    def started(self, weight: Tensor) -> Tensor:
        return weight.clone()

    def step(self, grad: Tensor) -> None:
        grad = grad.double()
        unit = self.v / self.sizes
        by_gain = (grad * unit).sum(dim=1, keepdim=True)
        by_direction = self.g / self.sizes * (grad - unit * by_gain)
        eta = self.lr * self.fading()
        self.v = self.v - eta * self.factor * self.direction(by_direction)
        self.sizes = self.v.norm(dim=1, keepdim=True).clamp_min(self.least)
        new = self.adam.step(self.g, by_gain, self.lr, self.weight_decay)
        self.g = floored(new, self.least)
        self.weight = self.g * self.v / self.sizes
        self.steps += 1
        self.retract()

    def fading(self) -> float:
        return 1.0

    def retract(self) -> None:
        """What becomes of V then."""


@dataclass(kw_only=True, eq=False)
class AngularMuown(Muown):
    """AngularMuown (arXiv 2606.23637; fhueb/angular-muown): V has unit rows before and after each
    step, M is a sum, and eta of V alone is divided by 1 + 0.001 t after t steps."""

    lr: float = 1e-2
    form: str = "sum"
    scale: str = "original"
    decay_scale: float = 0.001
    decay_degree: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sizes = torch.ones_like(self.g)

    def started(self, weight: Tensor) -> Tensor:
        return weight / self.g

    def fading(self) -> float:
        return float((1 + self.decay_scale * self.steps) ** -self.decay_degree)

    def retract(self) -> None:
        self.v = self.v / self.sizes
        self.sizes = torch.ones_like(self.sizes)


@dataclass(kw_only=True, eq=False)
class MagnitudeDirection(Oracle):
    """Magnitude-direction decoupling (arXiv 2606.25971; swiss-ai/Megatron-LM-MoE,
    md_decoupling.py), with direct gains: W = r V c, dr = sum_columns(V G c), dc = sum_rows(V G r),
    dV = G r c; V <- V - eta ||V|| polar(u) / ||polar(u)||, brought back to its norm ("flat"); gains
    by Adam(.9, .999, 1e-8), from one on.

    The norm is that of the weight at the start, as with the code's init radius.
    """

    weight_decay: float = 0.0
    axes: tuple[str, ...] = ("row", "column")
    gain_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.weight.shape
        self.v, self.norm = self.weight.clone(), self.weight.norm()
        self.r, self.c = (torch.ones(s, dtype=torch.float64) for s in ((rows, 1), (1, columns)))
        self.adams = [Adam(0.9, 0.999, 1e-8), Adam(0.9, 0.999, 1e-8)]

    def step(self, grad: Tensor) -> None:
        grad = grad.double()
        of_rows = (self.v * grad * self.c).sum(dim=1, keepdim=True)
        of_columns = (self.v * grad * self.r).sum(dim=0, keepdim=True)
        o = self.direction(grad * self.r * self.c)
        moved = self.v - self.lr * self.norm * o / o.norm().clamp_min(1e-30)
        self.v = moved * (self.norm / moved.norm().clamp_min(1e-30))
        told = self.lr * self.gain_rate, self.weight_decay
        if "row" in self.axes:
            self.r = floored(self.adams[0].step(self.r, of_rows, *told), 1e-8)
        if "column" in self.axes:
            self.c = floored(self.adams[1].step(self.c, of_columns, *told), 1e-8)
        self.weight = self.r * self.v * self.c


def md_rows(weight: Tensor, **parameters: object) -> Oracle:
    return MagnitudeDirection(weight, axes=("row",), **parameters)  # type: ignore[arg-type]


def md_columns(weight: Tensor, **parameters: object) -> Oracle:
    return MagnitudeDirection(weight, axes=("column",), **parameters)  # type: ignore[arg-type]


GAINS: dict[str, Callable[..., Oracle]] = {
    "muown": Muown,
    "angular_muown": AngularMuown,
    "md_rows": md_rows,
    "md_columns": md_columns,
    "md_decoupling": MagnitudeDirection,
}
