"""Second moments in the eigenbases of Shampoo's factors (SOAP), or of the momentum (Conda)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.coded import keep_basis, read_basis, square_state
from lowbit_muon.step.rules.direction import DirectionMap
from lowbit_muon.step.rules.factors import (
    SIDES,
    factors_state,
    read_bases,
    rotated,
    rotated_back,
    sides_within,
    take_gradients,
)
from lowbit_muon.step.rules.gradient import GradientTransform
from lowbit_muon.step.rules.moments import averaged, moment_state
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.stage import Matrices


@dataclass(frozen=True)
class SkipFirst(GradientTransform):
    """Zeros in the place of the first gradient, which is there for `EigenbasisAdam`'s bases."""

    kind: ClassVar[str] = "skip_first"

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return {"begun": Kept((1, 1), torch.uint8)}

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        begun = state["begun"]
        state["begun"] = torch.ones_like(begun)
        return grads * begun, None


@dataclass(frozen=True)
class _InEigenbases:
    """A stage that keeps P and Q, eigenvectors of L <- basis_beta L + (1 - basis_beta) G G^T and of
    R, of G^T G, and second moments in them.

    The first gradient gives P and Q, by a decomposition that a GPU's host waits for; in every
    `every`-th step they are brought nearer by one QR decomposition of L P and R Q with columns in
    the order of their eigenvalues (`Matrices.due`).

    largest: sides that are longer are not rotated. bits: 8 for V, L, R, P and Q in codes
    (`step.rules.moments`, `step.rules.factors`), or 32.
    """

    kind: ClassVar[str] = ""
    needs_size: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    beta: float = 0.95
    basis_beta: float = 0.95
    eps: float = 1e-8
    every: int = 10
    largest: int = 10000
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        moment = moment_state("rotated_moment", shape, self.bits)
        return moment | factors_state(shape, sides_within(shape, self.largest), self.bits)

    def _read(self, matrices: Matrices) -> dict[str, Tensor]:
        """Side -> its basis; zeros before the first."""
        return read_bases(matrices, sides_within(matrices.shape, self.largest), self.bits)

    def _turn(self, bases: dict[str, Tensor], turned: Tensor, matrices: Matrices) -> None:
        """Take the gradient into the factors, and bring the bases nearer where it is their turn.

        turned: the gradient in these bases.
        """
        due = matrices.due(self.every, since=1)

        def nearer(index: int, side: str, factor: Tensor, basis: Tensor) -> Tensor:
            if index in due[0]:
                return torch.linalg.eigh(factor).eigenvectors.flip(1)
            order = factor.diagonal().argsort(descending=True)
            _reorder(matrices, index, order, SIDES[side])
            return torch.linalg.qr(basis @ factor[:, order]).Q

        take_gradients(matrices, bases, turned, self.basis_beta, self.bits, due, nearer)


@dataclass(frozen=True)
class EigenbasisAdam(_InEigenbases, DirectionMap):
    """O = P ((P^T M Q) / (sqrt(V) + eps)) Q^T sqrt(1 - beta^t) / (1 - momentum^t): SOAP.

    See `_adam` (arXiv 2409.11321; nikhilvyas/SOAP). P and Q are those of `_InEigenbases`, brought
    nearer after the step. The first gradient is for them alone, and moves nothing (`SkipFirst`), so
    that t is one step less. A GPU's host waits in every step.
    """

    kind: ClassVar[str] = "eigenbasis_adam"
    reads_state: ClassVar[tuple[str, ...]] = ("begun",)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        bases = self._read(matrices)
        turned = rotated(matrices.grads.float(), bases)
        update = _adam(self, x.mul_(matrices.size), turned, bases, matrices, late=1)
        self._turn(bases, turned, matrices)
        return update


@dataclass(frozen=True)
class EigenbasisMoment(_InEigenbases, Preconditioner):
    """X <- P ((P^T X Q) / (sqrt(V) + eps)) Q^T, V <- beta V + (1 - beta) (P^T X Q)^2: SOAP-Muon.

    With P and Q as of `_InEigenbases`; X stays as it is in the first step, whose gradient gives
    them (KellerJordan/modded-nanogpt, records/track_3_optimization, 20260504_soap_mlp...). A GPU's
    host waits in every step.
    """

    kind: ClassVar[str] = "eigenbasis_moment"
    beta: float = 0.9
    basis_beta: float = 0.9

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        bases = self._read(matrices)
        inside = rotated(x * matrices.size, bases)
        v = averaged(matrices, "rotated_moment", inside.square(), self.beta, self.bits)
        new = rotated_back(inside.div_(v.sqrt().add_(self.eps)), bases)
        self._turn(bases, rotated(matrices.grads.float(), bases), matrices)
        return torch.where(matrices.age == 1, x, new)


@dataclass(frozen=True)
class MomentumBasisAdam(DirectionMap):
    """O = scale P ((P^T M) / (sqrt(V) + eps)) sqrt(1 - beta^t) / (1 - momentum^t): Conda.

    See `_adam`; P [m, m] are the left singular vectors of M, of M and G
    with the short side m first (a square matrix's columns), from the first step and then every
    `every` steps on (jie040109/Conda; arXiv 2509.24218). A GPU's host waits in every step.

    bits: 8 for V and P in codes (`step.rules.moments`, `step.rules.coded`), or 32.
    """

    kind: ClassVar[str] = "momentum_basis_adam"
    needs_size: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    beta: float = 0.99
    eps: float = 1e-8
    every: int = 2000
    scale: float = 0.25
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        basis = square_state("momentum_basis", min(shape), self.bits)
        return moment_state("rotated_moment", shape, self.bits) | basis

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        rows, columns = matrices.shape
        side = "rows" if rows < columns else "columns"
        basis = read_basis(matrices.state, "momentum_basis", self.bits)
        momentum = x.mul_(matrices.size)
        first, again = matrices.due(self.every)
        due = first + again
        if due:
            short = momentum if side == "rows" else momentum.mT
            found = torch.stack([_left_vectors(short[index]) for index in due])
            keep_basis(matrices.state, "momentum_basis", found, self.bits, due)
            basis = read_basis(matrices.state, "momentum_basis", self.bits)
        turned = rotated(matrices.grads.float(), {side: basis})
        return _adam(self, momentum, turned, {side: basis}, matrices).mul_(self.scale)


def _adam(
    stage: EigenbasisAdam | MomentumBasisAdam,
    momentum: Tensor,
    turned: Tensor,
    bases: dict[str, Tensor],
    matrices: Matrices,
    late: int = 0,
) -> Tensor:
    """P ((P^T M Q) / (sqrt(V) + eps)) Q^T sqrt(1 - beta^s) / (1 - momentum^t) with the bases given.

    turned: P^T G Q. V <- beta V + (1 - beta) (P^T G Q)^2 began s steps ago, `late` behind the
    state's first, and M t ago, as many behind the parameter's. If another rule made M, the gradient
    that V begins with may be nearly zero where M is not: V begins with the larger of the two.
    """
    s, t = ((steps - late).clamp_min(1) for steps in (matrices.age, matrices.steps))
    inside = rotated(momentum, bases) / (1 - torch.pow(matrices.beta, t))
    squares = turned.square()
    squares = torch.where(s == 1, torch.maximum(squares, inside.square()), squares)
    v = averaged(matrices, "rotated_moment", squares, stage.beta, stage.bits)
    inside.div_(v.sqrt().add_(stage.eps)).mul_((1 - torch.pow(stage.beta, s)).sqrt_())
    return rotated_back(inside, bases)


def _left_vectors(m: Tensor) -> Tensor:
    """Left singular vectors of m [rows, columns], float32, the largest value's first."""
    wide = m.to(accumulation_dtype(m.device))
    return torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1).float()


def _reorder(matrices: Matrices, index: int, order: Tensor, axis: int) -> None:
    """Bring the second moments of one matrix into the order of its basis's new columns."""
    for name in ("rotated_moment", "rotated_moment_row_scales", "rotated_moment_column_scales"):
        kept = matrices.state.get(name)
        if kept is not None and kept.shape[axis] == len(order):
            new = kept.clone()
            new[index] = kept[index].index_select(axis - 1, order)
            matrices.state[name] = new
