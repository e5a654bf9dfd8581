"""The Walsh-Hadamard transforms of a rotation, one row a program, in the reference's order."""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# What one program transforms in registers: 32 values a thread.
LARGEST_TILE = 8192
# Eight values a thread and more: below, a stage is little but its exchange.
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


@triton.jit
def butterfly(x, BEFORE: tl.constexpr, HALF: tl.constexpr, AFTER: tl.constexpr):
    """One stage over the middle of float32 x [.., BEFORE * 2 * HALF * AFTER]: (first + second,
    first - second) of the pairs HALF apart, which are AFTER elements each."""
    shape: tl.constexpr = (BEFORE, 2, HALF * AFTER)
    pairs = tl.reshape(x, shape)
    # The other one of each pair: the sum of both as integers, which wraps, less this one. An
    # exchange between registers or lanes, where splitting and joining would go through memory.
    bits = pairs.to(tl.int32, bitcast=True)
    other = (tl.sum(bits, axis=1, keep_dims=True).to(tl.int32) - bits).to(tl.float32, bitcast=True)
    is_second = tl.arange(0, 2)[None, :, None] == 1
    return tl.reshape(tl.where(is_second, other - pairs, pairs + other), x.shape)


@triton.jit
def transform(x, AFTER: tl.constexpr, SIZE: tl.constexpr):
    """All stages over pairs 1, 2, .. SIZE / 2 apart of float32 x [SIZE * AFTER]."""
    for stage in tl.static_range(0, 24):
        if (2 << stage) <= SIZE:
            x = butterfly(x, SIZE // (2 << stage), 1 << stage, AFTER)
    return x


@triton.jit
def rotate_kernel(
    x_ptr,  # float32 [rows, columns], columns contiguous, changed in place
    stride_xm,
    first_signs_ptr,  # float32 [columns]
    second_signs_ptr,  # float32 [columns]
    columns,
    factor,  # 1 / sqrt(SIZE)
    INVERSE: tl.constexpr,
    PARTS: tl.constexpr,  # 1 if SIZE is all columns, else 2
    SIZE: tl.constexpr,  # the largest power of two not above `columns`
    TILE: tl.constexpr,  # min(SIZE, LARGEST_TILE)
):
    """x <- x D1 A D2 B or its inverse (see `base.Backend.rotate`).

    A row longer than TILE is transformed in two rounds: within tiles of consecutive columns, then
    across them. The stages come in the same order.
    """
    ACROSS: tl.constexpr = SIZE // TILE
    row_ptr = x_ptr + tl.program_id(0).to(tl.int64) * stride_xm
    place = tl.arange(0, TILE)
    for step in tl.static_range(PARTS):
        start = 0
        signs_ptr = first_signs_ptr
        outside = SIZE  # where the columns begin that this transform leaves alone
        if (step == 1) != (INVERSE and PARTS == 2):  # the second transform
            start = columns - SIZE
            signs_ptr = second_signs_ptr
            outside = 0
        for tile in range(ACROSS):
            column = start + tile * TILE + place
            x = tl.load(row_ptr + column)
            if not INVERSE:
                x *= tl.load(signs_ptr + column)
            x = transform(x, 1, TILE)
            if ACROSS == 1:
                x *= factor
                if INVERSE:
                    x *= tl.load(signs_ptr + column)
            tl.store(row_ptr + column, x)
        if ACROSS > 1:
            tl.debug_barrier()
            WIDTH: tl.constexpr = TILE // ACROSS
            for tile in range(ACROSS):
                # place = (number of the tile, place in a slice of each tile)
                column = start + place // WIDTH * TILE + tile * WIDTH + place % WIDTH
                x = transform(tl.load(row_ptr + column), WIDTH, ACROSS) * factor
                if INVERSE:
                    x *= tl.load(signs_ptr + column)
                tl.store(row_ptr + column, x)
        if PARTS == 2:
            for first in range(0, columns - SIZE, TILE):
                column = outside + first + place
                mask = first + place < columns - SIZE
                x = tl.load(row_ptr + column, mask=mask, other=0.0)
                x *= tl.load(signs_ptr + column, mask=mask, other=0.0)
                tl.store(row_ptr + column, x, mask=mask)
            tl.debug_barrier()
