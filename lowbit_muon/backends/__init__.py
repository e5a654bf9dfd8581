"""Backends by name. `get_backend("auto", device)` may fall back; a named backend never does."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit_muon.backends import triton
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cuda import library as cuda


@dataclass(frozen=True)
class _Registered:
    path: str  # of the class, which is imported when it is first asked for
    unavailable_reason: Callable[[], str | None]  # None if it can be used
    device_types: tuple[str, ...] | None  # None: any


# In the order of preference for a device. Nobody has measured "cuda" ahead of "triton" yet.
_REGISTRY: dict[str, _Registered] = {
    "cpu": _Registered("cpu.adapter.CpuBackend", cpu.unavailable_reason, ("cpu",)),
    "triton": _Registered(
        "triton.backend.TritonBackend", triton.unavailable_reason, triton.DEVICE_TYPES
    ),
    "cuda": _Registered("cuda.adapter.CudaBackend", cuda.unavailable_reason, ("cuda",)),
    "reference": _Registered("base.Backend", lambda: None, None),
}

BACKEND_NAMES = ("auto", *_REGISTRY)


@functools.lru_cache(maxsize=256)
def get_backend(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`.

    "auto" takes the first that is available for the device: on CPUs "cpu"; on NVIDIA, AMD and Intel
    GPUs "triton", then "cuda"; anywhere else "reference", in torch operations on the device. It
    says once if only that is left where kernels exist. A backend named explicitly raises ValueError
    (unknown name or wrong device) or RuntimeError (not available, with the reason) rather than
    being replaced by another.
    """
    if name == "auto":
        return _automatic(device.type)
    _check_known(name)
    allowed = _REGISTRY[name].device_types
    if allowed is not None and device.type not in allowed:
        raise ValueError(
            f"backend: '{name}' works on devices {allowed}, got a tensor on '{device}'"
        )
    return _create(name)


def check_backend_name(name: str) -> None:
    """Raise ValueError for an unknown backend name, RuntimeError if a named one is not there."""
    _check_known(name)
    if name != "auto":
        _create(name)


def describe_backends() -> list[tuple[str, bool, str]]:
    """(name, available, detail) for each backend, fastest first."""
    rows = []
    for name, entry in _REGISTRY.items():
        reason = entry.unavailable_reason()
        types = entry.device_types
        devices = "any device" if types is None else ", ".join(types)
        rows.append((name, reason is None, reason or f"for {devices}"))
    return rows


def _check_known(name: str) -> None:
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend: expected one of {BACKEND_NAMES}, got {name!r}")


@functools.cache
def _create(name: str) -> Backend:
    entry = _REGISTRY[name]
    reason = entry.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend: '{name}' is not available: {reason}")
    return _load(entry.path)


def _load(path: str) -> Backend:
    """The backend of a class that is given by its path in this package."""
    module, _, name = path.rpartition(".")
    backend: Backend = getattr(importlib.import_module(f"{__name__}.{module}"), name)()
    return backend


def _automatic(device_type: str) -> Backend:
    reasons = []
    for name, entry in _REGISTRY.items():
        if entry.device_types is None or device_type not in entry.device_types:
            continue
        reason = entry.unavailable_reason()
        if reason is None:
            return _create(name)
        reasons.append(f"{name}: {reason}")
    if reasons:
        warnings.warn(
            f"lowbit_muon uses the slower reference backend ({'; '.join(reasons)})",
            RuntimeWarning,
            stacklevel=2,
        )
    return _create("reference")
