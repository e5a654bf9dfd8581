"""Tests that run in Triton's interpreter: `TRITON_INTERPRET=1 pytest tests/interpreter`.

They need a process of their own, since kernels are compiled or interpreted from their definition
on: without the variable this folder is skipped.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

WANTED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
collect_ignore_glob = [] if WANTED else ["test_*.py"]


def upper_half(values: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, uint16, to nearest and ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16).reshape(values.shape)


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16, uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def repair_interpreter() -> None:
    """Products and casts of bfloat16, which the interpreter keeps as bits and takes for integers;
    and less that is done again and again.

    Integer products go through float64, which holds them exactly and has a fast product in numpy.
    """
    import triton.language as tl
    from triton.runtime import interpreter
    from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        pair = (source.dtype.scalar, target.scalar)
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(upper_half(source.data), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        return cast(self, source, target)

    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        wide = np.float64 if total.dtype.scalar == tl.int32 else np.float32
        left, right = (
            (widened(x.data) if x.dtype.scalar == tl.bfloat16 else x.data).astype(wide)
            for x in (a, b)
        )
        product = np.matmul(left, right).astype(total.data.dtype)
        return TensorHandle(product + total.data, total.dtype.scalar)

    @functools.cache
    def languages(function: Any) -> list[Any]:
        """What a function knows triton.language by."""
        return [value for value in function.__globals__.values() if value is tl or value is tl.core]

    def call_device_function(self: Any, *args: Any, **named: Any) -> Any:
        if any(tl.core.is_builtin(language.arange) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    # The interpreter's operations are in triton.language since the launch, as a rule; looking for
    # all of them again at every call took a fifth of the time.
    InterpretedFunction.__call__ = call_device_function
    # Another third goes into whether integers overflow, of small matrices: `make fuzz` looks.
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow="FUZZ" in os.environ
    )
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = create_dot


if WANTED:
    repair_interpreter()


@pytest.fixture(autouse=True)
def quiet_overflow() -> Iterator[None]:
    """A GPU does not warn of infinities, so numpy need not."""
    with np.errstate(all="ignore"):
        yield
