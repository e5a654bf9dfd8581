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
    """lr * rate * scale: `factor` times the scale of `adjust_lr_fn`, and the rate that stages made
    of the learning rate."""

    kind: ClassVar[str] = "shape"
    factor: float = 1.0

    def size(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> float | Tensor:
        """What the update is multiplied by: a number, or a tensor [b, 1, 1] or [b, 1, columns].

        update: [b, rows, columns]. scale: by the matrices' shape, with `factor` in it. weights:
        float32 [rows, columns] each, empty unless the stage `needs_weights`.
        """
        size = matrices.lr * scale
        return size if matrices.rate is None else matrices.rate * size


@dataclass(frozen=True)
class Bounded(StepSize):
    """lr * rate * scale within [lowest, highest] (NAMO: at most one; AdaGO: at least its epsilon).

    highest: 0 for no limit.
    """

    kind: ClassVar[str] = "bounded"
    needs_rate: ClassVar[bool] = True
    lowest: float = 0.0
    highest: float = 0.0

    def size(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> float | Tensor:
        """See `StepSize.size`."""
        size = super().size(update, scale, weights, matrices)
        highest = self.highest or math.inf
        if isinstance(size, Tensor):
            return size.clamp(min=self.lowest, max=highest)
        return min(max(size, self.lowest), highest)


@dataclass(frozen=True)
class BeforeDecay(StepSize):
    """W <- (1 - lr * weight_decay) (W - lr * rate * scale * O): the decay comes after the step."""

    kind: ClassVar[str] = "before_decay"
    needs_rate: ClassVar[bool] = True

    def size(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> float | Tensor:
        """See `StepSize.size`."""
        decay = 1 - matrices.lr * matrices.weight_decay
        return super().size(update, scale, weights, matrices) * decay


@dataclass(frozen=True)
class Fading(StepSize):
    """lr * rate * scale * (1 + decay * t)^-degree behind `warmup` steps, with t of them before.

    AngularMuown's angular step size (arXiv 2606.23637; its numbers are those of
    fhueb/angular-muown), which goes down while the gains' learning rate need not.
    """

    kind: ClassVar[str] = "fading"
    decay: float = 0.001
    degree: float = 1.0
    warmup: int = 0

    def size(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> float | Tensor:
        """See `StepSize.size`."""
        behind = (matrices.steps - 1 - self.warmup).clamp_min_(0)
        fading = behind.mul_(self.decay).add_(1).pow_(-self.degree)
        return fading * super().size(update, scale, weights, matrices)


@dataclass(frozen=True)
class RelativeToWeights(StepSize):
    """lr * ||W|| / ||O|| (MuonH: microsoft/ArchScale, arXiv 2603.28743); zeros stay zeros."""

    kind: ClassVar[str] = "relative"
    needs_weights: ClassVar[bool] = True

    def size(
        self, update: Tensor, scale: float, weights: list[Tensor], matrices: Matrices
    ) -> float | Tensor:
        """See `StepSize.size`."""
        sizes = torch.stack([torch.linalg.vector_norm(w) for w in weights]).view(-1, 1, 1)
        size = super().size(update, self.factor, weights, matrices)
        return sizes * size / norm(update).clamp_min_(TINY)
