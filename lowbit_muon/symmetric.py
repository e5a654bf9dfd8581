"""Products known to be symmetric: one triangle is computed by block rows, the other mirrored.

torch has no symmetric matrix product on CPUs (BLAS syrk is not exposed). `torch.addmm(out=)` on
block row i of B, from the diagonal rightwards, does (1 + 1/B)/2 of the full product's arithmetic.
Three dimensions are a batch and take the full product: batches are of small matrices, where
splitting costs more than it saves. Nothing here records gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor

# From bench/results/orthogonalize.json, "product_seconds": with 256 rows the extra calls cost what
# the triangle saves, with 576 it takes 0.7 of torch.mm's time, and beyond 8 block rows (56% of the
# arithmetic) nothing more is gained.
_MIN_ROWS = 384
_ROWS_PER_BLOCK = 96
_MAX_BLOCKS = 8


def symmetric_addmm(
    addend: Tensor | None,
    left: Tensor,
    right: Tensor,
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
    blocks: int | None = None,
) -> Tensor:
    """beta*addend + alpha*(left @ right), where the caller knows both terms to be symmetric.

    addend: [m, m] or None for no such term; left: [m, k]; right: [k, m]; or all three with one
    leading batch dimension; not checked. `out` may be `addend` but must overlap neither factor.
    blocks: the number of block rows of a single product, by default chosen by m.
    Returns `out`, symmetric to rounding, and exactly so if it was computed by block rows.
    """
    if out is None:
        out = left.new_empty(*left.shape[:-1], left.shape[-2])
    if addend is None:
        addend, beta = out, 0.0  # with beta = 0 the addend is not read
    rows = left.shape[-2]
    if blocks is None:
        blocks = min(rows // _ROWS_PER_BLOCK, _MAX_BLOCKS) if rows >= _MIN_ROWS else 1
    if out.ndim == 3:
        return torch.baddbmm(addend, left, right, beta=beta, alpha=alpha, out=out)
    if blocks == 1:
        return torch.addmm(addend, left, right, beta=beta, alpha=alpha, out=out)
    height = -(-rows // blocks)
    for start in range(0, rows, height):
        end = min(start + height, rows)
        torch.addmm(
            addend[start:end, start:],
            left[start:end],
            right[:, start:],
            beta=beta,
            alpha=alpha,
            out=out[start:end, start:],
        )
        # Rounding leaves the diagonal block asymmetric. Between blocks that are exactly symmetric
        # this would not stay rounding: H R H of the Gram iteration is then no longer a similarity
        # of R, and a rank-one matrix of 512 rows comes out with 40 times the error.
        diagonal = out[start:end, start:end]
        torch.mul(diagonal + diagonal.mT, 0.5, out=diagonal)
        out[end:, start:end].copy_(out[start:end, end:].mT)
    return out


def gram(x: Tensor, *, out: Tensor | None = None, blocks: int | None = None) -> Tensor:
    """X X^T of x [m, n] or [b, m, n]; returns [m, m] or [b, m, m] in x's dtype.

    Meant for m <= n; of a tall matrix pass the transpose view, which costs nothing. A matrix with
    neither stride 1 is copied by torch for every block row. blocks: see `symmetric_addmm`. Raises
    ValueError for another number of dimensions or an `out` of another shape or dtype.
    """
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected [m, n] or [b, m, n], got shape {tuple(x.shape)}")
    _check_out(out, x, (*x.shape[:-1], x.shape[-2]))
    return symmetric_addmm(None, x, x.mT, out=out, blocks=blocks)


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
