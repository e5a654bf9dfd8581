"""The error that storing a momentum causes in its update, measured on the matrix itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import Triple
from lowbit_muon.linalg.newton_schulz import orthogonalize
from lowbit_muon.state.gradients import NORM_EPS
from lowbit_muon.state.stored import QuantizedMatrix, orient, quantize

SAMPLE_COLUMNS = 128  # at once: entries of a sum of so many are close to normal


def next_momentum(
    stored: QuantizedMatrix, grad: Tensor, weights: tuple[float, float], backend: str
) -> Tensor:
    """The sum of M and G with these weights, or as formats that normalise take it; [rows, columns].

    weights: of the update rule, momentum and 1 - momentum of Muon's.
    """
    momentum, share = weights
    decoded = stored.dequantize(backend)
    if stored.state_format.normalize:
        return momentum * decoded + grad.float() / (grad.float().norm() + NORM_EPS)
    return momentum * decoded + share * grad.float()


def rotated_sample(matrix: Tensor) -> Tensor:
    """A matrix like this one, [rows, columns], that codes do not hold exactly already.

    It is multiplied on its long side by an orthogonal matrix, always the same one.
    """
    oriented = orient(matrix)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in oriented.split(SAMPLE_COLUMNS, dim=1):
        size = part.shape[1]
        q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        parts.append(part @ q.to(part.device))
    product = torch.cat(parts, dim=1)
    return product if oriented is matrix else product.mT.contiguous()


class UpdateError:
    """How far storing a matrix once moves its Newton-Schulz update."""

    def __init__(self, matrix: Tensor, coefficients: Sequence[Triple], backend: str) -> None:
        """matrix: [rows, columns]; factors and scales go by this orientation."""
        self._matrix, self._coefficients = matrix, coefficients
        self._backend = backend
        self._exact = self._update(matrix)
        self._size = float(self._exact.norm())

    def of(self, state_format: StateFormat) -> float | None:
        """Relative error, in the Frobenius norm; None for zeros, which have no direction."""
        if not self._size > 0:
            return None
        stored = quantize(self._matrix, state_format, backend=self._backend)
        return (
            float((self._update(stored.dequantize(self._backend)) - self._exact).norm())
            / self._size
        )

    def _update(self, matrix: Tensor) -> Tensor:
        coefficients = self._coefficients
        return orthogonalize(orient(matrix), len(coefficients), coefficients, backend=self._backend)
