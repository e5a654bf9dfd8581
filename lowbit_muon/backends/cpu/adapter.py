"""C++ backend: checks tensors and passes their memory to the kernels of `csrc/cpu`.

The environment variable LOWBIT_MUON_ISA (baseline, avx2, avx512 or avx512vnni) overrides the choice
of instruction set, which is otherwise the highest this processor supports.
"""

from __future__ import annotations

import functools
import math
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.cpu.memory import (
    check,
    check_matrices,
    check_plain_rows,
    contiguous_codes,
    memory,
    output,
    row_distance,
)
from lowbit_muon.backends.cpu.products import CpuProducts
from lowbit_muon.formats.codebook import Codebook, CodeLayout, rotation_signs

ISA_VARIABLE = "LOWBIT_MUON_ISA"
_GRAD_TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def unavailable_reason() -> str | None:
    """Why the C++ backend cannot be used, or None if it can."""
    try:
        import lowbit_muon.backends._cpu  # noqa: F401
    except ModuleNotFoundError:
        return (
            "the C++ extension was not built (its build needs gcc or clang with C++17; "
            "reinstall with `pip install -v` to see what went wrong)"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


@functools.cache
def _extension() -> ModuleType:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend: 'cpu' is not available: {reason}")
    from lowbit_muon.backends import _cpu

    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            _cpu.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return _cpu


def isa() -> str:
    """The instruction-set level in use."""
    return str(_extension().isa())


def supported_isas() -> list[str]:
    """The levels this processor supports, lowest first."""
    return list(_extension().supported_isas())


def set_isa(name: str) -> None:
    """Use the level `name` in the whole process. Raises ValueError if it is not supported here."""
    _extension().set_isa(name)


def take_most_workspace() -> int:
    """The most bytes that the products held at once since the last call (torch does not see it)."""
    return int(_extension().take_most_workspace())


class CpuBackend(CpuProducts):
    """`Backend` in C++ with AVX2 or AVX-512, on as many threads as torch uses.

    Construction raises RuntimeError if the extension is not there and ValueError if LOWBIT_MUON_ISA
    names a level that this machine does not support. All methods raise ValueError or TypeError for
    tensors with another device, dtype or shape than `Backend` states.
    """

    name = "cpu"

    def __init__(self) -> None:
        super().__init__(_extension())

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
        *rows, columns = check_matrices(x, "x")
        packed = output(packed, "packed", (*rows, layout.row_bytes(columns)), torch.uint8)
        scales = output(scales, "scales", (*rows, layout.blocks(columns)))
        self._quantize(x, codebook, layout, layout.statistic, packed, scales)
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
        *rows, columns = check_matrices(x, "x")
        check(scales, "scales", (*rows, layout.blocks(columns)), torch.float32)
        packed = output(packed, "packed", (*rows, layout.row_bytes(columns)), torch.uint8)
        self._quantize(x, codebook, layout, "given", packed, scales.contiguous())
        return packed

    def _quantize(
        self,
        x: Tensor,
        codebook: Codebook,
        layout: CodeLayout,
        statistic: str,
        packed: Tensor,
        scales: Tensor,
    ) -> None:
        _, thresholds = _tables(codebook)
        *rows, columns = x.shape
        if row_distance(x) is None:
            x = x.contiguous()
        self._extension.quantize(
            rows=math.prod(rows),
            columns=columns,
            x=x.data_ptr(),
            x_stride=row_distance(x),
            statistic=statistic,
            clip=layout.clip,
            bits=layout.bits,
            block_size=layout.effective_block(columns),
            thresholds=thresholds.data_ptr(),
            threshold_count=thresholds.numel(),
            packed=packed.data_ptr(),
            row_bytes=packed.shape[-1],
            scales=scales.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """See `Backend.accumulate`."""
        *batch, rows, columns = check_matrices(buffer, "buffer")
        distance = row_distance(buffer)
        if distance is None:
            check_plain_rows(buffer, "buffer")
            whole = buffer.contiguous()
            row_sums = self.accumulate(whole, terms)
            buffer.copy_(whole)
            return row_sums
        row_sums = torch.empty((*batch, rows), dtype=torch.float64, device="cpu")
        kept: list[Tensor] = []  # alive until the kernel has run
        self._extension.accumulate(
            batch=batch[0] if batch else 1,
            rows=rows,
            columns=columns,
            buffer=buffer.data_ptr(),
            buffer_stride=distance,
            buffer_weight=terms.buffer_weight,
            row_sums=row_sums.data_ptr(),
            threads=torch.get_num_threads(),
            **_code_arguments(terms, buffer.shape, kept),
            **_grad_arguments(terms, buffer.shape),
        )
        return row_sums

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        *rows, columns = check_matrices(x, "x")
        distance = row_distance(x)
        if distance is None:
            check_plain_rows(x, "x")
            whole = x.contiguous()
            self.rotate(whole, inverse=inverse)
            x.copy_(whole)
            return
        first_signs, second_signs = _signs(columns)
        self._extension.rotate(
            rows=math.prod(rows),
            columns=columns,
            x=x.data_ptr(),
            x_stride=distance,
            first_signs=first_signs.data_ptr(),
            second_signs=second_signs.data_ptr(),
            inverse=inverse,
            threads=torch.get_num_threads(),
        )


def _code_arguments(terms: Terms, shape: torch.Size, kept: list[Tensor]) -> dict[str, Any]:
    codes = terms.codes
    if codes is None:
        return {}
    *rows, columns = shape
    if codes.columns != columns:
        raise ValueError(f"codes: expected {columns} columns like buffer, got {codes.columns}")
    packed, scales = contiguous_codes(codes, rows)
    kept += [packed, scales]
    levels, _ = _tables(codes.codebook)
    return {
        "bits": codes.layout.bits,
        "block_size": codes.layout.effective_block(columns),
        "levels": levels.data_ptr(),
        "level_count": levels.numel(),
        "packed": packed.data_ptr(),
        "row_bytes": packed.shape[-1],
        "scales": scales.data_ptr(),
        "code_weight": terms.code_weight,
    }


def _grad_arguments(terms: Terms, shape: torch.Size) -> dict[str, Any]:
    grad = terms.grad
    if grad is None:
        return {}
    if not isinstance(grad, Tensor) or grad.dtype not in _GRAD_TYPES:
        got = grad.dtype if isinstance(grad, Tensor) else type(grad).__name__
        raise TypeError(f"grad: expected float32, bfloat16 or float16, got {got}")
    check(grad, "grad", shape, grad.dtype)
    return {
        "grad": memory(grad),
        "grad_type": _GRAD_TYPES[grad.dtype],
        "grad_weight": terms.grad_weight,
    }


@functools.lru_cache(maxsize=64)
def _tables(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Levels and thresholds, float32."""
    return (
        torch.tensor(codebook.levels, dtype=torch.float32, device="cpu"),
        torch.tensor(codebook.thresholds, dtype=torch.float32, device="cpu"),
    )


@functools.lru_cache(maxsize=64)
def _signs(columns: int) -> tuple[Tensor, Tensor]:
    """The signs of a rotation, float32 [columns] each."""
    first, second = rotation_signs(columns)
    return torch.tensor(first, dtype=torch.float32, device="cpu"), torch.tensor(
        second, dtype=torch.float32, device="cpu"
    )
