"""Gram matrices of codes on integer matrix units: exact int32 sums straight from packed codes.

The order of a sum's terms does not matter, so operands that share a layout are multiplied as they
lie: in *pairs* of 64 columns whose codes sit in the low and high nibbles of 64 bytes. What is left
of a row that is no whole number of chunks is decoded to int8 beforehand (`kernels.levels`), as are
codes of eight bits, whose table does not fit registers, and codes with scales by blocks.
"""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_muon.backends.triton.kernels.codes import nibble_levels, plane_bytes

# Columns after which every plane of a format begins a new chunk.
CHUNK_COLUMNS = {2: 256, 3: 512, 4: 128}

# With warp-group products (sm_90 on) operands stay in shared memory: 128 x 128 sums are 64
# registers of each of 256 threads, and a decoded operand serves 128 rows. Elsewhere fragments of
# both operands take registers too, and 128 x 128 spilled on sm_80 (58 spills, none with 64 x 64
# and 166 registers). Three stages of packed codes hide the way to memory.
GRAM_LARGE = {"BLOCK": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
GRAM_SMALL = {"BLOCK": 64, "num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
# Scales by blocks keep float32 sums beside the integers, so tiles are smaller.
SEGMENT_BLOCK = 64
SEGMENT_OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
PAIR = tl.constexpr(128)  # columns


def triangle_programs(rows: int, block: int) -> int:
    """Programs that `triangle_tile` numbers."""
    tiles = -(-rows // block)
    return (tiles + 1) * -(-tiles // 2)


@triton.jit
def triangle_tile(index, tiles):
    """(i, j, wanted) of a tile with j <= i, from an index below (tiles + 1) * ceil(tiles / 2).

    Rows number r and tiles - 1 - r together have tiles + 1 tiles; the middle one meets itself.
    """
    short = index // (tiles + 1)
    place = index % (tiles + 1)
    long = tiles - 1 - short
    in_long = place <= long
    return (
        tl.where(in_long, long, short),
        tl.where(in_long, place, place - long - 1),
        in_long | (long != short),
    )


@triton.jit
def pair_column(pair, BITS: tl.constexpr):
    """(first column of the low nibbles, first of the high ones) of a pair."""
    if BITS == 4:
        return pair * 128, pair * 128 + 64
    else:
        low = pair // 2 * 256 + pair % 2 * 64  # fields e and e + 2 of the 2-bit plane
        return low, low + 128


@triton.jit
def load_pair(row_ptr, pair, columns, t0, t1, t2, t3, BITS: tl.constexpr, PRMT: tl.constexpr):
    """int8 levels [R, 64] of both halves of a pair; row_ptr [R, 1] points to packed rows."""
    byte = tl.arange(0, 64)[None, :]
    if BITS == 4:
        nibbles = tl.load(row_ptr + (pair * 64 + byte))
        return nibble_levels(nibbles, t0, t1, t2, t3, PRMT)
    else:
        # Two bits of both nibbles, then the third: bits 4h + e and 4h + e + 2 of another byte.
        parity = pair % 2
        packed = tl.load(row_ptr + (pair // 2 * 64 + byte)).to(tl.int32)
        nibbles = (packed >> (2 * parity)) & 0x33
        if BITS == 3:
            high_ptr = row_ptr + plane_bytes(columns, 4) + (pair // 4 * 64 + byte)
            packed = tl.load(high_ptr).to(tl.int32) >> (pair // 2 % 2 * 4 + parity)
            nibbles = nibbles | ((packed & 1) << 2) | ((packed & 4) << 4)
        return nibble_levels(nibbles.to(tl.uint8), t0, t1, t2, t3, PRMT)


@triton.jit
def store_both(out_ptr, value, row, column, rows):
    """A tile of a symmetric matrix [rows, rows] and its mirror image, each element once."""
    inside = (row[:, None] < rows) & (column[None, :] < rows)
    kept = row[:, None] >= column[None, :]
    offset = row[:, None].to(tl.int64) * rows + column[None, :]
    tl.store(out_ptr + offset, value, mask=inside & kept)
    mirror = column[:, None].to(tl.int64) * rows + row[None, :]
    mirrored = (row[None, :] < rows) & (column[:, None] < rows) & (row[None, :] > column[:, None])
    tl.store(out_ptr + mirror, tl.trans(value), mask=mirrored)


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def code_gram_kernel(
    packed_ptr,  # uint8 [batch, rows, bytes], bytes contiguous
    stride_pb,
    stride_pm,
    levels_ptr,  # int8 [batch, rows, padded], contiguous: the columns from `full` on
    scales_ptr,  # float32 [batch, rows]
    stride_sb,
    stride_sm,
    out_ptr,  # float32 [batch, rows, rows], contiguous
    rows,
    columns,
    full,  # columns read from packed codes, whole chunks, a multiple of 128
    padded,  # columns of levels, a multiple of 64; the padding is zeros
    t0,  # 16 int8 levels in four int32
    t1,
    t2,
    t3,
    HAS_PACKED: tl.constexpr,
    HAS_LEVELS: tl.constexpr,
    BITS: tl.constexpr,
    PRMT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """float32(sum of level * level) * (scale_i * scale_j), one triangle of tiles mirrored."""
    tile_m, tile_n, wanted = triangle_tile(tl.program_id(0), tl.cdiv(rows, BLOCK))
    if not wanted:
        return
    batch = tl.program_id(1).to(tl.int64)
    row = tile_m * BLOCK + tl.arange(0, BLOCK)
    column = tile_n * BLOCK + tl.arange(0, BLOCK)
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    safe_column = tl.minimum(column, rows - 1).to(tl.int64)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
    if HAS_PACKED:
        left_ptr = packed_ptr + batch * stride_pb + safe_row[:, None] * stride_pm
        right_ptr = packed_ptr + batch * stride_pb + safe_column[:, None] * stride_pm
        for pair in range(full // PAIR):
            low, high = load_pair(left_ptr, pair, columns, t0, t1, t2, t3, BITS, PRMT)
            right_low, right_high = load_pair(right_ptr, pair, columns, t0, t1, t2, t3, BITS, PRMT)
            total = tl.dot(low, tl.trans(right_low), total, out_dtype=tl.int32)
            total = tl.dot(high, tl.trans(right_high), total, out_dtype=tl.int32)
    if HAS_LEVELS:
        k = tl.arange(0, 64)[None, :]
        left_ptr = levels_ptr + (batch * rows + safe_row[:, None]) * padded + k
        right_ptr = levels_ptr + (batch * rows + safe_column[:, None]) * padded + k
        for first in range(0, padded, 64):
            left = tl.load(left_ptr + first)
            right = tl.load(right_ptr + first)
            total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
    scale_ptr = scales_ptr + batch * stride_sb
    row_scale = tl.load(scale_ptr + safe_row * stride_sm)
    column_scale = tl.load(scale_ptr + safe_column * stride_sm)
    value = total.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    store_both(out_ptr + batch * rows * rows, value, row, column, rows)


@triton.jit
def segment_gram_kernel(
    levels_ptr,  # int8 [batch, rows, padded], contiguous
    scales_ptr,  # float32 [batch, rows, blocks], blocks contiguous
    stride_sb,
    stride_sm,
    out_ptr,  # float32 [batch, rows, rows], contiguous
    rows,
    columns,
    padded,
    SEGMENT: tl.constexpr,  # columns of a sum, all of one scale
    SCALE_BLOCK: tl.constexpr,  # columns of a scale
    PIECE: tl.constexpr,  # columns of one step
    BLOCK: tl.constexpr,
):
    """The sum of float32(sum over a segment) * (scale_i * scale_j) over the segments in order."""
    tile_m, tile_n, wanted = triangle_tile(tl.program_id(0), tl.cdiv(rows, BLOCK))
    if not wanted:
        return
    batch = tl.program_id(1).to(tl.int64)
    row = tile_m * BLOCK + tl.arange(0, BLOCK)
    column = tile_n * BLOCK + tl.arange(0, BLOCK)
    safe_row = tl.minimum(row, rows - 1).to(tl.int64)
    safe_column = tl.minimum(column, rows - 1).to(tl.int64)
    left_ptr = levels_ptr + (batch * rows + safe_row[:, None]) * padded
    right_ptr = levels_ptr + (batch * rows + safe_column[:, None]) * padded
    row_scale_ptr = scales_ptr + batch * stride_sb + safe_row * stride_sm
    column_scale_ptr = scales_ptr + batch * stride_sb + safe_column * stride_sm
    value = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, columns, SEGMENT):
        end = tl.minimum(start + SEGMENT, columns)
        total = tl.zeros((BLOCK, BLOCK), dtype=tl.int32)
        for first in range(0, SEGMENT, PIECE):
            k = start + first + tl.arange(0, PIECE)[None, :]
            left = tl.load(left_ptr + k, mask=k < end, other=0)
            right = tl.load(right_ptr + k, mask=k < end, other=0)
            total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
        row_scale = tl.load(row_scale_ptr + start // SCALE_BLOCK)
        column_scale = tl.load(column_scale_ptr + start // SCALE_BLOCK)
        value += total.to(tl.float32) * (row_scale[:, None] * column_scale[None, :])
    store_both(out_ptr + batch * rows * rows, value, row, column, rows)
