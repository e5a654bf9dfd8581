"""Install each file of dist/ into an empty environment and use it: check.py dist/*.

A wheel takes the Python of its tag. A source distribution also runs a part of its own tests from
an empty folder, against the package that was built from it.
"""

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ONE_STEP = Path(__file__).resolve().with_name("one_step.py")
CONSTRAINTS = ONE_STEP.parents[2] / ".ci" / "constraints.txt"
# As in the README: what the package needs comes by itself, what its tests need does not.
TEST_PACKAGES = (
    "hypothesis", "numpy", "pybind11", "pytest", "pyyaml", "rich", "safetensors", "scipy",
)  # fmt: skip
TESTS = ("formats", "linalg", "state", "step", "checkpoint", "packaging", "test_layering.py")


def interpreter(file: Path) -> str:
    """The Python that a file is for."""
    tag = re.search(r"-cp3(\d+)-", file.name)
    return sys.executable if tag is None else f"python3.{tag[1]}"


def pinned(package: str) -> str:
    """The package in the version that is developed with."""
    versions = CONSTRAINTS.read_text(encoding="utf-8")
    found = re.search(rf"^{package}==\S+$", versions, re.MULTILINE | re.IGNORECASE)
    assert found is not None, package
    return found[0]


def check(file: Path, folder: Path) -> None:
    """Install and step once; `folder` is empty."""
    environment = folder / "environment"
    subprocess.run([interpreter(file), "-m", "venv", environment], check=True)
    python = environment / "bin" / "python"

    def install(*packages: str) -> None:
        pip = [python, "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(pip, check=True, cwd=folder)

    # (other pins are for one Python alone; a newer torch is the business of bench.versions)
    install(str(file.resolve()), pinned("torch"))
    subprocess.run([python, ONE_STEP], check=True, cwd=folder)
    if file.name.endswith(".tar.gz"):
        install(*map(pinned, TEST_PACKAGES))
        with tarfile.open(file) as archive:
            archive.extractall(folder, filter="data")
        (unpacked,) = (path.parent for path in folder.glob("*/PKG-INFO"))
        # Of what lies beside the tests only `bench` is imported: the package is the installed one.
        beside = folder / "beside"
        beside.mkdir()
        (beside / "bench").symlink_to(unpacked / "bench")
        pytest = [environment / "bin" / "pytest", *(f"tests/{name}" for name in TESTS)]
        variables = {**os.environ, "PYTHONPATH": str(beside)}
        subprocess.run(pytest, check=True, cwd=unpacked, env=variables)


def main() -> None:
    for file in map(Path, sys.argv[1:]):
        print(f"{file}:", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            check(file, Path(folder))


if __name__ == "__main__":
    main()
