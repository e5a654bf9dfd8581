"""Matrix products of the optimizer: the backend's kernels where they apply, torch's elsewhere.

float32 matrices take the kernels, which are faster than torch.mm on CPUs and compute one triangle
of products known to be symmetric. Batches (three dimensions) take them where the backend has such
kernels and else torch's, like float64. Nothing here records gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend, is_device_backend


def _kernels(x: Tensor) -> Backend | None:
    """The backend that multiplies matrices like `x`; None if torch does."""
    if x.dtype != torch.float32:
        return None
    backend = get_backend("auto", x.device)
    return backend if x.ndim == 2 or is_device_backend(backend) else None


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK's results depend on the number of threads; stored codes must not."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def multiply(
    left: Tensor,
    right: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """out <- alpha*(left @ right) + beta*out for matrices or batches; returns `out`.

    `out` is not read if beta is 0 and must overlap neither factor.
    """
    kernels = _kernels(left)
    if kernels is not None:
        return kernels.product(left, right, out=out, alpha=alpha, beta=beta)
    if out is None:
        out = left.new_empty(*left.shape[:-1], right.shape[-1])
    addmm = torch.addmm if out.ndim == 2 else torch.baddbmm
    return addmm(out, left, right, beta=beta, alpha=alpha, out=out)


def symmetric_addmm(
    addend: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """beta*addend + alpha*(left @ right), where the caller knows both terms to be symmetric.

    addend: [m, m] or None for no such term; left: [m, k]; right: [k, m]; or all three with one
    leading batch dimension; not checked. `out` may be `addend` but must overlap neither factor.
    Returns `out`; a single float32 matrix comes out exactly symmetric.
    """
    kernels = _kernels(left)
    if kernels is not None:
        transposed = right.data_ptr() == left.data_ptr() and right.stride() == left.mT.stride()
        return kernels.symmetric_product(
            left, None if transposed else right, addend=addend, alpha=alpha, beta=beta, out=out
        )
    if out is None:
        out = left.new_empty(*left.shape[:-1], left.shape[-2])
    if addend is None:
        addend, beta = out, 0.0  # with beta = 0 the addend is not read
    addmm = torch.addmm if out.ndim == 2 else torch.baddbmm
    return addmm(addend, left, right, beta=beta, alpha=alpha, out=out)


def gram(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """X X^T of x [m, n] or [b, m, n]; returns [m, m] or [b, m, m] in x's dtype.

    Meant for m <= n; of a tall matrix pass the transpose view, which costs nothing. Raises
    ValueError for another number of dimensions or an `out` of another shape or dtype.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected [m, n] or [b, m, n], got shape {tuple(x.shape)}")
    _check_out(out, x, (*x.shape[:-1], x.shape[-2]))
    return symmetric_addmm(None, x, x.mT, out=out)


def symmetric_mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b of commuting symmetric matrices [m, m] or [b, m, m], so that the product is symmetric.

    That they commute is the caller's promise (polynomials of one matrix do) and is not checked.
    `out` must overlap neither. Raises ValueError for wrong shapes or `out`.
    """
    if a.ndim not in (2, 3) or a.shape[-1] != a.shape[-2] or a.shape != b.shape:
        raise ValueError(
            "a, b: expected two square matrices or batches of one shape, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    _check_out(out, a, tuple(a.shape))
    return symmetric_addmm(None, a, b, out=out)


def symmetric_from_spectrum(
    vectors: Tensor, values: Tensor, *, out: Tensor | None = None
) -> Tensor:
    """V diag(values) V^T for V [m, m] (columns) and values [m], or [b, m, m] and [b, m].

    With (eigenvalues, V) = torch.linalg.eigh(R) and values = f(eigenvalues) this is f(R). Takes
    one m x m temporary besides `out`. Raises ValueError for wrong shapes or `out`.
    """
    if vectors.ndim not in (2, 3) or vectors.shape[:-1] != values.shape:
        raise ValueError(
            "vectors, values: expected [m, m] and [m], or [b, m, m] and [b, m], "
            f"got {tuple(vectors.shape)} and {tuple(values.shape)}"
        )
    _check_out(out, vectors, tuple(vectors.shape))
    return symmetric_addmm(None, vectors * values.unsqueeze(-2), vectors.mT, out=out)


def _check_out(out: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> None:
    if out is not None and (tuple(out.shape) != shape or out.dtype != like.dtype):
        raise ValueError(f"out: expected {like.dtype} {shape}, got {out.dtype} {tuple(out.shape)}")
