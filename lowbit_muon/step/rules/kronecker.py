"""Newton-Schulz between powers of Shampoo's Kronecker factors: Mousse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.coded import (
    decoded_factor,
    encoded_factor,
    keep_basis,
    read_basis,
    square_state,
)
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.scaling import Scaling
from lowbit_muon.step.rules.stage import TINY, Matrices, check_bits, expect, norm

_SIDES = ("rows", "columns")


@dataclass(frozen=True)
class KroneckerWhitened(Preconditioner):
    """X <- D^-a P^T X Q E^-a with rows L / tr(L) + eps I = P D P^T, and Q and E of R alike: Mousse.

    L <- beta L + (1 - beta) G G^T, R of G^T G. Decompositions are found anew every `every` steps,
    from the first on, in float64, and a GPU's host waits for them; each parameter has its turn in
    steps of its own (`Matrices.due`). `KroneckerUnwhitened` leads back (arXiv 2603.09697, algorithm
    1; Anti-Entrophic/Mousse, whose numbers these are but for eps: there it is 1e-10 above the least
    eigenvalue, which is rounding, about 1e-7 of the largest, where no gradient had a direction).

    L and R are kept as P^T L P and Q^T R Q, with the bases of the last decomposition. There they
    are nearly diagonal, so that codes relative to the diagonal know small eigenvalues as well as
    large ones; as they come, codes would lose what is below a tenth of the mean.

    exponent: a, the "curvature exponent". bits: of these and of P and Q, 8 in codes
    (`step.rules.coded`), or 32.
    """

    kind: ClassVar[str] = "kronecker_whitened"
    needs_age: ClassVar[bool] = True
    beta: float = 0.95
    exponent: float = 0.125
    eps: float = 1e-6
    every: int = 10
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        good = isinstance(self.every, int) and self.every >= 1
        expect(good, "kronecker_whitened: every", "a whole number >= 1", self.every)
        expect(self.beta < 1, "kronecker_whitened: beta", "a number in [0, 1)", self.beta)
        expect(self.eps > 0, "kronecker_whitened: eps", "a number > 0", self.eps)
        check_bits(self.kind, self.bits)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        kept: RuleState = {}
        for side, m in zip(_SIDES, shape, strict=True):
            kept |= square_state(f"{side}_factor", m, self.bits)
            kept |= square_state(f"{side}_basis", m, self.bits)
            kept[f"{side}_powers"] = Kept((1, m))
        return kept

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `Preconditioner.apply`."""
        first, again = matrices.due(self.every)
        grads = matrices.grads.float()
        for side, turned in zip(_SIDES, (grads, grads.mT), strict=True):
            basis = read_basis(matrices.state, f"{side}_basis", self.bits)
            if first:
                basis = basis.clone()
                basis[first] = torch.eye(basis.shape[1], device=basis.device)
            along = basis.mT @ turned
            before = decoded_factor(matrices.state, f"{side}_factor", self.bits)
            factor = torch.lerp(along @ along.mT, before, self.beta)
            if first or again:
                factor = self._decomposed(side, factor, basis, first + again, matrices)
            matrices.state |= encoded_factor(f"{side}_factor", factor, self.bits)
        (left, d), (right, e) = (_read(side, self.bits, matrices) for side in _SIDES)
        return d.mT * (left.mT @ x @ right) * e

    def _decomposed(
        self, side: str, factor: Tensor, basis: Tensor, due: list[int], matrices: Matrices
    ) -> Tensor:
        """The factors in new bases, which are kept, where they are due."""
        wide = accumulation_dtype(factor.device)
        back = torch.linalg.inv(basis[due].to(wide))  # (codes make no orthogonal matrix)
        plain = back.mT @ factor[due].to(wide) @ back
        mean = plain.diagonal(dim1=1, dim2=2).mean(dim=1).view(-1, 1, 1)
        values, vectors = torch.linalg.eigh(plain / mean.clamp_min(TINY))
        powers = matrices.state[f"{side}_powers"].clone()
        powers[due] = (values.clamp_min(0.0) + self.eps).pow(-self.exponent).unsqueeze(1).float()
        new = basis.clone()
        new[due] = vectors.float()
        keep_basis(matrices.state, f"{side}_basis", new, self.bits)
        matrices.state[f"{side}_powers"] = powers
        kept = read_basis(matrices.state, f"{side}_basis", self.bits)[due].to(wide)
        factor = factor.clone()
        factor[due] = (kept.mT @ plain @ kept).float()
        return factor


@dataclass(frozen=True)
class KroneckerUnwhitened(Scaling):
    """O <- P D^-a O E^-a Q^T with `KroneckerWhitened`'s, then ||O|| as it was: Mousse.

    The same powers a second time, not their inverses, in paper and code: the steepest descent where
    the norm is that of the whitened X.
    """

    kind: ClassVar[str] = "kronecker_unwhitened"
    reads_state: ClassVar[tuple[str, ...]] = ("rows_powers", "columns_powers")
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        check_bits(self.kind, self.bits)

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        (left, d), (right, e) = (_read(side, self.bits, matrices) for side in _SIDES)
        new = left @ (d.mT * update * e) @ right.mT
        return new.mul_(norm(update) / norm(new).clamp_min_(TINY))


def _read(side: str, bits: int, matrices: Matrices) -> tuple[Tensor, Tensor]:
    """(basis [b, m, m], powers [b, 1, m]) of a side."""
    return read_basis(matrices.state, f"{side}_basis", bits), matrices.state[f"{side}_powers"]
