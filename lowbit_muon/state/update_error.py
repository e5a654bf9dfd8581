"""The error that storing a momentum causes in its update, measured on the matrix itself."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.newton_schulz import Triple, orthogonalize
from lowbit_muon.state.momentum_state import NORM_EPS
from lowbit_muon.state.stored import QuantizedMatrix, orient, quantize

TURNED_COLUMNS = 128  # at once: entries of a sum of so many are close to normal


def next_momentum(stored: QuantizedMatrix, grad: Tensor, decay: float) -> Tensor:
    """decay * M + (1 - decay) * G, or as formats that normalise take it; [rows, columns]."""
    momentum = stored.dequantize()
    if stored.state_format.normalize:
        return decay * momentum + grad.float() / (grad.float().norm() + NORM_EPS)
    return decay * momentum + (1 - decay) * grad.float()


def turned(matrix: Tensor) -> Tensor:
    """A matrix like this one, [rows, columns], that codes do not hold exactly already.

    It is multiplied on its long side by an orthogonal matrix, always the same one.
    """
    oriented = orient(matrix)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for part in oriented.split(TURNED_COLUMNS, dim=1):
        size = part.shape[1]
        q, _ = torch.linalg.qr(torch.randn(size, size, generator=generator))
        parts.append(part @ q.to(part.device))
    product = torch.cat(parts, dim=1)
    return product if oriented is matrix else product.mT.contiguous()


class UpdateError:
    """How far storing a matrix once moves its Newton-Schulz update."""

    def __init__(self, matrix: Tensor, coefficients: Sequence[Triple]) -> None:
        """matrix: [rows, columns]; factors and scales go by this orientation."""
        self._matrix, self._coefficients = matrix, coefficients
        self._exact = self._update(matrix)
        self._size = float(self._exact.norm())

    def of(self, state_format: StateFormat) -> float | None:
        """Relative error, in the Frobenius norm; None for zeros, which have no direction."""
        if not self._size > 0:
            return None
        stored = quantize(self._matrix, state_format).dequantize()
        return float((self._update(stored) - self._exact).norm()) / self._size

    def _update(self, matrix: Tensor) -> Tensor:
        return orthogonalize(orient(matrix), len(self._coefficients), self._coefficients)
