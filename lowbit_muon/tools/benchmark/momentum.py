"""Matrices that look like a momentum, for timing: never zeros, never white noise."""

from __future__ import annotations

import torch
from torch import Tensor


def decaying_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] float32 with singular values falling about as 1/i, as momentum's do.

    It is made, and stays, on the generator's device.
    """
    if rows > columns:
        return decaying_matrix(columns, rows, generator).mT.contiguous()
    device = generator.device
    basis, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, device=device))
    values = 1 / torch.arange(1, rows + 1, device=device)
    return basis * values @ torch.randn(rows, columns, generator=generator, device=device)
