"""Results that depend neither on the number of threads nor on what the process allows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK's results depend on the number of threads; stored codes must not."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def full_precision_products() -> Iterator[None]:
    """Products of float32 in float32, whatever the process allows (TF32 or bfloat16).

    The spectral encoder resolves eigenvalues of shift^3; TF32 perturbs a Gram matrix by up to 5e-4.
    """
    # torch raises where its old switch (set_float32_matmul_precision) meets these, the new ones.
    switches: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        torch.backends.mkldnn.matmul,  # type: ignore[attr-defined]
    )
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
