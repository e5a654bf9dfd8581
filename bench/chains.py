"""Multiply-adds in registers at a level of the C++ kernels: compiles and calls csrc/peaks.cpp.

It takes the instructions of the level's matrix products and touches no memory, so its time gives
their peak. The library lands in build/bench and is compiled again when a source is newer.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import torch

from lowbit_muon.backends.cpu import adapter as cpu

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "bench/csrc/peaks.cpp"
KERNELS = ROOT / "csrc/cpu/kernels"
LIBRARIES = ROOT / "build/bench"
WORDS = ("float32", "int16", "int8", "bfloat16")  # in the order of WordType in interface.hpp
MOST_ITERATIONS = 2**24  # beyond, sums of floats would no longer grow


def multiply_adds(isa: str, word: str, iterations: int) -> int:
    """Multiplies and adds on as many threads as torch uses; how many products it was.

    isa: a level that this machine supports; word: "float32", "int16", or, only where the level has
    products of them, "int8" or "bfloat16"; iterations: rounds, at most MOST_ITERATIONS. Raises
    ValueError naming the argument, and RuntimeError where there is no compiler.
    """
    if word not in WORDS:
        raise ValueError(f"word: expected one of {WORDS}, got {word!r}")
    supported = cpu.supported_isas()  # (which asks the system for AMX's registers)
    if isa not in supported:
        raise ValueError(f"isa: expected one of {supported}, got {isa!r}")
    if not 1 <= iterations <= MOST_ITERATIONS:
        raise ValueError(f"iterations: expected 1 to {MOST_ITERATIONS}, got {iterations}")
    products = int(
        _library(isa).multiply_adds(WORDS.index(word), iterations, torch.get_num_threads())
    )
    if not products:
        raise ValueError(
            f"word: expected 'float32' or 'int16', as level {isa!r} has no products of {word}"
        )
    return products


@functools.cache
def _library(isa: str) -> ctypes.CDLL:
    path = LIBRARIES / f"peaks_{isa}.so"
    sources = [SOURCE, ROOT / "setup.py", *KERNELS.iterdir()]
    newest = max(source.stat().st_mtime for source in sources)
    if not path.exists() or path.stat().st_mtime < newest:
        _compile(isa, path)
    library = ctypes.CDLL(str(path))
    library.multiply_adds.restype = ctypes.c_double
    library.multiply_adds.argtypes = [ctypes.c_int, ctypes.c_size_t, ctypes.c_int]
    return library


def _compile(isa: str, path: Path) -> None:
    rules = _build_rules()
    levels = {**rules.X86_LEVELS, **rules.BF16_LEVEL, **rules.AMX_LEVEL}
    lanes = {"baseline": "generic", "avx2": "avx2"}.get(isa, "avx512")
    temporary = path.with_suffix(f".{os.getpid()}")
    command = [
        *_compiler(),
        *rules.FLAGS,
        rules.OPENMP_FLAG,
        *levels.get(isa, []),
        f'-DLOWBIT_LANES_FILE="lanes_{lanes}.inl"',
        f"-I{KERNELS}",
        "-fPIC",
        "-shared",
        str(SOURCE),
        "-o",
        str(temporary),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[0]} does not compile {SOURCE.name}: {done.stderr}")
    temporary.replace(path)


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    for command in [wanted] if wanted else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]) is not None:
            return command
    raise RuntimeError("peaks in registers need a C++17 compiler, gcc or clang (or CXX)")


def _build_rules() -> ModuleType:
    """setup.py, for the flags that the kernels are compiled with."""
    spec = importlib.util.spec_from_file_location("lowbit_muon_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
