"""Shampoo's factors L of G G^T and R of G^T G, each kept in a basis where it is nearly diagonal.

Kept are P, [m, m], and P^T L P. The elements of that are codes relative to its diagonal
(`step.rules.coded`), so that small eigenvalues of L are known as well as large ones; in codes of L
itself they would drown in the rounding of the large ones. P^T G G^T P is made of P^T G Q: bases in
codes are orthogonal to 1 %, and so exact is that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from lowbit_muon.state.stored import RuleState
from lowbit_muon.step.rules.coded import (
    decoded_factor,
    encoded_factor,
    keep_basis,
    read_basis,
    square_state,
)
from lowbit_muon.step.rules.stage import Matrices

# Name of a side -> its dimension of [b, rows, columns].
SIDES = {"rows": 1, "columns": 2}
# Of (index of a matrix, side, P^T L P [m, m], P): the new P, orthogonal.
Find = Callable[[int, str, Tensor, Tensor], Tensor]


def sides_within(shape: tuple[int, int], largest: int) -> list[str]:
    """The sides of a matrix [rows, columns] that are not longer."""
    return [side for side, axis in SIDES.items() if shape[axis - 1] <= largest]


def factors_state(shape: tuple[int, int], sides: Iterable[str], bits: int) -> RuleState:
    """What is kept of a matrix [rows, columns]."""
    kept: RuleState = {}
    for side in sides:
        m = shape[SIDES[side] - 1]
        kept |= square_state(f"{side}_factor", m, bits) | square_state(f"{side}_basis", m, bits)
    return kept


def read_bases(matrices: Matrices, sides: Iterable[str], bits: int) -> dict[str, Tensor]:
    """Side -> its bases, float32 [b, m, m]; zeros before the first."""
    return {side: read_basis(matrices.state, f"{side}_basis", bits) for side in sides}


def take_gradients(
    matrices: Matrices,
    bases: dict[str, Tensor],
    turned: Tensor,
    beta: float,
    bits: int,
    due: tuple[list[int], list[int]],
    find: Find,
) -> None:
    """L <- beta L + (1 - beta) G G^T, R alike, then new bases for the matrices that are due.

    bases: as they were read; turned: gradients in them. due: whose first step it is, and whose turn
    (`Matrices.due`).
    """
    first = due[0]
    if first:
        turned = turned.clone()
        turned[first] = matrices.grads[first].float()
        bases = {side: basis.clone() for side, basis in bases.items()}
        for basis in bases.values():
            basis[first] = torch.eye(basis.shape[1], device=basis.device)
    for side, basis in bases.items():
        square = turned @ turned.mT if side == "rows" else turned.mT @ turned
        before = decoded_factor(matrices.state, f"{side}_factor", bits)
        factor = torch.lerp(square, before, beta)
        if any(due):
            factor = _rebased(matrices, side, factor, basis, bits, first + due[1], find)
        matrices.state |= encoded_factor(f"{side}_factor", factor, bits)


def _rebased(
    matrices: Matrices,
    side: str,
    factor: Tensor,
    basis: Tensor,
    bits: int,
    due: list[int],
    find: Find,
) -> Tensor:
    """The factors in the new bases, which are kept, where they are due."""
    found = [find(index, side, factor[index], basis[index]) for index in due]
    keep_basis(matrices.state, f"{side}_basis", torch.stack(found), bits, due)
    kept = read_basis(matrices.state, f"{side}_basis", bits)
    factor = factor.clone()
    for index in due:
        turn = _solved(basis[index], kept[index])
        factor[index] = turn.mT @ factor[index] @ turn
    return factor


def _solved(basis: Tensor, other: Tensor) -> Tensor:
    """basis^-1 other, for a basis whose columns codes have made wrong by 1 %: one Newton step from
    the transpose, which leaves 1e-4; what is added to small eigenvalues goes with its square."""
    turn = basis.mT @ other
    return 2 * turn - basis.mT @ (basis @ turn)


def rotated(x: Tensor, bases: Mapping[str, Tensor]) -> Tensor:
    """P^T X Q, of the bases that there are; a new tensor."""
    if "rows" in bases:
        x = bases["rows"].mT @ x
    return x @ bases["columns"] if "columns" in bases else x * 1.0


def rotated_back(x: Tensor, bases: Mapping[str, Tensor]) -> Tensor:
    """P X Q^T."""
    return rotated(x, {side: basis.mT for side, basis in bases.items()})
