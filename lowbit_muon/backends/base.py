"""What a backend offers, checked and documented here once for all of them.

Each method of `Backend` checks its arguments and hands them to the method of the same name with an
underscore. Those of `reference.Kernels` are torch operations, on any device: the ground truth
("reference") that every kernel is tested against, and what a backend inherits where it has no
kernel. A new one is a folder with a subclass that overrides some of them, and a line in the
registry of `backends/__init__.py`. Element-wise and integer operations give the same bits in all
backends; float products agree to the rounding of their sums.

Matrices are [m, n], or [b, m, n] for a batch of them, each by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, Product, Terms
from lowbit_muon.backends.memory import (
    KERNEL_DTYPES,
    Checks,
    check_apart,
    check_book,
    check_rounded,
    has_even_rows,
    rows_in_place,
)
from lowbit_muon.backends.reference import Kernels, row_squares
from lowbit_muon.backends.tensors import FLOAT_DTYPES
from lowbit_muon.formats.codebook import Codebook, CodeLayout


class Backend(Kernels):
    """The kernels, in torch operations.

    name: as in the registry. asynchronous: it works on a device that the host must never wait for:
    what depends on values is left in tensors there. Only such backends take float16 and bfloat16 in
    their dense products of a step. product_dtypes: of its dense products. rounded_dtype: what its
    products with `rounded` round to, None where that is no faster; they then round to bfloat16.
    gram_aspect: columns a row from which an iteration on the Gram matrix, most of whose products
    stay in float32, is faster than one whose products are all rounded. fast_code_product:
    `code_product` is faster than to decode and multiply in float32. checks: of tensors on its
    devices.

    All methods raise ValueError or TypeError, naming the parameter, for tensors with another
    device, dtype or shape than is stated.
    """

    name: ClassVar[str] = "reference"
    asynchronous: ClassVar[bool] = False
    product_dtypes: ClassVar[tuple[torch.dtype, ...]] = FLOAT_DTYPES
    checks: Checks = Checks()
    rounded_dtype: torch.dtype | None = None
    gram_aspect: float = 2.0
    fast_code_product: bool = True

    def quantize(
        self,
        x: Tensor,  # float32 [.., m, n]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,  # uint8 [.., m, layout.row_bytes(n)], contiguous
        scales: Tensor | None = None,  # float32 [.., m, layout.blocks(n)], contiguous
    ) -> tuple[Tensor, Tensor]:
        """Scales from the statistic of each block, then codes: (packed, scales)."""
        *leading, n = self.checks.tensor(x, "x", None, torch.float32)
        check_book(layout.bits, len(codebook.levels))
        output = self.checks.output
        packed = output(packed, "packed", (*leading, layout.row_bytes(n)), torch.uint8, x)
        scales = output(scales, "scales", (*leading, layout.blocks(n)), torch.float32, x)
        if x.numel():
            codes = PackedCodes(packed, scales, codebook, layout, n)
            self._quantize(x, codes, layout.statistic)
        return packed, scales

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
        *leading, n = self.checks.tensor(x, "x", None, torch.float32)
        check_book(layout.bits, len(codebook.levels))
        self.checks.tensor(scales, "scales", (*leading, layout.blocks(n)), torch.float32, x)
        shape = (*leading, layout.row_bytes(n))
        packed = self.checks.output(packed, "packed", shape, torch.uint8, x)
        if x.numel():
            codes = PackedCodes(packed, scales.contiguous(), codebook, layout, n)
            self._quantize(x, codes, "given")
        return packed

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """buffer <- the sum of the terms, float32 [.., m, n], in place.

        Rows of the buffer are contiguous and do not overlap. Returns the sum of squares of each
        row, [.., m], in float64 (float32 where the device has nothing wider), which is not finite
        if any element is not.
        """
        shape = self.checks.tensor(buffer, "buffer", None, torch.float32, written=True)
        weight = terms.buffer_weight
        if isinstance(weight, Tensor):
            dtypes, one_each = (torch.float32, torch.float64), tuple(shape[:-2]) or (1,)
            self.checks.tensor(weight, "buffer_weight", one_each, dtypes, buffer)
        if terms.grad is not None:
            self.checks.tensor(terms.grad, "grad", shape, KERNEL_DTYPES, buffer)
        if terms.codes is not None:
            codes = self.checks.codes(terms.codes, shape, buffer)
            if codes is not terms.codes:
                terms = dataclasses.replace(terms, codes=codes)
        whole = rows_in_place(buffer, "buffer")
        if not buffer.numel():
            return row_squares(buffer)
        squares = self._accumulate(whole, terms)
        if whole is not buffer:
            buffer.copy_(whole)
        return squares

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

        packed, scales and `out` overlap nothing that is read. out <- w * X + v * grad with
        (w, v) = out_weights, in float32 from X before it was quantised. Returns the rows' sums of
        squares of X, and of `out` before it was rounded (zeros without `out`), as `accumulate`
        does.
        """
        codes, grad = terms.codes_and_grad()
        shape = self.checks.tensor(grad, "grad", None, KERNEL_DTYPES)
        codes = self.checks.codes(codes, shape, grad)
        output = self.checks.output
        output(packed, "packed", codes.packed.shape, torch.uint8, grad)
        output(scales, "scales", codes.scales.shape, torch.float32, grad)
        check_apart(packed, "packed", codes.packed, "codes.packed")
        check_apart(scales, "scales", codes.scales, "codes.scales")
        written = out
        if out is not None:
            self.checks.tensor(out, "out", shape, KERNEL_DTYPES, grad, written=True)
            check_apart(out, "out", grad, "grad")
            if not has_even_rows(out):
                written = torch.empty(shape, dtype=out.dtype, device=out.device)
        if not grad.numel():
            return row_squares(grad), row_squares(grad)
        new = PackedCodes(packed, scales, codes.codebook, codes.layout, codes.columns)
        terms = dataclasses.replace(terms, codes=codes)
        found = self._update_codes(terms, new, written, out_weights)
        if out is not None and written is not None and written is not out:
            out.copy_(written)
        return found

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """Multiply float32 x [.., m, n] by the fixed orthogonal matrix, in place.

        Each row for itself: x <- x D1 A D2 B with p the largest power of two not above n, A the
        Walsh-Hadamard transform (natural order, divided by sqrt(p)) of the first p columns, B that
        of the last p (left out if p is n), and D1, D2 signs by column (`codebook.rotation_signs`).
        Two overlapping transforms spread a single large column over all others, for every n. With
        `inverse`, the inverse. Rows are contiguous and do not overlap.
        """
        self.checks.tensor(x, "x", None, torch.float32, written=True)
        whole = rows_in_place(x, "x")
        if x.numel():
            self._rotate(whole, inverse)
        if whole is not x:
            x.copy_(whole)

    def product(
        self,
        a: Tensor,  # [.., m, k], any strides
        b: Tensor,  # [.., k, n], any strides
        *,
        out: Tensor | None = None,  # [.., m, n]
        addend: Tensor | None = None,  # [.., m, n], may be `out`; None: `out`
        alpha: float | Tensor = 1.0,  # a tensor: float32 [b], one for each matrix
        beta: float = 0.0,
        active: Tensor | None = None,  # bool [b]; matrices where it is False are left as they are
        rounded: bool = False,
        diagonal: int | None = None,
    ) -> Tensor:
        """out <- alpha * a b + beta * addend; out overlaps no factor.

        The addend is not read if beta is 0; without it and `out` there is nothing to add. Factors
        of one dtype, summed in float32 (float64 in float64), rounded once to the dtype of `out`, by
        default the factors'. Kernels may multiply a tensor alpha into `a` first, rounded to its
        dtype. Of a single matrix alpha and `active` have one element.

        rounded: float32 factors are rounded to `rounded_dtype` before they are multiplied
        (subnormal numbers to zero or as others are), but for the elements (k + diagonal, k) of `a`.
        """
        *batch, rows, depth = self.checks.tensor(a, "a", None, self.product_dtypes)
        columns = b.shape[-1] if isinstance(b, Tensor) and b.ndim else 0
        self.checks.tensor(b, "b", (*batch, depth, columns), a.dtype, a)
        if isinstance(alpha, Tensor):
            self.checks.tensor(alpha, "alpha", tuple(batch) or (1,), torch.float32, a)
        if active is not None:
            self.checks.tensor(active, "active", tuple(batch) or (1,), torch.bool, a)
        shape = (*batch, rows, columns)
        if out is not None:
            self.checks.tensor(out, "out", shape, self.product_dtypes, a, written=True)
        if addend is not None:
            self.checks.tensor(addend, "addend", shape, self.product_dtypes, a)
        addend = None if beta == 0 else out if addend is None else addend
        if rounded or diagonal is not None:
            check_rounded(rounded, a, diagonal)
        to = (self.rounded_dtype or torch.bfloat16) if rounded else None
        return self._multiply(
            Product(shape, a, b, out, addend, alpha, beta, active, False, to, diagonal)
        )

    def symmetric_product(
        self,
        a: Tensor,  # [.., m, k], any strides
        b: Tensor | None = None,  # [.., k, m]; None: the transpose of a
        *,
        addend: Tensor | None = None,  # [.., m, m], symmetric, may be `out`
        alpha: float = 1.0,
        beta: float = 1.0,
        other: Tensor | None = None,  # like the addend, but not `out`
        gamma: float = 1.0,
        identity: float = 0.0,
        out: Tensor | None = None,  # [.., m, m]
        active: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:
        """out <- alpha * a b + beta * addend + gamma * other + identity * I, a b being symmetric.

        Only one triangle need be computed; what is returned is exactly symmetric. `out` overlaps
        no factor. Dtypes and `active` as for `product`. rounded: as there; the diagonals of both
        factors are kept where they are square and b is given.
        """
        *batch, size, depth = self.checks.tensor(a, "a", None, self.product_dtypes)
        if b is not None:
            self.checks.tensor(b, "b", (*batch, depth, size), a.dtype, a)
        if active is not None:
            self.checks.tensor(active, "active", tuple(batch) or (1,), torch.bool, a)
        shape = (*batch, size, size)
        if addend is not None:
            self.checks.tensor(addend, "addend", shape, self.product_dtypes, a)
        if other is not None:
            self.checks.tensor(other, "other", shape, self.product_dtypes, a)
        if out is not None:
            self.checks.tensor(out, "out", shape, self.product_dtypes, a, written=True)
        if rounded:
            check_rounded(rounded, a, None)
        diagonal = 0 if rounded and b is not None and size == depth else None
        return self._multiply(
            Product(
                shape,
                a,
                b,
                out,
                addend,
                alpha,
                beta,
                active,
                True,
                (self.rounded_dtype or torch.bfloat16) if rounded else None,
                diagonal,
                other,
                gamma,
                identity,
            )
        )

    def combined(
        self,
        coefficients: Sequence[Sequence[float]],  # a row for each result, a number for each term
        terms: Sequence[Tensor],  # float32 or float64 [.., m, n]
        *,
        out: Sequence[Tensor] | None = None,  # contiguous, see below
    ) -> list[Tensor]:
        """Sums of the terms, each times its number: all results in one pass.

        The first term's number is one. The last result may lie in the place of the first term.
        """
        first = terms[0]
        shape = self.checks.tensor(first, "terms", None, (torch.float32, torch.float64))
        for term in terms:
            self.checks.tensor(term, "terms", shape, first.dtype, first)
        outs: Sequence[Tensor | None] = [None] * len(coefficients) if out is None else out
        results = [self.checks.output(x, "out", shape, first.dtype, first) for x in outs]
        for row in coefficients:
            if len(row) != len(terms) or row[0] != 1:
                raise ValueError(
                    f"coefficients: expected {len(terms)} numbers, the first of them one, got {row}"
                )
        if len(results) != len(coefficients):
            raise ValueError(f"out: expected {len(coefficients)} tensors, got {len(results)}")
        if first.numel():
            self._combined(coefficients, terms, results)
        return results

    def partial_fractions(
        self,
        x: Tensor,  # float32 or float64 [.., m, m], any strides
        constant: float,
        linear: float,
        poles: Sequence[float],
        weights: Sequence[float],
    ) -> Tensor:
        """constant * I + linear * x + the sum of weights[i] * (x + poles[i] I)^-1, contiguous.

        x must be exactly symmetric, all x + poles[i] I positive definite. Fractions are added in
        the order given; what is returned is exactly symmetric.
        """
        shape = self.checks.tensor(x, "x", None, (torch.float32, torch.float64))
        if shape[-1] != shape[-2]:
            raise ValueError(f"x: expected square matrices, got shape {tuple(shape)}")
        if len(poles) != len(weights):
            raise ValueError(f"weights: expected {len(poles)} numbers, got {len(weights)}")
        out = torch.mul(x, linear).contiguous()
        out.diagonal(dim1=-2, dim2=-1).add_(constant)
        if x.numel() and poles:
            self._add_inverses(x, poles, weights, out)
        return out

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """X X^T, float32 [.., m, m], of X = levels[code] * scale, summed in exact integers.

        With one scale a row, entry (i, j) is float32(sum) * (scale_i * scale_j); with blocks it is
        the sum of such terms over the blocks (or their parts of INTEGER_SEGMENT columns) in order;
        each operation rounded to float32. Raises ValueError for codes that `check_integer_codes`
        does not take.
        """
        codes = self.checks.integer_codes(codes, blocks=True)
        shape = (*codes.packed.shape[:-1], codes.packed.shape[-2])
        new = torch.empty if codes.packed.numel() else torch.zeros
        out = new(shape, dtype=torch.float32, device=codes.packed.device)
        if codes.packed.numel():
            self._code_gram(codes, out)
        return out

    def code_product(
        self,
        a: Tensor,  # float32 [.., k, m], any strides
        codes: PackedCodes,
        *,
        out: Tensor | None = None,  # [.., k, n], contiguous; float32, bfloat16 or float16
        beta: float = 0.0,
    ) -> Tensor:
        """out <- A X + beta * out of coded X in two integer products, rounded once.

        A diag(scales) is rounded, row by row, to whole multiples 256*h + l of a 32639th of the
        row's largest magnitude; the limbs h and l are int8, and their products with the levels are
        summed exactly. Without `out` there is nothing to add. Raises ValueError as `code_gram`
        does.
        """
        codes = self.checks.integer_codes(codes, blocks=False)
        *leading, rows, _ = codes.packed.shape
        out_rows = self.checks.tensor(a, "a", None, torch.float32, codes.packed)[-2]
        self.checks.tensor(a, "a", (*leading, out_rows, rows), torch.float32, codes.packed)
        beta = 0.0 if out is None else beta
        shape = (*leading, out_rows, codes.columns)
        out = self.checks.output(out, "out", shape, KERNEL_DTYPES, a)
        if not rows or not out.numel():
            return out.mul_(beta) if beta else out.zero_()
        self._code_product(a, codes, out, beta)
        return out

    def code_times(self, codes: PackedCodes, v: Tensor) -> Tensor:
        """X V, float32 [.., m, k], of coded X in two integer products; v: float32 [.., n, k].

        The columns of V are rounded as the rows of A diag(scales) are by `code_product`, with any
        strides. An entry is the scale of its row of X times (the column's unit times the sum), each
        rounded. Raises ValueError as `code_gram` does.
        """
        codes = self.checks.integer_codes(codes, blocks=False)
        *leading, rows, _ = codes.packed.shape
        out_columns = self.checks.tensor(v, "v", None, torch.float32, codes.packed)[-1]
        self.checks.tensor(
            v, "v", (*leading, codes.columns, out_columns), torch.float32, codes.packed
        )
        new = torch.empty if codes.columns else torch.zeros
        out = new((*leading, rows, out_columns), dtype=torch.float32, device=v.device)
        if codes.columns and out.numel():
            self._code_times(codes, v, out)
        return out

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """out <- factor * x for each matrix, and zeros where the factor is zero, whatever x is.

        x: float32 [b, m, n]; factor: float32 or float64 [b], rounded to float32; out: float32,
        bfloat16 or float16 [b, m, n], may be x.
        """
        shape = self.checks.tensor(x, "x", None, torch.float32, dimensions=(3,))
        self.checks.tensor(factor, "factor", shape[:1], (torch.float32, torch.float64), x)
        self.checks.tensor(out, "out", shape, KERNEL_DTYPES, x, written=True)
        if out.numel():
            self._scaled(x, factor, out)
        return out

    def update_weight(
        self,
        weight: Tensor,  # float32, bfloat16 or float16 [m, n], any strides, changed in place
        update: Tensor,  # float32, bfloat16 or float16 [m, n], any strides
        *,
        decay: Tensor,  # float32, one element
        step_size: Tensor,  # float32, one element
        seed: Tensor | None = None,  # int32, one element
        cautious: bool = False,
    ) -> None:
        """weight <- decay * weight - step_size * update, in float32 with one rounding at the end.

        Unchanged where decay is 1 and step_size 0, even if the update is not finite. cautious: an
        element decays only where weight * update >= 0 in float32 (arXiv 2510.12402). With `seed`
        the weight must be bfloat16 and is rounded stochastically: the low half of
        `reference.random_bits(seed, row*n + column)` is added to the 32 bits of the result, which
        are cut after the upper 16. What is not finite is rounded as usual.
        """
        shape = self.checks.tensor(
            weight, "weight", None, KERNEL_DTYPES, dimensions=(2,), written=True
        )
        self.checks.tensor(update, "update", shape, KERNEL_DTYPES, weight)
        self.checks.element(decay, "decay", torch.float32, weight)
        self.checks.element(step_size, "step_size", torch.float32, weight)
        if seed is not None:
            self.checks.element(seed, "seed", torch.int32, weight)
            if weight.dtype != torch.bfloat16:
                raise TypeError(f"weight: expected bfloat16 with a seed, got {weight.dtype}")
        if weight.numel():
            self._update_weight(weight, update, decay, step_size, seed, cautious)
