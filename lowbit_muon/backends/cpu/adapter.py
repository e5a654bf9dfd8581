"""C++ backend: passes tensors' memory to the kernels of `csrc/cpu`.

The environment variable LOWBIT_MUON_ISA (baseline, avx2, avx512, avx512vnni, avx512bf16 or amx)
overrides the choice of instruction set, which is otherwise the highest this processor supports.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Product, Terms, byte_levels, tables
from lowbit_muon.backends.memory import Checks, has_plain_rows, rows_in_place
from lowbit_muon.backends.reference import by_matrix, rotation_tensors

ISA_VARIABLE = "LOWBIT_MUON_ISA"
SIDE_BY_SIDE = 1024  # rows of the largest matrices that more than two threads invert at once
_GRAD_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
# A batch of matrices: its address, and the strides of matrices, rows and columns.
Memory = tuple[int, ...]
_NO_MEMORY: Memory = (0, 0, 0, 0)


def unavailable_reason() -> str | None:
    """Why the C++ backend cannot be used, or None if it can."""
    try:
        import lowbit_muon.backends._cpu  # noqa: F401
    except ModuleNotFoundError:
        return (
            "the C++ extension was not built (its build needs gcc or clang with C++17; "
            "reinstall with `pip install -v` to see what went wrong)"
        )
    except ImportError as error:
        return f"the C++ extension does not load: {error}"
    return None


@functools.cache
def _extension() -> ModuleType:
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend: 'cpu' is not available: {reason}")
    from lowbit_muon.backends import _cpu

    wanted = os.environ.get(ISA_VARIABLE)
    if wanted:
        try:
            _cpu.set_isa(wanted)
        except ValueError as error:
            raise ValueError(f"{ISA_VARIABLE}: {error}") from None
    return _cpu


def isa() -> str:
    """The instruction-set level in use."""
    return str(_extension().isa())


def supported_isas() -> list[str]:
    """The levels this processor supports, lowest first."""
    return list(_extension().supported_isas())


def set_isa(name: str) -> None:
    """Use the level `name` in the whole process. Raises ValueError if it is not supported here."""
    _extension().set_isa(name)
    _note_level()


def _note_level() -> None:
    multiplies, level = _extension().has_rounded_products(), isa()
    CpuBackend.rounded_dtype = torch.bfloat16 if multiplies else None
    # 576 rows, two threads: tiles multiply 576 x 576 in half the time of float32, AVX-512 in as
    # much or two thirds of it.
    CpuBackend.gram_aspect = 4.0 if level == "amx" else Backend.gram_aspect
    # 576x1536, two threads: by pairs of int16 20.6 ms on AVX2, 8.8 on AVX-512; floats 9.8 and 5.1.
    CpuBackend.fast_code_product = level not in ("baseline", "avx2", "avx512")


def take_most_workspace() -> int:
    """The most bytes that the products held at once since the last call (torch does not see it)."""
    return int(_extension().take_most_workspace())


class CpuBackend(Backend):
    """`Backend` in C++ with AVX2 or AVX-512, on as many threads as torch uses.

    Results do not depend on how many. Products of other dtypes than float32, of batches of which
    only some matrices are active, and rounded ones where the processor has no products of bfloat16,
    are left to torch. Construction raises RuntimeError if the
    extension is not there and ValueError if LOWBIT_MUON_ISA names a level that this machine does
    not support.
    """

    name = "cpu"
    checks = Checks("cpu")

    def __init__(self) -> None:
        self._extension = _extension()
        _note_level()

    def _quantize(self, x: Tensor, codes: PackedCodes, statistic: str) -> None:
        _, thresholds = tables(codes.codebook)
        rows = x.contiguous().flatten(0, -2)
        self._extension.quantize(
            rows=rows.shape[0],
            columns=codes.columns,
            x=rows.data_ptr(),
            x_stride=rows.stride(0),
            statistic=statistic,
            clip=codes.layout.clip,
            thresholds=thresholds.data_ptr(),
            threshold_count=thresholds.numel(),
            threads=torch.get_num_threads(),
            **_code_memory(codes),
        )

    def _accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        weight = terms.buffer_weight
        if isinstance(weight, Tensor) and weight.numel() > 1:
            buffer.mul_(by_matrix(weight.float(), buffer.ndim))
            weight = 1.0
        *batch, rows, columns = buffer.shape
        row_sums = torch.empty((*batch, rows), dtype=torch.float64, device="cpu")
        arguments: dict[str, Any] = {}
        if terms.codes is not None:
            levels, _ = tables(terms.codes.codebook)
            arguments |= _code_memory(terms.codes)
            arguments |= {"levels": levels.data_ptr(), "level_count": levels.numel()}
            arguments["code_weight"] = terms.code_weight
        if terms.grad is not None:
            arguments |= {"grad": _memory(terms.grad), "grad_type": _GRAD_TYPES[terms.grad.dtype]}
            arguments["grad_weight"] = terms.grad_weight
        self._extension.accumulate(
            batch=batch[0] if batch else 1,
            rows=rows,
            columns=columns,
            buffer=buffer.data_ptr(),
            buffer_stride=buffer.stride(-2 if rows > 1 else 0),
            buffer_weight=float(weight),
            row_sums=row_sums.data_ptr(),
            threads=torch.get_num_threads(),
            **arguments,
        )
        return row_sums

    def _rotate(self, x: Tensor, inverse: bool) -> None:
        rows = x.flatten(0, -2)
        first_signs, second_signs = rotation_tensors(x.shape[-1], x.device)
        self._extension.rotate(
            rows=rows.shape[0],
            columns=rows.shape[1],
            x=rows.data_ptr(),
            x_stride=rows.stride(0),
            first_signs=first_signs.data_ptr(),
            second_signs=second_signs.data_ptr(),
            inverse=inverse,
            threads=torch.get_num_threads(),
        )

    def _multiply(self, p: Product) -> Tensor:
        a, out = p.a, p.out
        float32 = a.dtype is torch.float32
        float32 = float32 and (out is None or out.dtype is torch.float32)
        float32 = float32 and (p.addend is None or p.addend.dtype is torch.float32)
        # What else is added is read by torch, after the product.
        if (p.other is not None or p.identity) and p.active is None:
            out = self._multiply(p._replace(other=None, identity=0.0))
            if p.other is not None:
                out.add_(p.other, alpha=p.gamma)
            if p.identity:
                out.diagonal(dim1=-2, dim2=-1).add_(p.identity)
            return out
        if p.active is not None or not float32 or (p.rounded and self.rounded_dtype is None):
            return super()._multiply(p)
        if out is None:
            out = torch.empty(p.shape, dtype=torch.float32, device="cpu")
        batch = a.shape[0] if a.ndim == 3 else 1
        if p.symmetric:
            target = out if has_plain_rows(out) else rows_in_place(out.mT, "out")
            addend = p.addend
            if addend is not None and addend.stride(-1) != 1:  # or else symmetric, or copied
                addend = addend.mT if addend.stride(-2) == 1 else addend.contiguous()
            self._extension.symmetric_product(
                batch=batch,
                size=a.shape[-2],
                depth=a.shape[-1],
                a=_memory(a),
                b=_NO_MEMORY if p.b is None else _memory(p.b),
                addend=_NO_MEMORY if addend is None else _memory(addend),
                out=_memory(target),
                alpha=p.alpha,
                beta=0.0 if addend is None else p.beta,
                rounded=p.rounded is not None,
                threads=torch.get_num_threads(),
            )
            return out
        if p.addend is not None and p.addend is not out:
            out.copy_(p.addend)
        target, b = out, a.mT if p.b is None else p.b
        a_diagonal, b_diagonal = p.diagonal, None
        if not has_plain_rows(out):
            if has_plain_rows(out.mT):
                a, b, target = b.mT, a.mT, out.mT
                a_diagonal, b_diagonal = None, a_diagonal
            else:
                target = out.contiguous()
        alphas = p.alpha.contiguous() if isinstance(p.alpha, Tensor) else None
        self._extension.product(
            batch=batch,
            rows=a.shape[-2],
            columns=b.shape[-1],
            depth=a.shape[-1],
            a=_memory(a),
            b=_memory(b),
            c=_memory(target),
            alphas=0 if alphas is None else alphas.data_ptr(),
            alpha=p.alpha if alphas is None else 1.0,
            beta=0.0 if p.addend is None else p.beta,
            rounded=p.rounded is not None,
            a_diagonal=a_diagonal,
            b_diagonal=b_diagonal,
            threads=torch.get_num_threads(),
        )
        return out if target.data_ptr() == out.data_ptr() else out.copy_(target)

    def _add_inverses(
        self, x: Tensor, poles: Sequence[float], weights: Sequence[float], out: Tensor
    ) -> None:
        if x.dtype != torch.float32:
            super()._add_inverses(x, poles, weights, out)
            return
        rows = x if has_plain_rows(x) else x.contiguous()
        batch, size = x.shape[0] if x.ndim == 3 else 1, x.shape[-1]
        numbers = torch.tensor([poles, weights], dtype=torch.float32, device="cpu")
        threads = torch.get_num_threads()
        # Side by side is faster; of large matrices there are two copies at most.
        together = 1 if size > SIDE_BY_SIDE and threads > 2 else min(batch * len(poles), threads)
        floats = self._extension.inverse_floats(size)
        workspace = torch.empty(together, floats, dtype=torch.float32, device="cpu")
        self._extension.add_inverses(
            batch=batch,
            size=size,
            x=_memory(rows),
            count=len(poles),
            shifts=numbers[0].data_ptr(),
            weights=numbers[1].data_ptr(),
            out=_memory(out),
            together=together,
            workspace=workspace.data_ptr(),
            threads=threads,
        )

    def _code_gram(self, codes: PackedCodes, out: Tensor) -> None:
        self._extension.code_gram(
            batch=out.shape[0] if out.ndim == 3 else 1,
            rows=out.shape[-1],
            columns=codes.columns,
            levels=byte_levels(codes.codebook, out.device).data_ptr(),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
            **_code_memory(codes),
        )

    def _code_product(self, a: Tensor, codes: PackedCodes, out: Tensor, beta: float) -> None:
        if out.dtype != torch.float32:
            super()._code_product(a, codes, out, beta)
            return
        arguments = _code_memory(codes)
        del arguments["block_size"]  # one scale a row
        self._extension.code_product(
            batch=a.shape[0] if a.ndim == 3 else 1,
            out_rows=a.shape[-2],
            rows=a.shape[-1],
            columns=codes.columns,
            levels=byte_levels(codes.codebook, out.device).data_ptr(),
            a=_memory(a),
            out=out.data_ptr(),
            beta=beta,
            threads=torch.get_num_threads(),
            **arguments,
        )

    def _code_times(self, codes: PackedCodes, v: Tensor, out: Tensor) -> None:
        arguments = _code_memory(codes)
        del arguments["block_size"]  # one scale a row
        self._extension.code_times(
            batch=v.shape[0] if v.ndim == 3 else 1,
            out_columns=v.shape[-1],
            rows=out.shape[-2],
            columns=codes.columns,
            levels=byte_levels(codes.codebook, out.device).data_ptr(),
            v=_memory(v),
            out=out.data_ptr(),
            threads=torch.get_num_threads(),
            **arguments,
        )


def _memory(x: Tensor) -> Memory:
    """Of [b, m, n], or of one matrix [m, n]."""
    return (x.data_ptr(), *x.stride()) if x.ndim == 3 else (x.data_ptr(), 0, *x.stride())


def _code_memory(codes: PackedCodes) -> dict[str, int]:
    """Codes in contiguous tensors, as all kernels take them."""
    return {
        "bits": codes.layout.bits,
        "block_size": codes.layout.effective_block(codes.columns),
        "packed": codes.packed.data_ptr(),
        "row_bytes": codes.packed.shape[-1],
        "scales": codes.scales.data_ptr(),
    }
