"""Triton backend: GPU kernels in Python, for NVIDIA, AMD and Intel.

Triton is imported by `backend`, and not needed before.
"""

from __future__ import annotations

import importlib.util
import os

import torch


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


# Where tensors may be; the CPU's memory only for the interpreter, which is for tests.
DEVICE_TYPES = ("cpu",) if interpreted() else ("cuda", "xpu")


def unavailable_reason() -> str | None:
    """Why the Triton backend cannot be used, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if not (interpreted() or torch.cuda.is_available() or torch.xpu.is_available()):
        return "triton finds no GPU here (its interpreter, TRITON_INTERPRET=1, is for tests)"
    return None
