"""Backends that take `rounded` products."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from device_reference import DeviceReference

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend


class RoundingReference(Backend):
    """The reference, asked for what the kernels of a processor with bfloat16 are asked for."""

    rounded_dtype = torch.bfloat16


class RoundingDevice(DeviceReference):
    """The same of a GPU's kernels."""

    rounded_dtype = torch.float16


BACKENDS: dict[str, Callable[[], Backend]] = {
    "reference": RoundingReference,
    "cpu": lambda: get_backend("cpu", torch.device("cpu")),
}


def needs_bfloat16(backend: Backend) -> Backend:
    if backend.rounded_dtype is None:
        pytest.skip("this processor has no products of bfloat16")
    return backend
