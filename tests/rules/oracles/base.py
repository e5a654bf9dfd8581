"""What all oracles share, and the rules that are only a choice of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from oracles.maps import Map, exact_polar


def shape_scale(name: str, shape: torch.Size) -> float:
    """The factor of the learning rate that depends on the shape."""
    rows, cols = shape
    return {
        "original": math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral_unclamped": math.sqrt(rows / cols),
        "megatron": math.sqrt(max(rows, cols)),
        "none": 1.0,
    }[name]


@dataclass(kw_only=True, eq=False)
class Oracle:
    """W <- decay(W) - eta s O with O = polar(u).

    Momentum: form "ema" M <- mu M + (1 - mu) G, or "sum" M <- mu M + G; u = (1 - mu) G + mu M or
    G + mu M with Nesterov, else M.

    Decay, with rate r = eta (times s if `scaled_decay`) unless the rule has its own:
    "decoupled" W (1 - lambda r); "per_column" the same with r a vector, never below 0;
    "cautious" W - lambda r W [step * W >= 0]; "cautious_lr2" the same with lambda eta r;
    "frank_wolfe" W (1 - eta).
    """

    weight: Tensor = field(kw_only=False)
    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    form: str = "ema"
    nesterov: bool = True
    scale: str = "original"
    decay: str = "decoupled"
    scaled_decay: bool = False
    polar: Map = exact_polar

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.buffer = torch.zeros_like(self.weight)
        self.steps = 0

    @property
    def factor(self) -> float:
        return shape_scale(self.scale, self.weight.shape)

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        step, rate = self.change(grad.double())
        self.weight = self.decayed(step, rate) - step

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        """What to take off the weight, and the decay's rate."""
        step = self.lr * self.factor * self.direction(grad)
        return step, self.lr * (self.factor if self.scaled_decay else 1.0)

    def direction(self, grad: Tensor) -> Tensor:
        return self.polar(self.accumulate(grad))

    def accumulate(self, grad: Tensor) -> Tensor:
        """Take the gradient into M; u."""
        gain = {"ema": 1 - self.momentum, "sum": 1.0}[self.form]
        self.buffer = self.momentum * self.buffer + gain * grad
        return gain * grad + self.momentum * self.buffer if self.nesterov else self.buffer

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        if self.decay == "frank_wolfe":
            return self.weight * (1 - self.lr)
        amount = self.weight_decay * torch.as_tensor(rate, dtype=torch.float64)
        if self.decay == "decoupled":
            return self.weight * (1 - amount)
        if self.decay == "per_column":
            return self.weight * (1 - amount).clamp_min(0)
        agrees = step * self.weight >= 0
        if self.decay == "cautious":
            return self.weight - amount * self.weight * agrees
        if self.decay == "cautious_lr2":
            return self.weight - self.lr * amount * self.weight * agrees
        raise ValueError(f"unknown decay: {self.decay}")


@dataclass(kw_only=True, eq=False)
class Muon(Oracle):
    """Muon (Keller Jordan's blog and code; torch.optim.Muon): the base as it is."""


@dataclass(kw_only=True, eq=False)
class Moonlight(Oracle):
    """Moonlight (arXiv 2502.16982; examples/toy_train.py): M sum, Nesterov, s = 0.2 sqrt(max)."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    form: str = "sum"
    scale: str = "match_rms_adamw"


@dataclass(kw_only=True, eq=False)
class MuonClip(Moonlight):
    """Kimi K2's Muon (arXiv 2507.20534) without QK-clip: M sum, no Nesterov, s = 0.2 sqrt(max).

    The learning rate is Moonlight's; the paper's belongs to its schedule.
    """

    nesterov: bool = False


@dataclass(kw_only=True, eq=False)
class DionMuon(Oracle):
    """Muon of the Dion repository (dion/muon.py): M sum, no Nesterov, s = sqrt(m/n)."""

    lr: float = 0.01
    weight_decay: float = 0.01
    form: str = "sum"
    nesterov: bool = False
    scale: str = "spectral_unclamped"
