"""The arithmetic of `Backend` in plain torch: the ground truth that every kernel is tested against.

Plain before fast. Statistics are taken in float64; everything else rounds to float32 after each
product and sum, in the order written, which the kernels reproduce bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.backends.codes import INTEGER_SEGMENT, LIMB_LIMIT, PackedCodes, Product, Terms
from lowbit_muon.backends.modes import float32_products
from lowbit_muon.backends.packing import pack, unpack
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.formats.codebook import Codebook, CodeLayout, rotation_signs

# Scales below the smallest normal float32 are stored as zero: their reciprocal would overflow.
SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def expand_scales(scales: Tensor, layout: CodeLayout, columns: int) -> Tensor:
    """One scale for each element: float32 [.., columns] from [.., layout.blocks(columns)]."""
    repeated = scales.repeat_interleave(layout.effective_block(columns), dim=-1)
    return repeated[..., :columns]


def block_scales(x: Tensor, layout: CodeLayout) -> Tensor:
    """statistic * clip of each block: float32 [.., layout.blocks(n)] from float32 [.., n]."""
    statistics = []
    for block in x.split(layout.effective_block(x.shape[-1]), dim=-1):
        if layout.statistic == "absmax":
            statistics.append(block.abs().amax(dim=-1))
        else:
            squares = block.to(accumulation_dtype(x.device)).square()
            statistics.append(squares.mean(dim=-1).sqrt().float())
    scales = torch.stack(statistics, dim=-1) * torch.tensor(layout.clip, dtype=torch.float32)
    return torch.where(scales < SMALLEST_SCALE, torch.zeros_like(scales), scales)


def encode(x: Tensor, scales: Tensor, codebook: Codebook, layout: CodeLayout) -> Tensor:
    """Packed codes of x / scales: uint8 [.., layout.row_bytes(n)] from float32 [.., n]."""
    # A row without a scale is a row of zeros, and zeros keep clear of 0 * inf.
    inverse = torch.where(scales > 0, 1 / scales, torch.zeros_like(scales))
    thresholds = torch.tensor(codebook.thresholds, dtype=torch.float32, device=x.device)
    z = x * expand_scales(inverse, layout, x.shape[-1])
    codes = torch.bucketize(z, thresholds).to(torch.uint8)
    return pack(codes.flatten(0, -2), layout).unflatten(0, x.shape[:-1])


def decode(codes: PackedCodes) -> Tensor:
    """levels[code] * scale, float32 [.., m, n]."""
    values = torch.tensor(codes.codebook.levels, dtype=torch.float32, device=codes.packed.device)
    indices = unpack(codes.packed.flatten(0, -2), codes.layout, codes.columns).int()
    # Kernels pad the table with its last level; a code past the end means the same here.
    indices = indices.clamp(max=len(codes.codebook.levels) - 1)
    levels = values[indices].unflatten(0, codes.packed.shape[:-1])
    return levels * expand_scales(codes.scales, codes.layout, codes.columns)


def add_terms(buffer: Tensor, terms: Terms) -> None:
    """`Backend.accumulate` without the sums of squares."""
    if isinstance(terms.buffer_weight, Tensor):
        buffer.mul_(by_matrix(terms.buffer_weight.float(), buffer.ndim))
    elif terms.buffer_weight == 0:
        buffer.zero_()
    else:
        buffer.mul_(terms.buffer_weight)
    if terms.codes is not None:
        buffer += decode(terms.codes) * terms.code_weight
    if terms.grad is not None:
        buffer += terms.grad.float() * terms.grad_weight


def row_squares(x: Tensor) -> Tensor:
    """The sum of squares of each row, [.., m], in the widest dtype there is."""
    return x.to(accumulation_dtype(x.device)).square().sum(dim=-1)


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


@functools.lru_cache(maxsize=64)
def rotation_tensors(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs of a rotation, float32 [columns] each."""
    first, second = rotation_signs(columns)
    return (
        torch.tensor(first, dtype=torch.float32, device=device),
        torch.tensor(second, dtype=torch.float32, device=device),
    )


def rotate(x: Tensor, *, inverse: bool) -> None:
    """`Backend.rotate`."""
    columns = x.shape[-1]
    size = 1 << (columns.bit_length() - 1)
    first, second = rotation_tensors(columns, x.device)
    parts = [(first, slice(0, size))]
    if size < columns:
        parts.append((second, slice(columns - size, columns)))
    for signs, part in reversed(parts) if inverse else parts:
        if not inverse:
            x *= signs
        transformed = x[..., part].clone(memory_format=torch.contiguous_format).flatten(0, -2)
        hadamard_transform_(transformed)
        x[..., part] = transformed.view(*x.shape[:-1], size)
        if inverse:
            x *= signs


def multiply(p: Product) -> Tensor:
    """`Backend.product` and `Backend.symmetric_product`."""
    a, b = _wide(p.a), _wide(p.a.mT if p.b is None else p.b)
    with float32_products():
        result = _rounded_product(a, b, p) if p.rounded else a @ b
    result.mul_(by_matrix(p.alpha, p.a.ndim) if isinstance(p.alpha, Tensor) else p.alpha)
    if p.addend is not None:
        result.add_(p.addend, alpha=p.beta)
    if p.other is not None:
        result.add_(p.other, alpha=p.gamma)
    if p.identity:
        result.diagonal(dim1=-2, dim2=-1).add_(p.identity)
    if p.symmetric:
        result = (result + result.mT).mul_(0.5)
    if p.out is None:
        return result.to(p.a.dtype)
    if p.active is not None:
        result = torch.where(by_matrix(p.active, p.a.ndim), result.to(p.out.dtype), p.out)
    return p.out.copy_(result)


def _rounded_product(a: Tensor, b: Tensor, p: Product) -> Tensor:
    """The product of rounded factors, but for what the diagonals multiply."""
    assert p.rounded is not None
    if p.diagonal is None:
        return a.to(p.rounded).to(a.dtype) @ b.to(p.rounded).to(b.dtype)
    kept = _only_diagonal(a, p.diagonal)
    # (one term for each element: exact but for its rounding)
    result = kept @ b
    a = a - kept
    if p.symmetric:
        kept = _only_diagonal(b, 0)
        result += a @ kept
        b = b - kept
    return result.add_(a.to(p.rounded).to(a.dtype) @ b.to(p.rounded).to(b.dtype))


def _only_diagonal(x: Tensor, diagonal: int) -> Tensor:
    """Zeros, but for the elements (k + diagonal, k)."""
    result = torch.zeros_like(x)
    result.diagonal(-diagonal, -2, -1).copy_(x.diagonal(-diagonal, -2, -1))
    return result


def by_matrix(values: Tensor, dimensions: int) -> Tensor:
    """[b] beside matrices [b, m, n], or [1] beside one [m, n]."""
    return values.view(-1, *(1,) * (dimensions - 1))


def _wide(x: Tensor) -> Tensor:
    """In the dtype that products are summed in."""
    return x if x.dtype == torch.float64 else x.float()


def integer_levels(codes: PackedCodes) -> Tensor:
    """The levels of codes: float32 [.., m, n], whole numbers."""
    return decode(dataclasses.replace(codes, scales=torch.ones_like(codes.scales)))


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, int32, of whole numbers that are int8 in float32.

    float32 holds every sum of up to 512 products of int8, also where products are taken in TF32 or
    bfloat16, which hold their factors.
    """
    shape = (*left.shape[:-1], right.shape[-1])
    total = torch.zeros(shape, dtype=torch.int32, device=left.device)
    for a, b in zip(left.split(512, dim=-1), right.split(512, dim=-2), strict=True):
        total += (a @ b).int()
    return total


def code_gram(codes: PackedCodes) -> Tensor:
    """`Backend.code_gram`: exact sums over segments, scaled and added up in float32."""
    block = codes.layout.effective_block(codes.columns)
    segment = block if block == codes.columns else min(block, INTEGER_SEGMENT)
    levels = integer_levels(codes)
    scales = expand_scales(codes.scales, codes.layout, codes.columns)[..., ::segment]
    shape = (*levels.shape[:-1], levels.shape[-2])
    total = torch.zeros(shape, dtype=torch.float32, device=levels.device)
    for index, part in enumerate(levels.split(segment, dim=-1)):
        scale = scales[..., index]
        outer = scale.unsqueeze(-1) * scale.unsqueeze(-2)
        total += exact_product(part, part.mT).float() * outer
    return total


def code_product(a: Tensor, codes: PackedCodes) -> Tensor:
    """`Backend.code_product` without the addend, float32."""
    return _limbs_product(a * codes.scales[..., 0].unsqueeze(-2), integer_levels(codes))


def code_times(codes: PackedCodes, v: Tensor) -> Tensor:
    """`Backend.code_times`."""
    return codes.scales * _limbs_product(v.mT, integer_levels(codes).mT).mT


def _limbs_product(a: Tensor, levels: Tensor) -> Tensor:
    """a @ levels with the rows of a in two limbs."""
    whole, scales = round_to_whole(a, LIMB_LIMIT)
    low = (whole + 128) % 256 - 128
    low, high = low.float(), ((whole - low) / 256).float()
    sums = 256 * exact_product(high, levels).float() + exact_product(low, levels).float()
    return scales * sums


def round_to_whole(a: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """(whole, scales): a = scales * whole to half a unit, |whole| <= limit.

    a: float32 [.., k, m]; whole: float64 [.., k, m] (float32 where there is no float64); scales:
    float32 [.., k, 1]. A row that is not finite has the scale NaN, one too small to divide by the
    whole numbers zero.
    """
    largest = a.abs().amax(dim=-1, keepdim=True)
    # (number / tensor would multiply by a rounded reciprocal)
    limits = torch.full_like(largest, limit)
    scales = largest / limits
    usable = (scales >= SMALLEST_SCALE) & largest.isfinite()
    inverse = torch.where(usable, limits / largest, torch.zeros_like(largest))
    whole = torch.where(usable, a * inverse, torch.zeros_like(a)).round()
    scales = torch.where(largest.isfinite(), scales, torch.full_like(scales, math.nan))
    return whole.to(accumulation_dtype(a.device)), scales


def updated_weight(
    weight: Tensor, update: Tensor, decay: Tensor, step_size: Tensor, seed: Tensor | None,
    cautious: bool,
) -> Tensor:  # fmt: skip
    """`Backend.update_weight`: the new weight."""
    factors = decay
    if cautious:
        factors = torch.where(weight.float() * update.float() >= 0, decay, 1.0)
    result = (weight.float() * factors).sub_(update.float() * step_size)  # two copies at a time
    if seed is not None:
        result = _round_stochastically(result, seed)
    unchanged = (decay == 1) & (step_size == 0)
    return torch.where(unchanged, weight, result.to(weight.dtype))


def random_bits(seed: Tensor, index: Tensor) -> Tensor:
    """32 bits for each index below 2**32, int64: mix(mix(index) + mix(seed)).

    mix is the finaliser of MurmurHash3 (https://github.com/aappleby/smhasher). seed: int32.
    """
    return _mix((_mix(index) + _mix(seed.long() & 0xFFFFFFFF)) & 0xFFFFFFFF)


def _mix(h: Tensor) -> Tensor:
    # int64 products wrap, which leaves their low 32 bits right
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def _round_stochastically(x: Tensor, seed: Tensor) -> Tensor:
    """float32 [m, n] whose lower 16 bits are zero (see `Backend.update_weight`)."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape) & 0xFFFFFFFF
    noise = random_bits(seed, index) & 0xFFFF
    cut = ((x.view(torch.int32).long() + noise) & ~0xFFFF).to(torch.int32)
    return torch.where(x.isfinite(), cut.view(torch.float32), x)


class Kernels:
    """What backends override: the methods of `Backend`, of arguments that it has checked.

    No matrix is empty, but for factors of `_multiply`. Codes are contiguous tensors.
    """

    def _quantize(self, x: Tensor, codes: PackedCodes, statistic: str) -> None:
        """Write into `codes`; statistic: the layout's, or "given" for the scales that are there."""
        if statistic != "given":
            codes.scales.copy_(block_scales(x, codes.layout))
        codes.packed.copy_(encode(x, codes.scales, codes.codebook, codes.layout))

    def _accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """Rows of the buffer lie at even distances."""
        add_terms(buffer, terms)
        return row_squares(buffer)

    def _update_codes(
        self, terms: Terms, new: PackedCodes, out: Tensor | None, out_weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        """Rows of `out` lie at even distances."""
        _, grad = terms.codes_and_grad()
        x = out  # in `out` itself where that can hold X
        if x is None or x.dtype != torch.float32:
            x = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        squares = self._accumulate(x, terms)
        self._quantize(x, new, new.layout.statistic)
        if out is None:
            return squares, torch.zeros_like(squares)
        value_weight, grad_weight = out_weights
        out_squares = self._accumulate(x, Terms(value_weight, grad=grad, grad_weight=grad_weight))
        if x is not out:
            out.copy_(x)
        return squares, out_squares

    def _rotate(self, x: Tensor, inverse: bool) -> None:
        """Rows of x lie at even distances."""
        rotate(x, inverse=inverse)

    def _multiply(self, p: Product) -> Tensor:
        return multiply(p)

    def _combined(
        self,
        coefficients: Sequence[Sequence[float]],
        terms: Sequence[Tensor],
        out: Sequence[Tensor],
    ) -> None:
        for row, result in zip(coefficients, out, strict=True):
            if len(row) == 1:
                result.copy_(terms[0])
                continue
            torch.add(terms[0], terms[1], alpha=row[1], out=result)
            for number, term in zip(row[2:], terms[2:], strict=True):
                result.add_(term, alpha=number)

    def _add_inverses(
        self, x: Tensor, poles: Sequence[float], weights: Sequence[float], out: Tensor
    ) -> None:
        """out <- out + the fractions; out is contiguous."""
        for pole, weight in zip(poles, weights, strict=True):
            shifted = x.clone()
            shifted.diagonal(dim1=-2, dim2=-1).add_(pole)
            factor, _ = torch.linalg.cholesky_ex(shifted)
            inverse = torch.cholesky_inverse(factor)
            out.add_(inverse.tril() + inverse.tril(-1).mT, alpha=weight)

    def _code_gram(self, codes: PackedCodes, out: Tensor) -> None:
        out.copy_(code_gram(codes))

    def _code_product(self, a: Tensor, codes: PackedCodes, out: Tensor, beta: float) -> None:
        result = code_product(a, codes)
        out.copy_(result if beta == 0 else beta * out.float() + result)

    def _code_times(self, codes: PackedCodes, v: Tensor, out: Tensor) -> None:
        out.copy_(code_times(codes, v))

    def _scaled(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        factor = factor.float().view(-1, 1, 1)
        out.copy_(torch.where(factor == 0, 0.0, x * factor))

    def _update_weight(
        self, weight: Tensor, update: Tensor, decay: Tensor, step_size: Tensor,
        seed: Tensor | None, cautious: bool,
    ) -> None:  # fmt: skip
        weight.copy_(updated_weight(weight, update, decay, step_size, seed, cautious))
