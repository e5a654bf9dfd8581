"""Momenta turned so that their polar factors keep the largest singular value of weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.linalg.coefficients import cached_coefficients
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.spectral import leading
from lowbit_muon.step.rules.stage import TINY, Matrices, norm


@dataclass(frozen=True)
class SpectralTangent(Preconditioner):
    """X <- X + l T with <T, polar(X + l T)> = 0, T = u v^T of W's largest singular value.

    The spectral sphere optimizer (arXiv 2601.08393). The left side rises with l, and its zero is
    within twice the nuclear norm of X, 2 sqrt(min(rows, columns)) or less: there it is bisected.
    Of a square matrix it jumps where X + l T is singular, unless the polar factor is that of
    Newton-Schulz steps, with a slope of some thousands.

    rounds: of bisection, each of which takes `steps` Newton-Schulz steps of Polar Express in
    float32, as the published code has eight; power_rounds: of power iteration.
    """

    kind: ClassVar[str] = "spectral_tangent"
    needs_weights: ClassVar[bool] = True
    rounds: int = 24
    steps: int = 8
    power_rounds: int = 16

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        tops = [leading(weight, self.power_rounds) for weight in matrices.weights]
        t = torch.stack([torch.outer(top.left, top.right) for top in tops])
        high = torch.full_like(norm(x), 2 * math.sqrt(min(matrices.shape)))
        low = -high
        for _ in range(self.rounds):
            middle = (low + high) / 2
            inner = (t * self._polar(torch.addcmul(x, t, middle))).sum(dim=(1, 2), keepdim=True)
            low = torch.where(inner < 0, middle, low)
            high = torch.where(inner < 0, high, middle)
        # (zeros stay zeros)
        return x.addcmul_(t, (low + high) / 2 * (norm(x) > 0))

    def _polar(self, x: Tensor) -> Tensor:
        x = x / norm(x).clamp_min_(TINY)
        wide = x if x.shape[1] <= x.shape[2] else x.mT
        for a, b, c in cached_coefficients("polar_express", self.steps):
            gram = wide @ wide.mT
            wide = a * wide + (b * gram + c * gram @ gram) @ wide
        return wide if x.shape[1] <= x.shape[2] else wide.mT
