"""Codes of what a low-rank part leaves over; its factors in codes of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.power_iteration import power_iteration, random_right_factor
from lowbit_muon.state.codec import Stored
from lowbit_muon.state.codecs.coded import Coded, empty_codes

if TYPE_CHECKING:
    from lowbit_muon.state.operands import Dense, Panels


class LowRank(Coded):
    """Beside those of `Coded`: left_codes, right_codes uint8 [rank, bytes], left_scales,
    right_scales float32 [rank, 1]: the factors of rows and of columns of the matrix as it is, not
    oriented, one scale a column."""

    def __init__(self, state_format: StateFormat, shape: tuple[int, int]) -> None:
        super().__init__(state_format, shape)
        self.factor_book = state_format.factor_code_book()
        self.factor_layout = state_format.factor_layout()

    def empty(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """See `Codec.empty`."""
        tensors = super().empty(device, seed)
        for side, length in (("left", self.rows), ("right", self.columns)):
            tensors[f"{side}_codes"], tensors[f"{side}_scales"] = empty_codes(
                self.rank, length, self.factor_layout, single_scale=False, device=device
            )
        return tensors

    def start(self, stored: Stored, seed: int) -> None:
        """Draw the right factor that the first power iteration starts from."""
        start = random_right_factor(self.columns, self.rank, seed, stored.device)
        # Only its direction matters, and entries in [-1, 1] suit every codebook.
        start = start / start.norm(dim=0, keepdim=True)
        self._write_factor(stored, "right", start.unsqueeze(0))

    def factors(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """See `Coded.factors`."""
        left, right = (
            self._decode_factor(stored, stored[f"{side}_codes"], stored[f"{side}_scales"], length)
            for side, length in (("left", self.rows), ("right", self.columns))
        )
        return (left, right) if self.is_wide else (right, left)

    def encode(
        self,
        stored: Stored,
        x: Dense | Panels,
        norm: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """See `Codec.encode`."""
        divisor = self.divisor(stored, norm, scale)
        left, right = self._factorise(stored, x, divisor)

        def residual() -> Iterator[tuple[slice, Tensor]]:
            for rows, values in x.panels(divisor):
                stored.backend.product(left[:, rows], right.mT, out=values, alpha=-1.0, beta=1.0)
                yield rows, values

        self.write_codes(stored, residual)

    def _factorise(
        self, stored: Stored, x: Dense | Panels, divisor: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One power iteration from the stored right factor; writes both factors.

        Returns, oriented, those whose product the residual is to be taken from.
        """
        products = (x.times, x.transposed_times)
        previous = self._decode_factor(
            stored, stored["right_codes"], stored["right_scales"], self.columns
        )
        left, right = power_iteration(*(products if self.is_wide else products[::-1]), previous)
        if divisor is not None:
            right = right / divisor.float().view(-1, 1, 1)
        # A zero matrix has no directions; the last ones must survive it, without a contribution.
        found = (right != 0).any(dim=2).any(dim=1).view(-1, 1, 1)
        left = torch.where(found, left, 0.0)
        written = [
            self._write_factor(stored, "left", left),
            self._write_factor(stored, "right", right, found),
        ]
        if self.state_format.residual_after == "stored":
            left, right = (
                self._decode_factor(stored, *codes, length)
                for codes, length in zip(written, (self.rows, self.columns), strict=True)
            )
        return (left, right) if self.is_wide else (right, left)

    def _write_factor(
        self, stored: Stored, side: str, factor: Tensor, found: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Quantise a factor [b, length, rank], where it was found; returns (codes, scales).

        Stored transposed, so that a column's codes and scale are a row.
        """
        values = factor.mT.clone(memory_format=torch.contiguous_format)
        packed, scales = stored.backend.quantize(
            self.to_code_domain(values, stored.backend), self.factor_book, self.factor_layout
        )
        if found is not None:
            packed = torch.where(found, packed, stored[f"{side}_codes"])
            scales = torch.where(found, scales, stored[f"{side}_scales"])
        return (
            stored.blank(f"{side}_codes").copy_(packed),
            stored.blank(f"{side}_scales").copy_(scales),
        )

    def _decode_factor(self, stored: Stored, packed: Tensor, scales: Tensor, length: int) -> Tensor:
        """float32 [b, length, rank]."""
        values = torch.empty(*packed.shape[:2], length, dtype=torch.float32, device=stored.device)
        codes = PackedCodes(packed, scales, self.factor_book, self.factor_layout, length)
        stored.backend.accumulate(values, Terms(codes=codes))
        self.from_code_domain(values, stored.backend)
        return values.mT
