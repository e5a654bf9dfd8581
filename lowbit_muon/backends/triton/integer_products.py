"""Adapter of the products of codes and of rounded matrices (`kernels.gram`, `kernels.limbs`)."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import (
    INTEGER_SEGMENT,
    LIMB_LIMIT,
    WHOLE_LIMIT,
    WHOLE_SEGMENT,
    PackedCodes,
    check_integer_codes,
)
from lowbit_muon.backends.triton.checks import (
    FLOAT_TYPES,
    changed,
    check,
    check_codes,
    on_device,
    target,
)
from lowbit_muon.backends.triton.kernels import gram, levels, limbs
from lowbit_muon.formats.codebook import Codebook


class IntegerProducts:
    """`code_gram`, `rounded_gram` and `code_product`; results are the reference's bits."""

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        check_integer_codes(codes, blocks=True)
        operand = _Operand(codes)
        b, m, n = operand.shape
        out = torch.empty(b, m, m, dtype=torch.float32, device=operand.packed.device)
        if n == 0:
            out.zero_()
        elif b * m:
            block = codes.layout.effective_block(n)
            with on_device(out):
                if block == n:
                    _row_gram(operand, out)
                else:
                    _segment_gram(operand, out, block)
        return out if operand.batched else out[0]

    def rounded_gram(self, x: Tensor) -> Tensor:
        """See `Backend.rounded_gram`."""
        check(x, "x", None, torch.float32)
        m = x.shape[0]
        out = torch.empty(m, m, dtype=torch.float32, device=x.device)
        if not x.numel():
            return out.zero_()
        with on_device(x):
            high, low, scales = _limbs(x.unsqueeze(0), None, WHOLE_LIMIT, limbs.GRAM_PIECE)
            limbs.limb_gram_kernel[(gram.triangle_programs(m, limbs.GRAM_BLOCK),)](
                high,
                low,
                scales,
                out,
                m,
                high.shape[2],
                SEGMENT=WHOLE_SEGMENT,
                PIECE=limbs.GRAM_PIECE,
                BLOCK=limbs.GRAM_BLOCK,
                **limbs.GRAM_OPTIONS,
            )
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        check_integer_codes(codes)
        operand = _Operand(codes)
        batch, depth, columns = operand.shape
        dimensions = (3,) if operand.batched else (2,)
        check(a, "a", None, torch.float32, operand.packed, dimensions)
        out_rows = a.shape[-2]
        leading = (batch,) if operand.batched else ()
        check(a, "a", (*leading, out_rows, depth), torch.float32)
        if out is None:
            out = torch.empty(*leading, out_rows, columns, dtype=torch.float32, device=a.device)
        check(out, "out", (*leading, out_rows, columns), FLOAT_TYPES, a)
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
        changed(out)
        if not out.numel():
            return out
        with on_device(a):
            a = a if operand.batched else a.unsqueeze(0)
            high, low, scales = _limbs(a, operand.scales[..., 0], LIMB_LIMIT, limbs.PRODUCT_BLOCK_K)
            if operand.full:
                _launch_product(operand, high, low, scales, out, beta, packed=True)
            if operand.full < columns:
                _launch_product(operand, high, low, scales, out, beta, packed=False)
        return out


class _Operand:
    """A batch of codes as the kernels take it.

    The first `full` columns are read as codes, `levels` holds the others decoded. Only 16 levels
    fit registers and only whole chunks lie in pairs.
    """

    def __init__(self, codes: PackedCodes) -> None:
        packed = codes.packed
        check(packed, "packed", None, torch.uint8, dimensions=(2, 3))
        self.batched = packed.ndim == 3
        shape = (*packed.shape[:-1], codes.columns)
        packed, scales = check_codes(codes, shape, packed, name="")
        self.packed = packed if self.batched else packed.unsqueeze(0)  # uint8 [b, m, bytes]
        self.scales = scales if self.batched else scales.unsqueeze(0)  # float32 [b, m, blocks]
        self.bits = codes.layout.bits
        self.shape = (*self.packed.shape[:2], codes.columns)
        self.codebook = codes.codebook
        chunk = gram.CHUNK_COLUMNS.get(self.bits)
        self.full = 0 if chunk is None else codes.columns // chunk * chunk
        self.table = _level_words(codes.codebook) if self.full else (0, 0, 0, 0)

    def levels(self, first: int) -> Tensor:
        """int8 [b, m, n'], contiguous: the columns from `first` on and zeros."""
        b, m, n = self.shape
        padded = -(-(n - first) // levels.BLOCK_N) * levels.BLOCK_N
        device = self.packed.device
        out = torch.empty(b, m, padded, dtype=torch.int8, device=device)
        if out.numel():
            grid = (triton.cdiv(m, levels.BLOCK_M), b, padded // levels.BLOCK_N)
            levels.levels_kernel[grid](
                self.packed,
                self.packed.stride(0),
                self.packed.stride(1),
                _level_table(self.codebook, self.bits, device),
                out,
                m,
                n,
                first,
                padded,
                BITS=self.bits,
                BLOCK_M=levels.BLOCK_M,
                BLOCK_N=levels.BLOCK_N,
                **levels.OPTIONS,
            )
        return out


def _row_gram(operand: _Operand, out: Tensor) -> None:
    batch, m, n = operand.shape
    rest = operand.levels(operand.full)
    offered = target(out.device)
    options = gram.GRAM_LARGE if offered.group_products else gram.GRAM_SMALL
    gram.code_gram_kernel[(gram.triangle_programs(m, options["BLOCK"]), batch)](
        operand.packed,
        operand.packed.stride(0),
        operand.packed.stride(1),
        rest,
        operand.scales,
        operand.scales.stride(0),
        operand.scales.stride(1),
        out,
        m,
        n,
        operand.full,
        rest.shape[2],
        *operand.table,
        HAS_PACKED=operand.full > 0,
        HAS_LEVELS=operand.full < n,
        BITS=operand.bits,
        PRMT=offered.prmt,
        **options,
    )


def _segment_gram(operand: _Operand, out: Tensor, block: int) -> None:
    batch, m, n = operand.shape
    segment = min(block, INTEGER_SEGMENT)
    whole = operand.levels(0)
    gram.segment_gram_kernel[(gram.triangle_programs(m, gram.SEGMENT_BLOCK), batch)](
        whole,
        operand.scales,
        operand.scales.stride(0),
        operand.scales.stride(1),
        out,
        m,
        n,
        whole.shape[2],
        SEGMENT=segment,
        SCALE_BLOCK=block,
        PIECE=min(64, max(32, segment)),  # integer units take 32 terms at least
        BLOCK=gram.SEGMENT_BLOCK,
        **gram.SEGMENT_OPTIONS,
    )


def _launch_product(
    operand: _Operand,
    high: Tensor,
    low: Tensor,
    scales: Tensor,
    out: Tensor,
    beta: float,
    *,
    packed: bool,
) -> None:
    """The columns of `out` that come from codes, or those that come from levels."""
    batch, depth, columns = operand.shape
    out_rows = high.shape[1]
    first, codes = 0, operand.packed
    span = operand.full
    if not packed:
        first, codes = operand.full, operand.levels(operand.full)
        span = columns - first
    grid = (triton.cdiv(out_rows, limbs.PRODUCT_BLOCK_M), triton.cdiv(span, 128), batch)
    limbs.code_product_kernel[grid](
        high,
        low,
        scales,
        codes,
        codes.stride(0),
        codes.stride(1),
        out,
        out_rows,
        depth,
        high.shape[2],
        columns,
        first,
        float(beta),
        *operand.table,
        PACKED=packed,
        BITS=operand.bits,
        PRMT=target(out.device).prmt,
        HAS_BETA=beta != 0,
        BLOCK_M=limbs.PRODUCT_BLOCK_M,
        BLOCK_K=limbs.PRODUCT_BLOCK_K,
        **limbs.PRODUCT_OPTIONS,
    )


def _limbs(
    a: Tensor, factors: Tensor | None, limit: int, multiple: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, scales) of a * factors: int8 [b, k, m'] twice, m' a multiple; float32 [b, k]."""
    batch, m, n = a.shape
    padded = -(-n // multiple) * multiple
    limbs_shape = (batch, m, padded)
    high = torch.empty(limbs_shape, dtype=torch.int8, device=a.device)
    low = torch.empty(limbs_shape, dtype=torch.int8, device=a.device)
    scales = torch.empty(batch, m, dtype=torch.float32, device=a.device)
    given = scales if factors is None else factors
    limbs.limbs_kernel[(m, batch)](
        a,
        *a.stride(),
        given,
        given.stride(0),
        given.stride(1),
        high,
        low,
        scales,
        m,
        n,
        padded,
        HAS_FACTORS=factors is not None,
        LIMIT=limit,
        TILE=limbs.LIMB_TILE,
        **limbs.LIMB_OPTIONS,
    )
    return high, low, scales


@functools.lru_cache(maxsize=64)
def _level_words(codebook: Codebook) -> tuple[int, int, int, int]:
    """16 levels, filled up with the last, four to an int32."""
    levels = [int(level) for level in codebook.levels]
    data = b"".join(
        level.to_bytes(1, "little", signed=True)
        for level in levels + levels[-1:] * (16 - len(levels))
    )
    first, second, third, fourth = (
        int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, 16, 4)
    )
    return first, second, third, fourth


@functools.lru_cache(maxsize=64)
def _level_table(codebook: Codebook, bits: int, device: torch.device) -> Tensor:
    """int8 [2**bits]: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    levels += levels[-1:] * (2**bits - len(levels))
    return torch.tensor(levels, dtype=torch.int8, device=device)
