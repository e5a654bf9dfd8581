"""Codes of one oriented matrix: scales for every granularity, companding, factor storage.

The codec knows formats and backends; it does not know what the matrix is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend, PackedCodes
from lowbit_muon.backends.reference import SMALLEST_SCALE
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.formats.codebook import Codebook, CodeLayout
from lowbit_muon.formats.state_format import StateFormat

# (rows, values): a function that yields the matrix in panels of rows, as often as it is called.
Panels = Callable[[], Iterable[tuple[slice, Tensor]]]


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


def store_panels(
    panels: Panels,
    packed: Tensor,
    scales: Tensor,
    state_format: StateFormat,
    backend: Backend,
    *,
    measure_noise: bool = False,
) -> float:
    """Quantise a matrix that comes in panels of rows into `packed` and `scales`, in place.

    A rotating format overwrites the panels, and so does `measure_noise`: they must not be parts of
    anything needed. Returns the squared Frobenius norm of the error if it is to be measured, or 0.
    """
    layout, book = state_format.code_layout(), state_format.code_book()
    single_scale = state_format.granularity == "tensor"
    if single_scale:
        scales.fill_(_tensor_scale(panels, state_format, layout, backend))
    noise = 0.0
    for rows, panel in panels():
        values = to_code_domain(panel, state_format, backend)
        panel_scales = scales.expand(values.shape[0], 1) if single_scale else scales[rows]
        if single_scale:
            backend.encode(values, panel_scales, book, layout, packed=packed[rows])
        else:
            backend.quantize(values, book, layout, packed=packed[rows], scales=panel_scales)
        if measure_noise:
            codes = packed_codes(packed[rows], panel_scales, book, layout, values.shape[1])
            noise += backend.accumulate(values, buffer_weight=-1.0, codes=codes)
    return noise


def to_code_domain(values: Tensor, state_format: StateFormat, backend: Backend) -> Tensor:
    """Values as the codebook sees them: rotated (in place) or companded, if the format says so."""
    if state_format.rotate:
        backend.rotate(values)
    return compress(values, state_format.mu) if state_format.companded_scale else values


def from_code_domain(values: Tensor, state_format: StateFormat, backend: Backend) -> None:
    """Inverse of `to_code_domain`, in place."""
    if state_format.companded_scale:
        values.copy_(expand(values, state_format.mu))
    if state_format.rotate:
        backend.rotate(values, inverse=True)


def _tensor_scale(
    panels: Panels, state_format: StateFormat, layout: CodeLayout, backend: Backend
) -> float:
    """The one scale of a matrix: its statistic times clip, 0 if that underflows float32."""
    largest = squares = 0.0
    count = 0
    for _, values in panels():
        if not values.numel():
            continue
        values = to_code_domain(values, state_format, backend)
        count += values.numel()
        if layout.statistic == "absmax":
            low, high = values.aminmax()
            largest = max(largest, -float(low), float(high))
        else:
            squares += float(values.to(accumulation_dtype(values.device)).square().sum())
    statistic = largest if layout.statistic == "absmax" else math.sqrt(squares / max(count, 1))
    scale = statistic * layout.clip
    return scale if scale >= SMALLEST_SCALE else 0.0


def matrix_scales(values: Tensor, layout: CodeLayout) -> Tensor:
    """The one scale of each matrix, float32 [b, 1, 1], of float32 values [b, m, n], m*n > 0.

    What `store_panels` takes for granularity "tensor", on the device.
    """
    order = math.inf if layout.statistic == "absmax" else 2
    statistic = torch.linalg.vector_norm(
        values, order, dim=(1, 2), keepdim=True, dtype=accumulation_dtype(values.device)
    )
    if layout.statistic == "rms":
        statistic = statistic / math.sqrt(values[0].numel())
    scales = statistic * layout.clip
    return torch.where(scales >= SMALLEST_SCALE, scales, 0.0).float()


def packed_codes(
    packed: Tensor, scales: Tensor, book: Codebook, layout: CodeLayout, columns: int
) -> PackedCodes:
    """Codes as kernels take them, with one row of scales for each row of codes."""
    return PackedCodes(packed, scales.expand(packed.shape[0], -1), book, layout, columns)


def load(
    buffer: Tensor, packed: Tensor, scales: Tensor, state_format: StateFormat, backend: Backend
) -> None:
    """Decode into `buffer`, float32 [rows, columns]."""
    codes = packed_codes(
        packed, scales, state_format.code_book(), state_format.code_layout(), buffer.shape[1]
    )
    backend.accumulate(buffer, codes=codes)
    from_code_domain(buffer, state_format, backend)


def store_factor(
    factor: Tensor, packed: Tensor, scales: Tensor, state_format: StateFormat, backend: Backend
) -> None:
    """Quantise a low-rank factor [length, rank], one scale a column, in place.

    Stored transposed, so that a column's codes and scale are a row: packed [rank, bytes],
    scales [rank, 1].
    """
    values = factor.mT.clone(memory_format=torch.contiguous_format)
    backend.quantize(
        to_code_domain(values, state_format, backend),
        state_format.factor_code_book(),
        state_format.factor_layout(),
        packed=packed,
        scales=scales,
    )


def load_factor(
    packed: Tensor, scales: Tensor, length: int, state_format: StateFormat, backend: Backend
) -> Tensor:
    """Decode a low-rank factor: float32 [length, rank]."""
    values = torch.empty(packed.shape[0], length, dtype=torch.float32, device=packed.device)
    codes = packed_codes(
        packed, scales, state_format.factor_code_book(), state_format.factor_layout(), length
    )
    backend.accumulate(values, codes=codes)
    from_code_domain(values, state_format, backend)
    return values.mT
