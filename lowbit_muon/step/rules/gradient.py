"""What a gradient goes through before the momentum takes it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.direction import exact_polar
from lowbit_muon.step.rules.stage import TINY, Stage, check_bits, norm

_LARGEST_CODE = 127


class GradientTransform(Stage):
    """The first stage."""

    @abstractmethod
    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float
    ) -> tuple[Tensor, Tensor | None]:
        """(what the momentum takes instead, factors of the learning rate [b, 1, 1] or None).

        grads: finite, [b, rows, columns], any float dtype. state: what the stage keeps, [b, ..] by
        name; to be replaced, not changed. beta: the group's `momentum`.
        """


@dataclass(frozen=True)
class PolarFactor(GradientTransform):
    """G <- polar(G), lr <- lr * ||G||_*: PolarGrad, polar first (arXiv 2505.21799).

    By a singular value decomposition in float64; a GPU's host waits for it.
    """

    kind: ClassVar[str] = "polar_factor"

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        polar = exact_polar(grads.float())
        return polar, (polar * grads).sum(dim=(1, 2), keepdim=True)


@dataclass(frozen=True)
class VarianceReduction(GradientTransform):
    """C = G + gamma momentum / (1 - momentum) (G - G_before), G <- C / max(1, ||C||): MARS-M.

    AGI-Arena/MARS, MARS_M/optimizers/mars_m.py, in its approximate form: G_before is the gradient
    of the step before as it came, of its own batch, and zero in the first step.

    bits: 8 for G_before in whole numbers of a 127th of each row's largest element, so that it is
    known to 1/254 of that, of which gamma momentum / (1 - momentum), 0.475 usually, goes into C; 32
    for float32.
    """

    kind: ClassVar[str] = "variance_reduction"
    gamma: float = 0.025
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        check_bits(self.kind, self.bits)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        if self.bits == 32:
            return {"gradient_before": Kept(shape)}
        return {
            "gradient_before": Kept(shape, torch.int8),
            "gradient_before_scales": Kept((shape[0], 1)),
        }

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        grads = grads.float()
        before = state["gradient_before"].float()
        if self.bits == 8:
            before = before * state["gradient_before_scales"]
        c = torch.add(grads, grads - before, alpha=self.gamma * beta / (1 - beta))
        self._keep(grads, state)
        return c.div_(norm(c).clamp_min_(1.0)), None

    def _keep(self, grads: Tensor, state: dict[str, Tensor]) -> None:
        if self.bits == 32:
            state["gradient_before"] = grads
            return
        scales = torch.linalg.vector_norm(grads, ord=torch.inf, dim=2, keepdim=True)
        scales = scales.div_(_LARGEST_CODE)
        codes = (grads / scales.clamp_min(TINY)).round_()
        state["gradient_before"] = codes.to(torch.int8)
        state["gradient_before_scales"] = scales
