"""What this machine can do at most, as torch finds it: bytes copied, and products, in a second.

They are timed in the same rounds as everything else (`measure_cases`), so that both see the same
clock and the same neighbours. A matrix that stays in a last-level cache moves more bytes than
memory can, and integer products are not torch's: shares of more than 100% are no error.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch

from lowbit_muon.tools.benchmark.cases import DTYPES, Case, Prepared
from lowbit_muon.tools.benchmark.counts import (
    BF16_PRODUCT,
    FP32_PRODUCT,
    FROM_MEMORY,
    IN_L2,
    L2_BYTES,
    product_operations,
)

MEMORY_BYTES = 128 * 2**20  # of source and of target: four times a last-level cache of 32 MiB
PRODUCT_SIZES = {"cpu": 1024, "cuda": 8192}  # of square matrices that reach the best seen


def peaks(names: Iterable[str], device: torch.device | None = None) -> list[Case]:
    """A case for each of these names, each once; the work of each is that of its own name."""
    where = torch.device("cpu") if device is None else device
    return [_peak(name, where) for name in sorted(set(names))]


def _peak(name: str, device: torch.device) -> Case:
    if name in (FROM_MEMORY, IN_L2):
        return Case(name, partial(_prepare_copy, name, device), peer=True)
    dtype = {FP32_PRODUCT: "fp32", BF16_PRODUCT: "bf16"}[name]
    return Case(name, partial(_prepare_product, name, dtype, device), dtype, peer=True)


def _prepare_copy(name: str, device: torch.device) -> Prepared:
    """torch's copy of float32; bytes read and written."""
    size = MEMORY_BYTES if name == FROM_MEMORY else L2_BYTES * torch.get_num_threads()
    source = torch.ones(size // 4, device=device)
    target = source.clone()
    return Prepared(lambda: target.copy_(source), work={name: 2.0 * source.nbytes})


def _prepare_product(name: str, dtype: str, device: torch.device) -> Prepared:
    """torch.mm of square matrices: the best that was seen, not a peak of the units."""
    size = PRODUCT_SIZES[device.type]
    a = torch.randn(size, size, device=device).to(DTYPES[dtype])
    out = torch.mm(a, a)
    work = product_operations(size, size, size)
    return Prepared(lambda: torch.mm(a, a, out=out), work={name: work})
