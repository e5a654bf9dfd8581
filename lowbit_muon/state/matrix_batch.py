"""A batch of stored matrices on a device: decoding and encoding without waiting for it.

The same formats as `quantized_matrix`, which is the definition. What differs: matrices of one shape
are taken together, they are decoded as a whole, numbers that depend on values (norms, scales, which
matrices are finite) stay on the device, and what is new is written over the stored tensors only
where it may be (`commit`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.backends.base import DeviceBackend, PackedCodes, reads_integer_codes
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.linalg.power_iteration import power_iteration
from lowbit_muon.linalg.products import multiply, symmetric_mm
from lowbit_muon.linalg.root_iteration import full_precision_products
from lowbit_muon.linalg.spectral import encoding_operator, unbiased_shift
from lowbit_muon.state import codec
from lowbit_muon.state.stored import SMALLEST_NORM, QuantizedMatrix


class MatrixBatch:
    """b stored matrices of one shape and format.

    `new` collects tensors by role, [b, ..] each, until `commit` writes them.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], backend: DeviceBackend) -> None:
        self.matrices = matrices
        self.backend = backend
        self.state_format = matrices[0].state_format
        m, n = sorted(matrices[0].shape)
        self.shape = (len(matrices), m, n)
        self.rank = matrices[0].rank
        self._wide = matrices[0].shape[0] <= matrices[0].shape[1]
        self.new: dict[str, Tensor] = {}

    @property
    def is_plain(self) -> bool:
        """Whether a matrix is codes times scales and nothing else, so that one pass updates it."""
        f = self.state_format
        coded = not (f.is_dense or f.spectral or f.companded_scale or f.rotate)
        return coded and not self.rank and f.granularity != "tensor"

    def stored(self, role: str) -> Tensor:
        """The stored tensors of this role, [b, ..]."""
        return torch.stack([matrix.tensors[role] for matrix in self.matrices])

    def codes(self) -> PackedCodes:
        """The stored codes, [b, m, ..]."""
        return self._packed_codes(self.stored("codes"), self.stored("scales"))

    def _packed_codes(self, packed: Tensor, scales: Tensor) -> PackedCodes:
        f = self.state_format
        scales = scales.expand(*packed.shape[:2], -1).contiguous()
        return PackedCodes(packed, scales, f.code_book(), f.code_layout(), self.shape[2])

    def decode(self) -> Tensor:
        """The stored matrices, float32 [b, m, n]."""
        f, backend = self.state_format, self.backend
        device = self.matrices[0].device
        if f.spectral:
            return self._decode_spectral()
        buffer = torch.empty(self.shape, dtype=torch.float32, device=device)
        if f.is_dense:
            for out, matrix in zip(buffer, self.matrices, strict=True):
                out.copy_(matrix.tensors["dense"])
            return buffer
        rows = buffer.flatten(0, 1)
        backend.accumulate_rows(rows, codes=self.codes().flat())
        codec.from_code_domain(rows, f, backend)
        if self.rank:
            left, right = self._oriented_factors({})
            backend.product(left, right.mT, out=buffer, beta=1.0)
        if f.stores_norm:
            buffer.mul_(self.stored("norm").float().view(-1, 1, 1))
        return buffer

    def _decode_spectral(self) -> Tensor:
        """nu * (Y Y^T + cI) Y, with nu from the norm and the traces of powers of Y Y^T."""
        f, backend, codes = self.state_format, self.backend, self.codes()
        _, m, n = self.shape
        integer = reads_integer_codes(codes)
        if integer:
            gram = backend.code_gram(codes)
        else:
            companded = torch.empty(self.shape, dtype=torch.float32, device=codes.packed.device)
            backend.accumulate_rows(companded.flatten(0, 1), codes=codes.flat())
            with full_precision_products():
                gram = backend.symmetric_product(companded)
        operator = gram.clone()
        shift = unbiased_shift(f.spectral_shift, self.stored("noise"), m, n).float()
        operator.diagonal(dim1=1, dim2=2).add_(shift)
        # ||A Y||_F^2 = <A K, A> for K = Y Y^T
        wide = accumulation_dtype(gram.device)
        decoded = symmetric_mm(operator, gram).mul_(operator).sum(dim=(1, 2), dtype=wide)
        norm = self.stored("norm")[:, 0]
        gain = torch.where(decoded > 0, norm * decoded.rsqrt(), 0.0)
        operator.mul_(gain.float().view(-1, 1, 1))
        buffer = backend.code_product(operator, codes) if integer else multiply(operator, companded)
        if f.rotate:
            backend.rotate(buffer.flatten(0, 1), inverse=True)
        return buffer

    def encode(self, buffer: Tensor, norm: Tensor, *, dtype: torch.dtype) -> None:
        """Put the codes of `buffer` [b, m, n], which is kept, into `new`.

        norm: Frobenius norms, float64 [b], and zero for a matrix that is not finite, which is
        encoded as zeros. dtype: of the factors in the spectral encoder's products with `buffer`.
        """
        f, backend = self.state_format, self.backend
        if f.is_dense:
            self.new["dense"] = buffer
            return
        usable = norm >= SMALLEST_NORM
        if f.stores_norm:
            norm = torch.where(usable, norm, 0.0)
            self.new["norm"] = norm.unsqueeze(1)
            factor = torch.where(usable, 1 / norm, 0.0).float()
        else:
            factor = (norm > 0).float()
        if f.spectral:
            values = self._compand(buffer, factor, dtype)
        else:
            values = backend.scaled(buffer, factor, out=torch.empty_like(buffer))
        if self.rank:
            left, right = self._factorise(values)
            backend.product(left, right.mT, out=values, alpha=-1.0, beta=1.0)
        self._encode_values(values)

    def _encode_values(self, values: Tensor) -> None:
        """Quantise what is to be stored as codes, [b, m, n]; overwritten."""
        f, backend = self.state_format, self.backend
        book, layout = f.code_book(), f.code_layout()
        rows = codec.to_code_domain(values.flatten(0, 1), f, backend)
        if f.granularity == "tensor":
            scales = codec.matrix_scales(rows.view(self.shape), layout)
            each_row = scales.expand(*self.shape[:2], 1).flatten(0, 1).contiguous()
            packed = backend.encode(rows, each_row, book, layout)
        else:
            packed, scales = backend.quantize(rows, book, layout)
            each_row, scales = scales, scales.unflatten(0, self.shape[:2])
        self.new["codes"] = packed.unflatten(0, self.shape[:2])
        self.new["scales"] = scales
        if f.spectral:
            codes = PackedCodes(packed, each_row, book, layout, self.shape[2])
            errors = backend.accumulate_rows(rows, buffer_weight=-1.0, codes=codes)
            self.new["noise"] = errors.view(self.shape[:2]).sum(dim=1, keepdim=True)

    def _compand(self, buffer: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
        """Y = C X for X = factor * buffer of norm one, float32 [b, m, n].

        In half precision X is taken times sqrt(m n), which makes its entries about one. Its
        rounding is a thousandth of 4-bit noise after C has enlarged it.
        """
        _, m, n = self.shape
        unit = 1 / math.sqrt(m * n)
        x = torch.empty(self.shape, dtype=dtype, device=buffer.device)
        self.backend.scaled(buffer, factor / unit, out=x)
        gram = torch.empty(*self.shape[:2], m, dtype=torch.float32, device=buffer.device)
        with full_precision_products():
            self.backend.symmetric_product(x, alpha=unit * unit, out=gram)
            operator = encoding_operator(gram, self.state_format.spectral_shift)
            y = torch.empty(self.shape, dtype=torch.float32, device=buffer.device)
            return self.backend.product(operator.to(dtype), x, out=y, alpha=unit)

    def _factorise(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """One power iteration; its factors as codes into `new`.

        Returns, oriented, the factors whose product the residual is to be taken from.
        """
        f = self.state_format
        matrix = values if self._wide else values.mT
        previous = self._load_factor("right", {})
        left, right = power_iteration(
            lambda v: torch.bmm(matrix, v), lambda v: torch.bmm(matrix.mT, v), previous
        )
        # A zero matrix has no directions; the last ones must survive it, without a contribution.
        found = right.count_nonzero(dim=(1, 2)).view(-1, 1, 1) > 0
        left = torch.where(found, left, 0.0)
        for side, factor in (("left", left), ("right", right)):
            length = factor.shape[1]
            rows = factor.mT.reshape(-1, length).contiguous()
            packed, scales = self.backend.quantize(
                codec.to_code_domain(rows.clone(), f, self.backend),
                f.factor_code_book(),
                f.factor_layout(),
            )
            for role, value in ((f"{side}_codes", packed), (f"{side}_scales", scales)):
                value = value.unflatten(0, (self.shape[0], self.rank))
                if side == "right":
                    value = torch.where(found, value, self.stored(role))
                self.new[role] = value
        if f.residual_after == "stored":
            return self._oriented_factors(self.new)
        return (left, right) if self._wide else (right, left)

    def _oriented_factors(self, source: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(L [b, m, rank], R [b, n, rank]) from `source`, by default what is stored."""
        left, right = (self._load_factor(side, source) for side in ("left", "right"))
        return (left, right) if self._wide else (right, left)

    def _load_factor(self, side: str, source: dict[str, Tensor]) -> Tensor:
        """Decode a factor: float32 [b, length, rank]."""
        f, backend = self.state_format, self.backend
        packed, scales = (
            source[role] if role in source else self.stored(role)
            for role in (f"{side}_codes", f"{side}_scales")
        )
        length = self.matrices[0].shape[0 if side == "left" else 1]
        values = torch.empty(
            self.shape[0] * self.rank, length, dtype=torch.float32, device=packed.device
        )
        codes = PackedCodes(packed, scales, f.factor_code_book(), f.factor_layout(), length).flat()
        backend.accumulate_rows(values, codes=codes)
        codec.from_code_domain(values, f, backend)
        return values.view(self.shape[0], self.rank, length).mT

    def commit(self, accepted: Tensor) -> None:
        """Write `new` over the stored tensors of the matrices where `accepted`, bool [b]."""
        old: list[Tensor] = []
        new: list[Tensor] = []
        for role, values in self.new.items():
            stored = [matrix.tensors[role] for matrix in self.matrices]
            if role == "dense":  # too large to stack
                kept: Sequence[Tensor] = [
                    torch.where(accepted[i], values[i].to(dense.dtype), dense)
                    for i, dense in enumerate(stored)
                ]
            else:
                mask = accepted.view(-1, *[1] * (values.ndim - 1))
                kept = torch.where(mask, values, torch.stack(stored)).unbind()
            old += stored
            new += kept
        if old:
            torch._foreach_copy_(old, new)
        self.new.clear()
