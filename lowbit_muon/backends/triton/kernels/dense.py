"""Dense products of float32, bfloat16 or float16 factors with float32 sums."""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

from lowbit_muon.backends.triton.kernels.gram import triangle_tile

# By whether warp groups multiply from shared memory (sm_90 on). There 128 x 128 sums are 64
# registers of each of 256 threads and little else is; steps are 128 bytes of a row, the widest
# swizzle. Elsewhere fragments take registers too: halves go half as far in a step, and float32,
# whose fragments come in two parts, in tiles of 64 x 64 by 16 (128 x 128 spilled 542 registers on
# sm_80, steps of 32 up to 23, these none of 166).
HALF_LAUNCH = {
    True: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 4},
    False: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
}
FLOAT_LAUNCH = {
    True: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
    False: {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 4},
}
# float32 in memory, of which halves are made on the way to the units: twice the memory of halves,
# so steps are half as long.
ROUNDED_LAUNCH = {
    True: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 4},
    False: {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
}


@triton.jit
def column_halves(x):
    """The first and the second half of the columns."""
    halves = tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2))
    return tl.split(tl.permute(halves, (0, 2, 1)))


@triton.jit
def diagonal_terms(
    a_ptr, stride_am, stride_ak, b_ptr, stride_bk, stride_bn, row, column, rows, columns, depth,
    diagonal, SYMMETRIC: tl.constexpr,
):  # fmt: skip
    """What the elements that are not rounded multiply, float32, of a tile of the product.

    Indices are clamped rather than loads masked, which takes fewer registers.
    """
    met = row - diagonal  # the row of b
    kept_ptr = a_ptr + row.to(tl.int64) * stride_am + met.to(tl.int64) * stride_ak
    kept = tl.load(kept_ptr, mask=(row < rows) & (met >= 0) & (met < depth), other=0.0)
    met = tl.minimum(tl.maximum(met, 0), depth - 1).to(tl.int64)
    last_column = tl.minimum(column, columns - 1).to(tl.int64)
    total = kept[:, None] * tl.load(
        b_ptr + met[:, None] * stride_bk + last_column[None, :] * stride_bn
    )
    if SYMMETRIC:
        kept = tl.load(b_ptr + last_column * (stride_bk + stride_bn))
        last_row = tl.minimum(row, rows - 1).to(tl.int64)
        left = tl.load(a_ptr + last_row[:, None] * stride_am + last_column[None, :] * stride_ak)
        total += tl.where(row[:, None] == column[None, :], 0.0, left * kept[None, :])
    return total


@triton.jit
def product_kernel(
    a_ptr,  # float32, bfloat16 or float16 [batch, rows, depth]
    stride_ab,
    stride_am,
    stride_ak,
    b_ptr,  # like a [batch, depth, columns]
    stride_bb,
    stride_bk,
    stride_bn,
    addend_ptr,  # float32, bfloat16 or float16 [batch, rows, columns]
    stride_cb,
    stride_cm,
    stride_cn,
    other_ptr,  # float32, bfloat16 or float16 [batch, rows, columns]
    stride_eb,
    stride_em,
    stride_en,
    out_ptr,  # float32, bfloat16 or float16 [batch, rows, columns]
    stride_ob,
    stride_om,
    stride_on,
    active_ptr,  # bool [batch]
    stride_active,
    rows,
    columns,
    depth,
    alpha,
    beta,
    gamma,
    identity,
    diagonal,
    SYMMETRIC: tl.constexpr,  # one triangle of tiles, mirrored
    HAS_ADDEND: tl.constexpr,
    HAS_OTHER: tl.constexpr,
    HAS_IDENTITY: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
    ROUNDED: tl.constexpr,  # float32 factors to float16
    HAS_DIAGONAL: tl.constexpr,  # but for a's (k + diagonal, k), and a symmetric b's (k, k)
    PRECISION: tl.constexpr,  # of float32 factors, see tl.dot
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out <- alpha * a b + beta * addend + gamma * other + identity * I where active.

    The addend may be `out`.
    """
    batch = tl.program_id(1).to(tl.int64)
    if HAS_ACTIVE:  # noqa: SIM102 (a constant, and one from memory)
        if tl.load(active_ptr + batch * stride_active) == 0:
            return
    if SYMMETRIC:
        tile_m, tile_n, wanted = triangle_tile(tl.program_id(0), tl.cdiv(rows, BLOCK_M))
        if not wanted:
            return
    else:
        tile_m = tl.program_id(0) % tl.cdiv(rows, BLOCK_M)
        tile_n = tl.program_id(0) // tl.cdiv(rows, BLOCK_M)
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Masks rather than clamped indices: consecutive rows or columns are loaded together.
    left_ptr = a_ptr + batch * stride_ab + row[:, None].to(tl.int64) * stride_am
    left_ptr += k[None, :].to(tl.int64) * stride_ak
    right_ptr = b_ptr + batch * stride_bb + column[None, :].to(tl.int64) * stride_bn
    right_ptr += k[:, None].to(tl.int64) * stride_bk
    left_inside, right_inside = row[:, None] < rows, column[None, :] < columns
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, depth, BLOCK_K):
        left = tl.load(left_ptr, mask=left_inside & (k[None, :] < depth - first), other=0.0)
        right = tl.load(right_ptr, mask=right_inside & (k[:, None] < depth - first), other=0.0)
        if ROUNDED:
            if HAS_DIAGONAL:
                kept = row[:, None] == k[None, :] + first + diagonal
                left = tl.where(kept, 0.0, left)
                if SYMMETRIC:
                    right = tl.where(column[None, :] == k[:, None] + first, 0.0, right)
            left, right = left.to(tl.float16), right.to(tl.float16)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        left_ptr += tl.cast(stride_ak, tl.int64) * BLOCK_K
        right_ptr += tl.cast(stride_bk, tl.int64) * BLOCK_K
    # In quarters: of whole tiles of all that is added, and its addresses, registers would spill.
    left_half, right_half = column_halves(total)
    quarters = column_halves(left_half) + column_halves(right_half)
    for quarter in tl.static_range(4):
        total = quarters[quarter]
        column = tile_n * BLOCK_N + quarter * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
        if HAS_DIAGONAL:
            total += diagonal_terms(
                a_ptr + batch * stride_ab, stride_am, stride_ak,
                b_ptr + batch * stride_bb, stride_bk, stride_bn,
                row, column, rows, columns, depth, diagonal, SYMMETRIC,
            )  # fmt: skip
        value = alpha * total
        mask = (row[:, None] < rows) & (column[None, :] < columns)
        if SYMMETRIC:
            mask &= row[:, None] >= column[None, :]
        row, column = row.to(tl.int64), column.to(tl.int64)
        if HAS_ADDEND:
            offset = row[:, None] * stride_cm + column[None, :] * stride_cn
            addend = tl.load(addend_ptr + batch * stride_cb + offset, mask=mask, other=0.0)
            value += beta * addend.to(tl.float32)
        if HAS_OTHER:
            offset = row[:, None] * stride_em + column[None, :] * stride_en
            other = tl.load(other_ptr + batch * stride_eb + offset, mask=mask, other=0.0)
            value += gamma * other.to(tl.float32)
        if HAS_IDENTITY:
            value += tl.where(row[:, None] == column[None, :], identity, 0.0)
        result = value.to(out_ptr.dtype.element_ty)
        matrix_ptr = out_ptr + batch * stride_ob
        offset = row[:, None] * stride_om + column[None, :] * stride_on
        tl.store(matrix_ptr + offset, result, mask=mask)
        if SYMMETRIC:
            # Each element is written once, so the result is symmetric to the last bit.
            offset = column[:, None] * stride_om + row[None, :] * stride_on
            below = (row[None, :] < rows) & (row[None, :] > column[:, None])
            tl.store(matrix_ptr + offset, tl.trans(result), mask=below)
