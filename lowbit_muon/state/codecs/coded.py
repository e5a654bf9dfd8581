"""Codes and scales, companded or rotated if the format says so: linear, mu-law, tables."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import threshold

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.reference import SMALLEST_SCALE
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.formats.codebook import CodeLayout
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.codec import SMALLEST_NORM, Codec, Decoder, Stored

if TYPE_CHECKING:
    from lowbit_muon.state.operands import Dense, Panels

# (rows, values [b, rows, n]) of a matrix, as often as it is called; the values may be overwritten.
ValuePanels = Callable[[], Iterable[tuple[slice, Tensor]]]


def compress(x: Tensor, mu: float) -> Tensor:
    """sign(x) ln(1 + mu |x|) / ln(1 + mu) (mu-law, ITU-T G.711); x is clamped to [-1, 1]."""
    return x.abs().clamp_(max=1).mul_(mu).log1p_().div_(math.log1p(mu)).copysign_(x)


def expand(y: Tensor, mu: float) -> Tensor:
    """The inverse of `compress`."""
    return y.abs().mul_(math.log1p(mu)).expm1_().div_(mu).copysign_(y)


def empty_codes(
    rows: int, columns: int, layout: CodeLayout, *, single_scale: bool, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Storage for the codes of a zero matrix [rows, columns]: (packed uint8, scales float32)."""
    packed = torch.zeros(rows, layout.row_bytes(columns), dtype=torch.uint8, device=device)
    shape = (1, 1) if single_scale else (rows, layout.blocks(columns))
    return packed, torch.zeros(shape, dtype=torch.float32, device=device)


class Coded(Codec):
    """codes uint8 [m, bytes], scales float32 [m, blocks] or [1, 1], and, with a companded scale,
    norm float64 [1]: the matrix is then stored scaled to Frobenius norm one."""

    def __init__(self, state_format: StateFormat, shape: tuple[int, int]) -> None:
        super().__init__(state_format, shape)
        f = state_format
        self.book, self.layout = f.code_book(), f.code_layout()
        self.rank, self.stores_norm = f.rank(*shape), f.stores_norm
        self.single_scale = f.granularity == "tensor"
        self.is_plain = not (f.stores_norm or f.rotate or self.single_scale or self.rank)

    def empty(self, device: torch.device, seed: int) -> dict[str, Tensor]:
        """See `Codec.empty`."""
        packed, scales = empty_codes(
            self.m, self.n, self.layout, single_scale=self.single_scale, device=device
        )
        tensors = {"codes": packed, "scales": scales}
        if self.stores_norm:
            tensors["norm"] = torch.zeros(1, dtype=accumulation_dtype(device), device=device)
        return tensors

    def codes(self, stored: Stored) -> PackedCodes:
        """The stored codes, [b, m, ..], with a row of scales for each row of codes."""
        packed = stored["codes"]
        scales = stored["scales"].expand(*packed.shape[:2], -1)
        return PackedCodes(packed, scales, self.book, self.layout, self.n)

    def decoder(self, stored: Stored) -> Decoder:
        """See `Codec.decoder`."""
        codes = self.codes(stored)
        # its own, since scales of a whole matrix are replaced before its last rows are read
        codes = PackedCodes(codes.packed, codes.scales.clone(), self.book, self.layout, self.n)
        norm = stored["norm"][:, 0].clone() if self.stores_norm else None
        factors = self.factors(stored) if self.rank else None
        return _CodeDecoder(self, codes, norm, factors, stored.backend)

    def factors(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """(L [b, m, rank], R [b, n, rank]): L R^T is the low-rank part of the oriented matrix."""
        raise ValueError(
            f"factors: expected a format with a low-rank part, got {self.state_format}"
        )

    def encode(
        self,
        stored: Stored,
        x: Dense | Panels,
        norm: Tensor,
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """See `Codec.encode`."""
        divisor = self.divisor(stored, norm, scale)
        self.write_codes(stored, lambda: x.panels(divisor))

    def divisor(self, stored: Stored, norm: Tensor, scale: Tensor | None) -> Tensor | None:
        """What x is divided by, float64 [b], None for one; writes the norm, if one is stored."""
        if self.stores_norm:
            stored.blank("norm").copy_(threshold(norm, SMALLEST_NORM, 0.0).unsqueeze(1))
            divisor = threshold(norm, SMALLEST_NORM, math.inf)
            return divisor if scale is None else divisor * scale
        if scale is None and not stored.backend.asynchronous:
            return None
        return torch.where(norm > 0, 1.0 if scale is None else scale, math.inf)

    def write_codes(self, stored: Stored, panels: ValuePanels) -> None:
        """Quantise what comes in panels."""
        backend = stored.backend
        packed, scales = stored.blank("codes"), stored.blank("scales")
        if self.single_scale:
            scales.copy_(self._whole_scales(panels, backend))
        for rows, panel in panels():
            values = self.to_code_domain(panel, backend)
            if self.single_scale:
                each_row = scales.expand(*values.shape[:2], 1)
                backend.encode(values, each_row, self.book, self.layout, packed=packed[:, rows])
            else:
                backend.quantize(
                    values, self.book, self.layout, packed=packed[:, rows], scales=scales[:, rows]
                )
            if self.state_format.spectral:
                self.measure_noise(stored, rows, values)

    def shrink(self, stored: Stored, chosen: Tensor, factor: float) -> None:
        """Multiply what is stored by a factor in [0, 1] where chosen, bool [b]; its codes stay.

        Encoding what only became smaller would round it again, and over many steps lose it.
        """
        role = "norm" if self.stores_norm else "scales"
        smallest = SMALLEST_NORM if self.stores_norm else SMALLEST_SCALE
        roles = [role, "left_scales"] if self.rank and not self.stores_norm else [role]
        for role in roles:
            values = stored[role]
            smaller = threshold(values * factor, smallest, 0.0)
            values = torch.where(chosen.view(-1, *[1] * (values.ndim - 1)), smaller, values)
            torch._foreach_copy_(list(stored.each(role)), list(values.unbind()))

    def measure_noise(self, stored: Stored, rows: slice, values: Tensor) -> None:
        """Of rows that have been quantised, for formats that keep it; overwrites the values."""
        raise ValueError(f"noise: expected a spectral format, got {self.state_format}")

    def to_code_domain(self, values: Tensor, backend: Backend) -> Tensor:
        """Values as the codebook sees them: rotated (in place) or companded."""
        if self.state_format.rotate:
            backend.rotate(values)
        return (
            compress(values, self.state_format.mu) if self.state_format.companded_scale else values
        )

    def from_code_domain(self, values: Tensor, backend: Backend) -> None:
        """Inverse of `to_code_domain`, in place."""
        if self.state_format.companded_scale:
            values.copy_(expand(values, self.state_format.mu))
        if self.state_format.rotate:
            backend.rotate(values, inverse=True)

    def _whole_scales(self, panels: ValuePanels, backend: Backend) -> Tensor:
        """The one scale of each matrix, float32 [b, 1, 1]: its statistic times clip."""
        found: list[Tensor] = []
        for _, panel in panels():
            values = self.to_code_domain(panel, backend)
            if self.layout.statistic == "absmax":  # found without a copy
                found.append(torch.linalg.vector_norm(values, math.inf, (1, 2), keepdim=True))
            else:
                wide = values.to(accumulation_dtype(values.device))
                found.append(wide.square().sum(dim=(1, 2), keepdim=True))
        each = torch.stack(found).to(accumulation_dtype(found[0].device))
        if self.layout.statistic == "absmax":
            statistic = each.amax(dim=0)
        else:
            statistic = (each.sum(dim=0) / (self.m * self.n)).sqrt()
        scales = statistic * self.layout.clip
        return torch.where(scales >= SMALLEST_SCALE, scales, 0.0).float()


@dataclass(frozen=True)
class _CodeDecoder(Decoder):
    codec: Coded
    codes: PackedCodes
    norm: Tensor | None  # float64 [b]
    factors: tuple[Tensor, Tensor] | None
    backend: Backend

    def add(self, out: Tensor, terms: Terms, rows: slice) -> Tensor:
        """See `Decoder.add`."""
        f, weight = self.codec.state_format, terms.buffer_weight
        assert not isinstance(weight, Tensor)
        whole = rows.stop - rows.start == self.codec.m
        codes = self.codes if whole else self.codes.row_slice(rows)
        if f.companded_scale or f.rotate:
            self.backend.accumulate(out, Terms(codes=codes))
            self.codec.from_code_domain(out, self.backend)
            if self.factors is not None:
                left, right = self.factors
                self.backend.product(left[:, rows], right.mT, out=out, beta=1.0)
            if self.norm is not None:
                weight = weight * self.norm
            terms = dataclasses.replace(terms, buffer_weight=weight)
        else:
            buffer_weight = 0.0
            if self.factors is not None:
                left, right = self.factors
                self.backend.product(left[:, rows], right.mT, out=out)
                buffer_weight = weight
            terms = Terms(buffer_weight, codes, weight, terms.grad, terms.grad_weight)
        return self.backend.accumulate(out, terms).sum(dim=-1)
