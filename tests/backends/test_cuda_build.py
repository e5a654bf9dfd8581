"""The CUDA kernels compiled for every architecture: registers, spills, instructions, loading.

cuda_budget.json beside this file holds the registers that a thread of each kernel may take, the
most of all architectures rounded up to the eight in which they are allocated. Raise a number only
knowingly: registers decide how many threads hide the latency of memory.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from cuda_emulation import ROOT, SOURCES
from test_build import run, source_tree

from lowbit_muon.backends.cuda import build as cuda_build
from lowbit_muon.backends.cuda.build import ARCHITECTURES
from lowbit_muon.backends.cuda.library import LAUNCHERS, LIBRARY_PATH, CudaLibrary

__all__ = ["source_tree"]  # a fixture

NVCC = cuda_build.find_nvcc()
BUDGET: dict[str, int] = json.loads(Path(__file__).with_name("cuda_budget.json").read_text())
# Bytes of a frame that are no spills (`nvcc -Xptxas -v` says so), of architectures before 100.
FRAMES = {"update_codes<4>": 32}
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc in CUDA_HOME or on the PATH")
# Nearly all of this file's time is the compiler's: those between the first and the last are left to
# `make fuzz`.
USUAL = ("80", "100")
each_architecture = pytest.mark.parametrize(
    "architecture",
    [
        name if name in USUAL else pytest.param(name, marks=pytest.mark.long)
        for name in ARCHITECTURES
    ],
)

RESOURCES = re.compile(r" Function (\S+):\n\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")


def cuobjdump() -> str | None:
    """CUDA's disassembler, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))


def plain_names(symbols: Sequence[str]) -> list[str]:
    """The kernels and their template arguments, without namespaces and parameters."""
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    names = re.sub(r"lowbit::|\(anonymous namespace\)::|void ", "", done.stdout).splitlines()
    return [name.replace("> >", ">>").rpartition("(")[0] for name in names]


def installed_library() -> Path | None:
    """The one that an install built on request, if no source has changed since."""
    read = [*SOURCES.iterdir(), Path(cuda_build.__file__)]
    newest = max(file.stat().st_mtime for file in read)
    if not LIBRARY_PATH.exists() or LIBRARY_PATH.stat().st_mtime < newest:
        return None
    return LIBRARY_PATH


class Build:
    """The library of the architectures that are tested, and what its machine code takes."""

    def __init__(self, folder: Path) -> None:
        assert NVCC is not None
        self.library = installed_library() or folder / cuda_build.LIBRARY_NAME
        if not self.library.exists():
            chosen = ARCHITECTURES if os.environ.get("FUZZ") else USUAL
            cuda_build.build(NVCC, SOURCES, self.library, chosen)

    @functools.cached_property
    def symbols(self) -> dict[str, dict[str, str]]:
        """Architecture -> kernel -> its symbol."""
        return {
            architecture: dict(zip(plain_names(list(found)), found, strict=True))
            for architecture, found in self.resources.items()
        }

    @functools.cached_property
    def resources(self) -> dict[str, dict[str, tuple[int, int]]]:
        """Architecture -> symbol -> (registers, bytes that a thread has in memory)."""
        command = [str(cuobjdump()), "--dump-resource-usage", str(self.library)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found: dict[str, dict[str, tuple[int, int]]] = {}
        for text in re.split(r"^arch = sm_", done.stdout, flags=re.MULTILINE)[1:]:
            kernels = found.setdefault(text.split()[0], {})
            for symbol, registers, stack, local in RESOURCES.findall(text):
                kernels[symbol] = int(registers), int(stack) + int(local)
        return found


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return Build(tmp_path_factory.mktemp("cuda"))


needs_cuobjdump = pytest.mark.skipif(
    cuobjdump() is None, reason="no cuobjdump, neither of CUDA nor of Triton"
)


@needs_nvcc
@needs_cuobjdump
@each_architecture
def test_registers_and_spills(build: Build, architecture: str) -> None:
    """What does not fit into registers would make the stack frame larger."""
    found = build.symbols[architecture]
    assert found.keys() == BUDGET.keys()
    for name, symbol in found.items():
        registers, in_memory = build.resources[architecture][symbol]
        assert in_memory <= FRAMES.get(name, 0), (name, in_memory)
        assert registers <= BUDGET[name], (name, registers)


@needs_nvcc
def test_no_warnings(tmp_path: Path) -> None:
    """Of the compiler for one architecture; spills show in the resources."""
    for source in cuda_build.sources(SOURCES):
        flags = [*cuda_build.NVCC_FLAGS, "-ptx", f"-arch=compute_{cuda_build.LOWEST}"]
        command = [str(NVCC), *flags, "-o", str(tmp_path / "out.ptx"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr + done.stdout, done.stderr


@needs_nvcc
@needs_cuobjdump
@each_architecture
def test_products_are_made_of_the_intended_instructions(build: Build, architecture: str) -> None:
    """Integer tensor cores, byte permutations, asynchronous copies and matrix loads."""
    products = [
        symbol
        for name, symbol in build.symbols[architecture].items()
        if re.match("code_(gram|prod)", name)
    ]
    assert len(products) == 4
    command = [str(cuobjdump()), "-sass", "-arch", f"sm_{architecture}", "-fun"]
    done = subprocess.run(
        [*command, ",".join(products), str(build.library)],
        capture_output=True,
        text=True,
        check=True,
    )
    functions = re.split(r"Function : ", done.stdout)[1:]
    assert {text.split()[0] for text in functions} == set(products)
    for text in functions:
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


@pytest.mark.parametrize(
    ("wish", "found", "words", "built"),
    [
        ("1", {}, None, True),
        ("1", {"nvcc": False}, "LOWBIT_MUON_CUDA is 1, but nvcc is neither in", False),
        ("1", {"fails": True}, "nvcc failed: nvcc fatal: out of order", False),
        ("0", {"fails": True}, None, False),
        ("", {"fails": True}, None, False),
        ("yes", {}, "LOWBIT_MUON_CUDA: expected 0, 1 or nothing, got 'yes'", False),
    ],
)
def test_when_the_library_is_built(
    source_tree: Path,
    tmp_path: Path,
    wish: str,
    found: dict[str, bool],
    words: str | None,
    built: bool,
) -> None:
    """Only on request, where an error ends the install; else nvcc is not even started."""
    environment = {"PATH": tools(tmp_path, **found), "LOWBIT_MUON_CUDA": wish}
    done = setup(source_tree, "build", **environment)
    if words is None:
        assert done.returncode == 0, done.stdout
        assert "cuda" not in done.stdout.replace("lowbit_muon/backends/cuda", "").lower()
    else:
        assert done.returncode != 0
        assert words in done.stdout
    assert [path.parts[-3:] for path in source_tree.rglob("_cuda.so")] == (
        [LIBRARY_PATH.parts[-3:]] if built else []
    )


@pytest.mark.parametrize("command", [["build"], ["build_ext", "--inplace"]])
def test_an_install_without_the_wish_removes_the_library(
    source_tree: Path, tmp_path: Path, command: list[str]
) -> None:
    """From build/, of which the next wheel is made, and from the folder of an editable install."""
    path = tools(tmp_path)
    for wish, libraries in (("1", 1), ("0", 0), ("1", 1), ("", 0)):
        done = setup(source_tree, *command, PATH=path, LOWBIT_MUON_CUDA=wish)
        assert done.returncode == 0, done.stdout
        assert len(list(source_tree.rglob("_cuda.so"))) == libraries, wish


def setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py without the extension for CPUs."""
    environment |= {"LOWBIT_MUON_NO_EXTENSION": "1", "CUDA_HOME": ""}
    return run(["setup.py", *command], folder, **environment)


def test_build_rules_need_only_the_standard_library() -> None:
    """setup.py loads them where neither torch nor the package is installed."""
    text = (ROOT / "lowbit_muon/backends/cuda/build.py").read_text()
    modules = re.findall(r"^(?:from|import) (\w+)", text, flags=re.MULTILINE)
    assert set(modules) <= set(sys.stdlib_module_names)
