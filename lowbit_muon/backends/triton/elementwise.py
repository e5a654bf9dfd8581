"""Adapter of the kernels that go element by element or row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.reference import rotation_tensors
from lowbit_muon.backends.triton.device import on_device, tables
from lowbit_muon.backends.triton.kernels import rotation, rows, weights
from lowbit_muon.formats.codebook import CodeLayout

# Of a sum of matrices, and such sums, that the kernel takes at once: a root iteration's
# (`linalg.root_iteration`).
MOST_TERMS, MOST_SUMS = 5, 3


class Elementwise(Backend):
    """All but the products; results are the reference's bits, but for sums of matrices."""

    def _quantize(self, x: Tensor, codes: PackedCodes, statistic: str) -> None:
        _update(Terms(grad=x), codes, statistic)

    def _update_codes(
        self, terms: Terms, new: PackedCodes, out: Tensor | None, out_weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        squares = new.packed.new_empty(2, *new.packed.shape[:-1], dtype=torch.float64)
        _update(terms, new, new.layout.statistic, out, out_weights, squares)
        return squares[0], squares[1]

    def _accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        target = buffer.flatten(0, -2)
        m, n = target.shape
        packed, scales, levels = target, target, target  # not read without codes
        bits, scale_block = 0, 0
        if terms.codes is not None:
            codes = terms.codes.flat()
            packed, scales = codes.packed, codes.scales
            bits, scale_block = codes.layout.bits, _scale_block(codes.layout, n)
            levels, _ = tables(codes.codebook, bits, buffer.device)
        source = target if terms.grad is None else terms.grad.flatten(0, -2)
        weight = terms.buffer_weight
        by_matrix = isinstance(weight, Tensor)
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
                weight.contiguous() if isinstance(weight, Tensor) else float(weight),
                float(terms.code_weight),
                float(terms.grad_weight),
                HAS_BUFFER=by_matrix or weight != 0,
                MATRIX_ROWS=buffer.shape[-2] if by_matrix else 0,
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

    def _rotate(self, x: Tensor, inverse: bool) -> None:
        target = x.flatten(0, -2)
        m, n = target.shape
        size = 1 << (n.bit_length() - 1)
        first_signs, second_signs = rotation_tensors(n, x.device)
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

    def _scaled(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        batch, m, n = x.shape
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

    def _combined(
        self,
        coefficients: Sequence[Sequence[float]],
        terms: Sequence[Tensor],
        out: Sequence[Tensor],
    ) -> None:
        if terms[0].dtype != torch.float32 or len(terms) > MOST_TERMS or len(out) > MOST_SUMS:
            super()._combined(coefficients, terms, out)
            return
        terms = [term.contiguous() for term in terms]
        padding = [terms[0]] * (MOST_TERMS - len(terms))
        missing = MOST_SUMS - len(out)
        each = [*coefficients, *[coefficients[-1]] * missing]
        numbers = [float(number) for row in each for number in (*row[1:], *[0.0] * len(padding))]
        size = terms[0].numel()
        with on_device(terms[0]):
            weights.combined_kernel[(triton.cdiv(size, weights.SUM_TILE),)](
                *terms,
                *padding,
                *out,
                *[out[-1]] * missing,
                size,
                *numbers,
                TERMS=len(terms),
                SUMS=len(out),
                TILE=weights.SUM_TILE,
                **weights.OPTIONS,
            )

    def _update_weight(
        self, weight: Tensor, update: Tensor, decay: Tensor, step_size: Tensor,
        seed: Tensor | None, cautious: bool,
    ) -> None:  # fmt: skip
        m, n = weight.shape
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
                CAUTIOUS=cautious,
                BLOCK_M=weights.BLOCK_M,
                BLOCK_N=weights.BLOCK_N,
                **weights.OPTIONS,
            )


def _update(
    terms: Terms,  # of a gradient, and codes
    new: PackedCodes,
    statistic: str,
    out: Tensor | None = None,
    out_weights: tuple[float, float] = (1.0, 0.0),
    squares: Tensor | None = None,
) -> None:
    """Quantise the terms' sum into `new`."""
    assert terms.grad is not None
    grad, packed, scales = (x.flatten(0, -2) for x in (terms.grad, new.packed, new.scales))
    m, n = grad.shape
    layout = new.layout
    old = terms.codes.flat() if terms.codes is not None else None
    old_packed, old_scales = (packed, scales) if old is None else (old.packed, old.scales)
    levels, thresholds = tables(new.codebook, layout.bits, grad.device)
    block = layout.effective_block(n)
    block_m, tile = _tile(grad, n)
    piece = min(tile, triton.next_power_of_2(block))
    target = grad if out is None else out.flatten(0, -2)
    arguments: dict[str, Any] = {
        "HAS_CODES": old is not None,
        "STATISTIC": statistic,
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
            len(new.codebook.thresholds),
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
