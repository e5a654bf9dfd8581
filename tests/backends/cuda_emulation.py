"""The CUDA kernels compiled for the CPU (csrc/cuda/emulation.hpp): building and mutating them.

LOWBIT_TEST_EMULATED names a library to test instead of building one: a process in which
AddressSanitizer is preloaded had better not start compilers.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cuda import build as cuda_build
from lowbit_muon.backends.cuda import library as cuda_library
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.backends.cuda.library import CudaLibrary

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc/cuda"
COMPILER = shutil.which("g++") or shutil.which("c++")
GIVEN_LIBRARY = os.environ.get("LOWBIT_TEST_EMULATED")
SANITIZER_FLAGS = ("-fsanitize=address",)


def emulated_library(folder: Path) -> CudaLibrary:
    """The library that is given or, built into `folder`, the one of these sources."""
    path = Path(GIVEN_LIBRARY) if GIVEN_LIBRARY else build(folder)
    return CudaLibrary(path, emulated=True)


def build(folder: Path, sources: Path = SOURCES, flags: tuple[str, ...] = ()) -> Path:
    """An emulated library in `folder`. What did not change is compiled once in a session."""
    headers = "".join(path.read_text() for path in sorted(sources.glob("*.*h*")))
    kept = _object_folder(folder)
    objects = [str(_compile(path, headers, flags, kept)) for path in cuda_build.sources(sources)]
    output = folder / "emulated.so"
    _run([str(COMPILER), "-shared", *flags, "-o", str(output), *objects])
    return output


def _object_folder(folder: Path) -> Path:
    """For all processes of this session of pytest, which keeps and removes it with their others."""
    session = next((p for p in folder.parents if re.fullmatch(r"pytest-\d+", p.name)), folder)
    return session / "emulated-objects"


def _compile(source: Path, headers: str, flags: tuple[str, ...], kept: Path) -> Path:
    """An object file; the texts and flags are what tells it from others."""
    key = repr((source.name, source.read_text(), headers, *flags)).encode()
    target = kept / f"{source.stem}-{hashlib.sha256(key).hexdigest()[:16]}.o"
    kept.mkdir(exist_ok=True)
    with open(target.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes later waits, and finds it
        if not target.exists():
            partial = target.with_suffix(".partial")
            _run(cuda_build.emulation_command(str(COMPILER), source, partial, *flags))
            partial.rename(target)
    return target


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr


def mutated_sources(folder: Path, name: str, before: str, after: str) -> Path:
    """A copy of the sources with one change in one file; what is changed occurs once."""
    copy = folder / "mutated"
    shutil.copytree(SOURCES, copy)
    text = (copy / name).read_text()
    assert text.count(before) == 1, (name, before)
    (copy / name).write_text(text.replace(before, after))
    return copy


def sanitizer_environment(library: Path) -> dict[str, str]:
    """Environment of a Python process that tests a library built with AddressSanitizer."""
    # ASan wraps C++ exceptions only if it finds the C++ library when the process starts.
    names = ("libasan.so", "libstdc++.so")
    commands = [[str(COMPILER), f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(c, capture_output=True, text=True, check=True) for c in commands]
    return {
        **os.environ,
        "LOWBIT_TEST_EMULATED": str(library),
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in found),
        # Python frees little at its end; fibers' frames are no stack that ASan knows.
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> CudaLibrary:
    return emulated_library(tmp_path_factory.mktemp("emulation"))


class OnDevice:
    """A backend for tensors on the CPU that works on copies of them on its device.

    So the tests of the emulation also test a GPU where there is one.
    """

    def __init__(self, backend: CudaBackend, device: torch.device) -> None:
        self._backend, self._device = backend, device

    def __getattr__(self, name: str) -> Callable[..., object]:
        return functools.partial(self._call, getattr(self._backend, name))

    def _call(self, method: Callable[..., object], *args: object, **named: object) -> object:
        copies: list[tuple[Tensor, Tensor]] = []

        def there(value: object) -> object:
            if isinstance(value, (PackedCodes, Terms)):
                fields = dataclasses.fields(value)
                return type(value)(*(there(getattr(value, field.name)) for field in fields))
            if not isinstance(value, Tensor):
                return value
            copies.append((value, value.to(self._device, copy=True)))
            return copies[-1][1]

        def back(value: object) -> object:
            if isinstance(value, tuple):
                return tuple(back(one) for one in value)
            for mine, copy in copies:
                if copy is value:
                    return mine
            return value.cpu() if isinstance(value, Tensor) else value

        result = method(*map(there, args), **{key: there(value) for key, value in named.items()})
        for mine, copy in copies:
            if not torch.equal(copy.cpu(), mine):
                mine.copy_(copy)
        return back(result)


SCHEDULES = {"forwards": 0, "shuffled 1": 1, "shuffled 2": 2, "copies": 0}


@pytest.fixture(params=[*SCHEDULES, "gpu"])
def backend(library: CudaLibrary, request: pytest.FixtureRequest) -> CudaBackend | OnDevice:
    """The emulated kernels in a schedule of their threads, or the kernels on a GPU."""
    if request.param == "gpu":
        reason = cuda_library.unavailable_reason()
        if reason is not None:
            pytest.skip(reason)
        return OnDevice(CudaBackend(), torch.device("cuda"))
    library.schedule(SCHEDULES[request.param])
    emulated = CudaBackend(library)
    return OnDevice(emulated, torch.device("cpu")) if request.param == "copies" else emulated


@pytest.fixture
def forwards(library: CudaLibrary) -> CudaBackend:
    library.schedule(0)
    return CudaBackend(library)
