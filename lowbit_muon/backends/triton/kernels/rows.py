"""Row by row: decode and add, and the update that decodes, adds and quantises in one pass.

Every product and sum is rounded to float32 by itself (the launches switch contraction off) and
statistics are float64, so results are the reference's bits. Sums of squares go to one place per
program, in a fixed order: no atomics.
"""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_muon.backends.triton.kernels.codes import (
    count_below,
    load_codes,
    plane_bytes,
    plane_column,
)

# Elements of a tile: four a thread, one 16-byte load of float32. With eight a thread ptxas kept 56
# to 80 registers and spilled one on sm_80; so it keeps 32 to 48 and fills the processor.
TILE = 1024
# A gradient whose rows are not contiguous (a tall weight's) is read eight rows at a time: eight
# float32 are the 32 bytes that memory moves at least.
STRIDED_ROWS = 8
# Tiles of one program of `accumulate_kernel`: enough to hide its start, few enough to fill a GPU
# with a short and wide matrix.
ACCUMULATE_STEPS = 4
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

_SMALLEST_SCALE = tl.constexpr(2.0**-126)  # `reference.SMALLEST_SCALE`


@triton.jit
def weighted_sum(
    packed_row_ptr,  # pointers to packed rows, shaped like `row`
    scale_row_ptr,  # pointers to rows of scales, shaped like `row`
    levels_ptr,  # float32 [2**BITS]
    grad_row_ptr,  # pointers to rows, shaped like `row`
    stride_gn,
    column,
    columns,
    inside,  # which rows there are, shaped like `row`
    mask,
    code_weight,
    grad_weight,
    start,  # float32, what the rest is added to
    BITS: tl.constexpr,  # 0: no codes
    SCALE_BLOCK: tl.constexpr,  # columns of a scale; 0: one a row
    HAS_GRAD: tl.constexpr,
):
    """start + code_weight * (level * scale) + grad_weight * grad, rounded in that order."""
    total = start
    if BITS > 0:
        level = tl.load(levels_ptr + load_codes(packed_row_ptr, column, columns, mask, BITS))
        if SCALE_BLOCK > 0:
            scale = tl.load(scale_row_ptr + column // SCALE_BLOCK, mask=mask, other=0.0)
        else:
            scale = tl.load(scale_row_ptr, mask=inside, other=0.0)
        total += level * scale * code_weight
    if HAS_GRAD:
        offset = column.to(tl.int64) * stride_gn
        grad = tl.load(grad_row_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        total += grad * grad_weight
    return total


@triton.jit
def accumulate_kernel(
    buffer_ptr,  # float32 [rows, columns], columns contiguous
    stride_bm,
    packed_ptr,  # uint8 [rows, bytes], bytes contiguous
    stride_pm,
    scales_ptr,  # float32 [rows, blocks], blocks contiguous
    stride_sm,
    levels_ptr,  # float32 [2**BITS]
    grad_ptr,  # float32, bfloat16 or float16 [rows, columns]
    stride_gm,
    stride_gn,
    squares_ptr,  # float64 [rows, programs along columns]
    rows,
    columns,
    buffer_weight,  # a number, or float32 or float64 [matrices]
    code_weight,
    grad_weight,
    HAS_BUFFER: tl.constexpr,
    MATRIX_ROWS: tl.constexpr,  # rows that share an element of buffer_weight; 0: it is a number
    HAS_GRAD: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEPS: tl.constexpr,
):
    """buffer <- buffer_weight*buffer + code_weight*decode(codes) + grad_weight*grad."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    inside = row < rows
    row = row.to(tl.int64)
    if MATRIX_ROWS > 0:
        buffer_weight = tl.load(buffer_weight + row // MATRIX_ROWS, mask=inside, other=0.0)
        buffer_weight = buffer_weight.to(tl.float32)
    squares = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float64)
    for step in range(STEPS):
        first = (tl.program_id(1) * STEPS + step) * BLOCK_N
        column = first + tl.arange(0, BLOCK_N)[None, :]
        mask = inside & (column < columns)
        target = buffer_ptr + row * stride_bm + column
        start = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if HAS_BUFFER:
            start = tl.load(target, mask=mask, other=0.0) * buffer_weight
        total = weighted_sum(
            packed_ptr + row * stride_pm,
            scales_ptr + row * stride_sm,
            levels_ptr,
            grad_ptr + row * stride_gm,
            stride_gn,
            column,
            columns,
            inside,
            mask,
            code_weight,
            grad_weight,
            start,
            BITS,
            SCALE_BLOCK,
            HAS_GRAD,
        )
        tl.store(target, total, mask=mask)
        wide = tl.where(mask, total, 0.0).to(tl.float64)
        squares += wide * wide
    place = squares_ptr + row * tl.num_programs(1) + tl.program_id(1)
    tl.store(place, tl.sum(squares, axis=1, keep_dims=True), mask=inside)


@triton.jit
def finish_scale(squares, largest, count, clip, STATISTIC: tl.constexpr):
    """statistic * clip, zero where that is too small to divide by."""
    if STATISTIC == "rms":
        statistic = tl.sqrt(squares / count).to(tl.float32)
    else:
        statistic = largest.to(tl.float32, bitcast=True)
    scale = statistic * clip
    return tl.where(scale < _SMALLEST_SCALE, 0.0, scale)


@triton.jit
def encode_plane(
    target_ptr,  # pointers to the plane's first byte in each row [BLOCK_M, 1]
    thresholds_ptr,  # float32 [2**BITS - 1], filled up with infinity
    threshold_count,
    new_scale_row_ptr,  # pointers to rows of scales [BLOCK_M, 1, 1]
    packed_row_ptr,  # [BLOCK_M, 1, 1]
    scale_row_ptr,  # [BLOCK_M, 1, 1]
    levels_ptr,
    grad_row_ptr,  # [BLOCK_M, 1, 1]
    stride_gn,
    columns,
    inside,  # bool [BLOCK_M, 1, 1]
    code_weight,
    grad_weight,
    HAS_CODES: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,
    PLANE_BITS: tl.constexpr,
    SHIFT: tl.constexpr,  # the plane holds bits SHIFT to SHIFT + PLANE_BITS - 1 of a code
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the weighted sum again, with its columns as the plane's bytes want them, and pack."""
    FIELDS: tl.constexpr = 8 // PLANE_BITS
    BYTES: tl.constexpr = BLOCK_N // FIELDS
    field = tl.arange(0, FIELDS)[None, :, None]
    size = plane_bytes(columns, FIELDS)
    for first in range(0, size, BYTES):
        byte = first + tl.arange(0, BYTES)[None, None, :]
        column = plane_column(byte, field, columns, FIELDS)
        mask = inside & (byte < size) & (column < columns)
        value = weighted_sum(
            packed_row_ptr,
            scale_row_ptr,
            levels_ptr,
            grad_row_ptr,
            stride_gn,
            column,
            columns,
            inside,
            mask,
            code_weight,
            grad_weight,
            tl.zeros((BLOCK_M, FIELDS, BYTES), dtype=tl.float32),
            BITS if HAS_CODES else 0,
            SCALE_BLOCK,
            True,
        )
        if SCALE_BLOCK > 0:
            scale = tl.load(new_scale_row_ptr + column // SCALE_BLOCK, mask=mask, other=0.0)
        else:
            scale = tl.load(new_scale_row_ptr, mask=inside, other=0.0)
        # Zeros keep clear of 0 * inf; the divisor is never zero.
        inverse = tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)
        z = value * inverse
        code = count_below(z, thresholds_ptr, BITS)
        code = tl.where(z != z, threshold_count, code)
        code = (code >> SHIFT) & ((1 << PLANE_BITS) - 1)
        packed = tl.sum(tl.where(mask, code << (PLANE_BITS * field), 0), axis=1)
        byte = first + tl.arange(0, BYTES)[None, :]
        stored = tl.reshape(inside, (BLOCK_M, 1)) & (byte < size)
        tl.store(target_ptr + byte, packed.to(tl.uint8), mask=stored)


@triton.jit
def update_kernel(
    packed_ptr,  # uint8 [rows, bytes], bytes contiguous
    stride_pm,
    scales_ptr,  # float32 [rows, blocks], blocks contiguous
    stride_sm,
    levels_ptr,  # float32 [2**BITS]
    thresholds_ptr,  # float32 [2**BITS - 1], filled up with infinity
    threshold_count,
    grad_ptr,  # float32, bfloat16 or float16 [rows, columns]
    stride_gm,
    stride_gn,
    new_packed_ptr,  # uint8 [rows, bytes], contiguous
    new_scales_ptr,  # float32 [rows, blocks], contiguous
    out_ptr,  # float32, bfloat16 or float16 [rows, columns]
    stride_om,
    stride_on,
    squares_ptr,  # float64 [2, rows]
    rows,
    columns,
    block,  # columns of a scale, all of them with one scale a row
    blocks,
    row_bytes,
    clip,
    code_weight,
    grad_weight,
    out_value_weight,
    out_grad_weight,
    HAS_CODES: tl.constexpr,
    STATISTIC: tl.constexpr,  # "rms", "absmax" or "given": then new_scales are read
    HAS_OUT: tl.constexpr,
    OUT_VALUE: tl.constexpr,  # whether out_value_weight is not zero
    HAS_SQUARES: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_BLOCK: tl.constexpr,  # `block` as a constant, 0 with one scale a row
    GROUP: tl.constexpr,  # scales taken at a time
    PIECE: tl.constexpr,  # columns of a scale taken at a time
    BLOCK_M: tl.constexpr,
):
    """X = code_weight*decode(codes) + grad_weight*grad: its scales and codes, and `out`.

    Two readings of the row: statistics and `out` first, codes then. What is read again was read
    just before by the same program.
    """
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None, None]
    inside = row < rows
    row = row.to(tl.int64)
    packed_row_ptr = packed_ptr + row * stride_pm
    scale_row_ptr = scales_ptr + row * stride_sm
    grad_row_ptr = grad_ptr + row * stride_gm
    new_scale_row_ptr = new_scales_ptr + row * blocks

    if STATISTIC != "given":
        value_squares = tl.zeros((BLOCK_M, 1, 1), dtype=tl.float64)
        out_squares = tl.zeros((BLOCK_M, 1, 1), dtype=tl.float64)
        for first in range(0, blocks, GROUP):
            index = first + tl.arange(0, GROUP)[None, :, None]
            squares = tl.zeros((BLOCK_M, GROUP, PIECE), dtype=tl.float64)
            largest = tl.zeros((BLOCK_M, GROUP, PIECE), dtype=tl.int32)
            for piece in range(0, block, PIECE):
                place = piece + tl.arange(0, PIECE)[None, None, :]
                column = index * block + place
                mask = inside & (place < block) & (column < columns)
                value = weighted_sum(
                    packed_row_ptr,
                    scale_row_ptr,
                    levels_ptr,
                    grad_row_ptr,
                    stride_gn,
                    column,
                    columns,
                    inside,
                    mask,
                    code_weight,
                    grad_weight,
                    tl.zeros((BLOCK_M, GROUP, PIECE), dtype=tl.float32),
                    BITS if HAS_CODES else 0,
                    SCALE_BLOCK,
                    True,
                )
                value = tl.where(mask, value, 0.0)
                wide = value.to(tl.float64)
                squares += wide * wide
                # Magnitudes compare like their bits, and a NaN is the largest of all.
                largest = tl.maximum(largest, value.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
                if HAS_OUT:
                    result = tl.zeros((BLOCK_M, GROUP, PIECE), dtype=tl.float32)
                    if OUT_VALUE:
                        result = value * out_value_weight
                    offset = column.to(tl.int64)
                    grad = tl.load(grad_row_ptr + offset * stride_gn, mask=mask, other=0.0)
                    result += grad.to(tl.float32) * out_grad_weight
                    target = out_ptr + row * stride_om + offset * stride_on
                    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=mask)
                    wide = tl.where(mask, result, 0.0).to(tl.float64)
                    piece_squares = tl.sum(wide * wide, axis=2, keep_dims=True)
                    out_squares += tl.sum(piece_squares, axis=1, keep_dims=True)
            block_squares = tl.sum(squares, axis=2, keep_dims=True)
            value_squares += tl.sum(block_squares, axis=1, keep_dims=True)
            count = tl.maximum(tl.minimum(block, columns - index * block), 1).to(tl.float64)
            scale = finish_scale(
                block_squares, tl.max(largest, axis=2, keep_dims=True), count, clip, STATISTIC
            )
            tl.store(new_scale_row_ptr + index, scale, mask=inside & (index < blocks))
        if HAS_SQUARES:
            tl.store(squares_ptr + row, value_squares, mask=inside)
            tl.store(squares_ptr + rows + row, out_squares, mask=inside)
        tl.debug_barrier()  # the threads of the program see each other's scales

    # Three bits lie in two planes, see `CodeLayout`.
    LOW_BITS: tl.constexpr = 2 if BITS == 3 else BITS
    target_ptr = new_packed_ptr + tl.reshape(row, (BLOCK_M, 1)) * row_bytes
    encode_plane(
        target_ptr,
        thresholds_ptr,
        threshold_count,
        new_scale_row_ptr,
        packed_row_ptr,
        scale_row_ptr,
        levels_ptr,
        grad_row_ptr,
        stride_gn,
        columns,
        inside,
        code_weight,
        grad_weight,
        HAS_CODES,
        BITS,
        SCALE_BLOCK,
        LOW_BITS,
        0,
        BLOCK_M,
        GROUP * PIECE,
    )
    if BITS == 3:
        encode_plane(
            target_ptr + plane_bytes(columns, 4),
            thresholds_ptr,
            threshold_count,
            new_scale_row_ptr,
            packed_row_ptr,
            scale_row_ptr,
            levels_ptr,
            grad_row_ptr,
            stride_gn,
            columns,
            inside,
            code_weight,
            grad_weight,
            HAS_CODES,
            BITS,
            SCALE_BLOCK,
            1,
            2,
            BLOCK_M,
            GROUP * PIECE,
        )
