"""The integer products of the CUDA backend. Others are torch's on the device, that is cuBLAS's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, check_integer_codes
from lowbit_muon.backends.cuda.library import CudaLibrary
from lowbit_muon.backends.cuda.memory import integer_levels
from lowbit_muon.backends.memory import KERNEL_DTYPES, Checks, changed

# Columns that one instruction of the tensor cores sums over.
SLICE = 32
# Rows of limbs are filled up to a multiple of this (kDepth in csrc/cuda/code_product.cu).
LIMB_DEPTH = 64


class CudaProducts(Backend):
    """The integer products; what has no kernel of its own runs as torch operations."""

    def __init__(self, library: CudaLibrary) -> None:
        self._library = library
        self._checks = Checks((library.device_type,))

    def code_gram(self, codes: PackedCodes, *, tile: int = 0) -> Tensor:
        """See `Backend.code_gram`. `tile`: 64 or 128 rows, or 0 to have it chosen, for tests."""
        check_integer_codes(codes, blocks=True)
        self._checks.tensor(codes.packed, "codes.packed", None, torch.uint8)
        shape = (*codes.packed.shape[:-1], codes.columns)
        codes = self._checks.codes(codes, shape, like=codes.packed)
        *leading, rows, columns = shape
        block = codes.layout.effective_block(columns)
        if block < columns and block % SLICE != 0:
            return super().code_gram(codes)  # the tensor cores would sum across blocks
        packed = codes.packed
        out = torch.empty(*leading, rows, rows, dtype=torch.float32, device=packed.device)
        if out.numel() == 0 or columns == 0:
            return out.zero_()
        self._library.call(
            "lowbit_code_gram",
            packed.device,
            batch=math.prod(leading),
            rows=rows,
            columns=columns,
            bits=codes.layout.bits,
            block=block,
            levels=integer_levels(codes.codebook),
            packed=packed.data_ptr(),
            scales=codes.scales.data_ptr(),
            out=out.data_ptr(),
            tile=tile,
        )
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        check_integer_codes(codes)
        self._checks.tensor(codes.packed, "codes.packed", None, torch.uint8)
        *leading, rows, _ = codes.packed.shape
        columns = codes.columns
        codes = self._checks.codes(codes, (*leading, rows, columns), like=codes.packed)
        packed = codes.packed
        out_rows = a.shape[-2] if isinstance(a, Tensor) and a.ndim > 1 else 0
        self._checks.tensor(a, "a", (*leading, out_rows, rows), torch.float32, like=packed)
        shape = (*leading, out_rows, columns)
        out = self._checks.output(out, "out", shape, KERNEL_DTYPES, like=packed)
        if out.dtype != torch.float32:
            result = self.code_product(a, codes)
            return out.copy_(result if beta == 0 else out.float().mul_(beta).add_(result))
        changed(out)
        if out.numel() == 0 or rows == 0:
            return out.mul_(beta) if beta else out.zero_()
        depth = -(-rows // LIMB_DEPTH) * LIMB_DEPTH
        device = packed.device
        limbs = torch.empty(*leading, 2, out_rows, depth, dtype=torch.int8, device=device)
        limb_scales = torch.empty(*leading, out_rows, dtype=torch.float32, device=device)
        self._library.call(
            "lowbit_code_product",
            device,
            batch=math.prod(leading),
            out_rows=out_rows,
            rows=rows,
            columns=columns,
            bits=codes.layout.bits,
            levels=integer_levels(codes.codebook),
            packed=packed.data_ptr(),
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
        return out
