"""Rules that divide by second moments, of rows, elements or the whole gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.base import Oracle
from oracles.maps import equilibrate


@dataclass(kw_only=True, eq=False)
class NorMuon(Oracle):
    """NorMuon (arXiv 2510.05491, zichongli5/NorMuon):

    v <- beta2 v + (1 - beta2) mean(O^2) along each row; O / (sqrt(v) + eps), scaled back to ||O||
    ("keep"), or to 0.2 sqrt(mn) ("match_rms", the paper's algorithm, to be used with scale "none").
    `axis`: one v a "row", a "column", or a vector of the "long" or "short" side (rows if square).
    """

    beta2: float = 0.95
    eps: float = 1e-10
    axis: str = "row"
    norm: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, cols = self.weight.shape
        axis = {
            "long": "row" if rows >= cols else "column",
            "short": "column" if rows > cols else "row",
        }.get(self.axis, self.axis)
        self.mean_over = {"row": 1, "column": 0}[axis]
        self.v: Tensor = torch.zeros(())

    def direction(self, grad: Tensor) -> Tensor:
        return self.normalize(self.polar(self.accumulate(grad)))

    def normalize(self, o: Tensor) -> Tensor:
        mean = o.square().mean(dim=self.mean_over, keepdim=True)
        self.v = self.beta2 * self.v + (1 - self.beta2) * mean
        scaled = o * self.inverse_root(self.v)
        target = o.norm() if self.norm == "keep" else 0.2 * math.sqrt(o.numel())
        return scaled * (target / (scaled.norm() + self.eps))

    def inverse_root(self, v: Tensor) -> Tensor:
        return 1 / (v.sqrt() + self.eps)


@dataclass(kw_only=True, eq=False)
class NorMuonPaper(NorMuon):
    """NorMuon as in the paper's algorithm: the last step has the norm 0.2 eta sqrt(mn)."""

    scale: str = "none"
    norm: str = "match_rms"


@dataclass(kw_only=True, eq=False)
class NorMuonSpeedrun(NorMuon):
    """NorMuon of modded-nanogpt: v on the long side, beta2 0.9, O max(v, 1e-10)^(-1/2), ||O|| kept;
    W <- W - eta s O - lambda eta (eta s) W [O * W >= 0]: the decay takes one eta with the shape's
    scale and one without."""

    lr: float = 0.023
    weight_decay: float = 1.2
    beta2: float = 0.9
    axis: str = "long"
    decay: str = "cautious_lr2"
    scaled_decay: bool = True

    def inverse_root(self, v: Tensor) -> Tensor:
        return v.clamp_min(self.eps).rsqrt()


@dataclass(kw_only=True, eq=False)
class Nanochat(NorMuonSpeedrun):
    """nanochat's Muon (nanochat/optim.py): u with rows of equal norm, O = polar(u) scaled to
    ||O|| = sqrt(min(m, n)), NorMuon on the long side, cautious decay at the rate eta s lambda."""

    lr: float = 0.02
    weight_decay: float = 0.28
    decay: str = "cautious"

    def direction(self, grad: Tensor) -> Tensor:
        o = self.polar(equilibrate(self.accumulate(grad), "row"))
        return self.normalize(o * (math.sqrt(min(o.shape)) / o.norm().clamp_min(1e-6)))


@dataclass(kw_only=True, eq=False)
class AdaMuon(Oracle):
    """AdaMuon (arXiv 2507.11005, official code): O = polar(sign(u)); V <- beta V + (1 - beta) O^2
    by elements, beta = mu unless beta2 is given; O / (sqrt(V) + eps), scaled to the norm
    0.2 sqrt(mn). Without `sign` it is the variant of several packages."""

    weight_decay: float = 0.01
    scale: str = "none"
    sign: bool = True
    beta2: float | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        o = self.polar(u.sign() if self.sign else u)
        beta2 = self.momentum if self.beta2 is None else self.beta2
        self.v = beta2 * self.v + (1 - beta2) * o.square()
        o = o / (self.v.sqrt() + self.eps)
        return o * (0.2 * math.sqrt(o.numel()) / (o.norm() + self.eps))


@dataclass(kw_only=True, eq=False)
class Muon2(Oracle):
    """Muon^2 (arXiv 2604.09967, modded-nanogpt's track 3): V <- beta2 V + (1 - beta2) G^2 by
    elements, polar(u / (sqrt(V) + eps))."""

    beta2: float = 0.95
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad.square()
        return self.polar(u / (self.v.sqrt() + self.eps))


@dataclass(kw_only=True, eq=False)
class Namo(Oracle):
    """NAMO (arXiv 2602.17080, src/namo.py): v <- mu2 v + (1 - mu2) ||G||^2,
    alpha = eta sqrt(1 - mu2^t) / (1 - mu^t + 1e-12) ||u|| / (sqrt(v) + eps),
    W <- W (1 - lambda min(alpha, 1)) - min(1, alpha s) polar(u), s = 0.2 sqrt(max)."""

    lr: float = 0.01
    weight_decay: float = 0.1
    mu2: float = 0.99
    eps: float = 1e-8
    scale: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v: Tensor = torch.zeros(())

    def alpha(self, grad: Tensor, u: Tensor) -> Tensor:
        """The adaptive learning rate; a vector [1, n] of columns in NAMO-D."""
        self.v = self.mu2 * self.v + (1 - self.mu2) * self.norms(grad).square()
        ratio = self.clamped(self.norms(u) / (self.v.sqrt() + self.eps))
        corrected = math.sqrt(1 - self.mu2**self.steps) / (1 - self.momentum**self.steps + 1e-12)
        return self.lr * corrected * ratio

    def norms(self, x: Tensor) -> Tensor:
        return x.norm()

    def clamped(self, ratio: Tensor) -> Tensor:
        return ratio

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        u = self.accumulate(grad)
        alpha = self.alpha(grad, u)
        return (alpha * self.factor).clamp_max(1) * self.polar(u), alpha.clamp_max(1)


@dataclass(kw_only=True, eq=False)
class NamoD(Namo):
    """NAMO-D (the same): V_j and s_j = ||u_j|| / (sqrt(V_j) + eps) of each column, s clamped to
    [c mean(s), mean(s)/c]; every column has its own alpha_j, step and decay."""

    c: float = 0.75
    decay: str = "per_column"

    def norms(self, x: Tensor) -> Tensor:
        return x.norm(dim=0, keepdim=True)

    def clamped(self, ratio: Tensor) -> Tensor:
        mean = float(ratio.mean())
        return ratio.clamp(self.c * mean, mean / self.c) if mean > 0 else ratio


@dataclass(kw_only=True, eq=False)
class AdaGO(Oracle):
    """AdaGO (arXiv 2509.02981): v^2 <- v^2 + min(||G||^2, gamma^2),
    W <- ... - s max(eps, eta min(||G||, gamma) / v) polar(M), no Nesterov.

    The defaults, v^2 at the start among them, are pytorch-optimizer's (which divides by v^2).
    """

    lr: float = 0.05
    nesterov: bool = False
    gamma: float = 10.0
    eps: float = 5e-4
    initial: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v2 = self.initial

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        norm = min(float(grad.norm()), self.gamma)
        self.v2 += norm**2
        size = max(self.eps, self.lr * norm / math.sqrt(self.v2))
        return self.factor * size * self.direction(grad), self.lr
