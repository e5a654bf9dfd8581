"""Adapter of the dense products (`kernels.dense`)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Product
from lowbit_muon.backends.memory import KERNEL_DTYPES
from lowbit_muon.backends.reference import by_matrix
from lowbit_muon.backends.triton.device import on_device, target
from lowbit_muon.backends.triton.kernels import dense
from lowbit_muon.backends.triton.kernels.gram import triangle_programs


class DenseProducts(Backend):
    """`product` and `symmetric_product`."""

    product_dtypes = KERNEL_DTYPES
    rounded_dtype = torch.float16

    def _multiply(self, p: Product) -> Tensor:
        """By the vendor's kernels where they can do it."""
        a, out, alpha = p.a, p.out, p.alpha
        b = a.mT if p.b is None else p.b
        if isinstance(alpha, Tensor):
            a, alpha = (a * by_matrix(alpha, a.ndim)).to(a.dtype), 1.0
        if out is None:
            out = a.new_empty(p.shape)
        if not out.numel():
            return out
        apart = p.addend is not None and p.addend is not out  # torch would copy it into `out` first
        vendors = not (p.symmetric or p.rounded or p.active is not None or apart)
        if not vendors or out.dtype != a.dtype:
            _launch(a, b, out, alpha, p)
            return out
        vendor = torch.addmm if a.ndim == 2 else torch.baddbmm
        vendor(out, a, b, beta=0 if p.addend is None else p.beta, alpha=alpha, out=out)
        return out


def _launch(a: Tensor, b: Tensor, out: Tensor, alpha: float, p: Product) -> None:
    """`p` with these in place of its own."""
    addend = out if p.addend is None else p.addend
    other = out if p.other is None else p.other
    a, b, out, added, other = (
        x if x.ndim == 3 else x.unsqueeze(0) for x in (a, b, out, addend, other)
    )
    batch, m, depth = a.shape
    n = b.shape[2]
    active = p.active
    offered = target(a.device)
    launches = dense.FLOAT_LAUNCH if a.dtype == torch.float32 else dense.HALF_LAUNCH
    launches = dense.ROUNDED_LAUNCH if p.rounded else launches
    options = launches[offered.group_products]
    if p.symmetric:
        tiles = triangle_programs(m, options["BLOCK_M"])
    else:
        tiles = triton.cdiv(m, options["BLOCK_M"]) * triton.cdiv(n, options["BLOCK_N"])
    with on_device(a):
        dense.product_kernel[(tiles, batch)](
            a,
            *a.stride(),
            b,
            *b.stride(),
            added,
            *added.stride(),
            other,
            *other.stride(),
            out,
            *out.stride(),
            out if active is None else active,
            0 if active is None else active.stride(0),
            m,
            n,
            depth,
            float(alpha),
            float(p.beta),
            float(p.gamma),
            float(p.identity),
            p.diagonal or 0,
            SYMMETRIC=p.symmetric,
            HAS_ADDEND=p.addend is not None,
            HAS_OTHER=p.other is not None,
            HAS_IDENTITY=p.identity != 0,
            HAS_ACTIVE=active is not None,
            ROUNDED=p.rounded is not None,
            HAS_DIAGONAL=p.diagonal is not None and depth > 0,
            PRECISION=offered.float_precision,
            enable_fp_fusion=True,  # Triton 3.9 warns of a default, which 3.10 turns round
            **options,
        )
