"""How `csrc/cuda` is compiled: by nvcc for GPUs, and by a C++ compiler for the emulation.

`setup.py` loads this file by its path, before the package or torch is there, and tests import it:
only the standard library may be imported here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

LIBRARY_NAME = "_cuda.so"
# 1 builds the kernels, and the install fails where that fails; 0 or nothing leaves them out. They
# take minutes to compile, and Triton's do the same work.
VARIABLE = "LOWBIT_MUON_CUDA"

# A100; RTX 30; RTX 40 and L4; H100 and H200 (no instruction of sm_90a is used); B200. Others from
# sm_80 on, RTX 50 among them, translate the PTX of the lowest when they first load it.
ARCHITECTURES = ("80", "86", "89", "90", "100")
LOWEST = ARCHITECTURES[0]

NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    # Plain constexpr functions are called on both sides.
    "--expt-relaxed-constexpr",
    # No product is fused with a sum, and division and roots round correctly: the reference's bits.
    *("-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"),
    *("-Xcompiler", "-fPIC,-Wall,-Wextra"),
)
# The static runtime's symbols stay inside, so that they and torch's own are never mixed.
LINK_FLAGS = ("-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL")

EMULATION_FLAGS = (
    "-std=c++17",
    "-O1",
    "-fPIC",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",  # unroll
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # device code reads floats as words
    # Frames of fibers are not calls of each other; shadow stacks would not follow.
    "-fcf-protection=none",
    "-fno-gnu-unique",  # two libraries in a process are two machines
)


def sources(folder: Path) -> list[Path]:
    """The translation units in csrc/cuda."""
    return sorted(folder.glob("*.cu"))


def find_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """nvcc of CUDA_HOME, else of the PATH."""
    home = environment.get("CUDA_HOME")
    if home and (candidate := shutil.which("nvcc", path=str(Path(home, "bin")))):
        return candidate
    return shutil.which("nvcc", path=environment.get("PATH"))


def requested_nvcc(environment: Mapping[str, str] = os.environ) -> str | None:
    """What is to build the kernels, or None if nobody asks for them.

    Raises RuntimeError if somebody does and there is no nvcc, or for a value that means nothing.
    """
    wish = environment.get(VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise RuntimeError(f"{VARIABLE}: expected 0, 1 or nothing, got {wish!r}")
    if wish != "1":
        return None
    nvcc = find_nvcc(environment)
    if nvcc is None:
        raise RuntimeError(f"{VARIABLE} is 1, but nvcc is neither in CUDA_HOME nor on the PATH")
    return nvcc


def architecture_flags(architectures: Sequence[str] = ARCHITECTURES) -> list[str]:
    """Machine code for each architecture, and PTX of the lowest for those that are not named."""
    flags = []
    for name in architectures:
        code = f"[sm_{name},compute_{name}]" if name == LOWEST else f"sm_{name}"
        flags += ["-gencode", f"arch=compute_{name},code={code}"]
    return flags


def nvcc_command(
    nvcc: str, folder: Path, output: Path, architectures: Sequence[str] = ARCHITECTURES
) -> list[str]:
    """Compiles and links the library; as many compilations at once as there are processors."""
    return [
        nvcc,
        *NVCC_FLAGS,
        *LINK_FLAGS,
        *architecture_flags(architectures),
        *("--threads", "0"),
        *("-o", str(output)),
        *map(str, sources(folder)),
    ]


def emulation_command(compiler: str, source: Path, output: Path, *flags: str) -> list[str]:
    """Compiles one translation unit for the emulation."""
    return [compiler, *EMULATION_FLAGS, *flags, "-c", "-o", str(output), "-x", "c++", str(source)]


def build(
    nvcc: str, folder: Path, output: Path, architectures: Sequence[str] = ARCHITECTURES
) -> None:
    """Builds the library. Raises RuntimeError with the compiler's words."""
    output.parent.mkdir(parents=True, exist_ok=True)
    command = nvcc_command(nvcc, folder, output, architectures)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError("nvcc failed: " + (words[0] if words else f"status {done.returncode}"))
