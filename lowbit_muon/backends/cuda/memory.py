"""What the CUDA kernels may be given: checks of tensors before their memory is passed on."""

from __future__ import annotations

import functools
from ctypes import Array, c_float, c_int8
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes
from lowbit_muon.backends.cuda.library import NUMBER_TYPES
from lowbit_muon.formats.codebook import Codebook


class Checks:
    """Checks for tensors on one type of device ("cpu" for the emulated kernels)."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type

    def tensor(
        self,
        x: Tensor,
        name: str,
        shape: tuple[int, ...] | None,
        dtypes: torch.dtype | tuple[torch.dtype, ...],
        *,
        like: Tensor | None = None,
    ) -> None:
        """Raise unless x is dense memory of this shape (None: any matrix) and one of these dtypes,
        on the device of `like`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device.type != self._device_type or x.layout != torch.strided:
            raise ValueError(
                f"{name}: expected a dense tensor on '{self._device_type}', "
                f"got {x.layout} on {x.device}"
            )
        if like is not None and x.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if x.dtype not in dtypes:
            expected = ", ".join(map(str, dtypes))
            raise TypeError(f"{name}: expected {expected}, got {x.dtype}")
        if (shape is None and x.ndim != 2) or (shape is not None and tuple(x.shape) != shape):
            wanted = "two dimensions" if shape is None else f"shape {shape}"
            raise ValueError(f"{name}: expected {wanted}, got shape {tuple(x.shape)}")

    def element(self, x: Tensor, name: str, dtype: torch.dtype, *, like: Tensor) -> None:
        """Raise unless x is one number of this dtype."""
        self.tensor(x, name, tuple(x.shape), dtype, like=like)
        if x.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(x.shape)}")

    def writable(self, x: Tensor, name: str) -> None:
        """Raise unless a kernel can write rows of float32 into x, which it is about to do."""
        self.tensor(x, name, None, torch.float32)
        if not has_plain_rows(x):
            raise ValueError(
                f"{name}: expected contiguous rows that do not overlap, got strides {x.stride()} "
                f"for shape {tuple(x.shape)}"
            )
        mark_changed(x)

    def rows(self, x: Tensor, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """x, float32, copied if a row is not contiguous."""
        self.tensor(x, name, shape, torch.float32)
        return x if has_plain_rows(x) else x.contiguous()

    def output(
        self,
        x: Tensor | None,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        like: Tensor,
    ) -> Tensor:
        """x after checks, or new memory. Autograd is told that it changes behind its back."""
        if x is None:
            return torch.empty(shape, dtype=dtype, device=like.device)
        self.tensor(x, name, shape, dtype, like=like)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
        mark_changed(x)
        return x

    def codes(self, codes: PackedCodes, shape: tuple[int, ...], *, like: Tensor) -> PackedCodes:
        """The codes with contiguous tensors, of a matrix (or a batch) of this shape."""
        *leading, columns = shape
        layout = codes.layout
        if codes.columns != columns:
            raise ValueError(f"codes: expected {columns} columns, got {codes.columns}")
        if layout.bits not in (2, 3, 4, 8):
            raise ValueError(f"codes: expected 2, 3, 4 or 8 bits, got {layout.bits}")
        packed_shape = (*leading, layout.row_bytes(columns))
        self.tensor(codes.packed, "codes.packed", packed_shape, torch.uint8, like=like)
        scales_shape = (*leading, layout.blocks(columns))
        self.tensor(codes.scales, "codes.scales", scales_shape, torch.float32, like=like)
        return PackedCodes(
            codes.packed.contiguous(), codes.scales.contiguous(), codes.codebook, layout, columns
        )

    def numbers(self, x: Tensor, name: str, shape: tuple[int, ...], *, like: Tensor) -> Tensor:
        """x of one of the three float types with contiguous rows.

        A transposed gradient is copied: read across its rows, each 32-byte sector would cross from
        L2 to a multiprocessor once for every row in it, which costs more than torch's transposing
        copy.
        """
        self.tensor(x, name, shape, tuple(NUMBER_TYPES), like=like)
        return x if has_plain_rows(x) else x.contiguous()


def has_plain_rows(x: Tensor) -> bool:
    """Whether each row is contiguous and rows do not overlap."""
    rows, columns = x.shape
    return (columns <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) >= columns)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors might overlap: they lie in one allocation."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def mark_changed(x: Tensor) -> None:
    """Tell autograd that x changes behind its back."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


def number_arguments(name: str, x: Tensor) -> dict[str, Any]:
    """A matrix of one of the three float types, its type and its row stride."""
    return {
        name: x.data_ptr(),
        f"{name}_type": NUMBER_TYPES[x.dtype],
        f"{name}_stride": x.stride(0),
    }


def strided_arguments(name: str, x: Tensor) -> dict[str, Any]:
    """A matrix of one of the three float types, its type and both strides."""
    return {
        name: x.data_ptr(),
        f"{name}_type": NUMBER_TYPES[x.dtype],
        f"{name}_row_stride": x.stride(0),
        f"{name}_column_stride": x.stride(1),
    }


def codebook_arguments(codebook: Codebook, bits: int) -> dict[str, Any]:
    """Levels and thresholds in the host's memory; the launcher copies them."""
    count = len(codebook.levels)
    if count > 2**bits:
        raise ValueError(f"codebook: expected at most {2**bits} levels, got {count}")
    levels, thresholds = _host_tables(codebook)
    return {"levels": levels, "thresholds": thresholds, "level_count": count}


@functools.lru_cache(maxsize=64)
def _host_tables(codebook: Codebook) -> tuple[Array[c_float], Array[c_float]]:
    return (
        (c_float * len(codebook.levels))(*codebook.levels),
        (c_float * len(codebook.thresholds))(*codebook.thresholds),
    )


@functools.lru_cache(maxsize=64)
def integer_levels(codebook: Codebook) -> Array[c_int8]:
    """int8 [256] in the host's memory: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    return (c_int8 * 256)(*levels, *levels[-1:] * (256 - len(levels)))
