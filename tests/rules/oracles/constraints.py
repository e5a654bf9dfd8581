"""Rules that bring the weights somewhere: onto a sphere, or below a largest singular value."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.base import Oracle
from oracles.maps import Map, exact_polar, power_iteration, soft_cap_coupling, spectral


@dataclass(kw_only=True, eq=False)
class MuonH(Oracle):
    """MuonH (arXiv 2603.28743, ArchScale): W' = W - eta ||W|| O / ||O||, W <- W' ||W|| / ||W'||.

    No weight decay and no shape scale. (ArchScale's defaults: M sum, no Nesterov.)
    """

    scale: str = "none"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay:
            raise ValueError("the norm is fixed: no weight decay")

    def step(self, grad: Tensor) -> None:
        radius = self.weight.norm()
        super().step(grad)
        self.weight = self.weight * (radius / self.weight.norm().clamp_min(self.eps))

    def direction(self, grad: Tensor) -> Tensor:
        o = super().direction(grad)
        return o * (self.weight.norm() / o.norm().clamp_min(self.eps))


@dataclass(kw_only=True, eq=False)
class Lipschitz(Oracle):
    """Muon with weights of singular values below w_max (arXiv 2507.13338, modula/atom.py).

    The published projections start power iteration at random, and assume weights that are within
    reach; further ones are divided by their largest singular value first (`within`)."""

    w_max: float = 1.0

    def step(self, grad: Tensor) -> None:
        super().step(grad)
        self.weight = self.project(self.weight)

    @abstractmethod
    def project(self, w: Tensor) -> Tensor: ...

    def within(self, w: Tensor, limit: float) -> Tensor:
        return w / max(1.0, float(power_iteration(w)[0]) / limit)


@dataclass(kw_only=True, eq=False)
class SpectralBall(Lipschitz):
    """ "Spectral normalize": W / max(1, s_1 / w_max)."""

    def project(self, w: Tensor) -> Tensor:
        return self.within(w, self.w_max)


@dataclass(kw_only=True, eq=False)
class SpectralHammer(Lipschitz):
    """W + (w_max - s_1) u_1 v_1^T."""

    def project(self, w: Tensor) -> Tensor:
        s, u, v = power_iteration(w)
        return w + (self.w_max - s) * torch.outer(u, v)


@dataclass(kw_only=True, eq=False)
class SoftCap(Lipschitz):
    """W (I - a W^T W), then W (I + a W^T W) with a by k = w_max (1 - eta lambda) + 1.145 * 1.05
    eta s."""

    def project(self, w: Tensor) -> Tensor:
        k = self.w_max * (1 - self.lr * self.weight_decay) + 1.145 * 1.05 * self.lr * self.factor
        a = soft_cap_coupling(k, self.w_max)
        w = spectral(self.within(w, k), lambda s: s - a * s**3)
        return w + a * w @ w.mT @ w


@dataclass(kw_only=True, eq=False)
class HardCap(Lipschitz):
    """Four odd polynomials, about min(s, w_max)."""

    def project(self, w: Tensor) -> Tensor:
        def polynomial(s: Tensor) -> Tensor:
            for a, b, c in (
                (0.805032, 0.206361, -0.019763),
                (0.649867, 0.162935, -0.011150),
                (1.810259, -0.200265, 0.008251),
                (1.004384, -0.183490, 0.014413),
            ):
                s = a * s + b * s**3 + c * s**5
            return s

        return self.w_max * spectral(self.within(w / self.w_max, 3.0), polynomial)


@dataclass(kw_only=True, eq=False)
class SpectralDecay(Oracle):
    """W - eta lambda s_1 u_1 v_1^T - eta s O (arXiv 2507.13338, where it has no eta)."""

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        s, u, v = power_iteration(self.weight)
        return self.weight - self.lr * self.weight_decay * s * torch.outer(u, v)


@dataclass(kw_only=True, eq=False)
class MuonBall(Oracle):
    """MuonBall (arXiv 2601.08393): W R / s_1(W) - eta R polar(u), R = sqrt(m/n)."""

    scale: str = "spectral_unclamped"

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        return self.weight * self.factor / power_iteration(self.weight)[0].clamp_min(1e-30)


@dataclass(kw_only=True, eq=False)
class SpectralSphere(MuonBall):
    """The spectral sphere optimizer (arXiv 2601.08393): polar(u / ||u|| + l T) with T = u_1 v_1^T
    of W and <T, polar(u / ||u|| + l T)> = 0 by bisection; zero for u = 0. `inner` is the polar
    factor of the bisection, as exact as the other one unless it is given: of square matrices the
    exact one jumps where u / ||u|| + l T is singular."""

    inner: Map = exact_polar

    def direction(self, grad: Tensor) -> Tensor:
        x = self.accumulate(grad)
        if not x.any():
            return x
        x = x / x.norm()
        _, left, right = power_iteration(self.weight)
        t = torch.outer(left, right)
        low, high = -2 * math.sqrt(min(x.shape)), 2 * math.sqrt(min(x.shape))
        for _ in range(60):
            middle = (low + high) / 2
            if float((t * self.inner(x + middle * t)).sum()) < 0:
                low = middle
            else:
                high = middle
        return self.polar(x + (low + high) / 2 * t)
