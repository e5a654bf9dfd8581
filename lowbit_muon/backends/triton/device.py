"""What the kernels need to know about a device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_muon.formats.codebook import Codebook


class Target(NamedTuple):
    """What a kernel may use of a device."""

    prmt: bool  # NVIDIA's byte permutation, by inline assembly
    group_products: bool  # warp groups multiply from shared memory
    float_precision: str  # of products of float32, see `triton.language.dot`


@functools.cache
def target(device: torch.device) -> Target:
    """What `device` offers. TF32 units, of which three products make a float32, begin at sm_80."""
    if device.type != "cuda" or torch.version.hip is not None:
        return Target(prmt=False, group_products=False, float_precision="ieee")
    return nvidia_target(torch.cuda.get_device_capability(device))


def nvidia_target(capability: tuple[int, int]) -> Target:
    """What a GPU of this compute capability offers."""
    return Target(
        prmt=True,
        group_products=capability[0] in (9, 10, 11),  # not sm_120, whose units are sm_80's
        float_precision="tf32x3" if capability >= (8, 0) else "ieee",
    )


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Kernels go to the current device, which need not be the tensors'."""
    if x.device.type == "cuda":
        return torch.cuda.device(x.device)
    if x.device.type == "xpu":
        return torch.xpu.device(x.device)
    return contextlib.nullcontext()


@functools.lru_cache(maxsize=64)
def tables(codebook: Codebook, bits: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Levels [2**bits], filled up with the last, and thresholds [2**bits - 1], with infinity."""
    levels = codebook.levels + codebook.levels[-1:] * (2**bits - len(codebook.levels))
    missing = 2**bits - 1 - len(codebook.thresholds)
    thresholds = codebook.thresholds + (float("inf"),) * missing
    return (
        torch.tensor(levels, dtype=torch.float32, device=device),
        torch.tensor(thresholds, dtype=torch.float32, device=device),
    )
