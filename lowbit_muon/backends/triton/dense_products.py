"""Adapter of the dense products (`kernels.dense`)."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.memory import KERNEL_DTYPES, changed
from lowbit_muon.backends.reference import by_matrix
from lowbit_muon.backends.triton.device import CHECKS, on_device, target
from lowbit_muon.backends.triton.kernels import dense
from lowbit_muon.backends.triton.kernels.gram import triangle_programs


class DenseProducts(Backend):
    """`product` and `symmetric_product`."""

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
        """See `Backend.product`. The vendor's kernels where they can do it."""
        shape = _check_factors(a, b, active)
        if isinstance(alpha, Tensor):
            CHECKS.tensor(alpha, "alpha", _by_matrix(a), torch.float32, like=a)
            a, alpha = (a * by_matrix(alpha, a.ndim)).to(a.dtype), 1.0
        out = _given_or_new(out, shape, a)
        if not out.numel():
            return out
        if active is None and out.dtype == a.dtype:
            vendor = torch.addmm if a.ndim == 2 else torch.baddbmm
            vendor(out, a, b, beta=beta, alpha=alpha, out=out)
            return out
        addend = out if beta != 0 else None
        _launch(a, b, addend, out, alpha, beta, active, symmetric=False)
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
        """See `Backend.symmetric_product`; exactly symmetric."""
        CHECKS.tensor(a, "a", None, KERNEL_DTYPES)
        if b is None:
            b = a.mT
        else:
            square = (*a.shape[:-2], a.shape[-1], a.shape[-2])
            CHECKS.tensor(b, "b", square, a.dtype, like=a)
        shape = _check_factors(a, b, active)
        if addend is not None:
            CHECKS.tensor(addend, "addend", shape, KERNEL_DTYPES, like=a)
        out = _given_or_new(out, shape, a)
        if out.numel():
            _launch(a, b, addend, out, alpha, beta, active, symmetric=True)
        return out


def _check_factors(a: Tensor, b: Tensor, active: Tensor | None) -> tuple[int, ...]:
    """The shape of a b."""
    CHECKS.tensor(a, "a", None, KERNEL_DTYPES)
    CHECKS.tensor(b, "b", None, a.dtype, like=a, dimensions=(a.ndim,))
    columns = b.shape[-1]
    CHECKS.tensor(b, "b", (*a.shape[:-2], a.shape[-1], columns), a.dtype)
    if active is not None:
        CHECKS.tensor(active, "active", _by_matrix(a), torch.bool, like=a)
    return (*a.shape[:-1], columns)


def _by_matrix(a: Tensor) -> tuple[int]:
    """The shape of what there is one of for each matrix."""
    return (a.shape[0] if a.ndim == 3 else 1,)


def _given_or_new(out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    CHECKS.tensor(out, "out", shape, KERNEL_DTYPES, like=like)
    changed(out)
    return out


def _launch(
    a: Tensor,
    b: Tensor,
    addend: Tensor | None,
    out: Tensor,
    alpha: float,
    beta: float,
    active: Tensor | None,
    *,
    symmetric: bool,
) -> None:
    """out <- alpha * a b + beta * addend."""
    matrices = [x if x.ndim == 3 else x.unsqueeze(0) for x in (a, b, out)]
    added = matrices[2]
    if addend is not None:
        added = addend if addend.ndim == 3 else addend.unsqueeze(0)
    a, b, out = matrices
    batch, m, depth = a.shape
    n = b.shape[2]
    offered = target(a.device)
    launches = dense.FLOAT_LAUNCH if a.dtype == torch.float32 else dense.HALF_LAUNCH
    options = launches[offered.group_products]
    if symmetric:
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
            out,
            *out.stride(),
            out if active is None else active,
            0 if active is None else active.stride(0),
            m,
            n,
            depth,
            float(alpha),
            float(beta),
            SYMMETRIC=symmetric,
            HAS_ADDEND=addend is not None,
            HAS_ACTIVE=active is not None,
            PRECISION=offered.float_precision,
            enable_fp_fusion=True,  # Triton 3.9 warns of a default, which 3.10 turns round
            **options,
        )
