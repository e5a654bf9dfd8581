"""Adapter of the kernels that go element by element or row by row."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.memory import KERNEL_DTYPES, changed, check_apart, check_book
from lowbit_muon.backends.triton.device import CHECKS, on_device, tables
from lowbit_muon.backends.triton.kernels import rotation, rows, weights
from lowbit_muon.formats.codebook import Codebook, CodeLayout, rotation_signs


class Elementwise(Backend):
    """All but the products; results are the reference's bits."""

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
        CHECKS.tensor(x, "x", None, torch.float32)
        check_book(codebook, layout)
        *leading, n = x.shape
        packed_shape, scales_shape = (*leading, layout.row_bytes(n)), (*leading, layout.blocks(n))
        packed = CHECKS.output(packed, "packed", packed_shape, torch.uint8, like=x)
        scales = CHECKS.output(scales, "scales", scales_shape, torch.float32, like=x)
        changed(packed, scales)
        _update(Terms(grad=x), codebook, layout, packed, scales)
        return packed, scales

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
        CHECKS.tensor(x, "x", None, torch.float32)
        check_book(codebook, layout)
        *leading, n = x.shape
        CHECKS.tensor(scales, "scales", (*leading, layout.blocks(n)), torch.float32, like=x)
        packed_shape = (*leading, layout.row_bytes(n))
        packed = CHECKS.output(packed, "packed", packed_shape, torch.uint8, like=x)
        changed(packed)
        _update(Terms(grad=x), codebook, layout, packed, scales.contiguous(), statistic="given")
        return packed

    def update_codes(
        self,
        terms: Terms,
        *,
        packed: Tensor,
        scales: Tensor,
        out: Tensor | None = None,
        out_weights: tuple[float, float] = (1.0, 0.0),
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.update_codes`. `out` is not the gradient, which is read after it."""
        codes, grad = terms.codes_and_grad()
        CHECKS.tensor(grad, "grad", None, KERNEL_DTYPES)
        shape = tuple(grad.shape)
        codes = CHECKS.codes(codes, shape, like=grad)
        CHECKS.output(packed, "packed", tuple(codes.packed.shape), torch.uint8, like=grad)
        CHECKS.output(scales, "scales", tuple(codes.scales.shape), torch.float32, like=grad)
        check_apart(packed, "packed", codes.packed, "codes.packed")
        check_apart(scales, "scales", codes.scales, "codes.scales")
        written = None
        if out is not None:
            CHECKS.tensor(out, "out", shape, KERNEL_DTYPES, like=grad)
            check_apart(out, "out", grad, "grad")
            changed(out)
            written = out.flatten(0, -2)  # a copy where rows are not at even distances
        changed(packed, scales)
        new = torch.empty if grad.numel() else torch.zeros
        squares = new(2, *shape[:-1], dtype=torch.float64, device=grad.device)
        _update(
            replace(terms, codes=codes),
            codes.codebook,
            codes.layout,
            packed,
            scales,
            out=written,
            out_weights=out_weights,
            squares=squares,
        )
        if out is not None and written is not None and written.data_ptr() != out.data_ptr():
            out.copy_(written.view(shape))
        return squares[0], squares[1]

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """See `Backend.accumulate`."""
        target = CHECKS.rows_in_place(buffer, "buffer")
        m, n = target.shape
        packed, scales, levels = target, target, target  # not read without codes
        bits, scale_block = 0, 0
        if terms.codes is not None:
            codes = CHECKS.codes(terms.codes, tuple(buffer.shape), like=buffer).flat()
            packed, scales = codes.packed, codes.scales
            bits, scale_block = codes.layout.bits, _scale_block(codes.layout, n)
            levels, _ = tables(codes.codebook, bits, buffer.device)
        source = target
        if terms.grad is not None:
            CHECKS.tensor(terms.grad, "grad", tuple(buffer.shape), KERNEL_DTYPES, like=buffer)
            source = terms.grad.flatten(0, -2)
        changed(buffer)
        if not buffer.numel():
            return torch.zeros(buffer.shape[:-1], dtype=torch.float64, device=buffer.device)
        block_m, block_n = _tile(source, n)
        span = block_n * rows.ACCUMULATE_STEPS
        squares = torch.empty(m, triton.cdiv(n, span), dtype=torch.float64, device=buffer.device)
        with on_device(buffer):
            rows.accumulate_kernel[(triton.cdiv(m, block_m), squares.shape[1])](
                target,
                target.stride(0),
                packed,
                packed.stride(0),
                scales,
                scales.stride(0),
                levels,
                source,
                source.stride(0),
                source.stride(1),
                squares,
                m,
                n,
                float(terms.buffer_weight),
                float(terms.code_weight),
                float(terms.grad_weight),
                HAS_BUFFER=terms.buffer_weight != 0,
                HAS_GRAD=terms.grad is not None,
                BITS=bits,
                SCALE_BLOCK=scale_block,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                STEPS=rows.ACCUMULATE_STEPS,
                **rows.OPTIONS,
            )
        row_squares = squares[:, 0] if squares.shape[1] == 1 else squares.sum(dim=1)
        return row_squares.view(buffer.shape[:-1])

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        target = CHECKS.rows_in_place(x, "x")
        m, n = target.shape
        changed(x)
        if not x.numel():
            return
        size = 1 << (n.bit_length() - 1)
        first_signs, second_signs = _signs(n, x.device)
        with on_device(x):
            rotation.rotate_kernel[(m,)](
                target,
                target.stride(0),
                first_signs,
                second_signs,
                n,
                1 / math.sqrt(size),
                INVERSE=inverse,
                PARTS=1 if size == n else 2,
                SIZE=size,
                TILE=min(size, rotation.LARGEST_TILE),
                **rotation.OPTIONS,
            )

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """See `Backend.scaled`."""
        CHECKS.tensor(x, "x", None, torch.float32, dimensions=(3,))
        batch, m, n = x.shape
        CHECKS.tensor(factor, "factor", (batch,), torch.float32, like=x)
        CHECKS.tensor(out, "out", (batch, m, n), KERNEL_DTYPES, like=x)
        changed(out)
        if not x.numel():
            return out
        with on_device(x):
            weights.scaled_kernel[(_weight_tiles(m, n), batch)](
                x,
                *x.stride(),
                factor,
                factor.stride(0),
                out,
                *out.stride(),
                m,
                n,
                BLOCK_M=weights.BLOCK_M,
                BLOCK_N=weights.BLOCK_N,
                **weights.OPTIONS,
            )
        return out

    def update_weight(
        self,
        weight: Tensor,
        update: Tensor,
        *,
        decay: Tensor,
        step_size: Tensor,
        seed: Tensor | None = None,
    ) -> None:
        """See `Backend.update_weight`."""
        CHECKS.weight_update(weight, update, decay, step_size, seed)
        m, n = weight.shape
        changed(weight)
        if not weight.numel():
            return
        with on_device(weight):
            weights.update_weight_kernel[(_weight_tiles(m, n),)](
                weight,
                *weight.stride(),
                update,
                *update.stride(),
                decay,
                step_size,
                decay if seed is None else seed,
                m,
                n,
                STOCHASTIC=seed is not None,
                BLOCK_M=weights.BLOCK_M,
                BLOCK_N=weights.BLOCK_N,
                **weights.OPTIONS,
            )


def _update(
    terms: Terms,  # of a gradient, and codes with contiguous rows
    codebook: Codebook,
    layout: CodeLayout,
    packed: Tensor,
    scales: Tensor,
    *,
    statistic: str | None = None,  # None: the layout's
    out: Tensor | None = None,  # [rows, n]
    out_weights: tuple[float, float] = (1.0, 0.0),
    squares: Tensor | None = None,
) -> None:
    """Quantise the terms' sum into (packed, scales)."""
    assert terms.grad is not None
    grad, packed, scales = (x.flatten(0, -2) for x in (terms.grad, packed, scales))
    m, n = grad.shape
    if not grad.numel():
        return
    old = terms.codes.flat() if terms.codes is not None else None
    old_packed, old_scales = (packed, scales) if old is None else (old.packed, old.scales)
    levels, thresholds = tables(codebook, layout.bits, grad.device)
    block = layout.effective_block(n)
    block_m, tile = _tile(grad, n)
    piece = min(tile, triton.next_power_of_2(block))
    target = grad if out is None else out
    arguments: dict[str, Any] = {
        "HAS_CODES": old is not None,
        "STATISTIC": statistic or layout.statistic,
        "HAS_OUT": out is not None,
        "OUT_VALUE": out_weights[0] != 0,
        "HAS_SQUARES": squares is not None,
        "BITS": layout.bits,
        "SCALE_BLOCK": _scale_block(layout, n),
        "GROUP": tile // piece,
        "PIECE": piece,
        "BLOCK_M": block_m,
    }
    with on_device(grad):
        rows.update_kernel[(triton.cdiv(m, block_m),)](
            old_packed,
            old_packed.stride(0),
            old_scales,
            old_scales.stride(0),
            levels,
            thresholds,
            len(codebook.thresholds),
            grad,
            grad.stride(0),
            grad.stride(1),
            packed,
            scales,
            target,
            target.stride(0),
            target.stride(1),
            scales if squares is None else squares,
            m,
            n,
            block,
            layout.blocks(n),
            layout.row_bytes(n),
            layout.clip,
            float(terms.code_weight),
            float(terms.grad_weight),
            float(out_weights[0]),
            float(out_weights[1]),
            **arguments,
            **rows.OPTIONS,
        )


def _tile(grad: Tensor, columns: int) -> tuple[int, int]:
    """(rows, columns) of a tile that reads `grad` in whole sectors of memory."""
    block_m = 1 if columns == 1 or grad.stride(1) == 1 else rows.STRIDED_ROWS
    return block_m, rows.TILE // block_m


def _scale_block(layout: CodeLayout, columns: int) -> int:
    """Columns of a scale; 0 for one a row."""
    block = layout.effective_block(columns)
    return 0 if block == columns else block


def _weight_tiles(m: int, n: int) -> int:
    return int(triton.cdiv(m, weights.BLOCK_M) * triton.cdiv(n, weights.BLOCK_N))


@functools.lru_cache(maxsize=64)
def _signs(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs of a rotation, float32 [columns] each."""
    first, second = rotation_signs(columns)
    return (
        torch.tensor(first, dtype=torch.float32, device=device),
        torch.tensor(second, dtype=torch.float32, device=device),
    )
