"""CUDA backend: checks tensors and passes their memory to the kernels of `csrc/cuda`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.cuda.library import (
    NUMBER_TYPES,
    STATISTICS,
    CudaLibrary,
    default_library,
    unavailable_reason,
)
from lowbit_muon.backends.cuda.memory import (
    codebook_arguments,
    number_arguments,
    plain_rows,
    strided_arguments,
)
from lowbit_muon.backends.cuda.products import CudaProducts
from lowbit_muon.backends.memory import (
    KERNEL_DTYPES,
    changed,
    check_book,
    has_plain_rows,
    share_memory,
)
from lowbit_muon.formats.codebook import Codebook, CodeLayout

# The longest row that the rotation holds in shared memory (csrc/cuda/rotation.cu).
ROTATED_COLUMNS = 24 * 1024


class CudaBackend(CudaProducts):
    """`Backend` in CUDA C++. No method makes the host wait.

    Construction raises RuntimeError if the library or a GPU is not there. All methods raise
    ValueError or TypeError for tensors with another device, dtype or shape than the contract
    states. `library`: another one than the package's own, for tests.
    """

    name = "cuda"
    asynchronous = True

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
        self._checks.tensor(x, "x", None, torch.float32)
        check_book(codebook, layout)
        *leading, n = x.shape
        output = self._checks.output
        packed = output(packed, "packed", (*leading, layout.row_bytes(n)), torch.uint8, like=x)
        scales = output(scales, "scales", (*leading, layout.blocks(n)), torch.float32, like=x)
        changed(packed, scales)
        self._update(Terms(grad=plain_rows(x)), codebook, layout, packed, scales)
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
        self._checks.tensor(x, "x", None, torch.float32)
        check_book(codebook, layout)
        *leading, n = x.shape
        self._checks.tensor(scales, "scales", (*leading, layout.blocks(n)), torch.float32, like=x)
        packed_shape = (*leading, layout.row_bytes(n))
        packed = self._checks.output(packed, "packed", packed_shape, torch.uint8, like=x)
        changed(packed)
        terms = Terms(grad=plain_rows(x))
        self._update(terms, codebook, layout, packed, scales.contiguous(), statistic="given")
        return packed

    def update_codes(
        self,
        terms: Terms,
        *,
        packed: Tensor,
        scales: Tensor,
        out: Tensor | None = None,
        out_weights: tuple[float, float] = (1.0, 0.0),
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.update_codes`."""
        codes, grad = terms.codes_and_grad()
        self._checks.tensor(grad, "grad", None, KERNEL_DTYPES)
        shape = tuple(grad.shape)
        codes = self._checks.codes(codes, shape, like=grad)
        output = self._checks.output
        output(packed, "packed", tuple(codes.packed.shape), torch.uint8, like=grad)
        output(scales, "scales", tuple(codes.scales.shape), torch.float32, like=grad)
        grad = plain_rows(grad)
        written = None
        if out is not None:
            self._checks.tensor(out, "out", shape, KERNEL_DTYPES, like=grad)
            changed(out)
            written = out.flatten(0, -2)  # a copy where rows are not at even distances
            if not has_plain_rows(written):
                written = torch.empty_like(grad, dtype=out.dtype)
            if share_memory(grad, written):
                grad = grad.clone()  # rows too long to keep are read again after `out` is written
        changed(packed, scales)
        new = torch.empty if grad.numel() else torch.zeros
        squares = new(2, *shape[:-1], dtype=torch.float64, device=grad.device)
        self._update(
            replace(terms, codes=codes, grad=grad),
            codes.codebook,
            codes.layout,
            packed,
            scales,
            out=written,
            out_weights=out_weights,
            squares=squares,
        )
        if out is not None and written is not None and written.data_ptr() != out.data_ptr():
            out.copy_(written.view(shape))
        return squares[0], squares[1]

    def _update(
        self,
        terms: Terms,  # of a gradient [rows, n] with plain rows, and contiguous codes
        codebook: Codebook,
        layout: CodeLayout,
        packed: Tensor,
        scales: Tensor,
        *,
        statistic: str | None = None,  # None: the layout's
        out: Tensor | None = None,  # [rows, n]
        out_weights: tuple[float, float] = (1.0, 0.0),
        squares: Tensor | None = None,
    ) -> None:
        """Quantise the terms' sum into (packed, scales)."""
        codes, grad = terms.codes, terms.grad
        assert grad is not None
        rows, columns = grad.shape
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
            **codebook_arguments(codebook),
            old_packed=None if codes is None else codes.packed.data_ptr(),
            old_scales=None if codes is None else codes.scales.data_ptr(),
            code_weight=terms.code_weight,
            **number_arguments("grad", grad),
            grad_weight=terms.grad_weight,
            statistic=STATISTICS[statistic or layout.statistic],
            clip=layout.clip,
            packed=packed.data_ptr(),
            scales=scales.data_ptr(),
            **({} if out is None else number_arguments("out", out)),
            out_value_weight=out_weights[0],
            out_grad_weight=out_weights[1],
            squares=None if squares is None else squares.data_ptr(),
        )

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """See `Backend.accumulate`."""
        target = self._checks.rows_in_place(buffer, "buffer")
        rows, columns = target.shape
        arguments: dict[str, object] = {}
        codes, grad = terms.codes, terms.grad  # alive until the kernel is queued
        if codes is not None:
            codes = self._checks.codes(codes, tuple(buffer.shape), like=buffer)
            tables = codebook_arguments(codes.codebook)
            arguments = {
                "bits": codes.layout.bits,
                "levels": tables["levels"],
                "level_count": tables["level_count"],
                "packed": codes.packed.data_ptr(),
                "scales": codes.scales.data_ptr(),
                "code_weight": terms.code_weight,
            }
        if grad is not None:
            self._checks.tensor(grad, "grad", tuple(buffer.shape), KERNEL_DTYPES, like=buffer)
            grad = plain_rows(grad)
            arguments |= {**number_arguments("grad", grad), "grad_weight": terms.grad_weight}
        changed(buffer)
        new = torch.empty if buffer.numel() else torch.zeros
        squares = new(buffer.shape[:-1], dtype=torch.float64, device=buffer.device)
        if buffer.numel():
            self._library.call(
                "lowbit_accumulate_rows",
                buffer.device,
                rows=rows,
                columns=columns,
                buffer=target.data_ptr(),
                buffer_stride=target.stride(0),
                buffer_weight=terms.buffer_weight,
                block=1 if codes is None else codes.layout.effective_block(columns),
                squares=squares.data_ptr(),
                **arguments,
            )
        return squares

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        target = self._checks.rows_in_place(x, "x")
        rows, columns = target.shape
        if columns > ROTATED_COLUMNS:
            super().rotate(x, inverse=inverse)
        elif x.numel():
            changed(x)
            self._library.call(
                "lowbit_rotate",
                x.device,
                rows=rows,
                columns=columns,
                x=target.data_ptr(),
                x_stride=target.stride(0),
                inverse=inverse,
            )

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """See `Backend.scaled`."""
        self._checks.tensor(x, "x", None, torch.float32, dimensions=(3,))
        shape = tuple(x.shape)
        self._checks.tensor(factor, "factor", shape[:1], torch.float32, like=x)
        self._checks.tensor(out, "out", shape, KERNEL_DTYPES, like=x)
        if not out.is_contiguous():
            return super().scaled(x, factor, out=out)
        if out.numel():
            x, factor = x.contiguous(), factor.contiguous()
            changed(out)
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
        """See `Backend.update_weight`."""
        self._checks.weight_update(weight, update, decay, step_size, seed)
        if weight.numel() == 0:
            return
        changed(weight)
        self._library.call(
            "lowbit_update_weight",
            weight.device,
            rows=weight.shape[0],
            columns=weight.shape[1],
            **strided_arguments("weight", weight),
            **strided_arguments("update", update),
            decay=decay.data_ptr(),
            step_size=step_size.data_ptr(),
            seed=None if seed is None else seed.data_ptr(),
        )
