"""Backends by name. `get_backend("auto", device)` may fall back; a named backend never does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit_muon.backends import triton
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.cpu.adapter import unavailable_reason as cpu_unavailable_reason
from lowbit_muon.backends.cuda import library as cuda_library


@dataclass(frozen=True)
class _Registered:
    create: Callable[[], Backend]
    unavailable_reason: Callable[[], str | None]  # None if it can be used
    device_types: tuple[str, ...] | None  # None: any


def _create_triton() -> Backend:
    return triton.TritonBackend()


def _create_cuda() -> Backend:
    from lowbit_muon.backends.cuda.adapter import CudaBackend

    return CudaBackend()


# In the order of preference for a device. Nobody has measured "cuda" ahead of "triton" yet.
_REGISTRY: dict[str, _Registered] = {
    "cpu": _Registered(CpuBackend, cpu_unavailable_reason, ("cpu",)),
    "triton": _Registered(_create_triton, triton.unavailable_reason, ("cuda", "xpu")),
    "cuda": _Registered(_create_cuda, cuda_library.unavailable_reason, ("cuda",)),
    "reference": _Registered(Backend, lambda: None, None),
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
    allowed = _device_types(name)
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
        types = _device_types(name)
        devices = "any device" if types is None else ", ".join(types)
        rows.append((name, reason is None, reason or f"for {devices}"))
    return rows


def _check_known(name: str) -> None:
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend: expected one of {BACKEND_NAMES}, got {name!r}")


def _device_types(name: str) -> tuple[str, ...] | None:
    """Where a backend works. Triton's interpreter, which is for tests, works on CPUs instead."""
    if name == "triton" and triton.interpreted():
        return ("cpu",)
    return _REGISTRY[name].device_types


@functools.cache
def _create(name: str) -> Backend:
    entry = _REGISTRY[name]
    reason = entry.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend: '{name}' is not available: {reason}")
    return entry.create()


@functools.cache
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
