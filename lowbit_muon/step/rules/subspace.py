"""Adam in the gradients' leading directions, Muon in the rest: COSMOS."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.moments import averaged, moment_state
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.scaling import Scaling
from lowbit_muon.step.rules.stage import Matrices, norm, uniform

# Of the momentum's norm: below it a part of it is rounding, which has no direction.
_ROUNDING = 1e-5


@dataclass(frozen=True)
class LeadingAdam(Preconditioner):
    """X <- X - X P P^T; beside it A = (X P / (sqrt(V) + eps)) P^T, for `WithLeading`.

    With u = (G + momentum M) / (1 + momentum (1 - momentum^t) / (1 - momentum)) for X, of a sum M
    with Nesterov's look-ahead. P [columns, rank] follows the leading right singular vectors of the
    gradients by one step of subspace iteration: P' = qr(beta P S + (1 - beta) G^T G P), S <- beta
    T^T S T + (1 - beta) (G P')^T (G P') with T = P^T P', V <- beta V + (1 - beta) (G P')^2, divided
    by 1 - beta^t where it is used (lliu606/COSMOS, COSMOS_optim.py; arXiv 2502.17410).

    There P starts as the eigenvectors of the first G^T G; here that iteration starts from random
    numbers, a hash of their places, so that no step decomposes [columns, columns].

    rank: of P, or what a gradient has at most if that is less. bits: 8 for V in logarithmic codes
    (`step.rules.moments`) and P in bfloat16, or 32 for both in float32.
    """

    kind: ClassVar[str] = "leading_adam"
    needs_size: ClassVar[bool] = True
    needs_age: ClassVar[bool] = True
    rank: int = 64
    beta: float = 0.999
    eps: float = 1e-8
    bits: int = 8

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        basis = torch.bfloat16 if self.bits == 8 else torch.float32
        return {
            "leading": Kept((columns, rank), basis),
            "leading_squares": Kept((rank, rank)),
            **moment_state("leading_moment", (rows, rank), self.bits),
        }

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        beta, steps = matrices.beta, matrices.steps
        look_ahead = 1 + beta * (1 - torch.pow(beta, steps)) / (1 - beta)
        u = x.mul_(matrices.size / look_ahead)
        basis, projected = self._turned(matrices)
        inside, least = u @ basis, norm(u) * _ROUNDING
        squares = projected.square_()
        # (of another rule's momentum, this gradient may have nothing in some of these directions)
        squares = torch.where(matrices.age == 1, torch.maximum(squares, inside.square()), squares)
        v = averaged(matrices, "leading_moment", squares, self.beta, self.bits)
        correction = (1 - torch.pow(self.beta, matrices.age)).sqrt_()
        rest = u.sub_(inside @ basis.mT)
        # (both are of rounding's size in directions that no gradient had)
        inside.mul_(torch.linalg.vector_norm(inside, dim=1, keepdim=True) > least)
        divisor = (v.sqrt() / correction).add_(self.eps)
        matrices.beside = inside.div_(divisor) @ basis.mT
        return rest.mul_(norm(rest) > least)

    def _turned(self, matrices: Matrices) -> tuple[Tensor, Tensor]:
        """P' and G P' of this step; P' and S are kept."""
        state, grads = matrices.state, matrices.grads.float()
        old, squares = state["leading"].float(), state["leading_squares"]
        first = matrices.age == 1
        old = torch.where(first, uniform(torch.zeros_like(matrices.steps), *old.shape[1:]), old)
        along = grads.mT @ (grads @ old)
        basis = torch.linalg.qr(torch.lerp(along, old @ squares, self.beta)).Q
        turn, projected = old.mT @ basis, grads @ basis
        new = projected.mT @ projected
        state["leading_squares"] = torch.lerp(new, turn.mT @ squares @ turn, self.beta)
        state["leading"] = basis.to(state["leading"].dtype)
        return basis, projected


@dataclass(frozen=True)
class WithLeading(Scaling):
    """O <- A + share * O, with what `LeadingAdam` put beside (COSMOS, arXiv 2502.17410)."""

    kind: ClassVar[str] = "with_leading"
    reads_state: ClassVar[tuple[str, ...]] = ("leading",)
    share: float = 0.2

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        assert matrices.beside is not None
        return torch.add(matrices.beside, update, alpha=self.share)
