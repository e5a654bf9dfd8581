"""The emulator finds what it is for: kernels that are spoilt on purpose must not pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import (
    COMPILER,
    GIVEN_LIBRARY,
    ROOT,
    SANITIZER_FLAGS,
    SOURCES,
    build,
    mutated_sources,
    sanitizer_environment,
)
from test_code_products import random_codes
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.backends.cuda.library import CudaLibrary
from lowbit_muon.formats.codebook import CodeLayout

if COMPILER is None:
    pytest.skip("no C++ compiler", allow_module_level=True)
if GIVEN_LIBRARY:
    pytest.skip("tests one library", allow_module_level=True)

CPU = CpuBackend()
SCHEDULES = range(3)


def gram(backend: CpuBackend | CudaBackend, codes: PackedCodes) -> Tensor:
    return backend.code_gram(codes)


def product(backend: CpuBackend | CudaBackend, codes: PackedCodes) -> Tensor:
    a = torch.arange(140 * codes.packed.shape[0]).view(140, -1).sin()
    return backend.code_product(a, codes)


def rotation(backend: CpuBackend | CudaBackend, codes: PackedCodes) -> Tensor:
    x = codes.scales * torch.arange(600.0)
    backend.rotate(x)
    return x


def quantization(backend: CpuBackend | CudaBackend, codes: PackedCodes) -> Tensor:
    x = codes.scales * torch.arange(600.0).sub(300).roll(100)
    return backend.quantize(x, codes.codebook, CodeLayout(4, 0, "absmax", 1 / 127))[0]


LEVELS_READ = "__syncthreads();  // all copies of the step are there; the levels before are read"
LEVELS_THERE = "__syncthreads();  // the levels are there"
BUFFERS_THERE = "__syncthreads();  // limbs and levels are there; the buffers before are read"
SCALE_THERE = "__syncthreads();  // kept values and the scale are there"
BARRIER_FAULTS = {
    "levels overwritten": ("code_gram.cu", LEVELS_READ, "", gram),
    "levels read too early": ("code_gram.cu", LEVELS_THERE, "", gram),
    "copies not awaited": (
        "code_gram.cu",
        "wait_for_copies<kStages - 2>();",
        "wait_for_copies<kStages - 1>();",
        gram,
    ),
    "limbs or levels read too early": ("code_product.cu", BUFFERS_THERE, "", product),
    "limbs not awaited": (
        "code_product.cu",
        "wait_for_copies<0>();",
        "wait_for_copies<1>();",
        product,
    ),
    "butterflies mixed": (
        "rotation.cu",
        "        }\n    }\n    __syncthreads();",
        "        }\n    }",
        rotation,
    ),
    "scale read too early": ("update.cu", SCALE_THERE, "", quantization),
}


@pytest.mark.parametrize("name", BARRIER_FAULTS)
def test_missing_synchronisation_changes_the_result(tmp_path: Path, name: str) -> None:
    file, before, after, operation = BARRIER_FAULTS[name]
    backend = mutant(tmp_path, file, before, after)
    codes = random_codes(70, 600, 4)
    expected = operation(CPU, codes)
    caught = []
    for schedule in SCHEDULES:
        backend._library.schedule(schedule)
        caught.append(not torch.equal(operation(backend, codes), expected))
    assert any(caught)


def mutant(folder: Path, file: str, before: str, after: str) -> CudaBackend:
    """A backend over sources with one fault."""
    library = build(folder, mutated_sources(folder, file, before, after))
    return CudaBackend(CudaLibrary(library, emulated=True))


def test_divergent_barriers_are_errors(tmp_path: Path) -> None:
    backend = mutant(
        tmp_path, "code_gram.cu", LEVELS_THERE, f"if (threadIdx.x < 64) {LEVELS_THERE}"
    )
    with pytest.raises(RuntimeError, match="threads diverged at a barrier of their block"):
        backend.code_gram(random_codes(70, 600, 4))


def test_a_shuffle_that_lanes_skip_is_an_error(tmp_path: Path) -> None:
    before = "value = combine(value, __shfl_xor_sync(kAllLanes, value, lanes));"
    backend = mutant(tmp_path, "rows.cuh", before, f"if (threadIdx.x % 32 != 3) {before}")
    with pytest.raises(RuntimeError, match="threads diverged at a barrier of their warp"):
        backend.accumulate(torch.ones(2, 600), Terms())


def test_unaligned_copies_are_errors(tmp_path: Path) -> None:
    before = "places % 16 == 0 ? 16 :"
    backend = mutant(tmp_path, "code_gram.cu", before, "places % 16 != 0 ? 16 :")
    with pytest.raises(RuntimeError, match="an asynchronous copy is not aligned"):
        backend.code_gram(random_codes(70, 601, 4))


def run_sanitized(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT / "tests" / "backends",
        env=sanitizer_environment(library),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


# Each library in a child, since a fault ends it: one import of torch, which is slow under the
# sanitizer, serves all.
FAULT_PROGRAM = """
import os
import sys
import torch
from pathlib import Path
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.backends.cuda.library import CudaLibrary
from lowbit_muon.formats.codebook import CodeLayout, nearest_codebook
torch.set_num_threads(1)
for path in sys.argv[1:]:
    if os.fork():
        os.wait()
        continue
    report = os.open(path + ".report", os.O_WRONLY | os.O_CREAT)
    os.dup2(report, 1)
    os.dup2(report, 2)
    backend = CudaBackend(CudaLibrary(Path(path), emulated=True))
    codebook = nearest_codebook([-1.0, 1.0])
    backend.quantize(torch.ones(1, 33), codebook, CodeLayout(4, 0, "rms", 1.0))
    backend.rotate(torch.ones(1, 65))
    os.write(1, b"done")
    os._exit(0)
"""
OVERFLOWS = {
    "one byte of codes": ("update.cu", "update.packed + row", "update.packed + 1 + row"),
    "one float of shared memory": (
        "rotation.cu",
        "(columns + columns / 32) * sizeof",
        "(columns + columns / 32 - 1) * sizeof",
    ),
}


@pytest.mark.long
def test_address_sanitizer_sees_overflows(tmp_path: Path) -> None:
    libraries = {}
    for name, change in {"none": None, **OVERFLOWS}.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        sources = mutated_sources(folder, *change) if change else SOURCES
        libraries[name] = build(folder, sources, SANITIZER_FLAGS)
    done = run_sanitized(libraries["none"], "-c", FAULT_PROGRAM, *map(str, libraries.values()))
    assert done.returncode == 0, done.stdout
    for name, library in libraries.items():
        report = library.with_name(library.name + ".report").read_text()
        assert ("heap-buffer-overflow" in report) == (name != "none"), (name, report)
        assert ("done" in report) == (name == "none"), (name, report)


def test_all_kernels_under_address_sanitizer(tmp_path: Path) -> None:
    library = build(tmp_path, flags=SANITIZER_FLAGS)
    chosen = "forwards and not presets and not half_precision and not every_byte"
    files = ["test_cuda_emulation.py", "test_cuda_emulation_products.py"]
    arguments = ["-m", "pytest", "-q", "-x", *files, "-k", chosen]
    done = run_sanitized(library, *arguments)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "100%" in done.stdout


def test_nothing_emulated_is_offered_to_users() -> None:
    from lowbit_muon import backends

    for name in backends.BACKEND_NAMES:
        assert "emul" not in name
    with pytest.raises((RuntimeError, ValueError)):
        backends.get_backend("cuda", torch.device("cpu"))
