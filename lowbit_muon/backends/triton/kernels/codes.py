"""Where a code lies in a packed row (`formats.CodeLayout`) and how it is decoded and found.

Shared by all kernels. A plane of b bits has FIELDS = 8 / b codes in a byte and chunks of 64 bytes;
a chunk of t codes is w = ceil(t / FIELDS) bytes wide, 64 but for the last one, and holds code
i*w + j in field i of byte j.
"""
# mypy: disable-error-code="no-untyped-def,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# Table of 16 int8 levels in $3, $7, $11 and $15 (an argument of 32 bits takes four operands where
# one of 8 bits takes one). prmt picks bytes of two registers by the low three bits of a nibble, so
# each half of the table is asked, and the nibble's high bit picks between the answers.
# $0 and $1: the levels of the low and of the high nibbles of the four bytes in $2.
NIBBLE_LEVELS_PTX = """
{
.reg .b32 index, pick, lower, upper, first, second;
and.b32 index, $2, 0x77777777;
shr.u32 pick, $2, 1;
and.b32 pick, pick, 0x44444444;
or.b32 pick, pick, 0x32103210;
prmt.b32 lower, $3, $7, index;
prmt.b32 upper, $11, $15, index;
prmt.b32 first, lower, upper, pick;
shr.u32 index, index, 16;
shr.u32 pick, pick, 16;
prmt.b32 lower, $3, $7, index;
prmt.b32 upper, $11, $15, index;
prmt.b32 second, lower, upper, pick;
prmt.b32 $0, first, second, 0x6420;
prmt.b32 $1, first, second, 0x7531;
}
"""
_NIBBLE_PTX = tl.constexpr(NIBBLE_LEVELS_PTX)
_NIBBLE_CONSTRAINTS = tl.constexpr("=r,=r," + ",".join(["r"] * 17))


@triton.jit
def plane_position(column, columns, FIELDS: tl.constexpr):
    """(byte, field) of each column in a plane of rows of `columns` codes."""
    CODES: tl.constexpr = 64 * FIELDS
    rest = columns % CODES
    width = tl.where(column < columns - rest, 64, (rest + FIELDS - 1) // FIELDS)
    within = column % CODES
    field = within * 0
    for i in tl.static_range(1, FIELDS):  # a division by w without dividing
        field += (within >= i * width).to(tl.int32)
    return column // CODES * 64 + within - field * width, field


@triton.jit
def plane_column(byte, field, columns, FIELDS: tl.constexpr):
    """Column of a field of a byte, the inverse of `plane_position`; >= columns if it is unused."""
    CODES: tl.constexpr = 64 * FIELDS
    full = columns // CODES
    width = tl.where(byte < full * 64, 64, (columns % CODES + FIELDS - 1) // FIELDS)
    return byte // 64 * CODES + field * width + byte % 64


@triton.jit
def plane_bytes(columns, FIELDS: tl.constexpr):
    """Bytes of a plane."""
    CODES: tl.constexpr = 64 * FIELDS
    return columns // CODES * 64 + (columns % CODES + FIELDS - 1) // FIELDS


@triton.jit
def load_codes(row_ptr, column, columns, mask, BITS: tl.constexpr):
    """Codes int32 at `column` of packed rows; row_ptr (pointers to rows), column and mask have
    shapes that broadcast."""
    if BITS == 3:
        byte, field = plane_position(column, columns, 4)
        low = tl.load(row_ptr + byte, mask=mask, other=0).to(tl.int32) >> (2 * field) & 3
        byte, field = plane_position(column, columns, 8)
        high_ptr = row_ptr + plane_bytes(columns, 4) + byte
        high = tl.load(high_ptr, mask=mask, other=0).to(tl.int32) >> field & 1
        return low | high << 2
    else:
        byte, field = plane_position(column, columns, 8 // BITS)
        packed = tl.load(row_ptr + byte, mask=mask, other=0).to(tl.int32)
        return packed >> (BITS * field) & ((1 << BITS) - 1)


@triton.jit
def count_below(z, thresholds_ptr, BITS: tl.constexpr):
    """How many thresholds lie strictly below z; all for a NaN, as torch.bucketize has it.

    thresholds_ptr: float32 [2**BITS - 1], ascending, filled up with infinity.
    """
    count = tl.zeros_like(z).to(tl.int32)
    for i in tl.static_range(BITS):
        # a binary search: do (1 << (BITS - 1 - i)) more lie below?
        threshold = tl.load(thresholds_ptr + count + ((1 << (BITS - 1 - i)) - 1))
        count += tl.where(threshold < z, 1 << (BITS - 1 - i), 0)
    return count


@triton.jit
def level_of(code, t0, t1, t2, t3):
    """int8 level of codes 0 to 15 from a table of 16 bytes in four int32."""
    word = tl.where(code < 8, tl.where(code < 4, t0, t1), tl.where(code < 12, t2, t3))
    return (word >> ((code & 3) * 8)).to(tl.int8)


@triton.jit
def nibble_levels(packed, t0, t1, t2, t3, PRMT: tl.constexpr):
    """int8 levels of the low and of the high nibbles of uint8 `packed`."""
    if PRMT:
        return tl.inline_asm_elementwise(
            _NIBBLE_PTX,
            _NIBBLE_CONSTRAINTS,
            [packed, t0, t1, t2, t3],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        codes = packed.to(tl.int32)
        return level_of(codes & 15, t0, t1, t2, t3), level_of(codes >> 4, t0, t1, t2, t3)
