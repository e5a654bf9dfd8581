"""Companding and expanding one matrix, as the spectral codec does."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.linalg import root_iteration
from lowbit_muon.linalg.spectral import EncodingMethod, encoding_operator, unbiased_shift

BACKEND = get_backend("auto", torch.device("cpu"))


def iterate_root(gram: Tensor, shift: float, *, overwrite: bool = False) -> Tensor:
    """`root_iteration.iterate_root` with the kernels of this machine."""
    return root_iteration.iterate_root(gram, shift, BACKEND, overwrite=overwrite)


def spectral_compand(
    matrix: Tensor, norm: float, shift: float, *, method: EncodingMethod = "auto", out: Tensor
) -> Tensor:
    """Y [m, n], written into `out`, for float32 `matrix` [m, n], m <= n, of Frobenius norm > 0."""
    gram = BACKEND.symmetric_product(matrix).div_(norm).div_(norm)
    operator = encoding_operator(gram, shift, BACKEND, method)
    return BACKEND.product(operator.div_(norm), matrix, out=out)


def spectral_expand(companded: Tensor, shift: float, *, noise: float = 0.0, out: Tensor) -> Tensor:
    """(Y Y^T + c I) Y for Y float32 [m, n], written into `out`; noise: see `unbiased_shift`."""
    operator = BACKEND.symmetric_product(companded)
    m, n = companded.shape
    operator.diagonal().add_(unbiased_shift(shift, torch.tensor(noise), m, n))
    return BACKEND.product(operator, companded, out=out)
