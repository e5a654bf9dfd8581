"""Walsh-Hadamard transforms, against the reference without tolerance."""

from __future__ import annotations

import pytest
import torch
from comparison import REFERENCE, TRITON

from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.triton.kernels import rotation

COLUMNS = (1, 2, 3, 5, 16, 31, 63, 64, 65, 129, 515, 576)
T = rotation.LARGEST_TILE


@pytest.mark.parametrize("columns", [*COLUMNS, T, T + 1, 2 * T, 4 * T + 100])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_bit_for_bit(columns: int, inverse: bool) -> None:
    """In rows further apart than they are long; beyond a tile also in two rounds."""
    rows = 3 if columns < T else 1
    padded = torch.randn(rows, columns + 3)
    x, gaps = padded[:, :columns], padded[:, columns:].clone()
    expected, other = x.clone(), x.clone()
    REFERENCE.rotate(expected, inverse=inverse)
    CpuBackend().rotate(other, inverse=inverse)
    TRITON.rotate(x, inverse=inverse)
    assert torch.equal(x, expected)
    assert torch.equal(x, other)
    assert torch.equal(padded[:, columns:], gaps)


def test_rotation_of_a_batch() -> None:
    x = torch.randn(3, 2, 48)
    expected = x.clone()
    TRITON.rotate(x)
    REFERENCE.rotate(expected)
    assert torch.equal(x, expected)


def test_rotation_of_nothing() -> None:
    for shape in ((0, 5), (5, 0), (0, 2, 5)):
        TRITON.rotate(torch.empty(shape))
