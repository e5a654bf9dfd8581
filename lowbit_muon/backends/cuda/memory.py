"""How tensors and codebooks are passed to the CUDA kernels."""

from __future__ import annotations

import functools
from ctypes import Array, c_float, c_int8
from typing import Any

from torch import Tensor

from lowbit_muon.backends.cuda.library import NUMBER_TYPES
from lowbit_muon.backends.memory import has_plain_rows
from lowbit_muon.formats.codebook import Codebook


def plain_rows(x: Tensor) -> Tensor:
    """x as one matrix of all its rows, copied unless they are contiguous and at even distances.

    A transposed gradient is copied: read across its rows, each 32-byte sector would cross from L2
    to a multiprocessor once for every row in it, which costs more than torch's transposing copy.
    """
    rows = x.flatten(0, -2)
    return rows if has_plain_rows(rows) else rows.contiguous()


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


@functools.lru_cache(maxsize=64)
def codebook_arguments(codebook: Codebook) -> dict[str, Any]:
    """Levels and thresholds in the host's memory; the launcher copies them."""
    return {
        "levels": (c_float * len(codebook.levels))(*codebook.levels),
        "thresholds": (c_float * len(codebook.thresholds))(*codebook.thresholds),
        "level_count": len(codebook.levels),
    }


@functools.lru_cache(maxsize=64)
def integer_levels(codebook: Codebook) -> Array[c_int8]:
    """int8 [256] in the host's memory: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    return (c_int8 * 256)(*levels, *levels[-1:] * (256 - len(levels)))
