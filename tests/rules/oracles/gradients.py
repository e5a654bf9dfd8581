"""Rules that change a gradient before the momentum takes it, or take a part of the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.base import Oracle


@dataclass(kw_only=True, eq=False)
class MarsM(Oracle):
    """MARS-M (AGI-Arena/MARS, mars_m.py): C = G + gamma mu / (1 - mu) (G - G_before) with G_before
    zero at first, C / max(1, ||C||) into M, no Nesterov, s = 0.2 sqrt(max)."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    nesterov: bool = False
    scale: str = "match_rms_adamw"
    gamma: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        self.before = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        c = grad + self.gamma * self.momentum / (1 - self.momentum) * (grad - self.before)
        self.before = grad
        return super().direction(c / max(1.0, float(c.norm())))


@dataclass(kw_only=True, eq=False)
class NewtonMuon(Oracle):
    """Newton-Muon (arXiv 2604.01472; zhehangdu/Newton-Muon): G (K + (ridge tr(K) / n + eps) I)^-1
    into Muon's M, with K <- b K + (1 - b) X^T X / (rows of X), 0.001 I at first, in each step that
    `read` has given inputs X before."""

    b: float = 0.95
    ridge: float = 0.2
    initial: float = 1e-3
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        n = self.weight.shape[1]
        self.k = self.initial * torch.eye(n, dtype=torch.float64)

    def read(self, x: Tensor) -> None:
        x = x.double()
        self.k = self.b * self.k + (1 - self.b) * x.T @ x / len(x)

    def direction(self, grad: Tensor) -> Tensor:
        n = len(self.k)
        ridge = self.ridge * self.k.trace() / n + self.eps
        inverse = torch.linalg.inv(self.k + ridge * torch.eye(n, dtype=torch.float64))
        return super().direction(grad @ inverse)


@dataclass(kw_only=True, eq=False)
class Dion2(Oracle):
    """Dion2 (arXiv 2512.16928, dion/dion2.py): M <- M + G; of the rows, or columns of a tall
    matrix, the share `fraction` of the largest L1 norms moves by polar(M_selected), s = sqrt(m/n);
    M_selected <- mu M_selected."""

    lr: float = 0.01
    weight_decay: float = 0.01
    scale: str = "spectral_unclamped"
    fraction: float = 0.25

    def direction(self, grad: Tensor) -> Tensor:
        self.buffer = self.buffer + grad
        wide = self.weight.shape[0] <= self.weight.shape[1]
        m = self.buffer if wide else self.buffer.mT
        k = max(1, math.ceil(self.fraction * m.shape[0]))
        chosen = m.abs().sum(dim=1).argsort(descending=True)[:k]
        o = torch.zeros_like(m)
        o[chosen] = self.polar(m[chosen])
        m[chosen] *= self.momentum
        return o if wide else o.mT


@dataclass(kw_only=True, eq=False)
class NorDion2(Dion2):
    """NorDion2 (dion/nordion2.py): Dion2 by rows of any matrix, with NorMuon's v of those that are
    chosen: v <- beta2 v + (1 - beta2) mean(O^2), O / (sqrt(v) + eps), of the norm of O."""

    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros(self.weight.shape[0], 1, dtype=torch.float64)

    def direction(self, grad: Tensor) -> Tensor:
        self.buffer = self.buffer + grad
        k = max(1, math.ceil(self.fraction * self.buffer.shape[0]))
        chosen = self.buffer.abs().sum(dim=1).argsort(descending=True)[:k]
        o = self.polar(self.buffer[chosen])
        self.buffer[chosen] *= self.momentum
        mean = o.square().mean(dim=1, keepdim=True)
        self.v[chosen] = self.beta2 * self.v[chosen] + (1 - self.beta2) * mean
        scaled = o / (self.v[chosen].sqrt() + self.eps)
        update = torch.zeros_like(self.weight)
        update[chosen] = scaled * (o.norm() / (scaled.norm() + self.eps))
        return update
