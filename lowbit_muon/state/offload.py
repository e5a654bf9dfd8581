"""Stored momentum in host memory: brought to the device a batch ahead and taken back behind it.

Copies run on a stream of their own beside the computations, from and to pinned memory. On devices
without streams they are ordinary copies.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from lowbit_muon.state.stored import QuantizedMatrix


@functools.cache
def copy_stream(device: torch.device) -> torch.Stream | None:
    """The stream of all copies of a device, so that they keep their order; None without streams."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or device.type != accelerator.type:
        return None
    return torch.Stream(device=device)


def finish_copies(device: torch.device) -> None:
    """Wait until the host memory holds what the last step stored."""
    stream = copy_stream(device)
    if stream is not None:
        stream.synchronize()


class Fetched:
    """Copies of stored matrices on a device, under way from the moment this is made."""

    def __init__(self, stored: Sequence[QuantizedMatrix], device: torch.device) -> None:
        self._stored = stored
        self._device = device
        self._stream = copy_stream(device)
        with self._copying():
            self._matrices = [
                QuantizedMatrix(
                    matrix.state_format,
                    matrix.shape,
                    {
                        role: tensor.to(device, non_blocking=True, copy=True)
                        for role, tensor in matrix.tensors.items()
                    },
                )
                for matrix in stored
            ]
        self._arrived = None if self._stream is None else self._stream.record_event()

    def matrices(self) -> list[QuantizedMatrix]:
        """The copies; computations from now on wait for them, but the host does not."""
        if self._arrived is not None:
            computations = torch.accelerator.current_stream(self._device)
            computations.wait_event(self._arrived)
            for matrix in self._matrices:
                for tensor in matrix.tensors.values():
                    tensor.record_stream(computations)  # or its memory might be reused too soon
        return self._matrices

    def give_back(self) -> None:
        """Copy what the computations so far have made of the matrices to where they are stored."""
        if self._stream is not None:
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        with self._copying():
            for stored, matrix in zip(self._stored, self._matrices, strict=True):
                for role, tensor in matrix.tensors.items():
                    stored.tensors[role].copy_(tensor, non_blocking=True)

    def _copying(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._stream
