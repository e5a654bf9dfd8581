"""Spectral companding: store the root of a momentum's spectrum instead of the momentum.

With M = U S V^T scaled to ||M||_F = 1, the stored matrix is Y = U y(S) V^T, y^3 + c*y = s. It is
mu-law's idea on singular values: a cube root for the large, linear near zero. Quantisation noise
is white, and Newton-Schulz lifts every direction to one; companding first makes the noise nearly
proportional to each direction's own size. Decoding is a polynomial in the stored matrix,

    M = (Y Y^T + c I) Y,

two products of codes. The encoder's root is a sum of inverses on hosts (`root_fractions`) and a
chain of products on devices (`root_iteration`). All need only the Gram matrix of the short side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.root_fractions import root_fractions
from lowbit_muon.linalg.root_iteration import iterate_root


def encoding_operator(
    gram: Tensor,
    shift: float,
    backend: Backend,
    *,
    rounded: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """C [b, m, m] with Y = C M, from M M^T [b, m, m] of M scaled to norm one.

    The Gram matrix may be overwritten. rounded, dtype: of devices, see `iterate_root`.
    """
    f = None if backend.asynchronous else root_fractions(shift)
    if f is None:
        return iterate_root(gram, shift, backend, overwrite=True, rounded=rounded, dtype=dtype)
    return backend.partial_fractions(gram, f.constant, f.linear, f.poles, f.weights)


def decoding_operator(
    gram: Tensor, norm: Tensor, noise: Tensor, shift: float, columns: int, backend: Backend
) -> Tensor:
    """A [b, m, m] with M = A Y of Frobenius norm `norm`, from Y Y^T [b, m, m].

    A is a multiple of `shifted_gram`. Noise of decoding would change the norm a little in every
    step, and that adds up, so the norm is given, float64 [b]; what it would be without is a trace:
    ||A Y||_F^2 = <A Y Y^T, A>. (A step decodes without A's factor and measures.)
    """
    operator = shifted_gram(gram.clone(), noise, shift, columns)
    squares = backend.symmetric_product(operator, gram).mul_(operator)
    decoded = squares.sum(dim=(1, 2), dtype=norm.dtype)
    gain = torch.where(decoded > 0, norm * decoded.rsqrt(), 0.0)
    return operator.mul_(gain.float().view(-1, 1, 1))


def shifted_gram(gram: Tensor, noise: Tensor, shift: float, columns: int) -> Tensor:
    """Y Y^T + c I [b, m, m], in the place of Y Y^T.

    noise: squared Frobenius norm of the error E that Y [m, n] was quantised with, float64 [b].
    White E of variance v an entry adds (m + n) v Y to the expectation of the cubic (E E^T ~ n v I,
    E^T E ~ m v I), as if the shift were larger; left in, it would amplify the small directions in
    every step, so c is shift - noise * (1/m + 1/n).
    """
    unbiased = torch.rsub(noise, shift, alpha=1 / gram.shape[-1] + 1 / columns)
    gram.diagonal(dim1=1, dim2=2).add_(unbiased.unsqueeze(1))
    return gram
