"""What a backend offers. `Backend` itself computes in torch operations, on any device.

It is the ground truth ("reference") that every kernel is tested against, and what a backend
inherits where it has no kernel: a new one is a folder with a subclass and a line in the registry
of `backends/__init__.py`. Element-wise and integer operations give the same bits in all backends;
float products agree to the rounding of their sums.

Matrices are [m, n], or [b, m, n] for a batch of them, each by itself.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends import reference
from lowbit_muon.backends.codes import (
    INTEGER_SEGMENT,
    LIMB_LIMIT,
    PackedCodes,
    Terms,
    check_integer_codes,
)
from lowbit_muon.backends.memory import share_memory
from lowbit_muon.formats.codebook import Codebook, CodeLayout


class Backend:
    """The kernels, in torch operations.

    name: as in the registry. asynchronous: it works on a device that the host must never wait for:
    what depends on values is left in tensors there. Only such backends take float16 and bfloat16
    in their dense products.
    """

    name: ClassVar[str] = "reference"
    asynchronous: ClassVar[bool] = False

    def quantize(
        self,
        x: Tensor,  # float32 [.., m, n]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,  # uint8 [.., m, layout.row_bytes(n)]
        scales: Tensor | None = None,  # float32 [.., m, layout.blocks(n)]
    ) -> tuple[Tensor, Tensor]:
        """Scales from the statistic of each block, then codes: (packed, scales)."""
        found = reference.block_scales(x, layout)
        scales = found if scales is None else scales.copy_(found)
        return self.encode(x, scales, codebook, layout, packed=packed), scales

    def encode(
        self,
        x: Tensor,  # float32 [.., m, n]
        scales: Tensor,  # float32 [.., m, layout.blocks(n)]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
    ) -> Tensor:
        """Codes for given scales: packed."""
        found = reference.encode(x, scales, codebook, layout)
        return found if packed is None else packed.copy_(found)

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """buffer <- the sum of the terms, float32 [.., m, n], in place.

        Returns the sum of squares of each row, [.., m], in float64 (float32 where the device has
        nothing wider), which is not finite if any element is not.
        """
        reference.add_terms(buffer, terms)
        return reference.row_squares(buffer)

    def update_codes(
        self,
        terms: Terms,  # of codes and a gradient
        *,
        packed: Tensor,  # uint8 [.., m, layout.row_bytes(n)], contiguous
        scales: Tensor,  # float32 [.., m, layout.blocks(n)], contiguous
        out: Tensor | None = None,  # float32, bfloat16 or float16 [.., m, n]
        out_weights: tuple[float, float] = (1.0, 0.0),
    ) -> tuple[Tensor, Tensor]:
        """One pass: X = the sum of the terms, quantised as by `quantize` into (packed, scales).

        packed and scales do not overlap the codes of the terms. out <- w * X + v * grad with
        (w, v) = out_weights, in float32 from X before it was quantised. Returns the rows' sums of
        squares of X, and of `out` before it was rounded (zeros without `out`), as `accumulate`
        does.
        """
        codes, grad = terms.codes_and_grad()
        x = out
        # In `out` itself where that can hold X and is not the gradient, which is read again.
        if x is None or x.dtype != torch.float32 or not x.is_contiguous() or share_memory(x, grad):
            x = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
        squares = self.accumulate(x, terms)
        self.quantize(x, codes.codebook, codes.layout, packed=packed, scales=scales)
        if out is None:
            return squares, torch.zeros_like(squares)
        value_weight, grad_weight = out_weights
        out_squares = self.accumulate(x, Terms(value_weight, grad=grad, grad_weight=grad_weight))
        if x is not out:
            out.copy_(x)
        return squares, out_squares

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """Multiply float32 x [.., m, n] by the fixed orthogonal matrix, in place.

        Each row for itself: x <- x D1 A D2 B with p the largest power of two not above n, A the
        Walsh-Hadamard transform (natural order, divided by sqrt(p)) of the first p columns, B that
        of the last p (left out if p is n), and D1, D2 signs by column (`codebook.rotation_signs`).
        Two overlapping transforms spread a single large column over all others, for every n. With
        `inverse`, the inverse.
        """
        reference.rotate(x, inverse=inverse)

    def product(
        self,
        a: Tensor,  # [.., m, k], any strides
        b: Tensor,  # [.., k, n], any strides
        *,
        out: Tensor | None = None,  # [.., m, n]
        alpha: float | Tensor = 1.0,  # a tensor: float32 [b], one for each matrix
        beta: float = 0.0,
        active: Tensor | None = None,  # bool [b]; matrices where it is False are left as they are
    ) -> Tensor:
        """out <- alpha * a b + beta * out; out is not read if beta is 0 and overlaps no factor.

        Factors of one dtype, summed in float32 (float64 in float64), rounded once to the dtype of
        `out`, by default the factors'. Kernels may multiply a tensor alpha into `a` first, rounded
        to its dtype. Of a single matrix alpha and `active` have one element.
        """
        return reference.product(a, b, out, alpha, beta, active)

    def symmetric_product(
        self,
        a: Tensor,  # [.., m, k], any strides
        b: Tensor | None = None,  # [.., k, m]; None: the transpose of a
        *,
        addend: Tensor | None = None,  # [.., m, m], symmetric, may be `out`
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,  # [.., m, m]
        active: Tensor | None = None,
    ) -> Tensor:
        """out <- alpha * a b + beta * addend where the caller knows a b to be symmetric.

        Only one triangle need be computed; what is returned is exactly symmetric. `out` overlaps
        no factor. Dtypes and `active` as for `product`.
        """
        return reference.symmetric_product(a, b, addend, out, alpha, beta, active)

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """X X^T, float32 [.., m, m], of X = levels[code] * scale, summed in exact integers.

        With one scale a row, entry (i, j) is float32(sum) * (scale_i * scale_j); with blocks it is
        the sum of such terms over the blocks (or their parts of INTEGER_SEGMENT columns) in order;
        each operation rounded to float32. Raises ValueError for codes that `check_integer_codes`
        does not take.
        """
        check_integer_codes(codes, blocks=True)
        block = codes.layout.effective_block(codes.columns)
        segment = block if block == codes.columns else min(block, INTEGER_SEGMENT)
        return reference.code_gram(codes, segment)

    def code_product(
        self,
        a: Tensor,  # float32 [.., k, m], any strides
        codes: PackedCodes,
        *,
        out: Tensor | None = None,  # [.., k, n], contiguous; float32, on devices also half
        beta: float = 0.0,
    ) -> Tensor:
        """out <- A X + beta * out of coded X in two integer products, rounded once.

        A diag(scales) is rounded, row by row, to whole multiples 256*h + l of a 32639th of the
        row's largest magnitude; the limbs h and l are int8, and their products with the levels are
        summed exactly. Raises ValueError as `code_gram` does.
        """
        check_integer_codes(codes)
        result = reference.code_product(a, codes, LIMB_LIMIT)
        if out is None:
            return result
        return out.copy_(result if beta == 0 else beta * out.float() + result)

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """out <- factor * x for each matrix, and zeros where the factor is zero, whatever x is.

        x: float32 [b, m, n]; factor: float32 [b]; out: float32, bfloat16 or float16 [b, m, n], may
        be x.
        """
        factor = factor.view(-1, 1, 1)
        return out.copy_(torch.where(factor == 0, 0.0, x * factor))

    def update_weight(
        self,
        weight: Tensor,  # float32, bfloat16 or float16 [m, n], any strides, changed in place
        update: Tensor,  # float32, bfloat16 or float16 [m, n], any strides
        *,
        decay: Tensor,  # float32, one element
        step_size: Tensor,  # float32, one element
        seed: Tensor | None = None,  # int32, one element
    ) -> None:
        """weight <- decay * weight - step_size * update, in float32 with one rounding at the end.

        Unchanged where decay is 1 and step_size 0, even if the update is not finite. With `seed`
        the weight must be bfloat16 and is rounded stochastically: the low half of
        `reference.random_bits(seed, row*n + column)` is added to the 32 bits of the result, which
        are cut after the upper 16. What is not finite is rounded as usual.
        """
        weight.copy_(reference.updated_weight(weight, update, decay, step_size, seed))
