"""Uncoded matrices: float32 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit_muon.backends.codes import Terms
from lowbit_muon.state.codec import Codec, Decoder, Stored

if TYPE_CHECKING:
    from lowbit_muon.state.operands import Dense, Panels


class DenseCodec(Codec):
    """One tensor a matrix: dense [m, n]."""

    def empty(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """See `Codec.empty`."""
        dtype = torch.float32 if self.state_format.bits == 32 else torch.bfloat16
        return {"dense": torch.zeros(self.m, self.n, dtype=dtype, device=device)}

    def decoder(self, stored: Stored) -> Decoder:
        """See `Codec.decoder`."""
        return _DenseDecoder(stored)

    def encode(
        self,
        stored: Stored,
        x: Dense | Panels,
        norm: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """See `Codec.encode`."""
        for rows, values in x.panels(scale, read_only=True):
            stored.write("dense", rows, values)


@dataclass(frozen=True)
class _DenseDecoder(Decoder):
    stored: Stored

    def add(self, out: Tensor, terms: Terms, rows: slice) -> Tensor:
        """See `Decoder.add`."""
        for values, dense in zip(out, self.stored.each("dense"), strict=True):
            values.copy_(dense[rows])
        return self.stored.backend.accumulate(out, terms).sum(dim=-1)
