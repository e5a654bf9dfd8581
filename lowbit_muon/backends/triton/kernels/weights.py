"""Element by element over a matrix or a batch: scaling, and the update of a weight."""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# A tile is two-dimensional because one operand may be the transpose of another: 32 elements on
# either side are full sectors of memory (64 or 128 bytes), and 64 columns leave 16 a thread.
BLOCK_M, BLOCK_N = 32, 64
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def tile_position(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(row, column, mask) of this program's tile; tiles are numbered along the rows first."""
    across = tl.cdiv(columns, BLOCK_N)
    row = (tl.program_id(0) // across) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    column = (tl.program_id(0) % across) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    return row.to(tl.int64), column.to(tl.int64), (row < rows) & (column < columns)


@triton.jit
def scaled_kernel(
    x_ptr,  # float32 [batch, rows, columns]
    stride_xb,
    stride_xm,
    stride_xn,
    factor_ptr,  # float32 or float64 [batch]
    stride_fb,
    out_ptr,  # float32, bfloat16 or float16 [batch, rows, columns]
    stride_ob,
    stride_om,
    stride_on,
    rows,
    columns,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out <- factor * x, zeros where the factor is zero."""
    batch = tl.program_id(1).to(tl.int64)
    row, column, mask = tile_position(rows, columns, BLOCK_M, BLOCK_N)
    factor = tl.load(factor_ptr + batch * stride_fb).to(tl.float32)
    offset = batch * stride_xb + row * stride_xm + column * stride_xn
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    result = tl.where(factor == 0, 0.0, x * factor)
    target = out_ptr + batch * stride_ob + row * stride_om + column * stride_on
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=mask)


SUM_TILE = 1024


@triton.jit
def combined_kernel(
    x0_ptr,  # float32 [size] each; what is not there is not read
    x1_ptr,
    x2_ptr,
    x3_ptr,
    x4_ptr,
    first_ptr,  # float32 [size]
    second_ptr,  # float32 [size]
    third_ptr,  # float32 [size]
    size,
    a1,  # of the first sum
    a2,
    a3,
    a4,
    b1,  # of the second
    b2,
    b3,
    b4,
    c1,  # of the third
    c2,
    c3,
    c4,
    TERMS: tl.constexpr,
    SUMS: tl.constexpr,
    TILE: tl.constexpr,
):
    """first <- x0 + a1 * x1 + a2 * x2 + .., second <- x0 + b1 * x1 + .., third <- x0 + c1 * x1 + ..

    All terms of a tile are read before it is written: results may lie in their place.
    """
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = place < size
    first = tl.load(x0_ptr + place, mask=mask, other=0.0)
    second, third = first, first
    if TERMS > 1:
        term = tl.load(x1_ptr + place, mask=mask, other=0.0)
        first += a1 * term
        second += b1 * term
        third += c1 * term
    if TERMS > 2:
        term = tl.load(x2_ptr + place, mask=mask, other=0.0)
        first += a2 * term
        second += b2 * term
        third += c2 * term
    if TERMS > 3:
        term = tl.load(x3_ptr + place, mask=mask, other=0.0)
        first += a3 * term
        second += b3 * term
        third += c3 * term
    if TERMS > 4:
        term = tl.load(x4_ptr + place, mask=mask, other=0.0)
        first += a4 * term
        second += b4 * term
        third += c4 * term
    tl.store(first_ptr + place, first, mask=mask)
    if SUMS > 1:
        tl.store(second_ptr + place, second, mask=mask)
    if SUMS > 2:
        tl.store(third_ptr + place, third, mask=mask)


@triton.jit
def mix(h):
    """The finaliser of MurmurHash3 as `reference.random_bits` uses it, of uint32 h."""
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def update_weight_kernel(
    weight_ptr,  # float32, bfloat16 or float16 [rows, columns], changed in place
    stride_wm,
    stride_wn,
    update_ptr,  # float32, bfloat16 or float16 [rows, columns]
    stride_um,
    stride_un,
    decay_ptr,  # float32, one element
    step_size_ptr,  # float32, one element
    seed_ptr,  # int32, one element
    rows,
    columns,
    STOCHASTIC: tl.constexpr,
    CAUTIOUS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """weight <- decay * weight - step_size * update, rounded once.

    CAUTIOUS: it decays only where weight * update >= 0.
    """
    row, column, mask = tile_position(rows, columns, BLOCK_M, BLOCK_N)
    decay = tl.load(decay_ptr)
    step_size = tl.load(step_size_ptr)
    target = weight_ptr + row * stride_wm + column * stride_wn
    weight = tl.load(target, mask=mask, other=0.0).to(tl.float32)
    source = update_ptr + row * stride_um + column * stride_un
    update = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    unchanged = (decay == 1) & (step_size == 0)
    if CAUTIOUS:
        decay = tl.where(weight * update >= 0, decay, 1.0)
    result = weight * decay - update * step_size
    result = tl.where(unchanged, weight, result)
    if STOCHASTIC:
        index = (row * columns + column).to(tl.uint32)
        seed = tl.load(seed_ptr + tl.zeros_like(index)).to(tl.uint32, bitcast=True)
        noise = mix(mix(index) + mix(seed)) & 0xFFFF
        bits = result.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        result = tl.where(finite, (bits + noise) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
    tl.store(target, result.to(weight_ptr.dtype.element_ty), mask=mask)
