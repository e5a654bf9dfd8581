"""What a backend offers: the contract between the codec and the kernels.

A new backend implements `Backend` and adds one line to the registry in `backends/__init__.py`.
Matrices here are oriented: the short side is rows (m), the long side columns (n).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lowbit_muon.formats import Codebook, CodeLayout


@dataclass(frozen=True)
class PackedCodes:
    """Codes of an oriented matrix [m, n] with everything needed to decode them."""

    packed: Tensor  # uint8 [m, layout.row_bytes(columns)]
    scales: Tensor  # float32 [m, layout.blocks(columns)]
    codebook: Codebook
    layout: CodeLayout
    columns: int  # n


class Backend(Protocol):
    """The element-wise kernels. Results are bit-identical between backends (see `reference`)."""

    name: str

    def quantize(
        self,
        x: Tensor,  # float32 [m, n]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scales from the statistic of each block, then codes: (packed, scales)."""

    def encode(
        self,
        x: Tensor,  # float32 [m, n]
        scales: Tensor,  # float32 [m, layout.blocks(n)]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
    ) -> Tensor:
        """Codes for given scales: packed."""

    def accumulate(
        self,
        buffer: Tensor,  # float32 [m, n], changed in place
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,  # float32, bfloat16 or float16 [m, n], any strides
        grad_weight: float = 1.0,
    ) -> float:
        """buffer <- buffer_weight*buffer + code_weight*decode(codes) + grad_weight*grad.

        Absent terms are left out; with buffer_weight 0 the buffer is not read. Returns the sum of
        squares of the result in float64, which is not finite if any element is not.
        """

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """Multiply float32 x [m, n] by the fixed orthogonal matrix, in place.

        Each row for itself: x <- x D1 A D2 B with p the largest power of two not above n, A the
        Walsh-Hadamard transform (natural order, divided by sqrt(p)) of the first p columns, B that
        of the last p (left out if p is n), and D1, D2 signs by column (`formats.rotation_signs`).
        Two overlapping transforms spread a single large column over all others, for every n. With
        `inverse`, the inverse.
        """
