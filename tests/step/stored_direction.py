"""What a step with ns_input="stored" moves a weight by, from its definition."""

from __future__ import annotations

import math

from torch import Tensor

from lowbit_muon import QuantizedMatrix, orthogonalize
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.reference import decode
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS


def stored_spectrum(stored: QuantizedMatrix) -> Tensor:
    """Y of a spectral format, the short side first."""
    y = decode(stored.codes())
    if stored.state_format.rotate:
        Backend().rotate(y, inverse=True)
    return y


def steps_left(stored: QuantizedMatrix) -> int:
    """Of five steps: as many fewer as multiply by a what 1/(c m^(1/3)) has lifted already."""
    rows = min(stored.shape)
    lift = 1 / (stored.state_format.shift(rows) * rows ** (1 / 3))
    return max(1, 5 - math.floor(math.log(lift, NS_COEFFICIENTS["muon"][0][0])))


def stored_direction(stored: QuantizedMatrix) -> Tensor:
    """The orthogonalised matrix that the codes hold, of the matrix's own shape.

    Spectral formats take their own matrix Y, whose polar factor is the same, with fewer steps.
    """
    if not stored.state_format.spectral:
        return orthogonalize(stored.dequantize())
    direction = orthogonalize(stored_spectrum(stored), steps_left(stored))
    return direction if stored.shape[0] <= stored.shape[1] else direction.mT
