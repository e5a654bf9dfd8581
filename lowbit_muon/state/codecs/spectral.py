"""Codes of a companded spectrum: decoded by a polynomial in the codes, encoded by its inverse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms, integer_codes_problem
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.newton_schulz import ROUNDED_ROWS
from lowbit_muon.linalg.spectral import encoding_operator, shifted_gram
from lowbit_muon.state.codec import Decoder, Stored
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.operands import SCRATCH_FLOATS, Dense, Panels, row_slices


class Spectral(Coded):
    """Beside those of `Coded`, of Y and not of the matrix: norm float64 [1], its Frobenius norm,
    and noise float64 [1]: squared Frobenius norm of the error that Y was quantised with."""

    by_rows = False

    def __init__(self, state_format: StateFormat, shape: tuple[int, int]) -> None:
        super().__init__(state_format, shape)
        problem = integer_codes_problem(self.book, self.layout, self.m, self.n)
        self.reads_integers = problem is None  # of the codes, by integer products
        self.shift = state_format.shift(self.m)

    def empty(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """See `Codec.empty`."""
        tensors = super().empty(device, seed)
        tensors["noise"] = torch.zeros(1, dtype=accumulation_dtype(device), device=device)
        return tensors

    def decoder(self, stored: Stored) -> Decoder:
        """See `Codec.decoder`; it decodes all rows at once."""
        return _SpectralDecoder(self, stored)

    def encode(
        self,
        stored: Stored,
        x: Dense | Panels,
        norm: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """See `Codec.encode`.

        On devices x is taken in half precision, times sqrt(m n), which makes its entries about one.
        Its rounding is a thousandth of 4-bit noise after the operator has enlarged it. `dtype`
        other than float32 allows rounded products, where the backend has them.
        """
        backend = stored.backend
        assert isinstance(x, Dense)
        matrix = x.matrix
        shift, divisor = self.shift, self.divisor(stored, norm, scale)
        assert divisor is not None
        unit = 1 / math.sqrt(self.m * self.n)
        rounded = dtype != torch.float32 and backend.rounded_dtype is not None
        rounded = rounded and self.m >= ROUNDED_ROWS
        if backend.asynchronous:
            half = torch.empty(matrix.shape, dtype=dtype, device=matrix.device)
            matrix = backend.scaled(matrix, (divisor * unit).reciprocal(), out=half)
            gram = torch.empty(*matrix.shape[:2], self.m, device=matrix.device)
            backend.symmetric_product(matrix, alpha=unit * unit, out=gram)
            operator = encoding_operator(gram, shift, backend, rounded=rounded, dtype=dtype)
            del gram  # nobody else holds it
            rounded = False  # both factors of Y are in half precision
        else:
            size, unit = divisor.float().view(-1, 1, 1), 1.0
            # It moves singular values by up to 2^-9: little to the root, which is flat below
            # c^(3/2), if that is not smaller.
            rounded = rounded and shift**1.5 > 2**-9
            gram = x.gram(rounded=rounded).div_(size).div_(size)
            operator = encoding_operator(gram, shift, backend).div_(size)

        def companded() -> Iterator[tuple[slice, Tensor]]:
            slices = row_slices(matrix.shape, backend)
            shape = (len(matrix), slices[0].stop, self.n)
            scratch = torch.empty(shape, dtype=torch.float32, device=matrix.device)
            for rows in slices:
                y = scratch[:, : rows.stop - rows.start]
                diagonal = -rows.start if rounded else None
                yield (
                    rows,
                    backend.product(
                        operator[:, rows],
                        matrix,
                        out=y,
                        alpha=unit,
                        rounded=rounded,
                        diagonal=diagonal,
                    ),
                )

        self.write_codes(stored, companded)

    def measure_noise(self, stored: Stored, rows: slice, values: Tensor) -> None:
        """See `Coded.measure_noise`."""
        packed, scales = stored.blank("codes"), stored.blank("scales")
        scales = scales.expand(*packed.shape[:2], -1)[:, rows]
        codes = PackedCodes(packed[:, rows], scales, self.book, self.layout, self.n)
        errors = stored.backend.accumulate(values, Terms(-1.0, codes=codes))
        noise, new = stored.blank("noise"), errors.sum(dim=-1, keepdim=True)
        noise.copy_(new if rows.start == 0 else noise + new)


@dataclass(frozen=True)
class _SpectralDecoder(Decoder):
    codec: Spectral
    stored: Stored

    def add(self, out: Tensor, terms: Terms, rows: slice) -> Tensor:
        """See `Decoder.add`."""
        codec, backend = self.codec, self.stored.backend
        codes, norm, noise = codec.codes(self.stored), self.stored["norm"], self.stored["noise"]
        shift = codec.shift
        if codec.reads_integers and backend.fast_code_product:
            operator = shifted_gram(backend.code_gram(codes), noise[:, 0], shift, codec.n)
            backend.code_product(operator, codes, out=out)
        else:
            backend.accumulate(out, Terms(codes=codes))
            exact = codec.reads_integers  # sums of integers
            gram = backend.code_gram(codes) if exact else backend.symmetric_product(out)
            _multiply_in_place(shifted_gram(gram, noise[:, 0], shift, codec.n), out, backend)
        # Noise of decoding would change the norm a little in every step, and that adds up. (Of rows
        # in float32, then in float64: within 1e-7.)
        found = torch.linalg.vector_norm(out, dim=2)
        found = torch.linalg.vector_norm(found, dim=1, keepdim=True, dtype=norm.dtype)
        gain = (norm / found).nan_to_num(0.0, 0.0, 0.0)[:, 0]
        if codec.state_format.rotate:
            backend.rotate(out, inverse=True)
        terms = dataclasses.replace(terms, buffer_weight=terms.buffer_weight * gain)
        return backend.accumulate(out, terms).sum(dim=-1)


def _multiply_in_place(a: Tensor, x: Tensor, backend: Backend) -> None:
    """x <- a x, [b, m, n]; on hosts by panels of columns, since a copy of x may be large."""
    b, m, n = x.shape
    width = n if backend.asynchronous else max(64, SCRATCH_FLOATS // (b * m))
    for start in range(0, n, width):
        panel = x[..., start : start + width]
        backend.product(a, panel.clone(), out=panel)
