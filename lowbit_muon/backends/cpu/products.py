"""The matrix products of the C++ backend (`csrc/cpu/product.hpp`)."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, integer_codes_problem
from lowbit_muon.backends.cpu.memory import (
    NO_MEMORY,
    changed,
    check,
    check_matrices,
    check_plain_rows,
    contiguous_codes,
    has_plain_rows,
    memory,
    output,
)
from lowbit_muon.formats.codebook import Codebook


class CpuProducts(Backend):
    """Products on as many threads as torch uses; results do not depend on how many.

    In float32; other dtypes, and batches of which only some matrices are active, are left to torch.
    """

    def __init__(self, extension: ModuleType) -> None:
        self._extension = extension

    def product(
        self,
        a: Tensor,
        b: Tensor,
        *,
        out: Tensor | None = None,
        alpha: float | Tensor = 1.0,
        beta: float = 0.0,
        active: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.product`."""
        *batch, rows, depth = check_matrices(a, "a", None)
        dtype = a.dtype
        columns = check_matrices(b, "b", dtype)[-1]
        check(b, "b", (*batch, depth, columns), dtype)
        if out is not None:
            check(out, "out", (*batch, rows, columns), None)
        if isinstance(alpha, Tensor):
            check(alpha, "alpha", batch or (1,), torch.float32)
        if active is not None:
            check(active, "active", batch or (1,), torch.bool)
        all_float32 = dtype is torch.float32 and (out is None or out.dtype is torch.float32)
        if active is not None or not all_float32:
            return super().product(a, b, out=out, alpha=alpha, beta=beta, active=active)
        if out is None:
            out = torch.empty((*batch, rows, columns), dtype=torch.float32, device="cpu")
        elif not has_plain_rows(out):
            if has_plain_rows(out.mT):
                self.product(b.mT, a.mT, out=out.mT, alpha=alpha, beta=beta)
                return out
            return out.copy_(self.product(a, b, out=out.contiguous(), alpha=alpha, beta=beta))
        alphas = alpha.contiguous() if isinstance(alpha, Tensor) else None
        self._extension.product(
            batch=batch[0] if batch else 1,
            rows=rows,
            columns=columns,
            depth=depth,
            a=memory(a),
            b=memory(b),
            c=memory(changed(out)),
            alphas=0 if alphas is None else alphas.data_ptr(),
            alpha=alpha if alphas is None else 1.0,
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
        active: Tensor | None = None,
    ) -> Tensor:
        """See `Backend.symmetric_product`."""
        *batch, size, depth = check_matrices(a, "a", None)
        dtype = a.dtype
        square = (*batch, size, size)
        if b is not None:
            check(b, "b", (*batch, depth, size), dtype)
        if addend is not None:
            check(addend, "addend", square, None)
        if out is not None:
            check(out, "out", square, None)
        if active is not None:
            check(active, "active", batch or (1,), torch.bool)
        given = (a, addend, out)
        if active is not None or any(x is not None and x.dtype != torch.float32 for x in given):
            return super().symmetric_product(
                a, b, addend=addend, alpha=alpha, beta=beta, out=out, active=active
            )
        if out is None:
            out = torch.empty(square, dtype=torch.float32, device="cpu")
        rows = out
        if not has_plain_rows(out):
            rows = out.mT
            check_plain_rows(rows, "out")
        if addend is not None and addend.stride(-1) != 1:  # or else symmetric, or copied
            addend = addend.mT if addend.stride(-2) == 1 else addend.contiguous()
        self._extension.symmetric_product(
            batch=batch[0] if batch else 1,
            size=size,
            depth=depth,
            a=memory(a),
            b=NO_MEMORY if b is None else memory(b),
            addend=NO_MEMORY if addend is None else memory(addend),
            out=memory(changed(rows)),
            alpha=alpha,
            beta=0.0 if addend is None else beta,
            threads=torch.get_num_threads(),
        )
        return out

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        *batch, rows, _ = check_matrices(codes.packed, "codes.packed", torch.uint8)
        problem = integer_codes_problem(
            codes.codebook, codes.layout, rows, codes.columns, blocks=True
        )
        if problem is not None:
            raise ValueError(problem)
        packed, scales = contiguous_codes(codes, (*batch, rows))
        out = output(None, "out", (*batch, rows, rows))
        self._extension.code_gram(
            batch=batch[0] if batch else 1,
            rows=rows,
            columns=codes.columns,
            bits=codes.layout.bits,
            levels=_byte_levels(codes.codebook).data_ptr(),
            packed=packed.data_ptr(),
            row_bytes=packed.shape[-1],
            scales=scales.data_ptr(),
            block_size=codes.layout.effective_block(codes.columns),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
        )
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        *batch, rows, _ = check_matrices(codes.packed, "codes.packed", torch.uint8)
        problem = integer_codes_problem(codes.codebook, codes.layout, rows, codes.columns)
        if problem is not None:
            raise ValueError(problem)
        packed, scales = contiguous_codes(codes, (*batch, rows))
        out_rows = check_matrices(a, "a")[-2]
        check(a, "a", (*batch, out_rows, rows), torch.float32)
        out = output(out, "out", (*batch, out_rows, codes.columns))
        if rows == 0:
            return out.mul_(beta) if beta else out.zero_()
        self._extension.code_product(
            batch=batch[0] if batch else 1,
            out_rows=out_rows,
            rows=rows,
            columns=codes.columns,
            bits=codes.layout.bits,
            levels=_byte_levels(codes.codebook).data_ptr(),
            packed=packed.data_ptr(),
            row_bytes=packed.shape[-1],
            scales=scales.data_ptr(),
            a=memory(a),
            out=changed(out).data_ptr(),
            beta=beta,
            threads=torch.get_num_threads(),
        )
        return out


@functools.lru_cache(maxsize=64)
def _byte_levels(codebook: Codebook) -> Tensor:
    """int8 [256]: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    return torch.tensor(levels + levels[-1:] * (256 - len(levels)), dtype=torch.int8, device="cpu")
