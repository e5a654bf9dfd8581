"""The spectral encoder and decoder of one float32 matrix, as the codec composes them, and the exact
encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.root_coefficients import companding_gain
from lowbit_muon.backends import get_backend
from lowbit_muon.linalg.root_iteration import iterate_root
from lowbit_muon.linalg.spectral import decoding_operator

BACKEND = get_backend("auto", torch.device("cpu"))


def spectrum_matrix(singular_values: Tensor, columns: int) -> Tensor:
    """float32 matrix [k, columns] of these k singular values, scaled to norm one."""
    rows = len(singular_values)
    u, _ = torch.linalg.qr(torch.randn(rows, rows, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, rows, dtype=torch.float64))
    return ((u * (singular_values / singular_values.norm())) @ v.mT).float()


def exact_operator(gram: Tensor, shift: float) -> Tensor:
    """f(R) by eigendecomposition, which `iterate_root` comes close to; [m, m]."""
    eigenvalues, vectors = torch.linalg.eigh(gram)
    gain = companding_gain(eigenvalues.double(), shift).to(gram.dtype)
    return BACKEND.symmetric_product(vectors * gain, vectors.mT)


def compand(matrix: Tensor, norm: float, shift: float, *, exact: bool = False) -> Tensor:
    """Y of the matrix [m, n], m <= n, of this Frobenius norm."""
    gram = BACKEND.symmetric_product(matrix).div_(norm).div_(norm)
    operator = exact_operator(gram, shift) if exact else iterate_root(gram, shift, BACKEND)
    return BACKEND.product(operator.div_(norm), matrix)


def cubic(companded: Tensor, shift: float) -> Tensor:
    """(Y Y^T + c I) Y, the inverse of `compand` for a norm of one, whose norm nothing corrects."""
    operator = BACKEND.symmetric_product(companded)
    operator.diagonal().add_(shift)
    return BACKEND.product(operator, companded)


def expand(companded: Tensor, norm: float, shift: float, noise: float = 0.0) -> Tensor:
    """The decoded matrix of this norm."""
    gram = BACKEND.symmetric_product(companded).unsqueeze(0)
    wide = torch.tensor([[norm], [noise]], dtype=torch.float64)
    operator = decoding_operator(gram, wide[0], wide[1], shift, companded.shape[1], BACKEND)
    return BACKEND.product(operator[0], companded)
