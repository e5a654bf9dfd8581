"""A direction map in a basis that follows the momentum: ARO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.state.stored import RuleState
from lowbit_muon.step.rules.coded import keep_basis, read_basis, square_state
from lowbit_muon.step.rules.direction import DirectionMap, Rows, Signs, Sinkhorn
from lowbit_muon.step.rules.stage import AXES, Matrices, dimension, expect

# Of the momentum's norm: rows below it are rounding, which has no direction.
_ROUNDING = 1e-6
_MAPS: dict[str, DirectionMap] = {"sinkhorn": Sinkhorn(), "row": Rows(), "sign": Signs()}


@dataclass(frozen=True)
class Rotated(DirectionMap):
    """R <- the Q of M f(R^T M)^T, O = R f(R^T M): ARO (arXiv 2602.09006), R [m, m] first I.

    m is the side of the residual stream there: rows of what writes to it (attention's output, an
    MLP's last matrix), columns, and M^T for M, of what reads it. By the longer side R is not
    determined where M has no directions, nor are the updates that follow.

    The factorisation is Householder's. The paper's, by shifted Cholesky factors, is another way to
    the same Q but for signs, which no f here sees, and falls back to this one where M is near
    singular, as momenta of training are.

    map: f: "sinkhorn", `Sinkhorn` with five rounds; "row", rows of norm one; "sign". axis: m,
    "row", "column", "short" (the side of the residual stream in MLPs, where the state is least) or
    "long". bits: 8 for R in codes (`step.rules.coded`), or 32: the next factorisation makes it
    orthogonal again.
    """

    kind: ClassVar[str] = "rotated"
    needs_age: ClassVar[bool] = True
    map: str = "sinkhorn"
    axis: str = "short"
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.map in _MAPS, "rotated: map", f"one of {tuple(_MAPS)}", self.map)
        expect(self.axis in AXES, "rotated: axis", f"one of {AXES}", self.axis)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return square_state("rotation", shape[dimension(self.axis, shape) - 1], self.bits)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        by_row = dimension(self.axis, matrices.shape) == 1
        m = x if by_row else x.mT
        before = read_basis(matrices.state, "rotation", self.bits)
        identity = torch.eye(before.shape[1], device=before.device)
        before = torch.where(matrices.age == 1, identity, before)
        rotation = torch.linalg.qr(m @ self._mapped(before, m, matrices).mT).Q
        keep_basis(matrices.state, "rotation", rotation, self.bits)
        update = rotation @ self._mapped(rotation, m, matrices)
        return update if by_row else update.mT

    def _mapped(self, rotation: Tensor, m: Tensor, matrices: Matrices) -> Tensor:
        """f(R^T M)."""
        rotated = rotation.mT @ m
        sizes = torch.linalg.vector_norm(rotated, dim=2, keepdim=True)
        return _MAPS[self.map].apply(rotated.mul_(sizes > _ROUNDING), matrices)
