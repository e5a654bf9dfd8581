"""How far weights move along an update: by the learning rate, a matrix's shape, or its weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.step.rules.stage import TINY, Matrices, Stage, norm


@dataclass(frozen=True)
class StepSize(Stage):
    """change = lr * rate * scale * O: `factor` times the scale of `adjust_lr_fn`, and the rate that
    stages made of the learning rate."""

    kind: ClassVar[str] = "shape"
    factor: float = 1.0

    def apply(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> Tensor:
        """What is subtracted from the weights, [b, rows, columns]; the update may be overwritten.

        scale: by the matrices' shape, with `factor` in it; weights: float32 [rows, columns] each,
        empty unless the stage `needs_weights`.
        """
        return update.mul_(self._factor(scale, matrices))

    def _factor(self, scale: float, matrices: Matrices) -> Tensor | float:
        factor = matrices.lr * scale
        return factor if matrices.rate is None else matrices.rate * factor


@dataclass(frozen=True)
class Bounded(StepSize):
    """lr * rate * scale within [lowest, highest] (NAMO: at most one; AdaGO: at least its epsilon).

    highest: 0 for no limit.
    """

    kind: ClassVar[str] = "bounded"
    needs_rate: ClassVar[bool] = True
    lowest: float = 0.0
    highest: float = 0.0

    def apply(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> Tensor:
        """See `StepSize.apply`."""
        factor = torch.as_tensor(
            self._factor(scale, matrices), dtype=torch.float32, device=update.device
        )
        most = self.highest or math.inf
        return update.mul_(factor.clamp(min=self.lowest, max=most))


@dataclass(frozen=True)
class RelativeToWeights(StepSize):
    """change = lr * ||W|| * O / ||O|| (MuonH: microsoft/ArchScale, arXiv 2603.28743)."""

    kind: ClassVar[str] = "relative"
    needs_weights: ClassVar[bool] = True

    def apply(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> Tensor:
        """See `StepSize.apply`."""
        sizes = torch.stack([torch.linalg.vector_norm(w) for w in weights]).view(-1, 1, 1)
        factor = self._factor(1.0, matrices) * sizes
        return update.mul_(factor / norm(update).clamp_min_(TINY))
