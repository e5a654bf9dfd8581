"""The optional extension: choosing an ISA level, and building with and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from lowbit_muon.backends.cpu import adapter as cpu

ROOT = Path(__file__).parents[2]
SENTENCE = (
    r"the C\+\+ extension lowbit_muon\.backends\._cpu was not built \(.*{reason}.*\); "
    r"lowbit_muon will use its slower reference backend"
)
needs_extension = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "LOWBIT_MUON_CUDA": "0", **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


@needs_extension
def test_environment_chooses_the_isa_level() -> None:
    program = (
        "from lowbit_muon.backends.cpu import adapter as cpu\n"
        "cpu.CpuBackend()\nprint('level:', cpu.isa())\n"
        "cpu.CpuBackend()\nprint('again:', cpu.isa())"
    )
    done = run(["-c", program], ROOT, LOWBIT_MUON_ISA="baseline")
    assert done.returncode == 0, done.stdout
    assert "level: baseline" in done.stdout
    assert "again: baseline" in done.stdout


@needs_extension
def test_unknown_isa_level_is_refused_even_where_a_fallback_is_allowed() -> None:
    program = (
        "import torch\nfrom lowbit_muon.backends import get_backend\n"
        "get_backend('auto', torch.device('cpu'))"
    )
    done = run(["-c", program], ROOT, LOWBIT_MUON_ISA="avx1024")
    assert done.returncode != 0
    supported = ", ".join(cpu.supported_isas())
    assert (
        "ValueError: LOWBIT_MUON_ISA: ISA level: expected one that this machine supports "
        f"({supported}), got 'avx1024'"
    ) in done.stdout


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, without anything built."""
    tree = tmp_path / "source"
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("csrc", "lowbit_muon"):
        shutil.copytree(ROOT / name, tree / name, ignore=built)
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    (tree / "README.md").touch()
    return tree


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        (
            {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"},
            "a C\\+\\+17 compiler, gcc or clang",
        ),
        ({"CC": "false", "CXX": "false"}, "a C\\+\\+17 compiler, gcc or clang"),
        ({"LOWBIT_MUON_NO_EXTENSION": "1"}, "LOWBIT_MUON_NO_EXTENSION is set"),
    ],
    ids=["no compiler", "broken compiler", "on request"],
)
def test_build_goes_on_without_the_extension(
    source_tree: Path, environment: dict[str, str], reason: str
) -> None:
    done = run(["setup.py", "build"], source_tree, **environment)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(SENTENCE.format(reason=reason), done.stdout)) == 1, done.stdout
    assert not list(source_tree.rglob("*.so"))
    assert list(source_tree.glob("build/**/lowbit_muon/backends/reference.py"))


def test_source_distribution_can_build_the_extension(source_tree: Path) -> None:
    done = run(["setup.py", "sdist"], source_tree)
    assert done.returncode == 0, done.stdout
    (archive,) = (source_tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as files:
        packed = {name.split("/", 1)[-1] for name in files.getnames()}
    needed = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert needed <= packed


def test_isa_specific_sources_use_no_library_code() -> None:
    """An inline function compiled for AVX-512 could be linked into code for older processors."""
    allowed = {"string.h", "immintrin.h", "stddef.h", "stdint.h"}
    sources = list((ROOT / "csrc/cpu/kernels").iterdir())
    assert sources
    for source in sources:
        assert set(re.findall(r"#include <(.*)>", source.read_text())) <= allowed, source
