"""What kernels on a device may be given: checks of tensors before their memory is passed on."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes
from lowbit_muon.formats.codebook import CODE_BITS, Codebook, CodeLayout

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Checks:
    """Checks for tensors on some types of device."""

    def __init__(self, device_types: tuple[str, ...]) -> None:
        self.device_types = device_types

    def tensor(
        self,
        x: Tensor,
        name: str,
        shape: tuple[int, ...] | None,
        dtypes: torch.dtype | tuple[torch.dtype, ...],
        *,
        like: Tensor | None = None,
        dimensions: tuple[int, ...] = (2, 3),
    ) -> None:
        """Raise unless x is dense memory of this shape (None: any of `dimensions`), one of these
        dtypes and on the device of `like`."""
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.device.type not in self.device_types or x.layout != torch.strided:
            raise ValueError(
                f"{name}: expected a dense tensor on {' or '.join(self.device_types)}, "
                f"got {x.layout} on {x.device}"
            )
        if like is not None and x.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, got one on {x.device}")
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
        if shape is None and x.ndim not in dimensions:
            counts = " or ".join(map(str, dimensions))
            raise ValueError(f"{name}: expected {counts} dimensions, got shape {tuple(x.shape)}")
        if shape is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got shape {tuple(x.shape)}")

    def element(self, x: Tensor, name: str, dtype: torch.dtype, *, like: Tensor) -> None:
        """Raise unless x is one number of this dtype."""
        self.tensor(x, name, None, dtype, like=like, dimensions=(0, 1, 2, 3))
        if x.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(x.shape)}")

    def weight_update(
        self,
        weight: Tensor,
        update: Tensor,
        decay: Tensor,
        step_size: Tensor,
        seed: Tensor | None,
    ) -> None:
        """Raise unless `Backend.update_weight` takes these."""
        self.tensor(weight, "weight", None, KERNEL_DTYPES, dimensions=(2,))
        self.tensor(update, "update", tuple(weight.shape), KERNEL_DTYPES, like=weight)
        self.element(decay, "decay", torch.float32, like=weight)
        self.element(step_size, "step_size", torch.float32, like=weight)
        if seed is not None:
            self.element(seed, "seed", torch.int32, like=weight)
            if weight.dtype != torch.bfloat16:
                raise TypeError(f"weight: expected bfloat16 with a seed, got {weight.dtype}")

    def rows_in_place(self, x: Tensor, name: str) -> Tensor:
        """x, float32, as one matrix of all its rows, into which a kernel can write."""
        self.tensor(x, name, None, torch.float32)
        rows = x.flatten(0, -2)
        if not has_plain_rows(rows) or rows.data_ptr() != x.data_ptr():
            raise ValueError(
                f"{name}: expected contiguous rows at even distances that do not overlap, got "
                f"strides {x.stride()} for shape {tuple(x.shape)}"
            )
        return rows

    def output(
        self,
        x: Tensor | None,
        name: str,
        shape: tuple[int, ...],
        dtypes: torch.dtype | tuple[torch.dtype, ...],
        *,
        like: Tensor,
    ) -> Tensor:
        """x, contiguous, or new memory of the first of the dtypes."""
        if x is None:
            dtype = dtypes[0] if isinstance(dtypes, tuple) else dtypes
            return torch.empty(shape, dtype=dtype, device=like.device)
        self.tensor(x, name, shape, dtypes, like=like)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
        return x

    def codes(self, codes: PackedCodes, shape: tuple[int, ...], *, like: Tensor) -> PackedCodes:
        """The codes of matrices of this shape, in contiguous tensors."""
        layout, (*rows, columns) = codes.layout, shape
        if codes.columns != columns:
            raise ValueError(f"codes: expected {columns} columns, got {codes.columns}")
        check_book(codes.codebook, layout)
        packed_shape = (*rows, layout.row_bytes(columns))
        self.tensor(codes.packed, "codes.packed", packed_shape, torch.uint8, like=like)
        scales_shape = (*rows, layout.blocks(columns))
        self.tensor(codes.scales, "codes.scales", scales_shape, torch.float32, like=like)
        packed, scales = codes.packed.contiguous(), codes.scales.contiguous()
        return dataclasses.replace(codes, packed=packed, scales=scales)


def check_book(codebook: Codebook, layout: CodeLayout) -> None:
    """Raise unless the layout is one of those there are and has room for the codebook."""
    if layout.bits not in CODE_BITS:
        raise ValueError(f"bits: expected one of {CODE_BITS}, got {layout.bits}")
    if len(codebook.levels) > 2**layout.bits:
        raise ValueError(
            f"codebook: expected at most {2**layout.bits} levels, got {len(codebook.levels)}"
        )


def check_apart(written: Tensor, name: str, read: Tensor, other: str) -> None:
    """Raise for the overlap that is easy to make: results in the place of what is read again."""
    if written.numel() and written.data_ptr() == read.data_ptr():
        raise ValueError(f"{name}: expected other memory than that of {other}, got the same")


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors might overlap: they lie in one allocation."""
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def has_plain_rows(x: Tensor) -> bool:
    """Whether each row of [m, n] is contiguous and rows do not overlap."""
    rows, columns = x.shape
    return (columns <= 1 or x.stride(1) == 1) and (rows <= 1 or x.stride(0) >= columns)


def changed(*tensors: Tensor) -> None:
    """Tell autograd that tensors change behind its back."""
    for x in tensors:
        if not x.is_inference():
            torch.autograd.graph.increment_version(x)
