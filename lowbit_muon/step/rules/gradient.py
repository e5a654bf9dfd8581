"""What a gradient goes through before the momentum takes it."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.direction import exact_polar
from lowbit_muon.step.rules.stage import TINY, Stage, expect, norm

_LARGEST_CODE = 127


class GradientTransform(Stage):
    """The first stage.

    needs_stored: it looks at the momentum as it is stored.
    """

    needs_stored: ClassVar[bool] = False

    @abstractmethod
    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(what the momentum takes instead, factors of the learning rate [b, 1, 1] or None).

        grads: finite, [b, rows, columns], any float dtype. state: what the stage keeps, [b, ..] by
        name; to be replaced, not changed. beta: the group's `momentum`. momentum: as it is stored,
        float32 [b, rows, columns], where it `needs_stored`.
        """


@dataclass(frozen=True)
class PolarFactor(GradientTransform):
    """G <- polar(G), lr <- lr * ||G||_*: PolarGrad, polar first (arXiv 2505.21799).

    By a singular value decomposition in float64; a GPU's host waits for it.
    """

    kind: ClassVar[str] = "polar_factor"

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        polar = exact_polar(grads.float())
        return polar, (polar * grads).sum(dim=(1, 2), keepdim=True)


@dataclass(frozen=True)
class VarianceReduction(GradientTransform):
    """C = G + gamma momentum / (1 - momentum) (G - G_before), G <- C / max(1, ||C||): MARS-M.

    AGI-Arena/MARS, MARS_M/optimizers/mars_m.py, in its approximate form: G_before is the gradient
    of the step before as it came, of its own batch, and zero in the first step.

    bits: 8 for G_before in whole numbers of a 127th of the largest element of its row, or of its
    column where that is smaller, so that it is known to 1/254 of that, of which gamma momentum /
    (1 - momentum), 0.475 usually, goes into C; 32 for float32. Of gradients of few tokens, whose
    rank is low, Newton-Schulz lifts that error where they have no direction of their own.
    """

    kind: ClassVar[str] = "variance_reduction"
    gamma: float = 0.025
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        if self.bits == 32:
            return {"gradient_before": Kept(shape)}
        return {
            "gradient_before": Kept(shape, torch.int8),
            "gradient_before_row_scales": Kept((shape[0], 1)),
            "gradient_before_column_scales": Kept((1, shape[1])),
        }

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        grads = grads.float()
        before = state["gradient_before"].float()
        if self.bits == 8:
            rows, columns = (state[f"gradient_before_{axis}_scales"] for axis in ("row", "column"))
            before = before * torch.minimum(rows, columns)
        c = torch.add(grads, grads - before, alpha=self.gamma * beta / (1 - beta))
        self._keep(grads, state)
        return c.div_(norm(c).clamp_min_(1.0)), None

    def _keep(self, grads: Tensor, state: dict[str, Tensor]) -> None:
        if self.bits == 32:
            state["gradient_before"] = grads
            return
        rows, columns = (
            torch.linalg.vector_norm(grads, ord=torch.inf, dim=across, keepdim=True) / _LARGEST_CODE
            for across in (2, 1)
        )
        codes = (grads / torch.minimum(rows, columns).clamp_min_(TINY)).round_()
        state["gradient_before"] = codes.to(torch.int8)
        state["gradient_before_row_scales"] = rows
        state["gradient_before_column_scales"] = columns


@dataclass(frozen=True)
class RowFeedback(GradientTransform):
    """G <- G - (1 - momentum) M in the rows that the step before selected: Dion2's error feedback.

    With `FeedbackMomentum` selected rows M <- momentum M, before they take a gradient, and others
    keep all. Then the share `fraction` of rows of the largest sums of magnitudes is selected, for
    `SelectedRows` (microsoft/dion, dion/dion2.py; arXiv 2512.16928).

    axis: "short" for columns of a tall matrix in the place of rows, as Dion2 has it; "row" for rows
    of any, as NorDion2 has it (dion/nordion2.py).
    """

    kind: ClassVar[str] = "row_feedback"
    needs_stored: ClassVar[bool] = True
    needs_size: ClassVar[bool] = True
    fraction: float = 0.25
    axis: str = "short"

    def check(self) -> None:
        """See `Stage.check`."""
        axes = ("short", "row")
        expect(self.axis in axes, "row_feedback: axis", f"one of {axes}", self.axis)
        good = 0 < self.fraction <= 1
        expect(good, "row_feedback: fraction", "a number in (0, 1]", self.fraction)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        rows, columns = shape
        by_row = self.axis == "row" or rows <= columns
        return {"selected": Kept((rows, 1) if by_row else (1, columns), torch.uint8)}

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        assert momentum is not None
        taken_off = momentum * (state["selected"].float() * (1 - beta))
        change = grads.float() - taken_off
        along = 1 if self.axis == "row" or grads.shape[1] <= grads.shape[2] else 2
        sizes = torch.linalg.vector_norm(momentum + change, ord=1, dim=3 - along, keepdim=True)
        count = max(1, math.ceil(self.fraction * sizes.shape[along]))
        largest = sizes.topk(count, dim=along).indices
        selected = torch.zeros_like(state["selected"])
        state["selected"] = selected.scatter_(along, largest, 1)
        return change, None
