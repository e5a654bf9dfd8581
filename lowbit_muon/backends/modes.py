"""Settings around a call, of the process and of the thread, that must not change its results."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

_AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def process_setting(
    read: Callable[[], _T], write: Callable[[_T], object], needed: _T
) -> Callable[[], AbstractContextManager[None]]:
    """Makes a context in which a setting of the whole process is what is needed.

    It is changed as long as some thread is in the context, and then put back.
    """
    lock = threading.Lock()
    before: list[_T] = []  # one for each thread that is in the context

    @contextmanager
    def context() -> Iterator[None]:
        with lock:
            before.append(before[0] if before else read())
            if before[0] != needed and len(before) == 1:
                write(needed)
        try:
            yield
        finally:
            with lock:
                value = before.pop()
                if value != needed and not before:
                    write(value)

    return context


def _precision_switches() -> tuple[Any, ...]:
    # torch raises where its old switch (set_float32_matmul_precision) meets these, the new ones.
    return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


def _set_precisions(values: list[str]) -> None:
    for switch, value in zip(_precision_switches(), values, strict=True):
        switch.fp32_precision = value


# torch's products of float32 in float32, whatever the process allows (TF32 or bfloat16). The
# spectral encoder resolves eigenvalues of shift^3; TF32 perturbs a Gram matrix by up to 5e-4.
float32_products = process_setting(
    lambda: [switch.fp32_precision for switch in _precision_switches()],
    _set_precisions,
    ["ieee", "ieee"],
)
_float32_default = process_setting(torch.get_default_dtype, torch.set_default_dtype, torch.float32)


@contextmanager
def plain_modes() -> Iterator[None]:
    """Within, as if no autocast, inference mode, default dtype or default device were set.

    The autocast cache is emptied behind it: it may hold casts of weights that have changed.
    """
    with ExitStack() as stack:
        stack.enter_context(_float32_default())
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        for device_type in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
                stack.callback(torch.clear_autocast_cache)
        # torch.get_default_device() of torch 2.9 fails after set_default_device(None).
        if torch.empty(0).device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def outside_compiled_regions(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method at which a region of torch.compile ends, to go on behind it.

    Kernels are called by pointer, which the compiler cannot follow. `torch.compiler.disable` itself
    imports the compiler, and Triton with it, so it waits for the first call.
    """

    disabled: list[Callable[..., Any]] = []  # (the compiler warns about lru_cache)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args, **kwargs)

    return call
