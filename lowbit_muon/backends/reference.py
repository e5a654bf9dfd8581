"""Reference backend in plain torch: the ground truth that every kernel is tested against.

Plain before fast. Statistics are taken in float64; everything else rounds to float32 after each
product and sum, in the order written, which the kernels reproduce bit for bit.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from lowbit_muon.backends.base import (
    INTEGER_SEGMENT,
    LIMB_LIMIT,
    WHOLE_LIMIT,
    WHOLE_SEGMENT,
    PackedCodes,
    check_integer_codes,
)
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.formats.codebook import CHUNK_BYTES, Codebook, CodeLayout, rotation_signs

# Scales below the smallest normal float32 are stored as zero: their reciprocal would overflow.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def pack_plane(codes: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits, uint8 [m, n], into one plane (layout: `formats.CodeLayout`)."""
    fields = 8 // bits
    chunks = []
    for chunk in codes.split(CHUNK_BYTES * fields, dim=1):
        rows, count = chunk.shape
        width = -(-count // fields)
        padded = chunk.new_zeros(rows, width * fields)
        padded[:, :count] = chunk
        shifted = padded.view(rows, fields, width).int() << (
            bits * torch.arange(fields, device=codes.device).view(1, -1, 1)
        )
        chunks.append(shifted.sum(dim=1).to(torch.uint8))
    return torch.cat(chunks, dim=1)


def unpack_plane(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack_plane`: uint8 [m, columns]."""
    fields = 8 // bits
    shifts = bits * torch.arange(fields, device=packed.device).view(1, -1, 1)
    chunks = []
    remaining = columns
    for chunk in packed.split(CHUNK_BYTES, dim=1):
        count = min(remaining, CHUNK_BYTES * fields)
        values = (chunk.unsqueeze(1).int() >> shifts) & (2**bits - 1)
        chunks.append(values.flatten(1)[:, :count].to(torch.uint8))
        remaining -= count
    return torch.cat(chunks, dim=1)


def pack(codes: Tensor, layout: CodeLayout) -> Tensor:
    """Pack codes uint8 [m, n] into uint8 [m, layout.row_bytes(n)]."""
    planes = []
    shift = 0
    for bits in layout.planes:
        planes.append(pack_plane((codes >> shift) & (2**bits - 1), bits))
        shift += bits
    return torch.cat(planes, dim=1)


def unpack(packed: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """Inverse of `pack`: uint8 [m, columns]."""
    codes = packed.new_zeros(packed.shape[0], columns)
    offset = shift = 0
    for bits in layout.planes:
        width = CodeLayout(bits, 0, "absmax", 1.0).row_bytes(columns)
        codes |= unpack_plane(packed[:, offset : offset + width], bits, columns) << shift
        offset += width
        shift += bits
    return codes


def expand_scales(scales: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """One scale for each element: float32 [m, columns] from [m, layout.blocks(columns)]."""
    repeated = scales.repeat_interleave(layout.effective_block(columns), dim=1)
    return repeated[:, :columns]


def block_scales(x: Tensor, layout: CodeLayout) -> Tensor:
    """statistic * clip of each block: float32 [m, layout.blocks(n)] from float32 [m, n]."""
    statistics = []
    for block in x.split(layout.effective_block(x.shape[1]), dim=1):
        if layout.statistic == "absmax":
            statistics.append(block.abs().amax(dim=1))
        else:
            statistics.append(
                block.to(accumulation_dtype(x.device)).square().mean(dim=1).sqrt().float()
            )
    scales = torch.stack(statistics, dim=1) * torch.tensor(layout.clip, dtype=torch.float32)
    return torch.where(scales < SMALLEST_SCALE, torch.zeros_like(scales), scales)


def decode(codes: PackedCodes) -> Tensor:
    """levels[code] * scale, float32 [m, n]."""
    values = torch.tensor(codes.codebook.levels, dtype=torch.float32, device=codes.packed.device)
    indices = unpack(codes.packed, codes.layout, codes.columns).int()
    # Kernels pad the table with its last level; a code past the end means the same here.
    indices = indices.clamp(max=len(codes.codebook.levels) - 1)
    return values[indices] * expand_scales(codes.scales, codes.layout, codes.columns)


def add_terms(
    buffer: Tensor,  # float32 [m, n], changed in place
    buffer_weight: float,
    codes: PackedCodes | None,
    code_weight: float,
    grad: Tensor | None,
    grad_weight: float,
) -> None:
    """The weighted sum of `Backend.accumulate`."""
    if buffer_weight == 0:
        buffer.zero_()
    else:
        buffer.mul_(buffer_weight)
    if codes is not None and buffer.numel():
        buffer += decode(codes) * code_weight
    if grad is not None:
        buffer += grad.float() * grad_weight


def hadamard_transform_(x: Tensor) -> None:
    """Walsh-Hadamard transform of each row, in place: float32 [m, p], p a power of two."""
    size = x.shape[1]
    half = 1
    while half < size:
        pairs = x.view(x.shape[0], size // (2 * half), 2, half)
        first, second = pairs[:, :, 0].clone(), pairs[:, :, 1].clone()
        torch.add(first, second, out=pairs[:, :, 0])
        torch.sub(first, second, out=pairs[:, :, 1])
        half *= 2
    x *= 1 / math.sqrt(size)


class ReferenceBackend:
    """`Backend` in torch operations; runs on any device."""

    name = "reference"

    def quantize(
        self,
        x: Tensor,
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.quantize`."""
        found = (
            block_scales(x, layout)
            if x.numel()
            else x.new_zeros(x.shape[0], layout.blocks(x.shape[1]))
        )
        scales = found if scales is None else scales.copy_(found)
        return self.encode(x, scales, codebook, layout, packed=packed), scales

    def encode(
        self,
        x: Tensor,
        scales: Tensor,
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.encode`."""
        rows, columns = x.shape
        if not x.numel():
            found = torch.zeros(rows, layout.row_bytes(columns), dtype=torch.uint8, device=x.device)
        else:
            # A row without a scale is a row of zeros, and zeros keep clear of 0 * inf.
            inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
            thresholds = torch.tensor(codebook.thresholds, dtype=torch.float32, device=x.device)
            z = x * expand_scales(inverse, layout, columns)
            found = pack(torch.bucketize(z, thresholds).to(torch.uint8), layout)
        return found if packed is None else packed.copy_(found)

    def accumulate(
        self,
        buffer: Tensor,
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,
        grad_weight: float = 1.0,
    ) -> float:
        """See `Backend.accumulate`."""
        add_terms(buffer, buffer_weight, codes, code_weight, grad, grad_weight)
        return float(buffer.to(accumulation_dtype(buffer.device)).square().sum())

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        columns = x.shape[1]
        if not x.numel():
            return
        size = 1 << (columns.bit_length() - 1)
        first, second = (
            torch.tensor(signs, dtype=x.dtype, device=x.device) for signs in rotation_signs(columns)
        )
        parts = [(first, slice(0, size))]
        if size < columns:
            parts.append((second, slice(columns - size, columns)))
        for signs, part in reversed(parts) if inverse else parts:
            if not inverse:
                x *= signs
            transformed = x[:, part].contiguous()
            hadamard_transform_(transformed)
            x[:, part] = transformed
            if inverse:
                x *= signs

    def product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        out: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> Tensor:
        """See `Backend.product`."""
        result = (a @ b).mul_(alpha)
        if out is None:
            return result
        return out.copy_(result) if beta == 0 else out.mul_(beta).add_(result)

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.symmetric_product`; exactly symmetric."""
        result = (a @ (a.mT if b is None else b)).mul_(alpha)
        if addend is not None:
            result.add_(addend, alpha=beta)
        result = (result + result.mT).mul_(0.5)
        return result if out is None else out.copy_(result)

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        check_integer_codes(codes, blocks=True)
        block = codes.layout.effective_block(codes.columns)
        segment = block if block == codes.columns else min(block, INTEGER_SEGMENT)
        scales = expand_scales(codes.scales, codes.layout, codes.columns)[:, ::segment]
        return gram_by_segments(integer_levels(codes), scales, segment)

    def rounded_gram(self, x: Tensor) -> Tensor:
        """See `Backend.rounded_gram`."""
        whole, scales = round_to_whole(x, WHOLE_LIMIT)
        segments = -(-x.shape[1] // WHOLE_SEGMENT)
        return gram_by_segments(whole, scales.expand(-1, segments), WHOLE_SEGMENT)

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        check_integer_codes(codes)
        levels = integer_levels(codes)
        if not levels.numel():
            return self.product(a, levels, out=out, beta=beta)
        whole, scales = round_to_whole(a * codes.scales[:, 0], LIMB_LIMIT)
        low = (whole + 128) % 256 - 128
        low, high = low.float(), ((whole - low) / 256).float()
        result = scales * (
            256 * exact_product(high, levels).float() + exact_product(low, levels).float()
        )
        if out is None:
            return result
        return out.copy_(result if beta == 0 else beta * out.float() + result)


def integer_levels(codes: PackedCodes) -> Tensor:
    """The levels of codes: float32 [m, n], whole numbers."""
    return decode(dataclasses.replace(codes, scales=torch.ones_like(codes.scales)))


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, int32, of whole numbers: int8 in float32, or any in float64.

    float32 holds every sum of up to 512 products of int8, also where products are taken in TF32 or
    bfloat16, which hold their factors.
    """
    total = torch.zeros(left.shape[0], right.shape[1], dtype=torch.int32, device=left.device)
    for a, b in zip(left.split(512, dim=1), right.split(512), strict=True):
        total += (a @ b).int()
    return total


def gram_by_segments(whole: Tensor, scales: Tensor, segment: int) -> Tensor:
    """X X^T, float32 [m, m]: exact sums over `segment` columns, scaled and added up in float32.

    whole: [m, n] as `exact_product` takes; scales: float32 [m, ceil(n / segment)].
    """
    m, n = whole.shape
    total = torch.zeros(m, m, dtype=torch.float32, device=whole.device)
    for index, part in enumerate(whole.split(segment, dim=1) if n else ()):
        scale = scales[:, index]
        total += exact_product(part, part.mT).float() * torch.outer(scale, scale)
    return total


def round_to_whole(a: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(whole, scales): a = scales * whole to half a unit, |whole| <= limit.

    a: float32 [k, m]; whole: float64 [k, m] (float32 where there is no float64, which makes
    `rounded_gram` round its sums); scales: float32 [k, 1]. A row that is not finite has
    the scale NaN, one too small to divide by the whole numbers zero.
    """
    largest = a.abs().amax(dim=1, keepdim=True) if a.numel() else a.new_zeros(a.shape[0], 1)
    # (number / tensor would multiply by a rounded reciprocal)
    limits = torch.full_like(largest, limit)
    scales = largest / limits
    usable = (scales >= SMALLEST_SCALE) & largest.isfinite()
    inverse = torch.where(usable, limits / largest, torch.zeros_like(largest))
    whole = (
        torch.where(usable, a * inverse, torch.zeros_like(a))
        .round()
        .to(accumulation_dtype(a.device))
    )
    return whole, torch.where(largest.isfinite(), scales, torch.full_like(scales, math.nan))
