"""Spectral companding: store the root of a momentum's spectrum instead of the momentum.

With M = U S V^T scaled to ||M||_F = 1, the stored matrix is Y = U y(S) V^T, y^3 + c*y = s. It is
mu-law's idea on singular values: a cube root for the large, linear near zero. Quantisation noise
is white, and Newton-Schulz lifts every direction to one; companding first makes the noise nearly
proportional to each direction's own size. Decoding is a polynomial in the stored matrix,

    M = (Y Y^T + c I) Y,

two products of codes. Both need only the Gram matrix of the short side.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend, PackedCodes
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.linalg.products import gram, multiply, one_thread, symmetric_from_spectrum
from lowbit_muon.linalg.root_iteration import ROOT_TABLE, iterate_root

EncodingMethod = Literal["auto", "eigh", "products"]


def compand_singular_values(s: Tensor, shift: float) -> Tensor:
    """The real root y of y^3 + shift*y = s for s >= 0, in closed form (hyperbolic sine)."""
    k = math.sqrt(shift / 3)
    return 2 * k * torch.sinh(torch.asinh(s / (2 * k**3)) / 3)


def companding_gain(eigenvalues: Tensor, shift: float) -> Tensor:
    """f(lambda) = y(s)/s with s = sqrt(lambda), f(0) = 1/shift; rounding below 0 counts as 0."""
    s = eigenvalues.clamp_min(0).sqrt()
    # Below this size y = s/shift to float64 precision: y^3/(shift*y) < 1e-18.
    linear = s <= 1e-9 * shift**1.5
    return torch.where(linear, 1 / shift, compand_singular_values(s, shift) / s.clamp_min(1e-300))


def encoding_operator(gram_matrix: Tensor, shift: float, method: EncodingMethod = "auto") -> Tensor:
    """C [m, m] with Y = C M, from R = M M^T / ||M||_F^2 [m, m].

    method: "eigh": exactly, by eigendecomposition; "products": by matrix products alone
    (`root_iteration`), which is faster and uses all threads; "auto": "products" for every shift
    that it can serve. `gram_matrix` is overwritten.
    """
    if method == "auto":
        method = "products" if shift >= ROOT_TABLE[-1].shift else "eigh"
    if method == "products":
        return iterate_root(gram_matrix, shift, overwrite=True)
    with one_thread(gram_matrix.device):
        eigenvalues, vectors = torch.linalg.eigh(gram_matrix)
    wide = eigenvalues.to(accumulation_dtype(eigenvalues.device))
    gain = companding_gain(wide, shift).to(gram_matrix.dtype)
    return symmetric_from_spectrum(vectors, gain)


def spectral_compand(
    matrix: Tensor, norm: float, shift: float, *, method: EncodingMethod = "auto", out: Tensor
) -> Tensor:
    """Y [m, n], written into `out`, for float32 `matrix` [m, n], m <= n, of Frobenius norm > 0.

    method: see `encoding_operator`.
    """
    operator = encoding_operator(gram(matrix).div_(norm).div_(norm), shift, method)
    return multiply(operator.div_(norm), matrix, out=out)


Number = TypeVar("Number", float, Tensor)


def unbiased_shift(shift: float, noise: Number, m: int, n: int) -> Number:
    """The c to decode with: shift - noise * (1/m + 1/n).

    noise: squared Frobenius norm of the error E that Y [m, n] was quantised with. White E of
    variance v an entry adds (m + n) v Y to the expectation of the cubic (E E^T ~ n v I,
    E^T E ~ m v I), as if the shift were larger; left in, it would amplify the small directions in
    every step.
    """
    return shift - noise * (1 / m + 1 / n)


def spectral_expand(companded: Tensor, shift: float, *, noise: float = 0.0, out: Tensor) -> Tensor:
    """(Y Y^T + c I) Y for Y float32 [m, n], written into `out` [m, n].

    noise: see `unbiased_shift`.
    """
    return multiply(_cubic_operator(gram(companded), companded, shift, noise), companded, out=out)


def spectral_expand_codes(
    codes: PackedCodes, shift: float, *, noise: float = 0.0, backend: Backend, out: Tensor
) -> Tensor:
    """`spectral_expand` straight from the codes of Y, in integers; codes as `code_gram` takes."""
    operator = _cubic_operator(backend.code_gram(codes), out, shift, noise)
    return backend.code_product(operator, codes, out=out)


def _cubic_operator(gram_matrix: Tensor, like: Tensor, shift: float, noise: float) -> Tensor:
    """Y Y^T + c I, in place of Y Y^T; `like` is of the shape of Y."""
    gram_matrix.diagonal().add_(unbiased_shift(shift, noise, *like.shape))
    return gram_matrix
