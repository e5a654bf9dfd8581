"""Methods that regions of torch.compile leave out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


def outside_compiled_regions(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method at which a region of torch.compile ends, to go on behind it.

    Kernels are called by pointer, which the compiler cannot follow. `torch.compiler.disable` itself
    imports the compiler, and Triton with it, so it waits for the first call.
    """

    @functools.lru_cache(maxsize=1)
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs)

    return call
