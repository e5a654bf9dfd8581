"""Products with float32 matrices that are rounded to whole numbers of two int8 limbs.

Rows are rounded to whole multiples 256*h + l of a fraction of their largest magnitude
(`reference.round_to_whole`); the limbs' products are summed exactly, like those of codes.
"""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_muon.backends.triton.kernels.gram import PAIR, load_pair, pair_column

# Two limbs by a pair of 64 columns: four sums of 64 x 64, 64 registers of each of 256 threads.
PRODUCT_BLOCK_M, PRODUCT_BLOCK_K = 64, 64
PRODUCT_OPTIONS = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": False}
# Rows are read twice in pieces of eight elements a thread.
LIMB_TILE = 1024
LIMB_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

_SMALLEST_SCALE = tl.constexpr(2.0**-126)  # `reference.SMALLEST_SCALE`
_ROUND = tl.constexpr(1.5 * 2.0**23)  # x + _ROUND - _ROUND is x rounded, ties to even


@triton.jit
def limbs_kernel(
    a_ptr,  # float32 [batch, rows, columns]
    stride_ab,
    stride_am,
    stride_an,
    factors_ptr,  # float32 [batch, columns]
    stride_fb,
    stride_fn,
    high_ptr,  # int8 [batch, rows, padded], contiguous
    low_ptr,  # int8 [batch, rows, padded], contiguous
    scales_ptr,  # float32 [batch, rows], contiguous
    rows,
    columns,
    padded,  # columns and zeros
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Rows of a * factors as scale * (256*high + low), see `reference.round_to_whole`."""
    row = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row_ptr = a_ptr + batch * stride_ab + row * stride_am
    factor_ptr = factors_ptr + batch * stride_fb
    largest = tl.zeros((TILE,), dtype=tl.int32)
    for first in range(0, columns, TILE):
        column = (first + tl.arange(0, TILE)).to(tl.int64)
        value = tl.load(row_ptr + column * stride_an, mask=column < columns, other=0.0)
        value *= tl.load(factor_ptr + column * stride_fn, mask=column < columns, other=0.0)
        # Magnitudes compare like their bits, and a NaN is the largest of all.
        largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    bits = tl.max(largest, axis=0)
    magnitude = bits.to(tl.float32, bitcast=True)
    finite = bits < 0x7F800000
    limit = tl.full((), LIMIT, tl.float32)
    scale = tl.div_rn(magnitude, tl.where(finite, limit, 1.0))
    usable = finite & (scale >= _SMALLEST_SCALE)
    inverse = tl.where(usable, tl.div_rn(limit, tl.where(usable, magnitude, 1.0)), 0.0)
    place = batch * rows + row
    tl.store(scales_ptr + place, tl.where(finite, scale, float("nan")))
    for first in range(0, padded, TILE):
        column = (first + tl.arange(0, TILE)).to(tl.int64)
        value = tl.load(row_ptr + column * stride_an, mask=column < columns, other=0.0)
        value *= tl.load(factor_ptr + column * stride_fn, mask=column < columns, other=0.0)
        whole = tl.where(usable, value, 0.0) * inverse + _ROUND - _ROUND
        number = whole.to(tl.int32)
        low = ((number + 128) & 255) - 128
        offset = place * padded + column
        tl.store(low_ptr + offset, low.to(tl.int8), mask=column < padded)
        tl.store(high_ptr + offset, ((number - low) >> 8).to(tl.int8), mask=column < padded)


@triton.jit
def product_value(high, low, scale, target_ptr, mask, beta, HAS_BETA: tl.constexpr):
    """scales * (256*h + l) + beta * out, rounded in the order of the reference, stored."""
    value = scale * (256.0 * high.to(tl.float32) + low.to(tl.float32))
    if HAS_BETA:
        value = beta * tl.load(target_ptr, mask=mask, other=0.0).to(tl.float32) + value
    tl.store(target_ptr, value.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["t0", "t1", "t2", "t3"])
def code_product_kernel(
    high_ptr,  # int8 [batch, out_rows, padded], contiguous
    low_ptr,  # int8 [batch, out_rows, padded], contiguous
    limb_scales_ptr,  # float32 [batch, out_rows], contiguous
    codes_ptr,  # uint8 [batch, depth, bytes], bytes contiguous; or int8 levels from `first` on
    stride_cb,
    stride_cm,
    out_ptr,  # float32, bfloat16 or float16 [batch, out_rows, columns], contiguous
    out_rows,
    depth,
    padded,  # a multiple of BLOCK_K; the padding is zeros
    columns,
    first,  # column of the first program: 0 of packed codes
    beta,
    t0,  # 16 int8 levels in four int32
    t1,
    t2,
    t3,
    PACKED: tl.constexpr,  # codes, not levels
    BITS: tl.constexpr,
    PRMT: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out <- scales * (256 * high levels + low levels) + beta * out; 128 columns a program."""
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    safe_row = batch * out_rows + tl.minimum(row, out_rows - 1)
    inside = tl.arange(0, 64)[None, :]
    pair = tl.program_id(1)
    if PACKED:
        left_column, right_column = pair_column(pair, BITS)
    else:
        left_column = first + pair * PAIR
        right_column = left_column + 64
    matrix_ptr = codes_ptr + batch * stride_cb
    limb_offset = safe_row[:, None] * padded
    left_high = tl.zeros((BLOCK_M, 64), dtype=tl.int32)
    left_low = tl.zeros((BLOCK_M, 64), dtype=tl.int32)
    right_high = tl.zeros((BLOCK_M, 64), dtype=tl.int32)
    right_low = tl.zeros((BLOCK_M, 64), dtype=tl.int32)
    for start in range(0, padded, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        high = tl.load(high_ptr + limb_offset + k[None, :])
        low = tl.load(low_ptr + limb_offset + k[None, :])
        # Past the depth the limbs are zero: any row will do.
        row_ptr = matrix_ptr + tl.minimum(k, depth - 1)[:, None].to(tl.int64) * stride_cm
        if PACKED:
            left, right = load_pair(row_ptr, pair, columns, t0, t1, t2, t3, BITS, PRMT)
        else:
            left = tl.load(row_ptr + (pair * PAIR + inside))
            right = tl.load(row_ptr + (pair * PAIR + 64 + inside))
        left_high = tl.dot(high, left, left_high, out_dtype=tl.int32)
        left_low = tl.dot(low, left, left_low, out_dtype=tl.int32)
        right_high = tl.dot(high, right, right_high, out_dtype=tl.int32)
        right_low = tl.dot(low, right, right_low, out_dtype=tl.int32)
    scale = tl.load(limb_scales_ptr + safe_row)[:, None]
    row_out = out_ptr + (batch * out_rows + row[:, None]) * columns
    mask = (row[:, None] < out_rows) & (left_column + inside < columns)
    target = row_out + left_column + inside
    product_value(left_high, left_low, scale, target, mask, beta, HAS_BETA)
    mask = (row[:, None] < out_rows) & (right_column + inside < columns)
    target = row_out + right_column + inside
    product_value(right_high, right_low, scale, target, mask, beta, HAS_BETA)
