"""What a gradient goes through before the momentum takes it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowbit_muon.step.rules.direction import exact_polar
from lowbit_muon.step.rules.stage import Stage


class GradientTransform(Stage):
    """The first stage."""

    @abstractmethod
    def apply(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """(what the momentum takes instead, factors of the learning rate, [b, 1, 1]).

        grads: finite, [b, rows, columns], any float dtype.
        """


@dataclass(frozen=True)
class PolarFactor(GradientTransform):
    """G <- polar(G), lr <- lr * ||G||_*: PolarGrad, polar first (arXiv 2505.21799).

    By a singular value decomposition in float64; a GPU's host waits for it.
    """

    kind: ClassVar[str] = "polar_factor"

    def apply(self, grads: Tensor) -> tuple[Tensor, Tensor]:
        """See `GradientTransform.apply`."""
        polar = exact_polar(grads.float())
        return polar, (polar * grads).sum(dim=(1, 2), keepdim=True)
