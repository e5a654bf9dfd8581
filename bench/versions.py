"""Which releases of torch and Triton the package works with: `make versions`.

    python -m bench.versions [--pairs TORCH:TRITON,..] [--tests PATH ..] [--json FILE]
        [--environments FOLDER]

Each pair gets a virtual environment of its own in a temporary folder, and a copy of this checkout
with what is already built in it: nothing is compiled but Triton's kernels. torch is installed
without what it depends on if it can be imported so, as builds for the CPU can; a CUDA build brings
seven gigabytes and takes ten minutes. FOLDER keeps environments, and those in it are used again.
Then, in this order:

import, step, checkpoint: `bench/version_worker.py` in the environment, every preset; a checkpoint
    of this interpreter's torch is read there, and the other way round.
tests: `TESTS`, by pytest, as they are in `make test`.
spills: what `tests/backends/test_triton_compilation.py` says of each kernel and target.

The environment is removed before the next is made. The JSON file is {"machine": ..., "results":
[`Row`, ..]}; rows of pairs that were not asked for stay. The exit status is 0 whatever failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from bench.harness import write_json

ROOT = Path(__file__).parents[1]
WORKER = "bench/version_worker.py"
# The oldest and the newest torch there are for the package, and one between; with the Triton that
# was current then, or later.
PAIRS = ("2.9.1:3.6.0", "2.11.0:3.8.0", "2.14.1:3.9.0")
TESTS = (
    "tests/formats", "tests/linalg", "tests/state", "tests/step", "tests/optimizers",
    "tests/checkpoint", "tests/distributed", "tests/backends/test_reference_backend.py",
    "tests/backends/test_cpu_backend.py", "tests/backends/test_code_products.py",
    "tests/backends/test_without_float64.py", "tests/backends/test_triton_compilation.py",
)  # fmt: skip
# These train SmolLM2, for which more packages are needed.
NOT_RUN = ("tests/distributed/test_finetune_processes.py",)
# What the package and the tests import, and what torch itself does without a GPU.
PACKAGES = ("numpy", "rich", "pytest", "pytest-xdist", "hypothesis", "safetensors", "scipy")
OF_TORCH = ("filelock", "typing-extensions", "sympy", "networkx", "jinja2", "fsspec", "setuptools")
LEFT_OUT = (".git", ".venv", "build", "dist", "runs", "*.egg-info", "__pycache__", ".*_cache")


@dataclass
class Row:
    """One environment."""

    torch: str
    triton: str
    tests: list[str]  # that were run
    # What the environment said of itself; None where it could not be installed or imported.
    torch_found: str | None = None
    torch_muon: str | None = None
    installed: str = ""  # "" or the error
    checkpoint: str = ""  # "" or the error, of the import, the steps and both directions
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: dict[str, str] = field(default_factory=dict)  # test -> first line of its error
    spills: dict[str, int] = field(default_factory=dict)  # "kernel-target" -> instructions or bytes
    seconds: float = 0.0


def run(command: Sequence[str | Path], **others: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **others,
    )


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no output")


def install(folder: Path, torch: str, triton: str) -> Path:
    """A Python with both. Raises RuntimeError with the last words of what failed."""
    python = folder / "bin" / "python"
    if not python.exists():
        run([sys.executable, "-m", "venv", folder], check=True)

    def pip(*arguments: str) -> None:
        done = run([str(python), "-m", "pip", "install", "--quiet", "--no-cache-dir", *arguments])
        if done.returncode != 0:
            raise RuntimeError(last_line(done.stdout))

    pip(*PACKAGES, *OF_TORCH)
    import_torch = [
        str(python),
        "-c",
        f"import torch; assert torch.__version__.startswith({torch!r})",
    ]
    if run(import_torch).returncode != 0:
        pip("--no-deps", f"torch=={torch}")
    if run(import_torch).returncode != 0:
        pip(f"torch=={torch}")
    pip("--no-deps", f"triton=={triton}", "bitsandbytes")
    return python


def environment(tree: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    return {**kept, "PYTHONPATH": str(tree)}


def checkpoints(row: Row, python: Path, tree: Path, folder: Path) -> None:
    """Import, step and checkpoints in both directions."""
    ours, theirs = folder / "ours.pt", folder / "theirs.pt"
    for who, action, path in (
        (sys.executable, "write", ours),
        (python, "write", theirs),
        (python, "read", theirs),
        (python, "read", ours),
        (sys.executable, "read", theirs),
    ):
        done = run([who, "-W", "error", WORKER, action, path], cwd=tree, env=environment(tree))
        if done.returncode != 0:
            row.checkpoint = f"{action}: {last_line(done.stdout)}"
            return
        if who == python:
            found = json.loads(last_line(done.stdout))
            row.torch_found, row.torch_muon = found["torch"], found["torch_muon"]


def tests(row: Row, python: Path, tree: Path, folder: Path, paths: Sequence[str]) -> None:
    report = folder / "report.xml"
    ignored = [f"--ignore={path}" for path in NOT_RUN]
    command = [str(python), "-m", "pytest", "-q", "--numprocesses", "2", "--dist", "loadfile"]
    done = run(
        [*command, *ignored, f"--junitxml={report}", *paths], cwd=tree, env=environment(tree)
    )
    if not report.exists():
        row.failed, row.failures = 1, {"pytest": last_line(done.stdout)}
        return
    read_report(row, ElementTree.parse(report).getroot())


def read_report(row: Row, suites: ElementTree.Element) -> None:
    """Counts, failures and spills of a junit report."""
    for case in suites.iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        wrong = [*case.findall("failure"), *case.findall("error")]
        if wrong:
            row.failed += 1
            row.failures[name] = (wrong[0].get("message") or "").split("\n")[0][:200]
        elif case.find("skipped") is not None:
            row.skipped += 1
        else:
            row.passed += 1
        for prop in case.iter("property"):
            found = re.search(r"\[(.*)\]", name)
            if prop.get("name") == "spills" and found and int(prop.get("value", "0")):
                row.spills[found[1]] = int(prop.get("value", "0"))


def examine(pair: str, paths: Sequence[str], environments: Path | None) -> Row:
    """Everything about one pair."""
    start = time.monotonic()
    torch, triton = pair.split(":")
    row = Row(torch, triton, list(paths))
    with tempfile.TemporaryDirectory(prefix="lowbit_muon_versions") as name:
        folder = Path(name)
        tree = folder / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        try:
            kept = (environments or folder).resolve()
            python = install(kept / pair.replace(":", "-"), row.torch, row.triton)
        except RuntimeError as error:
            row.installed = str(error)
            return row
        checkpoints(row, python, tree, folder)
        tests(row, python, tree, folder, paths)
    row.seconds = round(time.monotonic() - start)
    return row


def parse_pairs(text: str) -> list[str]:
    """Raises SystemExit for what is not TORCH:TRITON, .."""
    pairs = text.split(",")
    for pair in pairs:
        if not re.fullmatch(r"[^:]+:[^:]+", pair):
            raise SystemExit(f"--pairs: expected TORCH:TRITON,.. got {pair!r}")
    return pairs


def in_order(pair: str) -> list[int]:
    """What to sort pairs by: 2.11 comes after 2.9."""
    return [int(number) for number in re.findall(r"\d+", pair)]


def shown(row: Row) -> str:
    words = [f"torch {row.torch}, triton {row.triton}:"]
    if row.installed:
        return " ".join([*words, "not installed:", row.installed])
    words += [f"{row.passed} passed, {row.failed} failed, {row.skipped} skipped;"]
    words += [f"import, step, checkpoint: {row.checkpoint or 'ok'};"]
    words += [f"spills: {row.spills or 'none'}; {row.seconds:.0f} s"]
    lines = [" ".join(words), *(f"  {test}: {why}" for test, why in row.failures.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--pairs", type=parse_pairs, default=list(PAIRS), metavar="TORCH:TRITON,..")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="PATH")
    parser.add_argument("--environments", type=Path, metavar="FOLDER", help="keep them here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here")
    options = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text(encoding="utf-8"))["results"]
        rows = {f"{row['torch']}:{row['triton']}": row for row in found}
    for pair in options.pairs:
        row = examine(pair, options.tests, options.environments)
        print(shown(row), flush=True)
        rows[pair] = asdict(row)
        if options.json:
            write_json(options.json, [rows[key] for key in sorted(rows, key=in_order)])


if __name__ == "__main__":
    main()
