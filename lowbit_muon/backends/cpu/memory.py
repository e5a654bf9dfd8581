"""What the C++ kernels may be given: checks of tensors before their memory is passed on."""

from __future__ import annotations

import torch
from torch import Tensor


def check_writable(x: Tensor, name: str) -> None:
    """Raise unless a kernel can write rows of float32 into `x`."""
    check(x, name, None, torch.float32)
    if not has_plain_rows(x):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got strides "
            f"{x.stride()} for shape {tuple(x.shape)}"
        )


def check(tensor: Tensor, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype) -> None:
    """Raise unless the tensor is dense CPU memory of this shape (None: any matrix) and dtype."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor on the CPU, got {tensor.layout} on {tensor.device}"
        )
    if tensor.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")
    if tensor.ndim != 2 or (shape is not None and tuple(tensor.shape) != shape):
        expected = "two dimensions" if shape is None else f"shape {shape}"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(tensor.shape)}")


def has_plain_rows(x: Tensor) -> bool:
    """Whether each row is contiguous and rows do not overlap."""
    rows, columns = x.shape
    return (columns <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) >= columns)


def readable(x: Tensor, name: str) -> Tensor:
    """`x` with contiguous rows, copied if it has not."""
    check(x, name, None, torch.float32)
    return x if has_plain_rows(x) else x.contiguous()


def output(tensor: Tensor | None, name: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    check(tensor, name, shape, dtype)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    return tensor
