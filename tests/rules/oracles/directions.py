"""Rules with a direction of their own, or a map before or behind the polar factor."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from oracles.base import Oracle
from oracles.maps import PROMOTE, SUPPRESS, equilibrate, newton_schulz, row_norm, soft_clip


@dataclass(kw_only=True, eq=False)
class PolarGrad(Oracle):
    """PolarGrad, momentum first (arXiv 2505.21799, polar_grad.py): M EMA, U = polar(M),
    W <- (1 - eta lambda) W - eta <M, U> U; <M, U> is the nuclear norm."""

    nesterov: bool = False
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        m = self.accumulate(grad)
        u = self.polar(m)
        return (m * u).sum() * u


@dataclass(kw_only=True, eq=False)
class PolarGradPolarFirst(PolarGrad):
    """PolarGrad, polar first (the same): U = polar(G), nu = <G, U>, M EMA of U, step eta nu M."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.polar(grad)
        return (grad * u).sum() * self.accumulate(u)


@dataclass(kw_only=True, eq=False)
class RMNP(Oracle):
    """RMNP (arXiv 2603.20527, rmnp/rmnp.py): O = rows of u of unit length; M sum, Nesterov."""

    form: str = "sum"
    eps: float = 1e-12

    def direction(self, grad: Tensor) -> Tensor:
        return row_norm(self.accumulate(grad), self.eps)


@dataclass(kw_only=True, eq=False)
class AuON(Oracle):
    """AuON (arXiv 2509.24320, auon/optimizer.py): u / (r + 1e-8) with
    r = sqrt(mean(cosh(gamma u / (||u|| + 1e-7))^2))."""

    lr: float = 0.24
    scale: str = "none"
    gamma: float = 1.5

    def direction(self, grad: Tensor) -> Tensor:
        return self.brake(self.accumulate(grad))

    def brake(self, x: Tensor) -> Tensor:
        cosh = (self.gamma * x / (x.norm() + 1e-7)).cosh()
        return x / (cosh.square().mean().sqrt() + 1e-8)


@dataclass(kw_only=True, eq=False)
class AuONHybrid(AuON):
    """Hybrid-AuON (the same): the brake on polar(u)."""

    def direction(self, grad: Tensor) -> Tensor:
        return self.brake(self.polar(self.accumulate(grad)))


@dataclass(kw_only=True, eq=False)
class Scion(Oracle):
    """Scion (arXiv 2502.07529, scion.py) of hidden matrices: M <- mu M + (1 - mu) G with mu =
    1 - alpha, W <- (1 - eta) W - eta rho sqrt(m/n) polar(M). Unconstrained: decay "decoupled"."""

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    scale: str = "spectral_unclamped"
    decay: str = "frank_wolfe"
    radius: float = 50.0

    def direction(self, grad: Tensor) -> Tensor:
        return self.radius * self.lmo(self.accumulate(grad))

    def lmo(self, m: Tensor) -> Tensor:
        return self.polar(m)


@dataclass(kw_only=True, eq=False)
class ScionSign(Scion):
    """Scion of the output matrix: sign(M) / n."""

    scale: str = "none"
    radius: float = 3000.0

    def lmo(self, m: Tensor) -> Tensor:
        return m.sign() / m.shape[1]


@dataclass(kw_only=True, eq=False)
class ScionCol(Scion):
    """Scion's ColNorm: columns divided by their root mean square + 1e-8. No radius was read."""

    scale: str = "none"
    radius: float = 1.0

    def lmo(self, m: Tensor) -> Tensor:
        return m / (m.square().mean(dim=0, keepdim=True).sqrt() + 1e-8)


@dataclass(kw_only=True, eq=False)
class Lion(Oracle):
    """Lion (arXiv 2302.06675): W <- W - eta (sign(beta1 M + (1 - beta1) G) + lambda W), then
    M <- beta2 M + (1 - beta2) G; beta1 is `momentum`."""

    lr: float = 1e-4
    momentum: float = 0.9
    beta2: float = 0.99
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        u = self.momentum * self.buffer + (1 - self.momentum) * grad
        self.buffer = self.beta2 * self.buffer + (1 - self.beta2) * grad
        return u.sign()


@dataclass(kw_only=True, eq=False)
class Signum(Oracle):
    """Signum (arXiv 1802.04434): W <- W - eta (sign(M) + lambda W). Published mu: 0.9 to 0.95."""

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        return self.accumulate(grad).sign()


@dataclass(kw_only=True, eq=False)
class MuonEq(Oracle):
    """MuonEq (arXiv 2603.28254): polar of u with "row", "column" or "both" norms made equal.

    Rows as in nanochat; of both, D_r^(-1/2) u D_c^(-1/2) with the squared norms of u itself, as
    the authors' code. Its defaults too: M sum, Nesterov, s = 0.2 sqrt(max), lambda 0.1.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    form: str = "sum"
    scale: str = "match_rms_adamw"
    axes: str = "row"

    def direction(self, grad: Tensor) -> Tensor:
        return self.polar(equilibrate(self.accumulate(grad), self.axes))


@dataclass(kw_only=True, eq=False)
class MuonPlus(Oracle):
    """Muon+ (arXiv 2602.21545): a normalisation after the map.

    `renorm` "frobenius": ||O|| := sqrt(min(m, n)), as nanochat has it. "row", "column",
    "row_column" or "column_row", in this order: x / sqrt(sum(x^2) + 1e-7) over each. That is what
    the authors' code (K1seki221/MuonPlus) does, with s = sqrt(m/n), eta 1e-3, lambda 0.1.
    """

    renorm: str = "frobenius"

    def direction(self, grad: Tensor) -> Tensor:
        o = self.polar(self.accumulate(grad))
        if self.renorm == "frobenius":
            return o * (math.sqrt(min(o.shape)) / o.norm().clamp_min(1e-6))
        for axis in self.renorm.split("_"):
            sums = o.square().sum(dim={"row": 1, "column": 0}[axis], keepdim=True)
            o = o / (sums + 1e-7).sqrt()
        return o


@dataclass(kw_only=True, eq=False)
class TurboMuon(Oracle):
    """thib-s/flash-newton-schulz: O = polar(D u), D_i = (sum_j |(u u^T)_ij|)^(-1/2), short side."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        u = u.mT if u.shape[0] > u.shape[1] else u
        u = u / (u @ u.mT).abs().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        return self.polar(u if u.shape == self.weight.shape else u.mT)


@dataclass(kw_only=True, eq=False)
class Pion(Oracle):
    """Pion, the spectral high-pass (arXiv 2605.19282): k steps of (1.875, -1.25, 0.375), then
    5 - k of (0, 2.5, -1.5), from M / ||M||; M sum, no Nesterov. k has no published default; `polar`
    is what k makes it."""

    k: int
    form: str = "sum"
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polar = newton_schulz([PROMOTE] * self.k + [SUPPRESS] * (5 - self.k), 5)


@dataclass(kw_only=True, eq=False)
class Spectra(Oracle):
    """SPECTRA (arXiv 2603.14315, spectra.py) over momentum: W <- (1 - eta lambda) W - s eta H_c(M),
    H_c taking singular values to s / sqrt(1 + s^2/c^2). Here M is an EMA without Nesterov."""

    lr: float = 1e-3
    nesterov: bool = False
    c: float = 10.0

    def direction(self, grad: Tensor) -> Tensor:
        return soft_clip(self.accumulate(grad), self.c)


@dataclass(kw_only=True, eq=False)
class CautiousMuon(Oracle):
    """C-Muon (arXiv 2411.16085, C-Optim): polar(u [M * G > 0] / mean[M * G > 0])."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        mask = (self.buffer * grad > 0).double()
        return self.polar(u * mask / mask.mean().clamp_min(1e-3))
