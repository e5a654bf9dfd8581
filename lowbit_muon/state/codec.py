"""What a codec does, and what it reads and writes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.formats.state_format import StateFormat

if TYPE_CHECKING:
    from lowbit_muon.state.operands import Dense, Panels

# Formats that keep a norm divide by it; momentum below this is stored as zero.
SMALLEST_NORM = 1e-30


class Stored(ABC):
    """The tensors of b matrices that are stored in one format."""

    codec: Codec
    shape: tuple[int, int, int]  # (b, m, n) with m <= n
    backend: Backend
    device: torch.device

    @abstractmethod
    def each(self, role: str) -> Sequence[Tensor]:
        """The tensors of this role, one for each matrix."""

    @abstractmethod
    def __getitem__(self, role: str) -> Tensor:
        """Those tensors as one, [b, ..]."""

    @abstractmethod
    def blank(self, role: str) -> Tensor:
        """Where the new tensors of this role go, [b, ..], until `commit`."""

    @abstractmethod
    def write(self, role: str, rows: slice, values: Tensor) -> None:
        """Replace rows of the tensors of this role at once by values [b, rows, n]."""


class Decoder(ABC):
    """Decodes stored matrices, also while their tensors are being replaced row by row."""

    @abstractmethod
    def add(self, out: Tensor, terms: Terms, rows: slice) -> Tensor:
        """out <- buffer_weight * M[rows] + grad_weight * grad for these `terms`.

        out: float32 [b, rows, n]. Returns the sum of squares of each matrix's part, float64 [b].
        """


class Codec(ABC):
    """Stores matrices [rows, columns] of one format; oriented, [m, n] has the short side first."""

    # Whether rows decode by themselves, so that a matrix need not be decoded as a whole.
    by_rows = True
    # Whether a matrix is codes times scales and no more, so that one pass updates it.
    is_plain = False

    def __init__(self, state_format: StateFormat, shape: tuple[int, int]) -> None:
        self.state_format = state_format
        self.rows, self.columns = shape
        self.m, self.n = sorted(shape)
        self.is_wide = self.rows <= self.columns

    @abstractmethod
    def empty(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """The tensors of a zero matrix by role; `seed` draws the start of a power iteration."""

    @abstractmethod
    def decoder(self, stored: Stored) -> Decoder:
        """What decodes `stored`."""

    @abstractmethod
    def encode(
        self,
        stored: Stored,
        x: Dense | Panels,
        norm: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Write the codes of M = x / scale where `stored` says (`Stored.blank`).

        x is kept; it may decode what is being replaced. norm: Frobenius norms of M, float64 [b], 0
        for a matrix that is to be stored as zeros. scale: float64 [b], None for one. dtype: of x in
        the spectral encoder's products on devices.
        """
