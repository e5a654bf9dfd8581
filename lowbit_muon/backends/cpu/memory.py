"""What the C++ kernels may be given: checks of tensors before their memory is passed on.

Every call goes through them, so what is right passes after a few cheap comparisons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes
from lowbit_muon.backends.tensors import FLOAT_DTYPES

# A batch of matrices: its address, and the strides of matrices, rows and columns.
Memory = tuple[int, ...]
NO_MEMORY: Memory = (0, 0, 0, 0)


def check_matrices(x: Tensor, name: str, dtype: torch.dtype | None = torch.float32) -> torch.Size:
    """The shape of x, [m, n] or [b, m, n]. Raises unless it is dense CPU memory of this dtype.

    dtype: None for any floating point dtype.
    """
    dense = isinstance(x, Tensor) and x.is_cpu and x.layout is torch.strided
    dense = dense and (x.dtype is dtype if dtype else x.dtype in FLOAT_DTYPES)
    if dense and 2 <= x.ndim <= 3:
        return x.shape
    _refuse(x, name, "two dimensions, or three of a batch", dtype)


def check(x: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype | None) -> None:
    """Raise unless x is dense CPU memory of this shape and dtype; see `check_matrices`."""
    dense = isinstance(x, Tensor) and x.is_cpu and x.layout is torch.strided
    dense = dense and (x.dtype is dtype if dtype else x.dtype in FLOAT_DTYPES)
    if not (dense and x.shape == tuple(shape)):
        _refuse(x, name, f"shape {tuple(shape)}", dtype)


def _refuse(x: object, name: str, shape: str, dtype: torch.dtype | None) -> NoReturn:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.device.type != "cpu" or x.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor on the CPU, got {x.layout} on {x.device}"
        )
    if dtype is None and x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating point dtype, got {x.dtype}")
    if dtype is not None and x.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {x.dtype}")
    raise ValueError(f"{name}: expected {shape}, got shape {tuple(x.shape)}")


def memory(x: Tensor) -> Memory:
    """Of [b, m, n], or of one matrix [m, n]."""
    return (x.data_ptr(), *x.stride()) if x.ndim == 3 else (x.data_ptr(), 0, *x.stride())


def has_plain_rows(x: Tensor) -> bool:
    """Whether each row of [.., m, n] is contiguous and none overlaps another."""
    if x.is_contiguous() or not x.numel():
        return True
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        return False
    reach = x.shape[-1]  # of the elements with the indices so far
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1:
            if stride < reach:
                return False
            reach += stride * (size - 1)
    return True


def check_plain_rows(x: Tensor, name: str) -> None:
    """Raise unless a kernel can write rows into x."""
    if not has_plain_rows(x):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got strides "
            f"{x.stride()} for shape {tuple(x.shape)}"
        )


def row_distance(x: Tensor) -> int | None:
    """The stride of contiguous rows if all of x have one, also from one matrix to the next."""
    if x.is_contiguous():
        return x.shape[-1]
    if not has_plain_rows(x):
        return None
    if x.ndim == 2 or x.shape[1] == 1:
        return x.stride(0)
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x.stride(1) if even else None


def output(
    tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """`tensor` if it is contiguous memory of this shape and dtype; new memory for None."""
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    check(tensor, name, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor


def changed(out: Tensor) -> Tensor:
    """`out`, after telling autograd that a kernel changes it behind its back."""
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def contiguous_codes(codes: PackedCodes, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(packed, scales) of codes of `rows`, [m] or [b, m], after checks."""
    layout, columns = codes.layout, codes.columns
    check(codes.packed, "codes.packed", (*rows, layout.row_bytes(columns)), torch.uint8)
    check(codes.scales, "codes.scales", (*rows, layout.blocks(columns)), torch.float32)
    return codes.packed.contiguous(), codes.scales.contiguous()
