"""Argument checks. Each raises with the parameter's name, what was expected and what came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeGuard

import torch
from torch import Tensor

from lowbit_muon.formats.state_format import is_finite_number

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Metal has no float64.
DEVICES_WITHOUT_FLOAT64 = {"mps"}


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """What sums over a matrix are kept in: float64, or float32 where the device has nothing wider.

    Statistics then have float32's rounding, and codes may differ from those of other devices.
    """
    return torch.float32 if device.type in DEVICES_WITHOUT_FLOAT64 else torch.float64


def holds_values(value: object) -> TypeGuard[Tensor]:
    """True for a tensor whose elements can be read: dense, and not on the meta device."""
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta


@contextmanager
def error_context(what: str, raised: type[Exception] | None = None) -> Iterator[None]:
    """Put the name of what is being looked at before the message of an error.

    raised: the type that a TypeError or ValueError becomes; None for its own.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        raise (raised or type(error))(f"{what}: {error}") from error


def check_memory(tensor: Tensor) -> None:
    """Raise TypeError unless a tensor's elements lie in memory by strides, as kernels read them.

    Wrappers of other tensors (torchao's quantised weights) have none of their own; meta tensors
    pass.
    """
    if tensor.layout != torch.strided or tensor.is_nested:
        raise TypeError(f"expected a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"expected a floating point tensor of 16, 32 or 64 bits, got {tensor.dtype}"
        )
    if tensor.numel() and not tensor.is_meta and not _has_memory(tensor):
        raise TypeError(
            f"expected a tensor with memory of its own, got a {type(tensor).__name__}, which wraps "
            "other tensors"
        )


def _has_memory(tensor: Tensor) -> bool:
    try:
        return tensor.data_ptr() != 0
    except RuntimeError:
        return False


def is_real_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float (not bool) or a one-element floating point tensor."""
    if isinstance(value, Tensor):
        usable = value.numel() == 1 and value.is_floating_point() and holds_values(value)
        return usable and bool(value.isfinite())
    return is_finite_number(value)


def check_matrix(name: str, matrix: object) -> Tensor:
    """`matrix` if it is a 2-D floating point tensor, else TypeError or ValueError."""
    if not isinstance(matrix, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(matrix).__name__}")
    if matrix.ndim != 2:
        raise ValueError(f"{name}: expected 2 dimensions, got shape {tuple(matrix.shape)}")
    if matrix.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a floating point dtype, got {matrix.dtype}")
    return matrix


def check_tensor(name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`value` if it is a dense tensor of this dtype and shape, else ValueError."""
    if not holds_values(value) or value.dtype != dtype or tuple(value.shape) != shape:
        got = (
            f"{value.dtype} {tuple(value.shape)}, {value.layout} on {value.device}"
            if isinstance(value, Tensor)
            else type(value).__name__
        )
        raise ValueError(f"{name}: expected {dtype} {shape}, got {got}")
    return value
