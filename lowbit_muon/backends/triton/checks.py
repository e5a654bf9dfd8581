"""What the kernels may be given, and what they need to know about a device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes
from lowbit_muon.backends.triton import interpreted
from lowbit_muon.formats.codebook import CODE_BITS, Codebook, CodeLayout

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)


class Target(NamedTuple):
    """What a kernel may use of a device."""

    prmt: bool  # NVIDIA's byte permutation, by inline assembly
    group_products: bool  # warp groups multiply from shared memory
    float_precision: str  # of products of float32, see `triton.language.dot`


@functools.cache
def target(device: torch.device) -> Target:
    """What `device` offers. TF32 units, of which three products make a float32, begin at sm_80."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Target(prmt=False, group_products=False, float_precision="ieee")
    return nvidia_target(torch.cuda.get_device_capability(device))


def nvidia_target(capability: tuple[int, int]) -> Target:
    """What a GPU of this compute capability offers."""
    return Target(
        prmt=True,
        group_products=capability[0] in (9, 10, 11),  # not sm_120, whose units are sm_80's
        float_precision="tf32x3" if capability >= (8, 0) else "ieee",
    )


def device_types() -> tuple[str, ...]:
    """Where tensors may be; CPU memory only for the interpreter."""
    return ("cpu",) if interpreted() else ("cuda", "xpu")


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels go to the current device, which need not be the tensors'."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    if x.device.type == "xpu":
        return torch.xpu.device(x.device)
    return contextlib.nullcontext()


def check(
    tensor: Tensor,
    name: str,
    shape: tuple[int, ...] | None,
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    like: Tensor | None = None,
    dimensions: tuple[int, ...] = (2,),
) -> None:
    """Raise unless the tensor is dense GPU memory of this shape (None: any of `dimensions`), one of
    these dtypes and on the device of `like`."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.device.type not in device_types() or tensor.layout != torch.strided:
        expected = "the CPU" if interpreted() else "a GPU"
        raise ValueError(
            f"{name}: expected a dense tensor on {expected}, got {tensor.layout} on {tensor.device}"
        )
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {tensor.device}")
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    if shape is None and tensor.ndim not in dimensions:
        counts = " or ".join(map(str, dimensions))
        raise ValueError(f"{name}: expected {counts} dimensions, got shape {tuple(tensor.shape)}")
    if shape is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got shape {tuple(tensor.shape)}")


def check_writable_rows(x: Tensor, name: str) -> None:
    """Raise unless x is a float32 matrix of contiguous rows that do not overlap."""
    check(x, name, None, torch.float32)
    rows, columns = x.shape
    if (columns > 1 and x.stride(1) != 1) or (rows > 1 and x.stride(0) < columns):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got strides "
            f"{x.stride()} for shape {tuple(x.shape)}"
        )


def output(
    tensor: Tensor | None, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: Tensor
) -> Tensor:
    """`tensor` after checks, or new memory on the device of `like`."""
    if tensor is None:
        return torch.empty(shape, dtype=dtype, device=like.device)
    check(tensor, name, shape, dtype, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
    changed(tensor)
    return tensor


def changed(*tensors: Tensor) -> None:
    """Tell autograd that tensors change behind its back."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)


def check_codes(
    codes: PackedCodes, shape: tuple[int, ...], like: Tensor, name: str = "codes."
) -> tuple[Tensor, Tensor]:
    """(packed, scales) of codes of a matrix or batch of this shape, with contiguous rows."""
    layout, (*leading, columns) = codes.layout, shape
    if codes.columns != columns:
        raise ValueError(f"codes: expected {columns} columns, got {codes.columns}")
    check_book(codes.codebook, layout)
    packed_shape = (*leading, layout.row_bytes(columns))
    check(codes.packed, f"{name}packed", packed_shape, torch.uint8, like)
    scales_shape = (*leading, layout.blocks(columns))
    check(codes.scales, f"{name}scales", scales_shape, torch.float32, like)
    return contiguous_rows(codes.packed), contiguous_rows(codes.scales)


def contiguous_rows(x: Tensor) -> Tensor:
    """x, copied unless its rows are contiguous."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def check_book(codebook: Codebook, layout: CodeLayout) -> None:
    """Raise unless the layout has room for the codebook."""
    if layout.bits not in CODE_BITS:
        raise ValueError(f"bits: expected one of {CODE_BITS}, got {layout.bits}")
    if len(codebook.levels) > 2**layout.bits:
        raise ValueError(
            f"codebook: expected at most {2**layout.bits} levels, got {len(codebook.levels)}"
        )


@functools.lru_cache(maxsize=64)
def tables(codebook: Codebook, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [2**bits], filled up with the last, and thresholds [2**bits - 1], with infinity."""
    levels = codebook.levels + codebook.levels[-1:] * (2**bits - len(codebook.levels))
    missing = 2**bits - 1 - len(codebook.thresholds)
    thresholds = codebook.thresholds + (float("inf"),) * missing
    return (
        torch.tensor(levels, dtype=torch.float32, device=device),
        torch.tensor(thresholds, dtype=torch.float32, device=device),
    )
