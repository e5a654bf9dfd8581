"""`DeviceBackend` in torch operations: what the GPU kernels are tested against.

Runs on any device; what it saves are waits of the host, not passes over memory.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes, SumsRows
from lowbit_muon.backends.reference import ReferenceBackend, add_terms
from lowbit_muon.backends.tensors import accumulation_dtype


class DeviceReferenceBackend(SumsRows, ReferenceBackend):
    """The operations that a `DeviceBackend` adds, and batches."""

    def accumulate_rows(
        self,
        buffer: Tensor,
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,
        grad_weight: float = 1.0,
    ) -> Tensor:
        """See `DeviceBackend.accumulate_rows`."""
        add_terms(buffer, buffer_weight, codes, code_weight, grad, grad_weight)
        return _row_squares(buffer)

    def update_codes(
        self,
        codes: PackedCodes,
        grad: Tensor,
        *,
        code_weight: float,
        grad_weight: float,
        packed: Tensor,
        scales: Tensor,
        out: Tensor | None = None,
        out_value_weight: float = 1.0,
        out_grad_weight: float = 0.0,
    ) -> Tensor:
        """See `DeviceBackend.update_codes`."""
        x = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        squares = [
            self.accumulate_rows(
                x, codes=codes, code_weight=code_weight, grad=grad, grad_weight=grad_weight
            )
        ]
        self.quantize(x, codes.codebook, codes.layout, packed=packed, scales=scales)
        if out is not None:
            squares.append(
                self.accumulate_rows(
                    x, buffer_weight=out_value_weight, grad=grad, grad_weight=out_grad_weight
                )
            )
            out.copy_(x)
        else:
            squares.append(torch.zeros_like(squares[0]))
        return torch.stack(squares)

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        if codes.packed.ndim == 2:
            return super().code_gram(codes)
        return torch.stack([self.code_gram(one) for one in _unbatch(codes)])

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        if codes.packed.ndim == 2:
            return super().code_product(a, codes, out=out, beta=beta)
        if out is None:
            out = a.new_empty(*a.shape[:2], codes.columns)
        for left, one, result in zip(a, _unbatch(codes), out, strict=True):
            self.code_product(left, one, out=result, beta=beta)
        return out

    def product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        out: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        active: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.product`."""
        result = (a.float() @ b.float()).mul_(alpha)
        if out is None:
            out = a.new_empty(result.shape)
        elif beta != 0:
            result.add_(out, alpha=beta)
        return _store(result, out, active)

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.symmetric_product`; exactly symmetric."""
        result = (a.float() @ (a.mT if b is None else b).float()).mul_(alpha)
        if addend is not None:
            result.add_(addend, alpha=beta)
        result = (result + result.mT).mul_(0.5)
        return _store(result, a.new_empty(result.shape) if out is None else out, active)

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """See `DeviceBackend.scaled`."""
        factor = factor.view(-1, 1, 1)
        return out.copy_(torch.where(factor == 0, 0.0, x * factor))

    def update_weight(
        self,
        weight: Tensor,
        update: Tensor,
        *,
        decay: Tensor,
        step_size: Tensor,
        seed: Tensor | None = None,
    ) -> None:
        """See `DeviceBackend.update_weight`."""
        weight32 = weight.float()
        result = weight32 * decay - update.float() * step_size
        result = torch.where((decay == 1) & (step_size == 0), weight32, result)
        if seed is not None:
            if weight.dtype != torch.bfloat16:
                raise TypeError(f"weight: expected bfloat16 with a seed, got {weight.dtype}")
            result = _round_stochastically(result, seed)
        weight.copy_(result)


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
    """float32 [m, n] whose lower 16 bits are zero (see `DeviceBackend.update_weight`)."""
    index = torch.arange(x.numel(), device=x.device).view(x.shape) & 0xFFFFFFFF
    noise = random_bits(seed, index) & 0xFFFF
    cut = ((x.view(torch.int32).long() + noise) & ~0xFFFF).to(torch.int32)
    return torch.where(x.isfinite(), cut.view(torch.float32), x)


def _row_squares(x: Tensor) -> Tensor:
    return x.to(accumulation_dtype(x.device)).square().sum(dim=1)


def _unbatch(codes: PackedCodes) -> list[PackedCodes]:
    return [
        dataclasses.replace(codes, packed=packed, scales=scales)
        for packed, scales in zip(codes.packed, codes.scales, strict=True)
    ]


def _store(result: Tensor, out: Tensor, active: Tensor | None) -> Tensor:
    """out <- result, where active."""
    if active is None:
        return out.copy_(result)
    shape = (-1, 1, 1) if out.ndim == 3 else (1, 1)
    return out.copy_(torch.where(active.view(shape), result.to(out.dtype), out))
