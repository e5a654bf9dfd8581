"""Maps of a matrix in float64: polar factors, norms of rows and columns, singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Triple = tuple[float, float, float]

MUON: Triple = (3.4445, -4.7750, 2.0315)
PROMOTE: Triple = (1.875, -1.25, 0.375)
SUPPRESS: Triple = (0.0, 2.5, -1.5)


def spectral(x: Tensor, function: Map) -> Tensor:
    """U f(S) V^T of x = U S V^T."""
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * function(values) @ vh


def exact_polar(x: Tensor) -> Tensor:
    """U V^T over the singular values that are not zero; zeros of a zero matrix."""
    return spectral(x, lambda s: ((s > 1e-12 * s.max()) & (s > 0)).double())


def newton_schulz(coefficients: Sequence[Triple], steps: int, eps: float = 1e-7) -> Map:
    """X <- aX + (bS + cS^2)X with S = XX^T, from X = u / max(||u||, eps), on the transpose of tall
    matrices. The last triple repeats when there are fewer than `steps`."""
    triples = [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)]

    def iterate(x: Tensor) -> Tensor:
        if x.shape[0] > x.shape[1]:
            return iterate(x.mT).mT
        x = x.double() / max(float(x.double().norm()), eps)
        for a, b, c in triples:
            s = x @ x.mT
            x = a * x + (b * s + c * s @ s) @ x
        return x

    return iterate


def row_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of unit length; rows of zeros stay."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(eps)


def col_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Columns of unit length; columns of zeros stay."""
    return x / x.norm(dim=0, keepdim=True).clamp_min(eps)


def sinkhorn(x: Tensor, rounds: int = 5, eps: float = 1e-12) -> Tensor:
    """f of ARO (arXiv 2602.09006): rows to norm sqrt(n), then columns to norm sqrt(m), in rounds.

    At the fixed point both hold and elements have a root mean square of 1. The paper's own
    constant was not read; ARO divides by the norm of the result, so that it does not matter there.
    """
    rows, cols = x.shape
    for _ in range(rounds):
        x = math.sqrt(rows) * col_norm(math.sqrt(cols) * row_norm(x, eps), eps)
    return x


def soft_clip(x: Tensor, c: float) -> Tensor:
    """(I + XX^T/c^2)^(-1/2) X: singular values s -> s / sqrt(1 + s^2/c^2)."""
    return spectral(x, lambda s: s / (1 + (s / c) ** 2).sqrt())


def equilibrate(x: Tensor, axes: str, floor: float = 1e-6) -> Tensor:
    """Rows, columns or both scaled to equal norms, ||x||/sqrt(m) a row and ||x||/sqrt(n) a column.

    Of "both" the norms are those of x itself, so that they are equal only nearly.
    """
    result, norm = x, x.norm()
    if axes in ("row", "both"):
        of_row = x.norm(dim=1, keepdim=True).clamp_min(floor)
        result = result * (norm / math.sqrt(x.shape[0]) / of_row)
    if axes in ("column", "both"):
        of_col = x.norm(dim=0, keepdim=True).clamp_min(floor)
        result = result * (norm / math.sqrt(x.shape[1]) / of_col)
    return result


def power_iteration(x: Tensor, rounds: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(s, u, v) of the largest singular value, on the short side, from u_i = frac(i phi) - 1/2."""
    if x.shape[0] > x.shape[1]:
        s, u, v = power_iteration(x.mT, rounds)
        return s, v, u
    golden = (math.sqrt(5) - 1) / 2
    u = torch.tensor([i * golden % 1 - 0.5 for i in range(1, x.shape[0] + 1)], dtype=x.dtype)
    for _ in range(rounds):
        u = x @ (x.mT @ u)
        u = u / u.norm().clamp_min(1e-30)
    v = x.mT @ u
    return v.norm(), u, v / v.norm().clamp_min(1e-30)


def soft_cap_coupling(k: float, w_max: float) -> float:
    """The smallest root >= 0 of -k^9 a^4 + 3 k^7 a^3 - 3 k^5 a^2 + k - w_max; 0 below w_max."""
    if k <= w_max:
        return 0.0
    monic = torch.tensor([-3 / k**2, 3 / k**4, 0, -(k - w_max) / k**9], dtype=torch.float64)
    companion = torch.zeros(4, 4, dtype=torch.float64)
    companion[0] = -monic
    companion[1:, :-1] = torch.eye(3, dtype=torch.float64)
    roots = torch.linalg.eigvals(companion)
    return float(roots.real[(roots.imag.abs() < 1e-6 / k**2) & (roots.real >= 0)].min())
