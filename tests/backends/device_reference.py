"""The torch operations of `Backend`, taken for a device: how its step is tested on a CPU."""

from __future__ import annotations

from lowbit_muon.backends.base import Backend


class DeviceReference(Backend):
    """The reference, taken for a device that the host must not wait for."""

    name = "device reference"
    asynchronous = True
