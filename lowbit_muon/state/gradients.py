"""Which gradients an optimizer takes, and what it says of the others."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype

# A momentum of a larger norm is taken as if it were not finite. Its gradient is at most
# 1 / (1 - momentum) as large, 1e19 if that is 0.9999, and rules keep squares of it: float32 ends at
# 3.4e38.
LARGEST_NORM = 1e15
NORM_EPS = 1e-7  # MuonQ's guard when it divides by a norm (arXiv 2605.11396)


class NonFiniteGradientError(ValueError):
    """A gradient with inf, nan or values near float32's end; raised before anything changes."""


def frobenius_norm(grad: Tensor) -> Tensor:
    """Frobenius norm; not finite if any element is not."""
    return torch.linalg.vector_norm(grad, dtype=accumulation_dtype(grad.device))


def is_usable(grad: Tensor, *, parts: int = 1) -> Tensor:
    """Whether a gradient cannot take a momentum beyond `LARGEST_NORM`; a bool on its device.

    parts: of how many of its size the gradient is one.
    """
    if not grad.numel():
        return torch.ones((), dtype=torch.bool, device=grad.device)
    # The largest entry, since it is found without a copy; nan is not below anything.
    # (float32, since the limit would be inf in float16.)
    largest = torch.linalg.vector_norm(grad, ord=math.inf).float()
    return largest <= LARGEST_NORM / math.sqrt(grad.numel() * parts)


def describe(grad: Tensor) -> str:
    """What is wrong with a gradient that is not usable."""
    bad = int((~grad.isfinite()).sum())
    if not bad:
        return f"expected finite values of a norm below {LARGEST_NORM:g}, got a larger one"
    return f"expected finite values, got {bad} of {grad.numel()} elements inf or nan"


def count_skipped(state: dict[str, Any], param: Tensor) -> None:
    """Count a gradient that was left out in the parameter's state, and warn of the first."""
    state["skipped"] += 1
    if state["skipped"] == 1:
        warnings.warn(
            f"a gradient of a parameter of size {tuple(param.shape)} held inf or nan, or was too "
            "large: the parameter and its state were left as they were (nonfinite='skip')",
            RuntimeWarning,
            stacklevel=3,
        )
