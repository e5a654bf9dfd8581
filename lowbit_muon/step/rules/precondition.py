"""What a momentum goes through before the direction map."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import RuleState
from lowbit_muon.step.rules.moments import averaged, moment_state
from lowbit_muon.step.rules.stage import TINY, Matrices, Stage, expect, norm

_SMALLEST_ROW = 1e-6  # of nanochat's equilibration, relative to the matrix's norm here
_FEWEST_AGREEING = 1e-3


class Preconditioner(Stage):
    """A stage before the direction map.

    to_norm_one: whether its result is divided by its Frobenius norm, as Newton-Schulz needs it
    unless singular values are below one anyway.
    """

    to_norm_one: ClassVar[bool] = True

    @abstractmethod
    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """x, float32 [b, rows, columns] of norm one, which may be overwritten; any norm then."""


@dataclass(frozen=True)
class Equilibrate(Preconditioner):
    """Rows, columns or both brought to one norm.

    axis: "row": X_i <- X_i (||X|| / sqrt(rows)) / ||X_i|| (nanochat's optim.py; MuonEq, arXiv
    2603.28254); "column" alike; "both": rows, then columns. Rows below 1e-6 of the whole stay so
    much smaller.
    """

    kind: ClassVar[str] = "equilibrate"
    axis: str = "row"

    def check(self) -> None:
        """See `Stage.check`."""
        axes = ("row", "column", "both")
        expect(self.axis in axes, "equilibrate: axis", f"one of {axes}", self.axis)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        for axis, across in (("row", 2), ("column", 1)):
            if self.axis in (axis, "both"):
                sizes = torch.linalg.vector_norm(x, dim=across, keepdim=True)
                x = x.div_(sizes.clamp_min_(_SMALLEST_ROW))
        return x


@dataclass(frozen=True)
class Sign(Preconditioner):
    """The signs of all elements (AdaMuon, arXiv 2507.11005)."""

    kind: ClassVar[str] = "sign"

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        return x.sign_()


@dataclass(frozen=True)
class Agreeing(Preconditioner):
    """Only what has the gradient's sign: X <- X [X G > 0] (C-Muon, arXiv 2411.16085).

    There it is divided by the share of those, which changes no direction; here as well, for rules
    that look at sizes.
    """

    kind: ClassVar[str] = "agreeing"

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        mask = (x.sign() * matrices.grads.sign() > 0).to(x.dtype)
        return x.mul_(mask).div_(mask.mean(dim=(1, 2), keepdim=True).clamp_min_(_FEWEST_AGREEING))


@dataclass(frozen=True)
class AlmostOrthogonal(Preconditioner):
    """X_i <- X_i / sqrt(sum_j |(X X^T)_ij|) along the short side: singular values of at most one.

    The start of Turbo-Muon in place of the Frobenius norm (thib-s/flash-newton-schulz), from which
    four steps are enough; it changes the polar factor, too.
    """

    kind: ClassVar[str] = "almost_orthogonal"
    to_norm_one: ClassVar[bool] = False

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        rows, columns = matrices.shape
        short = x if rows <= columns else x.mT
        sums = (short @ short.mT).abs_().sum(dim=2, keepdim=True)
        short.div_(sums.sqrt_().clamp_min_(TINY))
        return x


@dataclass(frozen=True)
class SecondMoment(Preconditioner):
    """V <- beta V + (1 - beta) G^2, X <- X / (sqrt(V) + eps): Muon^2 (arXiv 2604.09967).

    modded-nanogpt, records/track_3_optimization/results/20260501_muonsq. Elements whose gradients
    were all zero have no direction: there a momentum that is stored in few bits holds nothing but
    its noise, which would be divided by eps.

    bits: of each element of V: 8 for logarithmic codes (`step.rules.moments`), or 32.
    """

    kind: ClassVar[str] = "second_moment"
    beta: float = 0.95
    eps: float = 1e-10
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return moment_state("second_moment", shape, self.bits)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        squares = matrices.grads.float().square()
        v = averaged(matrices, "second_moment", squares, self.beta, self.bits)
        # (squares of small gradients are zero too)
        unseen = (v == 0) & (matrices.grads == 0)
        return x.div_(v.sqrt().add_(self.eps)).masked_fill_(unseen, 0.0)


@dataclass(frozen=True)
class SelectedRows(Preconditioner):
    """Zeros but for the rows, or columns, that `RowFeedback` selected."""

    kind: ClassVar[str] = "selected_rows"
    reads_state: ClassVar[tuple[str, ...]] = ("selected",)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        return x.mul_(matrices.state["selected"])


def to_norm_one(x: Tensor) -> Tensor:
    """Matrices divided by their norms, in place; zeros stay."""
    return x.div_(norm(x).clamp_min_(TINY))
