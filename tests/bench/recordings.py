"""A made-up recording."""

from __future__ import annotations

import torch
from torch import Tensor


def recording(steps: int = 12, m: int = 16, n: int = 32) -> Tensor:
    """Gradients [steps, m, n] with a common part and a steep spectrum."""
    torch.manual_seed(0)
    columns = 1 / torch.arange(1, n + 1)
    return (torch.randn(m, n) + torch.randn(steps, m, n)) * columns
