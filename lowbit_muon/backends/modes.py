"""Settings around a call, of the process and of the thread, that must not change its results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch

_T = TypeVar("_T")

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


class ProcessSetting(Generic[_T]):
    """A setting of the whole process: changed as long as some thread needs it, then put back."""

    def __init__(self, read: Callable[[], _T], write: Callable[[_T], object], needed: _T) -> None:
        self._read, self._write, self._needed = read, write, needed
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._before = self._read()
                if self._before != self._needed:
                    self._write(self._needed)
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users and self._before != self._needed:
                self._write(self._before)


def _precision_switches() -> tuple[Any, ...]:
    # torch raises where its old switch (set_float32_matmul_precision) meets these, the new ones.
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _set_precisions(values: list[str]) -> None:
    for switch, value in zip(_precision_switches(), values, strict=True):
        switch.fp32_precision = value


# torch's products of float32 in float32, whatever the process allows (TF32 or bfloat16). The
# spectral encoder resolves eigenvalues of shift^3; TF32 perturbs a Gram matrix by up to 5e-4.
float32_products = ProcessSetting(
    lambda: [switch.fp32_precision for switch in _precision_switches()],
    _set_precisions,
    ["ieee", "ieee"],
)
_float32_default = ProcessSetting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Within, as if no autocast, inference mode, default dtype or default device were set.

    The autocast cache is emptied behind it: it may hold casts of weights that have changed.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32_default)
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
                stack.callback(torch.clear_autocast_cache)
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield
