"""Spectral companding of one matrix by the operators of `lowbit_muon.linalg.spectral`."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.linalg.spectral import EncodingMethod, encoding_operator, unbiased_shift

CPU = get_backend("auto", torch.device("cpu"))


def gram(matrix: Tensor) -> Tensor:
    """X X^T of X [.., m, n]."""
    return CPU.symmetric_product(matrix)


def compand(matrix: Tensor, norm: float, shift: float, method: EncodingMethod = "auto") -> Tensor:
    """Y of float32 [m, n], m <= n, of Frobenius norm > 0."""
    operator = encoding_operator(gram(matrix).div_(norm).div_(norm), shift, CPU, method)
    return CPU.product(operator.div_(norm), matrix)


def expand(companded: Tensor, shift: float, noise: float = 0.0) -> Tensor:
    """(Y Y^T + c I) Y, which `decoding_operator` gives a norm; noise: see `unbiased_shift`."""
    operator = gram(companded)
    wide_noise = torch.tensor(noise, dtype=torch.float64)
    operator.diagonal().add_(float(unbiased_shift(shift, wide_noise, *companded.shape)))
    return CPU.product(operator, companded)
