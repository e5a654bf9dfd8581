"""The matrix products of the C++ backend (`csrc/cpu/product.hpp`)."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import PackedCodes, check_integer_codes
from lowbit_muon.backends.cpu.memory import check, readable
from lowbit_muon.formats.codebook import Codebook


class CpuProducts:
    """`Backend`'s products on as many threads as torch uses; results do not depend on how many."""

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension

    def product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        out: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 0.0,
    ) -> Tensor:
        """See `Backend.product`."""
        check(a, "a", None, torch.float32)
        rows, depth = a.shape
        check(b, "b", None, torch.float32)
        columns = b.shape[1]
        check(b, "b", (depth, columns), torch.float32)
        out = _given_or_new(out, (rows, columns))
        if not _has_plain_lines(out):
            out.copy_(self.product(a, b, out=out.contiguous(), alpha=alpha, beta=beta))
            return out
        if columns > 1 and out.stride(1) != 1:  # then its transpose has contiguous rows
            self.product(b.mT, a.mT, out=out.mT, alpha=alpha, beta=beta)
            return out
        self._extension.product(
            rows=rows,
            columns=columns,
            depth=depth,
            **_operand("a", a),
            **_operand("b", b),
            c=out.data_ptr(),
            c_stride=out.stride(0),
            alpha=alpha,
            beta=beta,
            threads=torch.get_num_threads(),
        )
        return out

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.symmetric_product`."""
        check(a, "a", None, torch.float32)
        size, depth = a.shape
        arguments: dict[str, Any] = _operand("a", a)
        if b is not None:
            check(b, "b", (depth, size), torch.float32)
            arguments |= _operand("b", b)
        if addend is not None:
            check(addend, "addend", (size, size), torch.float32)
            addend = _with_plain_rows(addend)
            arguments |= {"addend": addend.data_ptr(), "addend_stride": addend.stride(0)}
        out = _given_or_new(out, (size, size))
        rows = out if size <= 1 or out.stride(1) == 1 else out.mT
        if not _has_plain_lines(out):
            raise ValueError(f"out: expected contiguous rows or columns, got {out.stride()}")
        self._extension.symmetric_product(
            size=size,
            depth=depth,
            out=rows.data_ptr(),
            out_stride=rows.stride(0),
            alpha=alpha,
            beta=0.0 if addend is None else beta,
            threads=torch.get_num_threads(),
            **arguments,
        )
        return out

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        check_integer_codes(codes, blocks=True)
        operand = _CodeOperand(codes)
        rows = codes.packed.shape[0]
        out = _given_or_new(None, (rows, rows))
        self._extension.code_gram(
            rows=rows,
            block_size=codes.layout.effective_block(codes.columns),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
            **operand.arguments,
        )
        return out

    def rounded_gram(self, x: Tensor) -> Tensor:
        """See `Backend.rounded_gram`."""
        check(x, "x", None, torch.float32)
        rows, columns = x.shape
        out = _given_or_new(None, (rows, rows))
        self._extension.rounded_gram(
            rows=rows,
            columns=columns,
            x=x.data_ptr(),
            row_stride=x.stride(0),
            column_stride=x.stride(1),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        check_integer_codes(codes)
        operand = _CodeOperand(codes)
        rows = codes.packed.shape[0]
        check(a, "a", None, torch.float32)
        check(a, "a", (a.shape[0], rows), torch.float32)
        out = _given_or_new(out, (a.shape[0], codes.columns))
        if not out.is_contiguous():
            raise ValueError(f"out: expected a contiguous tensor, got strides {out.stride()}")
        if rows == 0:
            return out.mul_(beta) if beta else out.zero_()
        self._extension.code_product(
            out_rows=a.shape[0],
            rows=rows,
            **_operand("a", a),
            out=out.data_ptr(),
            out_stride=max(out.stride(0), codes.columns),
            beta=beta,
            threads=torch.get_num_threads(),
            **operand.arguments,
        )
        return out


class _CodeOperand:
    """Arguments that describe codes, and the tensors that must live while they are used."""

    def __init__(self, codes: PackedCodes) -> None:
        rows, layout = codes.packed.shape[0], codes.layout
        check(codes.packed, "packed", (rows, layout.row_bytes(codes.columns)), torch.uint8)
        check(codes.scales, "scales", (rows, layout.blocks(codes.columns)), torch.float32)
        self.packed, self.scales = codes.packed.contiguous(), codes.scales.contiguous()
        self.levels = _byte_levels(codes.codebook)
        self.arguments = {
            "columns": codes.columns,
            "bits": layout.bits,
            "levels": self.levels.data_ptr(),
            "packed": self.packed.data_ptr(),
            "row_bytes": self.packed.shape[1],
            "scales": self.scales.data_ptr(),
        }


@functools.lru_cache(maxsize=64)
def _byte_levels(codebook: Codebook) -> Tensor:
    """int8 [256]: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    return torch.tensor(levels + levels[-1:] * (256 - len(levels)), dtype=torch.int8, device="cpu")


def _given_or_new(out: Tensor | None, shape: tuple[int, int]) -> Tensor:
    """`out` after checks, or new memory. Autograd is told that `out` changes behind its back."""
    if out is None:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    check(out, "out", shape, torch.float32)
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


def _operand(name: str, x: Tensor) -> dict[str, int]:
    return {
        name: x.data_ptr(),
        f"{name}_row_stride": x.stride(0),
        f"{name}_column_stride": x.stride(1),
    }


def _has_plain_lines(x: Tensor) -> bool:
    """Whether rows, or else columns, are contiguous and do not overlap."""
    return any(
        (y.shape[1] <= 1 or y.stride(1) == 1) and (y.shape[0] <= 1 or y.stride(0) >= y.shape[1])
        for y in (x, x.mT)
    )


def _with_plain_rows(symmetric: Tensor) -> Tensor:
    """A symmetric matrix with contiguous rows: itself, its transpose, or a copy."""
    if symmetric.stride(1) != 1 and symmetric.stride(0) == 1:
        symmetric = symmetric.mT
    return readable(symmetric, "addend")
