"""Where weights are brought back to after a step."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lowbit_muon.step.rules.stage import TINY, Stage


class WeightStep(NamedTuple):
    """What a step did to weights: W_before * decay - change, with a change of norm `size` or less
    if O is a polar factor: the learning rate times its scale by the matrix's shape."""

    decay: float | Tensor
    size: float | Tensor


class Constraint(Stage):
    """The last stage: a retraction."""

    needs_weights: ClassVar[bool] = True

    @abstractmethod
    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """Where `new`, which may be overwritten, is brought, float32 [rows, columns].

        weight: the weights before the step, which `step` led to `new`.
        """


@dataclass(frozen=True)
class FrobeniusSphere(Constraint):
    """W <- W ||W_before|| / ||W||: the norm stays (MuonH, arXiv 2603.28743)."""

    kind: ClassVar[str] = "frobenius_sphere"

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        size = torch.linalg.vector_norm(new).clamp_min_(TINY)
        return new.mul_(torch.linalg.vector_norm(weight) / size)


@dataclass(frozen=True)
class RowSpheres(Constraint):
    """Every row keeps the norm that it had."""

    kind: ClassVar[str] = "row_spheres"

    def apply(self, new: Tensor, weight: Tensor, step: WeightStep) -> Tensor:
        """See `Constraint.apply`."""
        sizes = torch.linalg.vector_norm(new, dim=1, keepdim=True).clamp_min_(TINY)
        return new.mul_(torch.linalg.vector_norm(weight, dim=1, keepdim=True) / sizes)
