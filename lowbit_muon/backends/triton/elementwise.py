"""Adapter of the kernels that go element by element or row by row."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes, SumsRows
from lowbit_muon.backends.triton.checks import (
    FLOAT_TYPES,
    changed,
    check,
    check_book,
    check_codes,
    check_writable_rows,
    on_device,
    output,
    tables,
)
from lowbit_muon.backends.triton.kernels import rotation, rows, weights
from lowbit_muon.formats.codebook import Codebook, CodeLayout, rotation_signs


class Elementwise(SumsRows):
    """`Backend` and `DeviceBackend` without the products; results are the reference's bits."""

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
        check(x, "x", None, torch.float32)
        check_book(codebook, layout)
        m, n = x.shape
        packed = output(packed, "packed", (m, layout.row_bytes(n)), torch.uint8, x)
        scales = output(scales, "scales", (m, layout.blocks(n)), torch.float32, x)
        _update(x, codebook, layout, packed, scales, layout.statistic)
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
        check(x, "x", None, torch.float32)
        check_book(codebook, layout)
        m, n = x.shape
        check(scales, "scales", (m, layout.blocks(n)), torch.float32, x)
        packed = output(packed, "packed", (m, layout.row_bytes(n)), torch.uint8, x)
        _update(x, codebook, layout, packed, scales.contiguous(), "given")
        return packed

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
        """See `DeviceBackend.update_codes`. `out` is not `grad`, which is read after it."""
        check(grad, "grad", None, FLOAT_TYPES)
        m, n = grad.shape
        old = check_codes(codes, (m, n), grad)
        layout = codes.layout
        output(packed, "packed", (m, layout.row_bytes(n)), torch.uint8, grad)
        output(scales, "scales", (m, layout.blocks(n)), torch.float32, grad)
        _check_apart(packed, "packed", codes.packed, "codes.packed")
        _check_apart(scales, "scales", codes.scales, "codes.scales")
        if out is not None:
            check(out, "out", (m, n), FLOAT_TYPES, grad)
            _check_apart(out, "out", grad, "grad")
            changed(out)
        squares = torch.empty(2, m, dtype=torch.float64, device=grad.device)
        if not grad.numel():
            return squares.zero_()
        _update(
            grad,
            codes.codebook,
            layout,
            packed,
            scales,
            layout.statistic,
            old=old,
            code_weight=code_weight,
            grad_weight=grad_weight,
            out=out,
            out_value_weight=out_value_weight,
            out_grad_weight=out_grad_weight,
            squares=squares,
        )
        return squares

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
        check_writable_rows(buffer, "buffer")
        changed(buffer)
        m, n = buffer.shape
        packed, scales, levels = buffer, buffer, buffer  # not read without codes
        bits, scale_block = 0, 0
        if codes is not None:
            packed, scales = check_codes(codes, (m, n), buffer)
            bits, scale_block = codes.layout.bits, _scale_block(codes.layout, n)
            levels, _ = tables(codes.codebook, bits, buffer.device)
        if grad is not None:
            check(grad, "grad", (m, n), FLOAT_TYPES, buffer)
        if not buffer.numel():
            return torch.zeros(m, dtype=torch.float64, device=buffer.device)
        source = buffer if grad is None else grad
        block_m, block_n = _tile(source, n)
        span = block_n * rows.ACCUMULATE_STEPS
        squares = torch.empty(m, triton.cdiv(n, span), dtype=torch.float64, device=buffer.device)
        with on_device(buffer):
            rows.accumulate_kernel[(triton.cdiv(m, block_m), squares.shape[1])](
                buffer,
                buffer.stride(0),
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
                float(buffer_weight),
                float(code_weight),
                float(grad_weight),
                HAS_BUFFER=buffer_weight != 0,
                HAS_GRAD=grad is not None,
                BITS=bits,
                SCALE_BLOCK=scale_block,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                STEPS=rows.ACCUMULATE_STEPS,
                **rows.OPTIONS,
            )
        return squares[:, 0] if squares.shape[1] == 1 else squares.sum(dim=1)

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        check_writable_rows(x, "x")
        changed(x)
        m, n = x.shape
        if not x.numel():
            return
        size = 1 << (n.bit_length() - 1)
        first_signs, second_signs = _signs(n, x.device)
        with on_device(x):
            rotation.rotate_kernel[(m,)](
                x,
                x.stride(0),
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
        """See `DeviceBackend.scaled`."""
        check(x, "x", None, torch.float32, dimensions=(3,))
        batch, m, n = x.shape
        check(factor, "factor", (batch,), torch.float32, x)
        check(out, "out", (batch, m, n), FLOAT_TYPES, x)
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
        """See `DeviceBackend.update_weight`."""
        check(weight, "weight", None, FLOAT_TYPES)
        m, n = weight.shape
        check(update, "update", (m, n), FLOAT_TYPES, weight)
        _check_element(decay, "decay", torch.float32, weight)
        _check_element(step_size, "step_size", torch.float32, weight)
        if seed is not None:
            _check_element(seed, "seed", torch.int32, weight)
            if weight.dtype != torch.bfloat16:
                raise TypeError(f"weight: expected bfloat16 with a seed, got {weight.dtype}")
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
    grad: Tensor,
    codebook: Codebook,
    layout: CodeLayout,
    packed: Tensor,
    scales: Tensor,
    statistic: str,
    *,
    old: tuple[Tensor, Tensor] | None = None,  # (packed, scales)
    code_weight: float = 1.0,
    grad_weight: float = 1.0,
    out: Tensor | None = None,
    out_value_weight: float = 1.0,
    out_grad_weight: float = 0.0,
    squares: Tensor | None = None,
) -> None:
    """Quantise code_weight*old + grad_weight*grad into (packed, scales)."""
    m, n = grad.shape
    if not grad.numel():
        return
    old_packed, old_scales = (packed, scales) if old is None else old
    levels, thresholds = tables(codebook, layout.bits, grad.device)
    block = layout.effective_block(n)
    block_m, tile = _tile(grad, n)
    piece = min(tile, triton.next_power_of_2(block))
    target = grad if out is None else out
    arguments: dict[str, Any] = {
        "HAS_CODES": old is not None,
        "STATISTIC": statistic,
        "HAS_OUT": out is not None,
        "OUT_VALUE": out_value_weight != 0,
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
            float(code_weight),
            float(grad_weight),
            float(out_value_weight),
            float(out_grad_weight),
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


def _check_apart(written: Tensor, name: str, read: Tensor, other: str) -> None:
    """Raise for the overlap that is easy to make: results in the place of what is read again."""
    if written.numel() and written.data_ptr() == read.data_ptr():
        raise ValueError(f"{name}: expected other memory than that of {other}, got the same")


def _check_element(x: Tensor, name: str, dtype: torch.dtype, like: Tensor) -> None:
    check(x, name, None, dtype, like, dimensions=(0, 1, 2, 3))
    if x.numel() != 1:
        raise ValueError(f"{name}: expected one element, got shape {tuple(x.shape)}")


@functools.lru_cache(maxsize=64)
def _signs(columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The signs of a rotation, float32 [columns] each."""
    first, second = rotation_signs(columns)
    return (
        torch.tensor(first, dtype=torch.float32, device=device),
        torch.tensor(second, dtype=torch.float32, device=device),
    )
