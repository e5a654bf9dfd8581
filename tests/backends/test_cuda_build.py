"""The CUDA kernels compiled for every architecture: registers, spills, instructions, loading.

cuda_budget.json beside this file holds the registers that a thread of each kernel may take, the
most of all architectures rounded up to the eight in which they are allocated. Raise a number only
knowingly: registers decide how many threads hide the latency of memory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_emulation import ROOT, SOURCES
from test_build import run, source_tree

from lowbit_muon.backends.cuda import build as cuda_build
from lowbit_muon.backends.cuda.build import ARCHITECTURES
from lowbit_muon.backends.cuda.library import LAUNCHERS, CudaLibrary

__all__ = ["source_tree"]  # a fixture

NVCC = cuda_build.find_nvcc()
BUDGET: dict[str, int] = json.loads(Path(__file__).with_name("cuda_budget.json").read_text())
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or on the PATH")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)

ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for 'sm_(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers",
    re.DOTALL,
)


def cuobjdump() -> str | None:
    """CUDA's disassembler, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


def plain_name(symbol: str) -> str:
    """The kernel and its template arguments, without namespaces and parameters."""
    done = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True)
    name = re.sub(r"lowbit::|\(anonymous namespace\)::|void ", "", done.stdout.strip())
    return name.replace("> >", ">>").rpartition("(")[0]


class Build:
    """The library of all architectures, and what ptxas said."""

    def __init__(self, folder: Path) -> None:
        assert NVCC is not None
        self.library = folder / cuda_build.LIBRARY_NAME
        command = cuda_build.nvcc_command(NVCC, SOURCES, self.library)
        command[command.index("--threads") + 1] = "1"  # words of two compilers would be mixed
        done = subprocess.run([*command, "-Xptxas", "-v"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.words = done.stderr
        self.kernels: dict[str, dict[str, tuple[int, int]]] = {a: {} for a in ARCHITECTURES}
        for symbol, architecture, _, stores, loads, registers in ENTRY.findall(done.stderr):
            spilled = int(stores) + int(loads)
            self.kernels[architecture][plain_name(symbol)] = (int(registers), spilled)


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("cuda"))


@needs_nvcc
@each_architecture
def test_registers_and_spills(build: Build, architecture: str) -> None:
    found = build.kernels[architecture]
    assert found.keys() == BUDGET.keys()
    for name, (registers, spilled) in found.items():
        assert spilled == 0, (name, spilled)
        assert registers <= BUDGET[name], (name, registers)


@needs_nvcc
def test_no_warnings(build: Build) -> None:
    assert "warning" not in build.words


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump, neither of CUDA nor of Triton")
@each_architecture
def test_products_are_made_of_the_intended_instructions(build: Build, architecture: str) -> None:
    """Integer tensor cores, byte permutations, asynchronous copies and matrix loads."""
    command = [str(cuobjdump()), "-sass", "-arch", f"sm_{architecture}", str(build.library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    functions = re.split(r"Function : ", done.stdout)[1:]
    assert len(functions) == len(BUDGET)
    names = [plain_name(text.split()[0]) for text in functions]
    products = [t for t, n in zip(functions, names, strict=True) if re.match("code_(gram|prod)", n)]
    assert len(products) == 4
    for text in products:
        for instruction in ("IMMA.16832.S8.S8", "PRMT", "LDGSTS", "LDSM.16.M88.4"):
            assert instruction in text, instruction


@needs_nvcc
def test_library_exports_launchers_only(build: Build) -> None:
    command = ["nm", "-D", "--defined-only", str(build.library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in done.stdout.splitlines()}
    others = {"lowbit_interface_version", "lowbit_error_string", "lowbit_probe"}
    assert names == {*LAUNCHERS, *others}


@needs_nvcc
def test_library_loads_without_a_driver(build: Build) -> None:
    """And says in CUDA's words what is missing; where there is a GPU, it runs."""
    library = CudaLibrary(build.library)
    if torch.cuda.is_available():
        library.launch_without_device()
        return
    with pytest.raises(RuntimeError, match=r"lowbit_probe: .*(driver|device).* \(error \d+\)"):
        library.launch_without_device()


def test_another_interface_is_refused(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, library = tmp_path / "old.cpp", tmp_path / "old.so"
    source.write_text('extern "C" int lowbit_interface_version() { return -7; }')
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    with pytest.raises(RuntimeError, match=r"expected a library with interface \d+, got -7; rein"):
        CudaLibrary(library)


# ---- setup.py ----

FAKE_NVCC = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
if {fails}:
    sys.exit("nvcc fatal: out of order")
pathlib.Path(arguments[arguments.index("-o") + 1]).write_text("library")
"""


def tools(folder: Path, *, nvcc: bool = True, fails: bool = False) -> str:
    """A PATH with these programs and none of the same name."""
    programs = folder / "programs"
    programs.mkdir()
    texts = {}
    if nvcc:
        texts["nvcc"] = FAKE_NVCC.format(python=sys.executable, fails=fails)
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    others = [
        place for place in os.environ["PATH"].split(os.pathsep) if not Path(place, "nvcc").exists()
    ]
    return os.pathsep.join([str(programs), *others])


SENTENCE = "the CUDA kernels of lowbit_muon were not built"


@pytest.mark.parametrize(
    ("wish", "found", "status", "words", "built"),
    [
        ("1", {}, 0, None, True),
        ("1", {"nvcc": False}, 1, "LOWBIT_MUON_CUDA is 1, but nvcc is neither in", False),
        ("1", {"fails": True}, 1, "nvcc failed: nvcc fatal: out of order", False),
        ("0", {}, 0, f"{SENTENCE} (LOWBIT_MUON_CUDA is 0)", False),
        ("", {}, 0, None, True),
        ("", {"fails": True}, 0, f"{SENTENCE} (nvcc failed: nvcc fatal", False),
        ("", {"nvcc": False}, 0, None, False),
        ("yes", {}, 1, "LOWBIT_MUON_CUDA: expected 0, 1 or nothing, got 'yes'", False),
    ],
)
def test_when_the_library_is_built(
    source_tree: Path,
    tmp_path: Path,
    wish: str,
    found: dict[str, bool],
    status: int,
    words: str | None,
    built: bool,
) -> None:
    path = tools(tmp_path, **found)
    environment = {"PATH": path, "LOWBIT_MUON_CUDA": wish, "CUDA_HOME": ""}
    done = run(["setup.py", "build"], source_tree, LOWBIT_MUON_NO_EXTENSION="1", **environment)
    assert (done.returncode != 0) == bool(status), done.stdout
    if words is not None:
        assert done.stdout.count(words) >= 1, done.stdout
    else:
        assert SENTENCE not in done.stdout
    assert bool(list(source_tree.glob("build/**/lowbit_muon/backends/_cuda.so"))) == built


def test_build_rules_need_only_the_standard_library() -> None:
    """setup.py loads them where neither torch nor the package is installed."""
    text = (ROOT / "lowbit_muon/backends/cuda/build.py").read_text()
    modules = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert set(modules) <= set(sys.stdlib_module_names)
