"""From a momentum to a direction: the polar factor, or what a rule takes in its place.

A linear minimisation oracle, or steepest descent under a norm: the spectral norm leads to the polar
factor, the largest row's to rows of norm one, the largest element's to signs.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.step.rules.stage import TINY, Matrices, Stage, expect, uniform

# Singular values below this share of the largest are rounding of float32: noise of 2^-25 of the
# largest element, whose spectral norm is sqrt(m) + sqrt(n) times that.
_NO_DIRECTION = 1e-6


class Direction(Stage):
    """The stage that makes a direction of a momentum."""


class DirectionMap(Direction):
    """A direction that is computed here."""

    @abstractmethod
    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """The direction of x, float32 [b, rows, columns] of norm one, which may be overwritten."""


@dataclass(frozen=True)
class Polar(Direction):
    """Newton-Schulz by the group's `ns_coefficients` and `ns_steps`: close to U V^T.

    The step computes it itself (`step.update`), in the fastest form that is precise.
    """

    kind: ClassVar[str] = "polar"


@dataclass(frozen=True)
class ExactPolar(DirectionMap):
    """U V^T by a singular value decomposition in float64; a GPU's host waits for it.

    Directions below 1e-6 of the largest singular value are left out. QDWH, which nobody would have
    to wait for, makes these as large as the rest, and is twice as slow where it has to take them
    off again (square matrices, on a CPU: `python -m bench.exact_polar`).
    """

    kind: ClassVar[str] = "exact_polar"

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        return exact_polar(x)


@dataclass(frozen=True)
class LowRankPolar(DirectionMap):
    """Q polar(Q^T X), Q from X times random numbers: the polar factor in `rank` directions.

    The range finder of Halko, Martinsson and Tropp (2011), as `torch.svd_lowrank` without power
    iterations; arXiv 2605.06884 analyses Muon with such inexact polar factors. The numbers are a
    hash of the step, the same in every process and after a resume. Matrices that have no more than
    `rank` directions are taken whole. A GPU's host waits, as for `ExactPolar`.
    """

    kind: ClassVar[str] = "low_rank_polar"
    rank: int = 128

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        if self.rank >= min(matrices.shape):
            return exact_polar(x)
        basis = torch.linalg.qr(x @ uniform(matrices.steps, x.shape[2], self.rank)).Q
        return basis @ exact_polar(basis.mT @ x)


@dataclass(frozen=True)
class Rows(DirectionMap):
    """Rows, or columns, of norm one (RMNP, arXiv 2603.20527; Scion's RowNorm and ColNorm).

    axis: "row" or "column"; rms: so that their elements have a root mean square of one.
    """

    kind: ClassVar[str] = "normalize"
    axis: str = "row"
    rms: bool = False

    def check(self) -> None:
        """See `Stage.check`."""
        axes = ("row", "column")
        expect(self.axis in axes, "normalize: axis", f"one of {axes}", self.axis)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        across = 2 if self.axis == "row" else 1
        sizes = torch.linalg.vector_norm(x, dim=across, keepdim=True).clamp_min_(TINY)
        return x.div_(sizes / math.sqrt(x.shape[across]) if self.rms else sizes)


@dataclass(frozen=True)
class Signs(DirectionMap):
    """Signs of all elements (Lion, Signum); over the number of columns with `by_columns` (Scion's
    oracle for heads, arXiv 2502.07529)."""

    kind: ClassVar[str] = "sign"
    by_columns: bool = False

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        x = x.sign_()
        return x.div_(matrices.shape[1]) if self.by_columns else x


@dataclass(frozen=True)
class Sinkhorn(DirectionMap):
    """Rows and columns of one norm each, by turns: sqrt(columns) and sqrt(rows), so that elements
    have a mean square of one (ARO's usual function, arXiv 2602.09006)."""

    kind: ClassVar[str] = "sinkhorn"
    rounds: int = 5

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        for _ in range(self.rounds):
            for across in (2, 1):
                sizes = torch.linalg.vector_norm(x, dim=across, keepdim=True).clamp_min_(TINY)
                x = x.div_(sizes).mul_(math.sqrt(x.shape[across]))
        return x


@dataclass(frozen=True)
class Itself(DirectionMap):
    """The momentum as it is, with its size."""

    kind: ClassVar[str] = "itself"
    needs_size: ClassVar[bool] = True

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        return x.mul_(matrices.size)


@dataclass(frozen=True)
class SoftClip(DirectionMap):
    """Singular values s to s / sqrt(1 + s^2 / limit^2) (SPECTRA, arXiv 2603.14315).

    See `soft_clip`; a GPU's host waits for it. Around another optimizer: `SpectralClip`.
    """

    kind: ClassVar[str] = "soft_clip"
    needs_size: ClassVar[bool] = True
    limit: float = 10.0

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.limit > 0, "soft_clip: limit", "a number > 0", self.limit)

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        """See `DirectionMap.apply`."""
        return soft_clip(x.mul_(matrices.size), self.limit)


def exact_polar(x: Tensor) -> Tensor:
    """See `ExactPolar`; x: finite, [b, rows, columns]."""
    u, s, vh = torch.linalg.svd(x.to(accumulation_dtype(x.device)), full_matrices=False)
    largest = s.amax(dim=1, keepdim=True) if s.shape[1] else s
    kept = (s > _NO_DIRECTION * largest).to(u.dtype)
    return ((u * kept.unsqueeze(1)) @ vh).to(x.dtype)


def soft_clip(x: Tensor, limit: float | Tensor) -> Tensor:
    """(I + X X^T / limit^2)^(-1/2) X: singular values s become s / sqrt(1 + s^2 / limit^2).

    By an eigendecomposition in float64, in place of the coupled Newton-Schulz iteration of SPECTRA
    (arXiv 2603.14315). x: finite, float32 or float64 [.., rows, columns].
    """
    wide = x.shape[-2] <= x.shape[-1]
    short = (x if wide else x.mT).to(accumulation_dtype(x.device)) / limit
    values, vectors = torch.linalg.eigh(short @ short.mT)
    root = (1 + values.clamp_min(0)).rsqrt()
    operator = ((vectors * root.unsqueeze(-2)) @ vectors.mT).to(x.dtype)
    return operator @ x if wide else x @ operator
