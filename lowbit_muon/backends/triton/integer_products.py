"""Adapter of the products of codes (`kernels.gram`, `kernels.limbs`)."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import (
    INTEGER_SEGMENT,
    LIMB_LIMIT,
    PackedCodes,
    check_integer_codes,
)
from lowbit_muon.backends.memory import KERNEL_DTYPES, changed
from lowbit_muon.backends.triton.device import CHECKS, on_device, target
from lowbit_muon.backends.triton.kernels import gram, levels, limbs
from lowbit_muon.formats.codebook import Codebook


class IntegerProducts(Backend):
    """`code_gram` and `code_product`; results are the reference's bits."""

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

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        check_integer_codes(codes)
        operand = _Operand(codes)
        batch, depth, columns = operand.shape
        dimensions = (3,) if operand.batched else (2,)
        CHECKS.tensor(a, "a", None, torch.float32, like=operand.packed, dimensions=dimensions)
        leading = (batch,) if operand.batched else ()
        rows = (*leading, a.shape[-2])
        CHECKS.tensor(a, "a", (*rows, depth), torch.float32)
        out = CHECKS.output(out, "out", (*rows, columns), KERNEL_DTYPES, like=a)
        changed(out)
        if not out.numel():
            return out
        with on_device(a):
            a = a if operand.batched else a.unsqueeze(0)
            high, low, scales = _limbs(a, operand.scales[..., 0])
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
        CHECKS.tensor(codes.packed, "codes.packed", None, torch.uint8)
        codes = CHECKS.codes(codes, (*codes.packed.shape[:-1], codes.columns), like=codes.packed)
        self.batched = codes.packed.ndim == 3
        self.packed, self.scales = (  # uint8 [b, m, bytes], float32 [b, m, blocks]
            x if self.batched else x.unsqueeze(0) for x in (codes.packed, codes.scales)
        )
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


def _limbs(a: Tensor, factors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(high, low, scales) of a * factors: int8 [b, k, m'] twice, filled up; float32 [b, k]."""
    batch, m, n = a.shape
    padded = -(-n // limbs.PRODUCT_BLOCK_K) * limbs.PRODUCT_BLOCK_K
    high, low = (torch.empty(batch, m, padded, dtype=torch.int8, device=a.device) for _ in range(2))
    scales = torch.empty(batch, m, dtype=torch.float32, device=a.device)
    limbs.limbs_kernel[(m, batch)](
        a,
        *a.stride(),
        factors,
        *factors.stride(),
        high,
        low,
        scales,
        m,
        n,
        padded,
        LIMIT=LIMB_LIMIT,
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
