"""The momentum update: decode, add the gradient, encode, and hand over what is orthogonalised."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.quantized_matrix import QuantizedMatrix, orient, rescaling

_EPS = 1e-7  # MuonQ's guard when it divides by a norm (arXiv 2605.11396)


class NonFiniteGradientError(ValueError):
    """A gradient with inf or nan; raised before state or weights change."""


def update_momentum(
    momentum: QuantizedMatrix,
    grad: Tensor,  # [rows, columns], any float dtype and strides
    *,
    decay: float,
    nesterov: bool,
    backend: Backend,
    from_stored: bool = False,
) -> tuple[Tensor, float]:
    """M <- decay*M + (1 - decay)*G in the stored matrix; returns what is to be orthogonalised.

    Returns (X, scale): X float32 [m, n] (short side first) is scale times M, or with Nesterov
    scale times decay*M + (1 - decay)*G; M as it was before it was quantised, or with `from_stored`
    as the codes have it. A format with `normalize` instead divides G by its Frobenius norm, sums,
    and divides M by its norm (arXiv 2605.11396); X is then of that size, scale 1.

    Raises NonFiniteGradientError, with nothing changed, if the new momentum is not finite.
    """
    oriented_grad = orient(grad.float() if grad.dtype == torch.float64 else grad)
    buffer = torch.empty(oriented_grad.shape, dtype=torch.float32, device=grad.device)
    weight, codes = momentum.decode_parts(buffer, backend)
    normalize = momentum.state_format.normalize
    grad_weight = 1 / (_norm(grad) + _EPS) if normalize else 1 - decay
    squares = backend.accumulate(
        buffer,
        buffer_weight=decay * weight,
        codes=codes,
        code_weight=decay,
        grad=oriented_grad,
        grad_weight=grad_weight,
    )
    if not math.isfinite(squares):
        raise NonFiniteGradientError(_describe(grad))
    norm = math.sqrt(squares)
    scale = 1 / (norm + _EPS) if normalize else rescaling(norm)
    if scale != 1:
        buffer.mul_(scale)
    if normalize:
        norm, scale = norm * scale, 1.0
    momentum.store(buffer, norm, backend, scale=scale)
    if from_stored:
        weight, codes = momentum.decode_parts(buffer, backend)
        backend.accumulate(buffer, buffer_weight=weight * scale, codes=codes, code_weight=scale)
    if nesterov:
        backend.accumulate(
            buffer, buffer_weight=decay, grad=oriented_grad, grad_weight=grad_weight * scale
        )
    return buffer, scale


def _norm(grad: Tensor) -> float:
    """Frobenius norm, accumulated in float32 at least; not finite if any element is not."""
    return float(torch.linalg.vector_norm(grad, dtype=torch.float32))


def _describe(grad: Tensor) -> str:
    bad = int((~grad.isfinite()).sum())
    return f"expected a finite gradient, got {bad} of {grad.numel()} elements inf or nan"
