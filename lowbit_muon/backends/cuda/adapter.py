"""CUDA backend: checks tensors and passes their memory to the kernels of `csrc/cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes
from lowbit_muon.backends.cuda.library import (
    NUMBER_TYPES,
    STATISTICS,
    CudaLibrary,
    default_library,
    unavailable_reason,
)
from lowbit_muon.backends.cuda.memory import (
    codebook_arguments,
    has_plain_rows,
    mark_changed,
    number_arguments,
    share_memory,
    strided_arguments,
)
from lowbit_muon.backends.cuda.products import CudaProducts
from lowbit_muon.formats.codebook import Codebook, CodeLayout

# The longest row that the rotation holds in shared memory (csrc/cuda/rotation.cu).
ROTATED_COLUMNS = 24 * 1024

__all__ = ["CudaBackend", "unavailable_reason"]


class CudaBackend(CudaProducts):
    """`DeviceBackend` in CUDA C++. No method makes the host wait, `accumulate` excepted.

    Construction raises RuntimeError if the library or a GPU is not there. All methods raise
    ValueError or TypeError for tensors with another device, dtype or shape than the contract
    states. `library`: another one than the package's own, for tests.
    """

    name = "cuda"

    def __init__(self, library: CudaLibrary | None = None) -> None:
        if library is None:
            reason = unavailable_reason()
            if reason is not None:
                raise RuntimeError(f"backend: 'cuda' is not available: {reason}")
            library = default_library()
        super().__init__(library)

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
        x = self._checks.rows(x, "x")
        rows, columns = x.shape
        output = self._checks.output
        scales_shape = (rows, layout.blocks(columns))
        packed_shape = (rows, layout.row_bytes(columns))
        packed = output(packed, "packed", packed_shape, torch.uint8, like=x)
        scales = output(scales, "scales", scales_shape, torch.float32, like=x)
        self._update(x, codebook, layout, packed, scales)
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
        x = self._checks.rows(x, "x")
        rows, columns = x.shape
        scales_shape = (rows, layout.blocks(columns))
        self._checks.tensor(scales, "scales", scales_shape, torch.float32, like=x)
        packed_shape = (rows, layout.row_bytes(columns))
        packed = self._checks.output(packed, "packed", packed_shape, torch.uint8, like=x)
        self._update(x, codebook, layout, packed, scales.contiguous(), statistic="given")
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
        """See `DeviceBackend.update_codes`."""
        rows, columns = shape = tuple(grad.shape)
        grad = self._checks.numbers(grad, "grad", shape, like=codes.packed)
        codes = self._checks.codes(codes, shape, like=grad)
        layout = codes.layout
        output = self._checks.output
        packed_shape = (rows, layout.row_bytes(columns))
        packed = output(packed, "packed", packed_shape, torch.uint8, like=grad)
        scales = output(scales, "scales", (rows, layout.blocks(columns)), torch.float32, like=grad)
        written = None
        if out is not None:
            self._checks.tensor(out, "out", shape, (torch.float32, torch.bfloat16, torch.float16))
            mark_changed(out)
            written = out if has_plain_rows(out) else torch.empty_like(grad, dtype=out.dtype)
            if share_memory(grad, written):
                grad = grad.clone()  # rows too long to keep are read again after `out` is written
        new = torch.empty if grad.numel() else torch.zeros
        squares = new(2, rows, dtype=torch.float64, device=grad.device)
        self._update(
            grad,
            codes.codebook,
            layout,
            packed,
            scales,
            codes=codes,
            code_weight=code_weight,
            grad_weight=grad_weight,
            out=written,
            out_value_weight=out_value_weight,
            out_grad_weight=out_grad_weight,
            squares=squares,
        )
        if out is not None and written is not None and written is not out:
            out.copy_(written)
        return squares

    def _update(
        self,
        grad: Tensor,
        codebook: Codebook,
        layout: CodeLayout,
        packed: Tensor,
        scales: Tensor,
        *,
        statistic: str | None = None,
        codes: PackedCodes | None = None,
        code_weight: float = 0.0,
        grad_weight: float = 1.0,
        out: Tensor | None = None,
        out_value_weight: float = 0.0,
        out_grad_weight: float = 0.0,
        squares: Tensor | None = None,
    ) -> None:
        rows, columns = grad.shape
        tables = codebook_arguments(codebook, layout.bits)
        if grad.numel() == 0:
            scales.zero_()
            return
        self._library.call(
            "lowbit_update_codes",
            grad.device,
            rows=rows,
            columns=columns,
            bits=layout.bits,
            block=layout.effective_block(columns),
            **tables,
            old_packed=None if codes is None else codes.packed.data_ptr(),
            old_scales=None if codes is None else codes.scales.data_ptr(),
            code_weight=code_weight,
            **number_arguments("grad", grad),
            grad_weight=grad_weight,
            statistic=STATISTICS[statistic or layout.statistic],
            clip=layout.clip,
            packed=packed.data_ptr(),
            scales=scales.data_ptr(),
            **({} if out is None else number_arguments("out", out)),
            out_value_weight=out_value_weight,
            out_grad_weight=out_grad_weight,
            squares=None if squares is None else squares.data_ptr(),
        )

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
        self._checks.writable(buffer, "buffer")
        rows, columns = shape = tuple(buffer.shape)
        arguments: dict[str, object] = {}
        kept: list[object] = []  # alive until the kernel is queued
        if codes is not None:
            codes = self._checks.codes(codes, shape, like=buffer)
            tables = codebook_arguments(codes.codebook, codes.layout.bits)
            kept.append(codes)
            arguments = {
                "bits": codes.layout.bits,
                "levels": tables["levels"],
                "level_count": tables["level_count"],
                "packed": codes.packed.data_ptr(),
                "scales": codes.scales.data_ptr(),
                "code_weight": code_weight,
            }
        if grad is not None:
            grad = self._checks.numbers(grad, "grad", shape, like=buffer)
            arguments |= {**number_arguments("grad", grad), "grad_weight": grad_weight}
        if buffer.numel() == 0:
            return torch.zeros(rows, dtype=torch.float64, device=buffer.device)
        squares = torch.empty(rows, dtype=torch.float64, device=buffer.device)
        self._library.call(
            "lowbit_accumulate_rows",
            buffer.device,
            rows=rows,
            columns=columns,
            buffer=buffer.data_ptr(),
            buffer_stride=buffer.stride(0),
            buffer_weight=buffer_weight,
            block=1 if codes is None else codes.layout.effective_block(columns),
            squares=squares.data_ptr(),
            **arguments,
        )
        return squares

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        self._checks.writable(x, "x")
        rows, columns = x.shape
        if columns > ROTATED_COLUMNS:
            return super().rotate(x, inverse=inverse)
        if x.numel():
            self._library.call(
                "lowbit_rotate",
                x.device,
                rows=rows,
                columns=columns,
                x=x.data_ptr(),
                x_stride=x.stride(0),
                inverse=inverse,
            )
        return None

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """See `DeviceBackend.scaled`."""
        shape = tuple(x.shape)
        self._checks.tensor(x, "x", shape, torch.float32)
        if x.ndim != 3:
            raise ValueError(f"x: expected three dimensions, got shape {shape}")
        self._checks.tensor(factor, "factor", shape[:1], torch.float32, like=x)
        self._checks.tensor(out, "out", shape, tuple(NUMBER_TYPES), like=x)
        if not out.is_contiguous():
            return super().scaled(x, factor, out=out)
        if out.numel():
            x, factor = x.contiguous(), factor.contiguous()
            mark_changed(out)
            self._library.call(
                "lowbit_scaled",
                x.device,
                batch=shape[0],
                size=shape[1] * shape[2],
                x=x.data_ptr(),
                factor=factor.data_ptr(),
                out=out.data_ptr(),
                out_type=NUMBER_TYPES[out.dtype],
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
        self._checks.tensor(weight, "weight", None, tuple(NUMBER_TYPES))
        shape = tuple(weight.shape)
        self._checks.tensor(update, "update", shape, tuple(NUMBER_TYPES), like=weight)
        self._checks.element(decay, "decay", torch.float32, like=weight)
        self._checks.element(step_size, "step_size", torch.float32, like=weight)
        if seed is not None:
            self._checks.element(seed, "seed", torch.int32, like=weight)
            if weight.dtype != torch.bfloat16:
                raise TypeError(f"weight: expected bfloat16 with a seed, got {weight.dtype}")
        if weight.numel() == 0:
            return
        mark_changed(weight)
        self._library.call(
            "lowbit_update_weight",
            weight.device,
            rows=shape[0],
            columns=shape[1],
            **strided_arguments("weight", weight),
            **strided_arguments("update", update),
            decay=decay.data_ptr(),
            step_size=step_size.data_ptr(),
            seed=None if seed is None else seed.data_ptr(),
        )
