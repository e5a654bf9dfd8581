"""What kernels may be given: checks of tensors before their memory is passed on."""

from __future__ import annotations

import dataclasses
import functools
from typing import NoReturn

import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, integer_codes_problem
from lowbit_muon.formats.codebook import CODE_BITS

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Dtypes = torch.dtype | tuple[torch.dtype, ...]
Shape = tuple[int, ...]


class Checks:
    """Checks for tensors on some types of device; none: on any."""

    def __init__(self, *device_types: str) -> None:
        self.device_types = device_types

    def tensor(
        self,
        x: Tensor,
        name: str,
        shape: Shape | None,
        dtypes: Dtypes,
        like: Tensor | None = None,
        *,
        dimensions: tuple[int, ...] = (2, 3),
        written: bool = False,
    ) -> Shape:
        """The shape of x. Raises unless it is dense memory of this shape (None: any of
        `dimensions`), one of these dtypes and on the device of `like`.

        written: a kernel is about to change it behind autograd's back, which is told here.
        """
        # Every call goes through here, so what is right passes after a few cheap comparisons.
        if (
            isinstance(x, Tensor)
            and x.layout is torch.strided
            and (x.dtype is dtypes or (isinstance(dtypes, tuple) and x.dtype in dtypes))
            and (x.ndim in dimensions if shape is None else x.shape == shape)
            and (
                x.device == like.device
                if like is not None
                else not self.device_types or x.device.type in self.device_types
            )
        ):
            if written and not x.is_inference():
                torch.autograd.graph.increment_version(x)
            return x.shape
        self._refuse(x, name, shape, dtypes, like, dimensions)

    def _refuse(
        self,
        x: object,
        name: str,
        shape: Shape | None,
        dtypes: Dtypes,
        like: Tensor | None,
        dimensions: tuple[int, ...],
    ) -> NoReturn:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        types, where = self.device_types, " or ".join(self.device_types) or "any device"
        there = not types or x.device.type in types
        if like is not None:
            there, where = x.device == like.device, str(like.device)
        if x.layout != torch.strided or not there:
            raise ValueError(
                f"{name}: expected a dense tensor on {where}, got {x.layout} on {x.device}"
            )
        dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
        if x.dtype not in dtypes:
            raise TypeError(f"{name}: expected {' or '.join(map(str, dtypes))}, got {x.dtype}")
        counts = " or ".join(map(str, dimensions))
        expected = f"{counts} dimensions" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name}: expected {expected}, got shape {tuple(x.shape)}")

    def element(self, x: Tensor, name: str, dtype: torch.dtype, like: Tensor) -> None:
        """Raise unless x is one number of this dtype."""
        self.tensor(x, name, None, dtype, like, dimensions=(0, 1, 2, 3))
        if x.numel() != 1:
            raise ValueError(f"{name}: expected one element, got shape {tuple(x.shape)}")

    def output(
        self, x: Tensor | None, name: str, shape: Shape, dtypes: Dtypes, like: Tensor
    ) -> Tensor:
        """x, contiguous, or new memory of the first of the dtypes."""
        if x is None:
            dtype = dtypes[0] if isinstance(dtypes, tuple) else dtypes
            return torch.empty(shape, dtype=dtype, device=like.device)
        self.tensor(x, name, shape, dtypes, like, written=True)
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")
        return x

    def codes(self, codes: PackedCodes, shape: Shape, like: Tensor) -> PackedCodes:
        """The codes of matrices of this shape, in contiguous tensors."""
        layout, (*rows, columns) = codes.layout, shape
        if codes.columns != columns:
            raise ValueError(f"codes: expected {columns} columns, got {codes.columns}")
        check_book(layout.bits, len(codes.codebook.levels))
        packed, scales = codes.packed, codes.scales
        self.tensor(packed, "codes.packed", (*rows, layout.row_bytes(columns)), torch.uint8, like)
        self.tensor(scales, "codes.scales", (*rows, layout.blocks(columns)), torch.float32, like)
        if packed.is_contiguous() and scales.is_contiguous():
            return codes
        return dataclasses.replace(codes, packed=packed.contiguous(), scales=scales.contiguous())

    def integer_codes(self, codes: PackedCodes, *, blocks: bool) -> PackedCodes:
        """Those that integer products read (`integer_codes_problem`), in contiguous tensors."""
        packed, columns = codes.packed, codes.columns
        *_, rows, _ = shape = self.tensor(packed, "codes.packed", None, torch.uint8)
        problem = integer_codes_problem(codes.codebook, codes.layout, rows, columns, blocks=blocks)
        if problem is not None:
            raise ValueError(problem)
        return self.codes(codes, (*shape[:-1], columns), packed)


@functools.lru_cache(maxsize=256)
def check_book(bits: int, levels: int) -> None:
    """Raise unless there are codes of so many bits, with room for so many levels."""
    if bits not in CODE_BITS:
        raise ValueError(f"bits: expected one of {CODE_BITS}, got {bits}")
    if levels > 2**bits:
        raise ValueError(f"codebook: expected at most {2**bits} levels, got {levels}")


def check_rounded(rounded: bool, a: Tensor, diagonal: int | None) -> None:
    """Raise unless factors like `a` can be rounded, or need not be."""
    if rounded and a.dtype != torch.float32:
        raise TypeError(f"a: expected float32 with rounded=True, got {a.dtype}")
    if diagonal is not None and not rounded:
        raise ValueError(f"diagonal: expected None without rounded=True, got {diagonal}")


def check_apart(written: Tensor, name: str, read: Tensor, other: str) -> None:
    """Raise for the overlap that is easy to make: results in the place of what is read again."""
    if written.numel() and written.data_ptr() == read.data_ptr():
        raise ValueError(f"{name}: expected other memory than that of {other}, got the same")


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


def has_even_rows(x: Tensor) -> bool:
    """Whether rows are plain and at even distances, also from one matrix to the next."""
    even = x.is_contiguous() or x.ndim == 2 or 1 in x.shape[:2]
    return has_plain_rows(x) and (even or x.stride(0) == x.shape[1] * x.stride(1))


def plain_rows(x: Tensor) -> Tensor:
    """x as one matrix of all its rows, copied unless they are contiguous and at even distances."""
    rows = x.flatten(0, -2)
    return rows if has_plain_rows(rows) else rows.contiguous()


def rows_in_place(x: Tensor, name: str) -> Tensor:
    """x, or a copy to be written back where its rows lie at uneven distances.

    Raises ValueError where rows are not contiguous or overlap.
    """
    if x.is_contiguous():
        return x
    if not has_plain_rows(x):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got strides "
            f"{x.stride()} for shape {tuple(x.shape)}"
        )
    return x if has_even_rows(x) else x.contiguous()
