"""Gradients whitened by a Kronecker product that follows the Fisher information: FISMO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.stored import RuleState
from lowbit_muon.step.rules.coded import decoded_factor, encoded_factor, square_state
from lowbit_muon.step.rules.gradient import GradientTransform
from lowbit_muon.step.rules.scaling import Scaling
from lowbit_muon.step.rules.stage import TINY, Matrices, expect

_ROWS, _COLUMNS = "fisher_rows", "fisher_columns"


@dataclass(frozen=True)
class FisherWhitened(GradientTransform):
    """G <- P^(-1/2) G Q^(-1/2), P [rows, rows] and Q [columns, columns] symmetric, of mean trace 1.

    P <- decay P + (1 - decay) (G Q^-1 G^T / columns + damping tr(P) / rows I), Q alike by the new P
    and G^T P^-1 G / rows, each divided by its mean trace; I at first (arXiv 2601.21750). By
    decompositions in float64 in each step, for which a GPU's host waits.

    decay, damping: not published; no number serves as a default (`recipes.fismo`). bits: of P and
    Q, 8 in codes (`step.rules.coded`), or 32.
    """

    kind: ClassVar[str] = "fisher_whitened"
    decay: float = 0.0
    damping: float = 0.0
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        good = 0 < self.decay < 1
        expect(good, "fisher_whitened: decay", "a number in (0, 1)", self.decay)
        expect(self.damping > 0, "fisher_whitened: damping", "a number > 0", self.damping)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        return square_state(_ROWS, shape[0], self.bits) | square_state(
            _COLUMNS, shape[1], self.bits
        )

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        g = grads.to(accumulation_dtype(grads.device))
        p, q = (_or_identity(decoded_factor(state, name, self.bits)) for name in (_ROWS, _COLUMNS))
        p = self._next(p, g @ power(q, -1.0, self.damping) @ g.mT / g.shape[2])
        q = self._next(q, g.mT @ power(p, -1.0, self.damping) @ g / g.shape[1])
        for name, factor in ((_ROWS, p), (_COLUMNS, q)):
            state |= encoded_factor(name, factor.float(), self.bits)
        roots = (power(factor, -0.5, self.damping) for factor in (p, q))
        return (next(roots) @ g @ next(roots)).float(), None

    def _next(self, before: Tensor, seen: Tensor) -> Tensor:
        identity = torch.eye(before.shape[1], dtype=before.dtype, device=before.device)
        seen = seen + self.damping * _mean_trace(before) * identity
        new = torch.lerp(seen, before, self.decay)
        new = (new + new.mT) / 2
        return new / _mean_trace(new)


@dataclass(frozen=True)
class FisherUnwhitened(Scaling):
    """O <- P^(-1/2) O Q^(-1/2) with `FisherWhitened`'s P and Q of this step (arXiv 2601.21750)."""

    kind: ClassVar[str] = "fisher_unwhitened"
    reads_state: ClassVar[tuple[str, ...]] = (_ROWS, _COLUMNS)
    damping: float = 0.0
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.damping > 0, "fisher_unwhitened: damping", "a number > 0", self.damping)

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        """See `Scaling.apply`."""
        left, right = (
            power(_or_identity(decoded_factor(matrices.state, name, self.bits)), -0.5, self.damping)
            for name in (_ROWS, _COLUMNS)
        )
        return (left @ update.to(left.dtype) @ right).float()


def power(factor: Tensor, exponent: float, damping: float) -> Tensor:
    """factor^exponent of symmetric matrices [b, m, m] of mean trace 1.

    In exact arithmetic no eigenvalue is below damping / (1 + damping) for long; a smaller one is
    rounding of the codes, and is taken for it.
    """
    values, vectors = torch.linalg.eigh(factor)
    values = values.clamp_min(min(1.0, damping) * 1e-3).pow(exponent)
    return (vectors * values.unsqueeze(1)) @ vectors.mT


def _mean_trace(factor: Tensor) -> Tensor:
    """tr(F) / m, [b, 1, 1]."""
    return factor.diagonal(dim1=1, dim2=2).mean(dim=1).view(-1, 1, 1).clamp_min(TINY)


def _or_identity(factor: Tensor) -> Tensor:
    """The factor in float64 (float32 on devices without it); I where it is zero, as at first."""
    factor = factor.to(accumulation_dtype(factor.device))
    identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
    started = factor.diagonal(dim1=1, dim2=2).sum(dim=1).view(-1, 1, 1) > 0
    return torch.where(started, factor, identity)
