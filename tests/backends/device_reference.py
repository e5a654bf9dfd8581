"""The reference as a device that the host must never wait for: the device path, on a CPU."""

from __future__ import annotations

import dataclasses

import pytest

from lowbit_muon import backends
from lowbit_muon.backends.base import Backend


class DeviceReference(Backend):
    """Batches, masks and counters as on a GPU."""

    asynchronous = True


def stand_in(monkeypatch: pytest.MonkeyPatch, backend: Backend, name: str) -> None:
    """Whoever asks for the backend `name` (or "auto") gets this one, on any device."""
    backends.get_backend.cache_clear()  # and again after the test (conftest)
    if name == "auto":
        monkeypatch.setattr(backends, "_automatic", lambda device_type: backend)
        return
    create = backends._create
    anywhere = dataclasses.replace(backends._REGISTRY[name], device_types=None)
    monkeypatch.setitem(backends._REGISTRY, name, anywhere)
    monkeypatch.setattr(backends, "_create", lambda one: backend if one == name else create(one))
