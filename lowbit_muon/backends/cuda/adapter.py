"""CUDA backend: passes tensors' memory to the kernels of `csrc/cuda`.

Dense products are torch's on the device, that is cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms, byte_levels, tables
from lowbit_muon.backends.cuda.library import (
    NUMBER_TYPES,
    STATISTICS,
    CudaLibrary,
    default_library,
    unavailable_reason,
)
from lowbit_muon.backends.memory import Checks, plain_rows
from lowbit_muon.backends.reference import by_matrix
from lowbit_muon.formats.codebook import Codebook

# The longest row that the rotation holds in shared memory (csrc/cuda/rotation.cu).
ROTATED_COLUMNS = 24 * 1024
# Columns that one instruction of the tensor cores sums over.
SLICE = 32
# Rows of limbs are filled up to a multiple of this (kDepth in csrc/cuda/code_product.cu).
LIMB_DEPTH = 64
_HOST = torch.device("cpu")


class CudaBackend(Backend):
    """`Backend` in CUDA C++. No method makes the host wait.

    Construction raises RuntimeError if the library or a GPU is not there. `library`: another one
    than the package's own, for tests. gram_tile: rows of a tile of `code_gram`, 64 or 128, or 0 to
    have them chosen.

    A transposed gradient is copied (`plain_rows`): read across its rows, each 32-byte sector would
    cross from L2 to a multiprocessor once for every row in it, which costs more than torch's
    transposing copy.
    """

    name = "cuda"
    asynchronous = True
    gram_tile = 0

    def __init__(self, library: CudaLibrary | None = None) -> None:
        if library is None:
            reason = unavailable_reason()
            if reason is not None:
                raise RuntimeError(f"backend: 'cuda' is not available: {reason}")
            library = default_library()
        self._library = library
        self.checks = Checks(library.device_type)

    def _quantize(self, x: Tensor, codes: PackedCodes, statistic: str) -> None:
        self._update(Terms(grad=x), codes, statistic)

    def _update_codes(
        self, terms: Terms, new: PackedCodes, out: Tensor | None, out_weights: tuple[float, float]
    ) -> tuple[Tensor, Tensor]:
        squares = new.packed.new_empty(2, *new.packed.shape[:-1], dtype=torch.float64)
        arguments = {} if out is None else _numbers("out", out.flatten(0, -2))
        value_weight, grad_weight = out_weights
        self._update(
            terms,
            new,
            new.layout.statistic,
            out_value_weight=value_weight,
            out_grad_weight=grad_weight,
            squares=squares.data_ptr(),
            **arguments,
        )
        return squares[0], squares[1]

    def _update(self, terms: Terms, new: PackedCodes, statistic: str, **outputs: object) -> None:
        """Quantise the sum of a gradient and, if there are any, codes into `new`."""
        codes, layout = terms.codes, new.layout
        assert terms.grad is not None
        grad = plain_rows(terms.grad)
        _, thresholds = tables(new.codebook)
        self._library.call(
            "lowbit_update_codes",
            grad.device,
            rows=grad.shape[0],
            columns=new.columns,
            bits=layout.bits,
            block=layout.effective_block(new.columns),
            **_levels(new.codebook),
            thresholds=thresholds.data_ptr(),
            old_packed=None if codes is None else codes.packed.data_ptr(),
            old_scales=None if codes is None else codes.scales.data_ptr(),
            code_weight=terms.code_weight,
            **_numbers("grad", grad),
            grad_weight=terms.grad_weight,
            statistic=STATISTICS[statistic],
            clip=layout.clip,
            packed=new.packed.data_ptr(),
            scales=new.scales.data_ptr(),
            **outputs,
        )

    def _accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        weight = terms.buffer_weight
        if isinstance(weight, Tensor):
            buffer.mul_(by_matrix(weight.float(), buffer.ndim))
            weight = 1.0
        target = buffer.flatten(0, -2)
        rows, columns = target.shape
        arguments: dict[str, object] = {"block": 1}
        codes, grad = terms.codes, terms.grad  # alive until the kernel is queued
        if codes is not None:
            arguments = {**_code_memory(codes), **_levels(codes.codebook)}
            arguments["code_weight"] = terms.code_weight
        if grad is not None:
            grad = plain_rows(grad)
            arguments |= {**_numbers("grad", grad), "grad_weight": terms.grad_weight}
        squares = torch.empty(buffer.shape[:-1], dtype=torch.float64, device=buffer.device)
        self._library.call(
            "lowbit_accumulate_rows",
            buffer.device,
            rows=rows,
            columns=columns,
            buffer=target.data_ptr(),
            buffer_stride=target.stride(0),
            buffer_weight=weight,
            squares=squares.data_ptr(),
            **arguments,
        )
        return squares

    def _rotate(self, x: Tensor, inverse: bool) -> None:
        target = x.flatten(0, -2)
        rows, columns = target.shape
        if columns > ROTATED_COLUMNS:
            super()._rotate(x, inverse)
            return
        self._library.call(
            "lowbit_rotate",
            x.device,
            rows=rows,
            columns=columns,
            x=target.data_ptr(),
            x_stride=target.stride(0),
            inverse=inverse,
        )

    def _code_gram(self, codes: PackedCodes, out: Tensor) -> None:
        block = codes.layout.effective_block(codes.columns)
        if block < codes.columns and block % SLICE != 0:
            super()._code_gram(codes, out)  # the tensor cores would sum across blocks
            return
        self._library.call(
            "lowbit_code_gram",
            out.device,
            batch=out.shape[0] if out.ndim == 3 else 1,
            rows=out.shape[-1],
            columns=codes.columns,
            levels=byte_levels(codes.codebook, _HOST).data_ptr(),
            out=out.data_ptr(),
            tile=self.gram_tile,
            **_code_memory(codes),
        )

    def _code_product(self, a: Tensor, codes: PackedCodes, out: Tensor, beta: float) -> None:
        if out.dtype != torch.float32:
            result = self.code_product(a, codes)
            out.copy_(result if beta == 0 else out.float().mul_(beta).add_(result))
            return
        *leading, out_rows, rows = a.shape
        depth = -(-rows // LIMB_DEPTH) * LIMB_DEPTH
        limbs = a.new_empty(*leading, 2, out_rows, depth, dtype=torch.int8)
        limb_scales = a.new_empty(*leading, out_rows)
        self._library.call(
            "lowbit_code_product",
            a.device,
            batch=a.shape[0] if leading else 1,
            out_rows=out_rows,
            rows=rows,
            columns=codes.columns,
            bits=codes.layout.bits,
            levels=byte_levels(codes.codebook, _HOST).data_ptr(),
            packed=codes.packed.data_ptr(),
            scales=codes.scales.data_ptr(),
            a=a.data_ptr(),
            a_batch_stride=a.stride(0) if leading else 0,
            a_row_stride=a.stride(-2),
            a_column_stride=a.stride(-1),
            limbs=limbs.data_ptr(),
            limb_scales=limb_scales.data_ptr(),
            out=out.data_ptr(),
            beta=beta,
        )

    def _scaled(self, x: Tensor, factor: Tensor, out: Tensor) -> None:
        if not out.is_contiguous():
            super()._scaled(x, factor, out)
            return
        x, factor = x.contiguous(), factor.float().contiguous()
        self._library.call(
            "lowbit_scaled",
            x.device,
            batch=x.shape[0],
            size=x.shape[1] * x.shape[2],
            x=x.data_ptr(),
            factor=factor.data_ptr(),
            out=out.data_ptr(),
            out_type=NUMBER_TYPES[out.dtype],
        )

    def _update_weight(
        self, weight: Tensor, update: Tensor, decay: Tensor, step_size: Tensor,
        seed: Tensor | None, cautious: bool,
    ) -> None:  # fmt: skip
        arguments: dict[str, object] = {}
        for name, x in (("weight", weight), ("update", update)):
            arguments[name], arguments[f"{name}_type"] = x.data_ptr(), NUMBER_TYPES[x.dtype]
            arguments[f"{name}_row_stride"], arguments[f"{name}_column_stride"] = x.stride()
        self._library.call(
            "lowbit_update_weight",
            weight.device,
            rows=weight.shape[0],
            columns=weight.shape[1],
            decay=decay.data_ptr(),
            step_size=step_size.data_ptr(),
            seed=None if seed is None else seed.data_ptr(),
            cautious=int(cautious),
            **arguments,
        )


def _numbers(name: str, x: Tensor) -> dict[str, Any]:
    """A matrix of one of the three float types, its type and its row stride."""
    return {
        name: x.data_ptr(),
        f"{name}_type": NUMBER_TYPES[x.dtype],
        f"{name}_stride": x.stride(0),
    }


def _levels(codebook: Codebook) -> dict[str, Any]:
    """In the host's memory; the launcher copies them."""
    levels, _ = tables(codebook)
    return {"levels": levels.data_ptr(), "level_count": len(levels)}


def _code_memory(codes: PackedCodes) -> dict[str, Any]:
    """Codes in contiguous tensors."""
    return {
        "bits": codes.layout.bits,
        "block": codes.layout.effective_block(codes.columns),
        "packed": codes.packed.data_ptr(),
        "scales": codes.scales.data_ptr(),
    }
