"""The shared library of the CUDA kernels (`csrc/cuda`), loaded by ctypes.

An install with LOWBIT_MUON_CUDA=1 puts it beside the CPU's extension. It is loaded when a tensor
first asks for it, and needs neither torch nor a driver for that. The same library compiled for the
emulation (`csrc/cuda/emulation.hpp`) works on the CPU's memory; only tests load that.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from lowbit_muon.backends.cuda.build import LIBRARY_NAME, VARIABLE

LIBRARY_PATH = Path(__file__).parents[1] / LIBRARY_NAME
HOW_TO_BUILD = f"reinstall with {VARIABLE}=1 where nvcc 12.8 or newer is on the PATH"
# Of the launchers; csrc/cuda/library.cu has the same number.
INTERFACE_VERSION = 2

NUMBER_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATISTICS = {"given": 0, "absmax": 1, "rms": 2}

_CODEBOOK = {"levels": c_void_p, "thresholds": c_void_p, "level_count": c_int}
# Arguments of each launcher, in order, up to the stream that all of them take last.
LAUNCHERS: dict[str, dict[str, type]] = {
    "lowbit_accumulate_rows": {
        "rows": c_int64,
        "columns": c_int,
        "buffer": c_void_p,
        "buffer_stride": c_int64,
        "buffer_weight": c_float,
        "bits": c_int,
        "block": c_int,
        "levels": c_void_p,
        "level_count": c_int,
        "packed": c_void_p,
        "scales": c_void_p,
        "code_weight": c_float,
        "grad": c_void_p,
        "grad_type": c_int,
        "grad_stride": c_int64,
        "grad_weight": c_float,
        "squares": c_void_p,
    },
    "lowbit_update_codes": {
        "rows": c_int64,
        "columns": c_int,
        "bits": c_int,
        "block": c_int,
        **_CODEBOOK,
        "old_packed": c_void_p,
        "old_scales": c_void_p,
        "code_weight": c_float,
        "grad": c_void_p,
        "grad_type": c_int,
        "grad_stride": c_int64,
        "grad_weight": c_float,
        "statistic": c_int,
        "clip": c_float,
        "packed": c_void_p,
        "scales": c_void_p,
        "out": c_void_p,
        "out_type": c_int,
        "out_stride": c_int64,
        "out_value_weight": c_float,
        "out_grad_weight": c_float,
        "squares": c_void_p,
    },
    "lowbit_code_gram": {
        "batch": c_int64,
        "rows": c_int,
        "columns": c_int,
        "bits": c_int,
        "block": c_int,
        "levels": c_void_p,
        "packed": c_void_p,
        "scales": c_void_p,
        "out": c_void_p,
        "tile": c_int,
    },
    "lowbit_code_product": {
        "batch": c_int64,
        "out_rows": c_int,
        "rows": c_int,
        "columns": c_int,
        "bits": c_int,
        "levels": c_void_p,
        "packed": c_void_p,
        "scales": c_void_p,
        "a": c_void_p,
        "a_batch_stride": c_int64,
        "a_row_stride": c_int64,
        "a_column_stride": c_int64,
        "limbs": c_void_p,
        "limb_scales": c_void_p,
        "out": c_void_p,
        "beta": c_float,
    },
    "lowbit_rotate": {
        "rows": c_int64,
        "columns": c_int,
        "x": c_void_p,
        "x_stride": c_int64,
        "inverse": c_int,
    },
    "lowbit_scaled": {
        "batch": c_int64,
        "size": c_int64,
        "x": c_void_p,
        "factor": c_void_p,
        "out": c_void_p,
        "out_type": c_int,
    },
    "lowbit_update_weight": {
        "rows": c_int64,
        "columns": c_int64,
        "weight": c_void_p,
        "weight_type": c_int,
        "weight_row_stride": c_int64,
        "weight_column_stride": c_int64,
        "update": c_void_p,
        "update_type": c_int,
        "update_row_stride": c_int64,
        "update_column_stride": c_int64,
        "decay": c_void_p,
        "step_size": c_void_p,
        "seed": c_void_p,
        "cautious": c_int,
    },
}


class CudaLibrary:
    """The launchers of one shared library. Raises OSError if it does not load, RuntimeError if it
    was built from other sources.

    `emulated` says that it runs on the CPU and takes tensors there.
    """

    def __init__(self, path: Path, *, emulated: bool = False) -> None:
        self.device_type = "cpu" if emulated else "cuda"
        self._library = ctypes.CDLL(str(path))
        version = self._library.lowbit_interface_version()
        if version != INTERFACE_VERSION:
            raise RuntimeError(
                f"{path}: expected a library with interface {INTERFACE_VERSION}, got {version}; "
                f"{HOW_TO_BUILD}"
            )
        self._library.lowbit_error_string.restype = ctypes.c_char_p
        self._functions = {}
        for name, arguments in LAUNCHERS.items():
            function = getattr(self._library, name)
            function.argtypes = [*arguments.values(), c_void_p]
            function.restype = c_int
            self._functions[name] = function

    def call(self, launcher: str, device: torch.device, **arguments: object) -> None:
        """Queue a kernel on the current stream of `device`; absent arguments are 0 or null.

        Raises RuntimeError with CUDA's words if that fails.
        """
        expected = LAUNCHERS[launcher]
        unknown = arguments.keys() - expected.keys()
        if unknown:
            raise TypeError(f"{launcher}: unexpected arguments {sorted(unknown)}")
        ordered = [
            arguments.get(name, None if kind is c_void_p else 0) for name, kind in expected.items()
        ]
        for (name, kind), value in zip(expected.items(), ordered, strict=True):
            if kind is c_int and not -(2**31) <= value < 2**31:  # type: ignore[operator]
                raise ValueError(f"{name}: expected a number of 32 bits, got {value}")
        if self.device_type == "cpu":
            code = self._functions[launcher](*ordered, None)
        else:
            with torch.cuda.device(device):
                stream = torch.cuda.current_stream(device).cuda_stream
                code = self._functions[launcher](*ordered, stream)
        self._check(code, launcher)

    def _check(self, code: int, launcher: str) -> None:
        if code != 0:
            message = self._library.lowbit_error_string(code).decode()
            raise RuntimeError(f"{launcher}: {message} (error {code})")

    def schedule(self, seed: int) -> None:
        """Of an emulated library: the order in which threads take turns; 0 is forwards."""
        self._library.lowbit_emulation_schedule(seed)

    def launch_without_device(self) -> None:
        """Launch an empty kernel on the default stream; raises RuntimeError where none can run."""
        self._check(self._library.lowbit_probe(None), "lowbit_probe")


def unavailable_reason() -> str | None:
    """Why no GPU can use the kernels, or None if one can."""
    if not LIBRARY_PATH.exists():
        return f"the CUDA library is only built on request; {HOW_TO_BUILD}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda is None:
        return "this build of torch is not for CUDA"
    try:
        default_library()
    except (OSError, RuntimeError, AttributeError) as error:
        return f"the CUDA library does not load: {error}"
    return None


@functools.cache
def default_library() -> CudaLibrary:
    """The library that was built with the package."""
    return CudaLibrary(LIBRARY_PATH)
