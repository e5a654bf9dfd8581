"""Adapter of the products of codes (`kernels.gram`, `kernels.limbs`)."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import INTEGER_SEGMENT, LIMB_LIMIT, PackedCodes, byte_levels
from lowbit_muon.backends.triton.device import on_device, target
from lowbit_muon.backends.triton.kernels import gram, levels, limbs
from lowbit_muon.formats.codebook import Codebook


class IntegerProducts(Backend):
    """`code_gram` and `code_product`; results are the reference's bits."""

    def _code_gram(self, codes: PackedCodes, out: Tensor) -> None:
        operand = _Operand(codes)
        block = codes.layout.effective_block(codes.columns)
        out = out.view(*operand.shape[:2], -1)
        with on_device(out):
            if block == codes.columns:
                _row_gram(operand, out)
            else:
                _segment_gram(operand, out, block)

    def _code_product(self, a: Tensor, codes: PackedCodes, out: Tensor, beta: float) -> None:
        operand = _Operand(codes)
        with on_device(a):
            a = a if a.ndim == 3 else a.unsqueeze(0)
            high, low, scales = _limbs(a, operand.scales[..., 0])
            if operand.full:
                _launch_product(operand, high, low, scales, out, beta, packed=True)
            if operand.full < codes.columns:
                _launch_product(operand, high, low, scales, out, beta, packed=False)


class _Operand:
    """A batch of codes as the kernels take it.

    The first `full` columns are read as codes, `levels` holds the others decoded. Only 16 levels
    fit registers and only whole chunks lie in pairs.
    """

    def __init__(self, codes: PackedCodes) -> None:
        self.packed, self.scales = (  # uint8 [b, m, bytes], float32 [b, m, blocks]
            x if x.ndim == 3 else x.unsqueeze(0) for x in (codes.packed, codes.scales)
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
                byte_levels(self.codebook, device),
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
