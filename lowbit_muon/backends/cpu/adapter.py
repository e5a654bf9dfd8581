"""C++ backend: checks tensors and passes their memory to the kernels of `csrc/cpu`.

The environment variable LOWBIT_MUON_ISA (baseline, avx2, avx512 or avx512vnni) overrides the choice
of instruction set, which is otherwise the highest this processor supports.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes
from lowbit_muon.backends.cpu.memory import check, check_writable, output, readable
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


def multiply_adds(word: str, iterations: int) -> int:
    """Multiplies and adds in registers on as many threads as torch uses; how many products it was.

    It takes the instructions of the matrix products of the level in use and touches no memory, so
    its time gives their peak. word: "float32", "int16" or "int8", the last only where the level
    multiplies codes as bytes; iterations: 1 to 2^24 rounds. Raises ValueError naming the argument.
    """
    return int(_extension().multiply_adds(word, iterations, torch.get_num_threads()))


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
        x = readable(x, "x")
        rows, columns = x.shape
        packed = output(packed, "packed", (rows, layout.row_bytes(columns)), torch.uint8)
        scales = output(scales, "scales", (rows, layout.blocks(columns)), torch.float32)
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
        x = readable(x, "x")
        rows, columns = x.shape
        check(scales, "scales", (rows, layout.blocks(columns)), torch.float32)
        packed = output(packed, "packed", (rows, layout.row_bytes(columns)), torch.uint8)
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
        rows, columns = x.shape
        self._extension.quantize(
            rows=rows,
            columns=columns,
            x=x.data_ptr(),
            x_stride=x.stride(0),
            statistic=statistic,
            clip=layout.clip,
            bits=layout.bits,
            block_size=layout.effective_block(columns),
            thresholds=thresholds.data_ptr(),
            threshold_count=thresholds.numel(),
            packed=packed.data_ptr(),
            row_bytes=packed.shape[1],
            scales=scales.data_ptr(),
            threads=torch.get_num_threads(),
        )

    def accumulate(
        self,
        buffer: Tensor,
        *,
        buffer_weight: float = 0.0,
        codes: PackedCodes | None = None,
        code_weight: float = 1.0,
        grad: Tensor | None = None,
        grad_weight: float = 1.0,
    ) -> float:
        """See `Backend.accumulate`."""
        check_writable(buffer, "buffer")
        kept: list[Tensor] = []  # alive until the kernel has run
        return float(
            self._extension.accumulate(
                rows=buffer.shape[0],
                columns=buffer.shape[1],
                buffer=buffer.data_ptr(),
                buffer_stride=buffer.stride(0),
                buffer_weight=buffer_weight,
                threads=torch.get_num_threads(),
                **_code_arguments(codes, code_weight, buffer.shape, kept),
                **_grad_arguments(grad, grad_weight, buffer.shape),
            )
        )

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""
        check_writable(x, "x")
        first_signs, second_signs = _signs(x.shape[1])
        self._extension.rotate(
            rows=x.shape[0],
            columns=x.shape[1],
            x=x.data_ptr(),
            x_stride=x.stride(0),
            first_signs=first_signs.data_ptr(),
            second_signs=second_signs.data_ptr(),
            inverse=inverse,
            threads=torch.get_num_threads(),
        )


def _code_arguments(
    codes: PackedCodes | None, weight: float, shape: torch.Size, kept: list[Tensor]
) -> dict[str, Any]:
    if codes is None:
        return {}
    rows, columns = shape
    layout = codes.layout
    if codes.columns != columns:
        raise ValueError(f"codes: expected {columns} columns like buffer, got {codes.columns}")
    check(codes.packed, "codes.packed", (rows, layout.row_bytes(columns)), torch.uint8)
    check(codes.scales, "codes.scales", (rows, layout.blocks(columns)), torch.float32)
    levels, _ = _tables(codes.codebook)
    packed, scales = codes.packed.contiguous(), codes.scales.contiguous()
    kept += [packed, scales]
    return {
        "bits": layout.bits,
        "block_size": layout.effective_block(columns),
        "levels": levels.data_ptr(),
        "level_count": levels.numel(),
        "packed": packed.data_ptr(),
        "row_bytes": packed.shape[1],
        "scales": scales.data_ptr(),
        "code_weight": weight,
    }


def _grad_arguments(grad: Tensor | None, weight: float, shape: torch.Size) -> dict[str, Any]:
    if grad is None:
        return {}
    if grad.dtype not in _GRAD_TYPES:
        raise TypeError(f"grad: expected float32, bfloat16 or float16, got {grad.dtype}")
    check(grad, "grad", tuple(shape), grad.dtype)
    return {
        "grad": grad.data_ptr(),
        "grad_type": _GRAD_TYPES[grad.dtype],
        "grad_row_stride": grad.stride(0),
        "grad_column_stride": grad.stride(1),
        "grad_weight": weight,
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
