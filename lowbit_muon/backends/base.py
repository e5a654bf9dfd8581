"""What a backend offers: the contract between the codec and the kernels.

A new backend implements `Backend` and adds one line to the registry in `backends/__init__.py`.
Matrices here are oriented: the short side is rows (m), the long side columns (n).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeGuard

from torch import Tensor

from lowbit_muon.formats.codebook import Codebook, CodeLayout


@dataclass(frozen=True)
class PackedCodes:
    """Codes of an oriented matrix [m, n] with everything needed to decode them.

    A `DeviceBackend` also takes a batch of b such matrices, with a leading dimension.
    """

    packed: Tensor  # uint8 [m, layout.row_bytes(columns)]
    scales: Tensor  # float32 [m, layout.blocks(columns)]
    codebook: Codebook
    layout: CodeLayout
    columns: int  # n

    def row_slice(self, rows: slice) -> PackedCodes:
        """The codes of these rows."""
        return dataclasses.replace(self, packed=self.packed[rows], scales=self.scales[rows])

    def flat(self) -> PackedCodes:
        """A batch as one matrix of b*m rows; a matrix as it is."""
        return dataclasses.replace(
            self, packed=self.packed.flatten(0, -2), scales=self.scales.flatten(0, -2)
        )


# int32 holds that many products of 127 with 127 (a Gram matrix) or 128 (a limb, see code_product).
MAX_INTEGER_TERMS = (2**31 - 1) // (127 * 128)
# The largest whole number whose limbs 256*h + l, l in [-128, 127], have |h| <= 127.
LIMB_LIMIT = 127 * 256 + 127
# Blocks of scales are summed in integers over so many columns at most.
INTEGER_SEGMENT = 512
# Of `rounded_gram`: so many products of two numbers up to the limit fit an int32.
WHOLE_LIMIT, WHOLE_SEGMENT = 2896, 256


def reads_integer_codes(codes: PackedCodes) -> bool:
    """Whether `code_gram` and `code_product` take these codes."""
    try:
        check_integer_codes(codes)
    except ValueError:
        return False
    return True


def check_integer_codes(codes: PackedCodes, *, blocks: bool = False) -> None:
    """Raise ValueError unless integer products can read the codes.

    They need levels that are whole numbers of at most 127, sums that stay within int32, and one
    scale a row or, where `blocks` are taken, blocks of a multiple of four columns that divides
    INTEGER_SEGMENT or is a multiple of it.
    """
    levels, columns = codes.codebook.levels, codes.columns
    if any(level != int(level) or abs(level) > 127 for level in levels):
        raise ValueError(f"codes: expected whole levels of at most 127, got {levels}")
    block = codes.layout.effective_block(columns)
    aligned = INTEGER_SEGMENT % block == 0 or block % INTEGER_SEGMENT == 0
    if block < columns and not (blocks and block % 4 == 0 and aligned):
        expected = "one scale a row"
        if blocks:
            expected += f" or blocks of a multiple of 4 that goes with {INTEGER_SEGMENT}"
        raise ValueError(f"codes: expected {expected}, got one for {block} of {columns} columns")
    terms = max(columns, codes.packed.shape[-2])
    if terms > MAX_INTEGER_TERMS:
        raise ValueError(f"codes: expected at most {MAX_INTEGER_TERMS} terms a sum, got {terms}")


class Backend(Protocol):
    """The kernels. Element-wise and integer ones are bit-identical between backends; float32
    products agree to the rounding of their sums."""

    name: str

    def quantize(
        self,
        x: Tensor,  # float32 [m, n]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Scales from the statistic of each block, then codes: (packed, scales)."""

    def encode(
        self,
        x: Tensor,  # float32 [m, n]
        scales: Tensor,  # float32 [m, layout.blocks(n)]
        codebook: Codebook,
        layout: CodeLayout,
        *,
        packed: Tensor | None = None,
    ) -> Tensor:
        """Codes for given scales: packed."""

    def accumulate(
        self,
        buffer: Tensor,  # float32 [m, n], changed in place
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,  # float32, bfloat16 or float16 [m, n], any strides
        grad_weight: float = 1.0,
    ) -> float:
        """buffer <- buffer_weight*buffer + code_weight*decode(codes) + grad_weight*grad.

        Absent terms are left out; with buffer_weight 0 the buffer is not read. Returns the sum of
        squares of the result in float64, which is not finite if any element is not.
        """

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """Multiply float32 x [m, n] by the fixed orthogonal matrix, in place.

        Each row for itself: x <- x D1 A D2 B with p the largest power of two not above n, A the
        Walsh-Hadamard transform (natural order, divided by sqrt(p)) of the first p columns, B that
        of the last p (left out if p is n), and D1, D2 signs by column (`formats.rotation_signs`).
        Two overlapping transforms spread a single large column over all others, for every n. With
        `inverse`, the inverse.
        """

    def product(
        self,
        a: Tensor,  # float32 [m, k], any strides
        b: Tensor,  # float32 [k, n], any strides
        *,
        out: Tensor | None = None,  # float32 [m, n]
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> Tensor:
        """out <- alpha * a b + beta * out; out is not read if beta is 0 and overlaps no factor."""

    def symmetric_product(
        self,
        a: Tensor,  # float32 [m, k], any strides
        b: Tensor | None = None,  # float32 [k, m]; None: the transpose of a
        *,
        addend: Tensor | None = None,  # float32 [m, m], symmetric, may be `out`
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,  # float32 [m, m]
    ) -> Tensor:
        """out <- alpha * a b + beta * addend where the caller knows a b to be symmetric.

        Only one triangle need be computed. `out` overlaps no factor.
        """

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """X X^T, float32 [m, m], of X = levels[code] * scale, summed in exact integers.

        With one scale a row, entry (i, j) is float32(sum) * (scale_i * scale_j); with blocks it is
        the sum of such terms over the blocks (or their parts of INTEGER_SEGMENT columns) in order;
        each operation rounded to float32. Raises ValueError for codes that `check_integer_codes`
        does not take.
        """

    def rounded_gram(self, x: Tensor) -> Tensor:
        """X X^T, float32 [m, m], of float32 X [m, n] rounded to whole numbers, row by row.

        The unit is a WHOLE_LIMIT-th of the row's largest magnitude. Products are summed exactly
        over WHOLE_SEGMENT columns, the segments in float32 like the blocks of `code_gram`.
        """

    def code_product(
        self,
        a: Tensor,  # float32 [k, m], any strides
        codes: PackedCodes,
        *,
        out: Tensor | None = None,  # float32 [k, n], contiguous
        beta: float = 0.0,
    ) -> Tensor:
        """out <- A X + beta * out of coded X in two integer products.

        A diag(scales) is rounded, row by row, to whole multiples 256*h + l of a 32639th of the
        row's largest magnitude; the limbs h and l are int8, and their products with the levels are
        summed exactly. Raises ValueError as `code_gram` does.
        """


class DeviceBackend(Backend, Protocol):
    """A backend that never makes the host wait, `accumulate` excepted.

    What depends on values is returned and taken as tensors on the device. `code_gram`,
    `code_product`, `product` and `symmetric_product` also take batches: a leading dimension b in
    every matrix. The dense products take float32, bfloat16 and float16 factors of one dtype and an
    addend of any of these, sum in float32, round once to the dtype of `out` (by default the
    factors'), and have one argument more, `active`: bool [b]; matrices where it is False are left
    as they are (a single matrix is a batch of one).
    """

    def product(
        self,
        a: Tensor,  # [b, m, k] or [m, k], any strides
        b: Tensor,  # [b, k, n] or [k, n], any strides
        *,
        out: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
        active: Tensor | None = None,
    ) -> Tensor:
        """`Backend.product` of batches."""

    def symmetric_product(
        self,
        a: Tensor,  # [b, m, k] or [m, k], any strides
        b: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """`Backend.symmetric_product` of batches."""

    def code_product(
        self,
        a: Tensor,  # float32 [b, k, m] or [k, m], any strides
        codes: PackedCodes,
        *,
        out: Tensor | None = None,  # float32, bfloat16 or float16, contiguous
        beta: float = 0.0,
    ) -> Tensor:
        """`Backend.code_product` of batches; a weight update in `out`'s own dtype, rounded once."""

    def accumulate_rows(
        self,
        buffer: Tensor,  # float32 [m, n], changed in place
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,  # float32, bfloat16 or float16 [m, n], any strides
        grad_weight: float = 1.0,
    ) -> Tensor:
        """`accumulate`, returning each row's sum of squares, float64 [m]."""

    def update_codes(
        self,
        codes: PackedCodes,
        grad: Tensor,  # float32, bfloat16 or float16 [m, n], any strides
        *,
        code_weight: float,
        grad_weight: float,
        packed: Tensor,  # uint8 [m, layout.row_bytes(n)], contiguous
        scales: Tensor,  # float32 [m, layout.blocks(n)], contiguous
        out: Tensor | None = None,  # float32, bfloat16 or float16 [m, n]
        out_value_weight: float = 1.0,
        out_grad_weight: float = 0.0,
    ) -> Tensor:
        """One pass: X = code_weight*decode(codes) + grad_weight*grad, quantised as `quantize` does
        into (packed, scales), which do not overlap the codes.

        out <- out_value_weight*X + out_grad_weight*grad, computed in float32 from X before it was
        quantised. Returns the rows' sums of squares of X and of `out` before it was rounded (zeros
        without `out`), float64 [2, m].
        """

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """out <- factor * x for each matrix, and zeros where the factor is zero, whatever x is.

        x: float32 [b, m, n]; factor: float32 [b]; out: float32, bfloat16 or float16 [b, m, n], may
        be x.
        """

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
        `random_bits(seed, row*n + column)` is added to the 32 bits of the result, which are cut
        after the upper 16. What is not finite is rounded as usual.
        """


class SumsRows:
    """`accumulate` of a backend that has `accumulate_rows`; the one call that waits."""

    accumulate_rows: Callable[..., Tensor]

    def accumulate(self, buffer: Tensor, **terms: Any) -> float:
        """See `Backend.accumulate`."""
        return float(self.accumulate_rows(buffer, **terms).sum())


def is_device_backend(backend: Backend) -> TypeGuard[DeviceBackend]:
    """Whether a backend takes batches and leaves results on the device."""
    return hasattr(backend, "accumulate_rows")
