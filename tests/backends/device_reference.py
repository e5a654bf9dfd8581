"""The reference as a device that the host must never wait for: the device path, on a CPU."""

from __future__ import annotations

from lowbit_muon.backends.base import Backend


class DeviceReference(Backend):
    """Batches, masks and counters as on a GPU."""

    asynchronous = True
