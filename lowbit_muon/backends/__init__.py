"""Backends by name. `get_backend("auto", device)` may fall back; a named backend never does."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu import CpuBackend
from lowbit_muon.backends.cpu import unavailable_reason as cpu_unavailable_reason
from lowbit_muon.backends.reference import ReferenceBackend


@dataclass(frozen=True)
class _Registered:
    create: Callable[[], Backend]
    unavailable_reason: Callable[[], str | None]  # None if it can be used
    device_types: tuple[str, ...] | None  # None: any


_REGISTRY: dict[str, _Registered] = {
    "cpu": _Registered(CpuBackend, cpu_unavailable_reason, ("cpu",)),
    "reference": _Registered(ReferenceBackend, lambda: None, None),
}

BACKEND_NAMES = ("auto", *_REGISTRY)


def get_backend(name: str, device: torch.device) -> Backend:
    """The backend for tensors on `device`.

    "auto" takes the fastest that is available and says once if that is only the reference on a
    CPU. A backend named explicitly raises ValueError (unknown name or wrong device) or
    RuntimeError (not available, with the reason) rather than being replaced by another.
    """
    if name == "auto":
        return _automatic(device.type)
    check_backend_name(name)
    entry = _REGISTRY[name]
    if entry.device_types is not None and device.type not in entry.device_types:
        raise ValueError(
            f"backend: '{name}' works on devices {entry.device_types}, got a tensor on '{device}'"
        )
    reason = entry.unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"backend: '{name}' is not available: {reason}")
    return _create(name)


def check_backend_name(name: str) -> None:
    """Raise ValueError for an unknown backend name, RuntimeError if a named one is not there."""
    if name not in BACKEND_NAMES:
        raise ValueError(f"backend: expected one of {BACKEND_NAMES}, got {name!r}")
    if name != "auto":
        reason = _REGISTRY[name].unavailable_reason()
        if reason is not None:
            raise RuntimeError(f"backend: '{name}' is not available: {reason}")


def describe_backends() -> list[tuple[str, bool, str]]:
    """(name, available, detail) for each backend, fastest first."""
    rows = []
    for name, entry in _REGISTRY.items():
        reason = entry.unavailable_reason()
        devices = "any device" if entry.device_types is None else ", ".join(entry.device_types)
        rows.append((name, reason is None, reason or f"for {devices}"))
    return rows


@functools.cache
def _create(name: str) -> Backend:
    return _REGISTRY[name].create()


@functools.cache
def _automatic(device_type: str) -> Backend:
    for name, entry in _REGISTRY.items():
        if entry.device_types is None or device_type not in entry.device_types:
            continue
        reason = entry.unavailable_reason()
        if reason is None:
            return _create(name)
        warnings.warn(
            f"lowbit_muon uses the slower reference backend: {reason}", RuntimeWarning, stacklevel=2
        )
    return _create("reference")
