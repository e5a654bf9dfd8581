"""Triton backend: GPU kernels in Python, for NVIDIA and AMD.

Triton is imported when `TritonBackend` is first asked for, and not needed before.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lowbit_muon.backends.triton.backend import TritonBackend

__all__ = ["TritonBackend", "interpreted", "unavailable_reason"]


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def unavailable_reason() -> str | None:
    """Why the Triton backend cannot be used, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not (interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "triton finds no GPU here (its interpreter, TRITON_INTERPRET=1, is for tests)"
    return None


def __getattr__(name: str) -> Any:
    if name == "TritonBackend":
        from lowbit_muon.backends.triton.backend import TritonBackend

        return TritonBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
