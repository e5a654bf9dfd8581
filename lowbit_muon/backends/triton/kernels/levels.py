"""Codes to int8 levels, for what the products of codes do not decode themselves."""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_muon.backends.triton.kernels.codes import load_codes

# What is left of rows is short, so a tile spans several; a row ends in a whole pair of 64 columns,
# which is what products take.
BLOCK_M, BLOCK_N = 8, 128
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def levels_kernel(
    packed_ptr,  # uint8 [batch, rows, bytes], bytes contiguous
    stride_pb,
    stride_pm,
    table_ptr,  # int8 [256]
    out_ptr,  # int8 [batch, rows, padded], contiguous
    rows,
    columns,
    first,  # the column decoded first
    padded,  # a multiple of BLOCK_N
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The levels of the columns from `first` on, and zeros."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    inside = row < rows
    row = row.to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = inside & (first + place < columns)
    row_ptr = packed_ptr + batch * stride_pb + row * stride_pm
    code = load_codes(row_ptr, first + place, columns, mask, BITS)
    level = tl.load(table_ptr + code, mask=mask, other=0)
    tl.store(out_ptr + (batch * rows + row) * padded + place, level, mask=inside)
