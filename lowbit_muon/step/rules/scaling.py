"""What a direction is scaled by: second moments, signal over noise, norms."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.moments import averaged, moment_state
from lowbit_muon.step.rules.stage import (
    AXES,
    TINY,
    Matrices,
    Stage,
    dimension,
    expect,
    norm,
    times,
)


class Scaling(Stage):
    """A stage behind the direction map.

    takes_half: it reads an update in half precision, as Newton-Schulz leaves it on devices, without
    a float32 copy.
    """

    takes_half: ClassVar[bool] = False

    @abstractmethod
    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """The update, float32 [b, rows, columns], scaled; it may be overwritten."""


@dataclass(frozen=True)
class VectorMoment(Scaling):
    """v <- beta v + (1 - beta) mean(O^2), O <- O / (sqrt(v) + eps), then ||O|| as it was.

    NorMuon (arXiv 2510.05491; its beta_2 is `beta`). axis: "row": a value for each row, as
    published; "long": for each row or column, whichever there are more of, as modded-nanogpt and
    nanochat have it (with beta 0.9): the polar factor of a wide matrix has rows of norm one anyway.
    """

    kind: ClassVar[str] = "vector_moment"
    takes_half: ClassVar[bool] = True
    axis: str = "row"
    beta: float = 0.95
    eps: float = 1e-10

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.axis in AXES, "vector_moment: axis", f"one of {AXES}", self.axis)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        along = dimension(self.axis, shape)
        return {"vector_moment": Kept((shape[0], 1) if along == 1 else (1, shape[1]))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        across = 3 - dimension(self.axis, matrices.shape)
        count = max(1, matrices.shape[across - 1])
        sizes = torch.linalg.vector_norm(update, dim=across, keepdim=True, dtype=torch.float32)
        squares = sizes.square_()
        v = matrices.averaged("vector_moment", squares / count, self.beta)
        factors = v.sqrt().add_(self.eps).reciprocal_()
        # ||O|| before and after by the vector alone
        before = squares.sum(dim=(1, 2), keepdim=True)
        after = (squares * factors * factors).sum(dim=(1, 2), keepdim=True)
        return times(update, factors * (before / after.clamp_min_(TINY)).sqrt_())


@dataclass(frozen=True)
class SelectedVectorMoment(Scaling):
    """`VectorMoment` of the rows that `RowFeedback` selected; the others' v stays.

    NorDion2 (microsoft/dion, dion/nordion2.py).
    """

    kind: ClassVar[str] = "selected_vector_moment"
    reads_state: ClassVar[tuple[str, ...]] = ("selected",)
    beta: float = 0.95
    eps: float = 1e-8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return {"vector_moment": Kept((shape[0], 1))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        selected = matrices.state["selected"] > 0
        squares = torch.linalg.vector_norm(update, dim=2, keepdim=True).square_()
        old, mean = matrices.state["vector_moment"], squares / max(1, matrices.shape[1])
        v = torch.where(selected, torch.lerp(mean, old, self.beta), old)
        matrices.state["vector_moment"] = v
        factors = (v.sqrt() + self.eps).reciprocal_()
        before = squares.sum(dim=(1, 2), keepdim=True)
        after = (squares * factors * factors).sum(dim=(1, 2), keepdim=True)
        return update.mul_(factors * (before / after.clamp_min_(TINY)).sqrt_())


@dataclass(frozen=True)
class ElementMoment(Scaling):
    """V <- beta V + (1 - beta) O^2, O <- O / (sqrt(V) + eps): AdaMuon (arXiv 2507.11005).

    bits: of each element of V: 8 for logarithmic codes (`step.rules.moments`), or 32.
    """

    kind: ClassVar[str] = "element_moment"
    beta: float = 0.95
    eps: float = 1e-8
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return moment_state("element_moment", shape, self.bits)

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        v = averaged(matrices, "element_moment", update.square(), self.beta, self.bits)
        return update.div_(v.sqrt().add_(self.eps))


@dataclass(frozen=True)
class SignalToNoise(Scaling):
    """lr <- lr * sqrt(1 - beta^t) / (1 - momentum^t) * ||u|| / (sqrt(v) + eps): NAMO.

    v <- beta v + (1 - beta) ||G||^2, a number a matrix (arXiv 2602.17080, its mu_2 is `beta`).
    """

    kind: ClassVar[str] = "signal_to_noise"
    needs_size: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    beta: float = 0.99
    eps: float = 1e-8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return {"gradient_square": Kept((1, 1))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        v = matrices.averaged("gradient_square", norm(matrices.grads).square_(), self.beta)
        matrices.multiply_rate(matrices.size / (v.sqrt() + self.eps) * _corrections(self, matrices))
        return update


@dataclass(frozen=True)
class ColumnSignalToNoise(Scaling):
    """As `SignalToNoise` for each column, within [clamp * mean, mean / clamp] of all columns.

    NAMO-D (arXiv 2602.17080, its c is `clamp`).
    """

    kind: ClassVar[str] = "column_signal_to_noise"
    needs_size: ClassVar[bool] = True
    needs_momentum: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    beta: float = 0.99
    clamp: float = 0.75
    eps: float = 1e-8

    def check(self) -> None:
        """See `Stage.check`."""
        good = 0 < self.clamp <= 1
        expect(good, "column_signal_to_noise: clamp", "a number in (0, 1]", self.clamp)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return {"column_square": Kept((1, shape[1]))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        grads = matrices.grads.float()
        squares = torch.linalg.vector_norm(grads, dim=1, keepdim=True).square_()
        v = matrices.averaged("column_square", squares, self.beta)
        assert matrices.momentum is not None
        signal = torch.linalg.vector_norm(matrices.momentum, dim=1, keepdim=True) * matrices.size
        ratio = signal / (v.sqrt() + self.eps)
        mean = ratio.mean(dim=2, keepdim=True)
        ratio = torch.minimum(torch.maximum(ratio, self.clamp * mean), mean / self.clamp)
        matrices.multiply_rate(ratio * _corrections(self, matrices))
        return update


def _corrections(stage: SignalToNoise | ColumnSignalToNoise, matrices: Matrices) -> Tensor:
    """sqrt(1 - beta^t) / (1 - momentum^t), [b, 1, 1]."""
    second = (1 - torch.pow(stage.beta, matrices.age)).sqrt_()
    return second / (1 - torch.pow(matrices.beta, matrices.steps)).add_(1e-12)


@dataclass(frozen=True)
class GradientNorms(Scaling):
    """lr <- lr * min(||G||, limit) / v with v^2 <- v^2 + min(||G||, limit)^2: AdaGO.

    arXiv 2509.02981, algorithm 1 (its gamma is `limit`); v^2 starts at `start`.
    """

    kind: ClassVar[str] = "gradient_norms"
    limit: float = 10.0
    start: float = 1e-6

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return {"gradient_sum": Kept((1, 1))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        size = norm(matrices.grads).clamp_max_(self.limit)
        total = matrices.state["gradient_sum"] + size.square()
        matrices.state["gradient_sum"] = total
        matrices.multiply_rate(size / (total + self.start).sqrt().clamp_min_(TINY))
        return update


@dataclass(frozen=True)
class NuclearNorm(Scaling):
    """O <- <u, O> O: for a polar factor the nuclear norm of u (PolarGrad, arXiv 2505.21799)."""

    kind: ClassVar[str] = "nuclear_norm"
    needs_size: ClassVar[bool] = True
    needs_momentum: ClassVar[bool] = True

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        assert matrices.momentum is not None
        inner = (matrices.momentum * update).sum(dim=(1, 2), keepdim=True)
        return update.mul_(inner * matrices.size)


@dataclass(frozen=True)
class FixedNorm(Scaling):
    """O <- target * O / ||O||.

    target: "sqrt_min": sqrt(min(rows, columns)), a polar factor's own (Muon+ and nanochat); "rms":
    `rms` * sqrt(rows * columns), so that elements have that root mean square (AdaMuon, NorMuon as
    in its paper).
    """

    kind: ClassVar[str] = "fixed_norm"
    target: str = "sqrt_min"
    rms: float = 0.2

    def check(self) -> None:
        """See `Stage.check`."""
        targets = ("sqrt_min", "rms")
        expect(self.target in targets, "fixed_norm: target", f"one of {targets}", self.target)

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        rows, columns = matrices.shape
        size = math.sqrt(min(rows, columns))
        if self.target == "rms":
            size = self.rms * math.sqrt(rows * columns)
        return update.mul_(size / norm(update).clamp_min_(TINY))


@dataclass(frozen=True)
class Brake(Scaling):
    """O <- O / (r + 1e-8), r^2 = mean(cosh(strength * O / ||O||)^2): AuON (arXiv 2509.24320)."""

    kind: ClassVar[str] = "brake"
    strength: float = 1.5

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        relative = update * (self.strength / (norm(update) + 1e-7))
        r = relative.cosh_().square_().mean(dim=(1, 2), keepdim=True).sqrt_()
        return update.div_(r.add_(1e-8))
