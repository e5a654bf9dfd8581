"""Codes of fewer than eight bits in bytes (layout: `formats.codebook.CodeLayout`)."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.formats.codebook import CHUNK_BYTES, CodeLayout


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits, uint8 [m, n], into one plane (layout: `CodeLayout`)."""
    fields = 8 // bits
    chunks = []
    for chunk in codes.split(CHUNK_BYTES * fields, dim=1):
        rows, count = chunk.shape
        width = -(-count // fields)
        padded = chunk.new_zeros(rows, width * fields)
        padded[:, :count] = chunk
        shifted = padded.view(rows, fields, width).int() << (
            bits * torch.arange(fields, device=codes.device).view(1, -1, 1)
        )
        chunks.append(shifted.sum(dim=1).to(torch.uint8))
    return torch.cat(chunks, dim=1)


def unpack_plane(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_plane`: uint8 [m, columns]."""
    fields = 8 // bits
    shifts = bits * torch.arange(fields, device=packed.device).view(1, -1, 1)
    chunks = []
    remaining = columns
    for chunk in packed.split(CHUNK_BYTES, dim=1):
        count = min(remaining, CHUNK_BYTES * fields)
        values = (chunk.unsqueeze(1).int() >> shifts) & (2**bits - 1)
        chunks.append(values.flatten(1)[:, :count].to(torch.uint8))
        remaining -= count
    return torch.cat(chunks, dim=1)


def pack(codes: Tensor, layout: CodeLayout) -> Tensor:
    """Pack codes uint8 [m, n] into uint8 [m, layout.row_bytes(n)]."""
    planes = []
    shift = 0
    for bits in layout.planes:
        planes.append(pack_plane((codes >> shift) & (2**bits - 1), bits))
        shift += bits
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """Inverse of `pack`: uint8 [m, columns]."""
    codes = packed.new_zeros(packed.shape[0], columns)
    offset = shift = 0
    for bits in layout.planes:
        width = CodeLayout(bits, 0, "absmax", 1.0).row_bytes(columns)
        codes |= unpack_plane(packed[:, offset : offset + width], bits, columns) << shift
        offset += width
        shift += bits
    return codes
