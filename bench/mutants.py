"""Small faults on purpose: which test finds each.

    python -m bench.mutants [--only WORD] [--json FILE]

Each of `FAULTS` is made alone in a copy of this checkout, with what is built in it, and the tests
that should know of it run there until one fails. A fault whose old text is not found exactly once
is "gone": the source has changed, and the row has to. The exit status is 1 if any survived or is
gone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness import write_json
from bench.versions import LEFT_OUT

ROOT = Path(__file__).parents[1]
TIMEOUT = 600  # seconds: a fault may make a test wait for ever

STEP = ("tests/step/test_update.py", "tests/optimizers/test_muon.py", "tests/step")
ROUNDING = ("tests/state/test_rounding.py", "tests/step")
CODEC = ("tests/state", "tests/backends/test_reference_backend.py")
SHARED = ("tests/distributed/test_sharing.py", "tests/distributed/test_unusual.py")
CHECKPOINT = ("tests/checkpoint",)


@dataclass(frozen=True)
class Fault:
    """A text that occurs once in a file of the package, what it becomes, and who should notice."""

    file: str  # below lowbit_muon/
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    # ---- The step ----
    Fault("step/update.py", "max(1.0, rows / columns)", "max(1.0, columns / rows)", STEP),
    Fault("step/update.py", "0.2 * math.sqrt(max(rows", "0.2 * math.sqrt(min(rows", STEP),
    Fault("step/update.py", "grad_weight=1 - rule.momentum)", "grad_weight=1.0)", STEP),
    Fault("step/update.py", "squares <= LARGEST_NORM**2", "squares < math.inf", STEP),
    Fault("step/update.py", "x_norm.clamp_min(rule.eps)", "x_norm.add(rule.eps)", STEP),
    Fault("step/update.py", "len(steps) > 1 and lift >=", "len(steps) > 1 and 2 * lift >=", STEP),
    Fault("step/update.py", 'Panels) and rule.ns_input == "exact"', "Panels) and False", STEP),
    Fault("step/batches.py", "if item.counts and is_accepted:", "if item.counts:", STEP),
    Fault("step/batches.py", "        counts = False\n", "        counts = True\n", STEP),
    Fault("state/rounding.py", "step * 0x9E3779B1", "step * 0", ROUNDING),
    Fault("state/rounding.py", "matrix * 0x27D4EB2F", "matrix * 0", ROUNDING),
    Fault("state/rounding.py", "clamp_(-127, 127)", "clamp_(-128, 126)", ROUNDING),
    # ---- Codecs ----
    Fault("state/codecs/coded.py", "scales >= SMALLEST_SCALE,", "scales > -1,", CODEC),
    Fault("state/codecs/spectral.py", 'blank("noise").zero_()', 'blank("noise")', CODEC),
    Fault("state/codecs/coded.py", "norm >= SMALLEST_NORM, norm", "norm >= 0, norm", CODEC),
    Fault("state/codecs/coded.py", "codes.scales.clone(), self", "codes.scales, self", STEP),
    Fault(
        "state/codecs/low_rank.py", "products if self.is_wide else products[::-1]", "products",
        CODEC,
    ),
    Fault("backends/packing.py", "remaining -= count", "remaining -= 0", CODEC),
    # ---- Several processes ----
    Fault(
        "distributed/ownership.py", "(-costs[index], index)", "(costs[index], index)",
        ("tests/distributed/test_exchange.py",),
    ),
    Fault(
        "distributed/exchange.py", "largest / _INT8_MAX", "largest / 100",
        ("tests/distributed/test_exchange.py",),
    ),
    Fault("distributed/exchange.py", "(sum(sizes) - sizes[self.process])", "sum(sizes)", SHARED),
    Fault(
        "distributed/agreement.py", "is_usable(grad, parts=group.size())", "is_usable(grad)",
        ("tests/distributed/test_faults.py", *SHARED),
    ),
    Fault(
        "distributed/state_dicts.py", "device, copy=True)  # ours", "device)  # ours",
        ("tests/distributed/test_distributed_checkpoint.py", *SHARED),
    ),
    # ---- Checkpoints ----
    Fault("checkpoint/momentum.py", 'momentum * (1 - group["momentum"])', "momentum", CHECKPOINT),
    Fault("checkpoint/momentum.py", "if largest >= len(book", "if largest > len(book", CHECKPOINT),
    Fault("checkpoint/momentum.py", "(1 - decay) * norm\n", "norm\n", CHECKPOINT),
    Fault("checkpoint/adam.py", "(second < 0).any()", "(second < 0).all()", CHECKPOINT),
    Fault("checkpoint/dicts.py", "1 <= version <= FORMAT_VERSION", "1 <= version", CHECKPOINT),
    Fault("checkpoint/dicts.py", "shapes[i], reverse=True)", "shapes[i])", CHECKPOINT),
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What came of a fault."""

    file: str
    old: str
    new: str
    killed_by: str | None  # the test, or "no end within .. seconds"
    status: str  # "killed", "survived" or "gone"


def tried(fault: Fault, tree: Path) -> Outcome:
    """The fault made in the tree, its tests run, and undone."""
    path = tree / "lowbit_muon" / fault.file
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if text.count(fault.old) != 1:
        return Outcome(fault.file, fault.old, fault.new, None, "gone")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        killed_by = first_failure(fault.tests, tree)
    finally:
        path.write_text(text, encoding="utf-8")
    status = "survived" if killed_by is None else "killed"
    return Outcome(fault.file, fault.old, fault.new, killed_by, status)


def first_failure(tests: Sequence[str], tree: Path) -> str | None:
    """The first test that fails, None if all pass. Raises RuntimeError where none was run."""
    # No bytecode: two changes of one second and length would look the same.
    options = ("-B", "-m", "pytest", "-x", "-q", "--no-header", "-rfE", "-p", "no:cacheprovider")
    try:
        done = subprocess.run(
            [sys.executable, *options, *dict.fromkeys(tests)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return f"no end within {TIMEOUT} seconds"
    if done.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", done.stdout, flags=re.MULTILINE)
    if done.returncode not in (1, 2) or failed is None:
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}")
    return failed[1]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="faults with it in file or text")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here")
    options = parser.parse_args(arguments)
    chosen = [f for f in FAULTS if options.only in f.file or options.only in f.old]
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="lowbit_muon_mutants") as name:
        tree = Path(name) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
        for fault in chosen:
            outcomes.append(tried(fault, tree))
            found = outcomes[-1]
            by = f" by {found.killed_by}" if found.killed_by else ""
            print(f"{found.status}{by}: {fault.file}: {fault.old!r} -> {fault.new!r}", flush=True)
            if options.json:
                write_json(options.json, [asdict(each) for each in outcomes])
    counts = {
        kind: sum(o.status == kind for o in outcomes) for kind in ("killed", "survived", "gone")
    }
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if counts["survived"] or counts["gone"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
