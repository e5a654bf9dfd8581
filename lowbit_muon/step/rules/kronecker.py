"""Newton-Schulz between powers of Shampoo's Kronecker factors: Mousse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.factors import (
    SIDES,
    factors_state,
    read_bases,
    rotated,
    rotated_back,
    sides_within,
    take_gradients,
)
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.scaling import Scaling
from lowbit_muon.step.rules.stage import TINY, Matrices, expect, norm


@dataclass(frozen=True)
class KroneckerWhitened(Preconditioner):
    """X <- D^-a P^T X Q E^-a, rows L / tr(L) + eps I = P D P^T, and Q and E of R alike: Mousse.

    L <- beta L + (1 - beta) G G^T, R of G^T G. They are decomposed every `every` steps, from the
    first on, in float64, and a GPU's host waits in every step; each parameter has its turn in steps
    of its own (`Matrices.due`). `KroneckerUnwhitened` leads back (arXiv 2603.09697, algorithm 1;
    Anti-Entrophic/Mousse, whose numbers these are but for eps: there it is 1e-10 above the least
    eigenvalue, which is rounding, about 1e-7 of the largest, where no gradient had a direction).

    exponent: a, the "curvature exponent". largest: sides that are longer are left as they are.
    bits: of L, R, P and Q, 8 in codes (`step.rules.factors`) or 32.
    """

    kind: ClassVar[str] = "kronecker_whitened"
    needs_age: ClassVar[bool] = True
    beta: float = 0.95
    exponent: float = 0.125
    eps: float = 1e-6
    every: int = 10
    largest: int = 10000
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.eps > 0, "kronecker_whitened: eps", "a number > 0", self.eps)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        sides = sides_within(shape, self.largest)
        powers = {_powers(side): Kept((1, shape[SIDES[side] - 1])) for side in sides}
        return factors_state(shape, sides, self.bits) | powers

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        due, sides = matrices.due(self.every), sides_within(matrices.shape, self.largest)
        if any(due):
            for name in map(_powers, sides):
                matrices.state[name] = matrices.state[name].clone()

        def decomposed(index: int, side: str, factor: Tensor, basis: Tensor) -> Tensor:
            wide = factor.to(accumulation_dtype(factor.device))
            values, vectors = torch.linalg.eigh(wide / wide.diagonal().mean().clamp_min(TINY))
            powers = (values.clamp_min(0.0) + self.eps).pow(-self.exponent)
            matrices.state[_powers(side)][index, 0] = powers.float()
            return torch.linalg.qr(basis @ vectors.float()).Q

        bases = read_bases(matrices, sides, self.bits)
        turned = rotated(matrices.grads.float(), bases)
        take_gradients(matrices, bases, turned, self.beta, self.bits, due, decomposed)
        return _scaled(rotated(x, read_bases(matrices, sides, self.bits)), matrices)


@dataclass(frozen=True)
class KroneckerUnwhitened(Scaling):
    """O <- P D^-a O E^-a Q^T with `KroneckerWhitened`'s, then ||O|| as it was: Mousse.

    The same powers a second time, not their inverses, in paper and code: the steepest descent where
    the norm is that of the whitened X.
    """

    kind: ClassVar[str] = "kronecker_unwhitened"
    reads_state: ClassVar[tuple[str, ...]] = ("rows_powers", "columns_powers")

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        sides = [side for side in SIDES if _powers(side) in matrices.state]
        bits = 8 if any(f"{side}_basis_scales" in matrices.state for side in sides) else 32
        bases = read_bases(matrices, sides, bits)
        new = rotated_back(_scaled(update, matrices), bases)
        return new.mul_(norm(update) / norm(new).clamp_min_(TINY))


def _scaled(x: Tensor, matrices: Matrices) -> Tensor:
    """D^-a X E^-a, of the sides that are whitened."""
    if "rows_powers" in matrices.state:
        x = matrices.state["rows_powers"].mT * x
    return x * matrices.state["columns_powers"] if "columns_powers" in matrices.state else x


def _powers(side: str) -> str:
    """Name of the diagonal of D^-a or E^-a, [1, m], in the state."""
    return f"{side}_powers"
