"""Weights kept within a ball, or on a sphere, of the spectral norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.step.rules.constraint import Constraint, WeightStep
from lowbit_muon.step.rules.spectral import leading, odd_polynomial
from lowbit_muon.step.rules.stage import TINY, expect

# Of power iteration, as published.
_ROUNDS = 16
_HARD_CAP = (
    (0.805032, 0.206361, -0.019763),
    (0.649867, 0.162935, -0.011150),
    (1.810259, -0.200265, 0.008251),
    (1.004384, -0.183490, 0.014413),
)


@dataclass(frozen=True)
class SpectralSphere(Constraint):
    """W <- radius / s W_before - change, with s the largest singular value of W_before: MuonBall.

    radius: times sqrt(rows / columns). The weights before the step are brought to the sphere, so
    that those behind it are as far off as the step is large, as in the spectral sphere optimizer
    (arXiv 2601.08393), of which MuonBall is the case of no multiplier. Weight decay has no place.
    """

    kind: ClassVar[str] = "spectral_sphere"
    radius: float = 1.0
    rounds: int = _ROUNDS

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.radius > 0, "spectral_sphere: radius", "a number > 0", self.radius)

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        rows, columns = weight.shape
        value = leading(weight, self.rounds).value.clamp_min(TINY)
        factor = self.radius * math.sqrt(rows / columns) / value
        return new.add_(weight * (factor - step.decay))


@dataclass(frozen=True)
class _Limited(Constraint):
    """Singular values are held to `limit`, the largest found by `rounds` of power iteration."""

    limit: float = 1.0
    rounds: int = _ROUNDS

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.limit > 0, f"{self.kind}: limit", "a number > 0", self.limit)


@dataclass(frozen=True)
class SpectralBall(_Limited):
    """W <- W / max(1, s / limit), with s its largest singular value.

    "Spectral normalize" of Arongil/lipschitz-transformers, modula/atom.py (arXiv 2507.13338), by as
    many rounds of power iteration, which there start at random in each step; alike for the others.
    """

    kind: ClassVar[str] = "spectral_ball"

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        return _within(new, self.limit, self.rounds)


@dataclass(frozen=True)
class SpectralHammer(_Limited):
    """W <- W + (limit - s) u v^T: the largest singular value is set to `limit`, also a smaller one.

    arXiv 2507.13338 (see `SpectralBall`).
    """

    kind: ClassVar[str] = "spectral_hammer"

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        value, left, right = leading(new, self.rounds)
        return new.add_(torch.outer(left, right) * (self.limit - value))


@dataclass(frozen=True)
class SoftCap(_Limited):
    """W <- W - a W W^T W, then W <- W + a W W^T W: singular values stay below `limit`.

    arXiv 2507.13338 (see `SpectralBall`). a is such that k, which they are below before, comes to
    the limit: k = limit (1 - lr weight_decay) + growth * lr * scale, where a polar factor by Muon's
    Newton-Schulz steps is at most 1.145, and 1.05 of that where bfloat16 computes it. Weights that
    start above k are divided first.
    """

    kind: ClassVar[str] = "soft_cap"
    growth: float = 1.145 * 1.05

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        most = step.decay * self.limit + step.size * self.growth
        strength = soft_cap_strength(most, self.limit)
        new = _within(new, most, self.rounds)
        return odd_polynomial(odd_polynomial(new, (1.0, -strength)), (1.0, strength))


def soft_cap_strength(most: float | Tensor, limit: float) -> float | Tensor:
    """a such that k = `most` comes to `limit`: k - a k^3 + a (k - a k^3)^3 = limit; 0 if it is.

    With x = a k^2 that is 3 x^2 - 3 x^3 + x^4 = 1 - limit / k, whose left side rises from 0 to 1.
    """
    excess = 1 - limit / most
    excess = excess.clamp_min(0) if isinstance(excess, Tensor) else max(excess, 0.0)
    x = (excess / 3) ** 0.5
    for _ in range(8):  # of Newton's method, from below: below 1e-6 for any excess up to 0.999
        x = x - (x * x * (3 - x * (3 - x)) - excess) / (x * (6 - x * (9 - 4 * x)) + TINY)
    return x / (most * most)


@dataclass(frozen=True)
class HardCap(_Limited):
    """W <- limit p(W / limit): four odd polynomials of degree five, together about min(1, s).

    arXiv 2507.13338 (see `SpectralBall`). p(s) is within 5 % of it up to 3.4, and 1.011 at most;
    weights above 3 limits are divided first.
    """

    kind: ClassVar[str] = "hard_cap"

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        x = _within(new.div_(self.limit), 3.0, self.rounds)
        for coefficients in _HARD_CAP:
            x = odd_polynomial(x, coefficients)
        return x.mul_(self.limit)


def _within(x: Tensor, limit: float | Tensor, rounds: int) -> Tensor:
    return x.div_((leading(x, rounds).value / limit).clamp_min_(1.0))
