"""Which optimizers fit: full fine-tuning of SmolLM2-135M under limits of the address space.

    python -m bench.memory_limits [--quick] [--limits GIB ...] [--steps N] [--json FILE]

Each run is a process of its own, one thread, with RLIMIT_AS as `ulimit -v` sets it: allocations
beyond it fail. A run completes if all its steps do. Reported are its largest resident size, the
optimizer's state, and the most gradients that were alive at once. Ours keeps the embedding's AdamW
in 8 bits; the usual Muon beside it is fp32 Muon with torch.optim.AdamW.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.harness import write_json
from lowbit_muon.tools.console import MIB
from lowbit_muon.tools.finetune.report import peak_memory_bytes
from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.finetune.training import FinetuneRun

GIB = 2**30
UNLIMITED = 0
LIMITS = [16.0, 8.0, 4.0, 3.0]
# name -> settings of the fine-tune
RUNS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "AdamW, 8 bits": {"optimizer": "adamw8bit"},
    "fp32 Muon": {"format": "fp32", "aux_adam": "adamw"},
    "spectral4": {"format": "spectral4"},
    "fp32 Muon, gradient release": {
        "format": "fp32", "aux_adam": "adamw", "gradient_release": True,
    },
    "spectral4, gradient release": {"format": "spectral4", "gradient_release": True},
    "spectral2, gradient release": {"format": "spectral2", "gradient_release": True},
}  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="fine-tuning under limits of the address space")
    parser.add_argument("--quick", action="store_true", help="a tiny model, no limits, one step")
    parser.add_argument("--limits", type=float, nargs="*", default=LIMITS, help="GiB")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(run_here(**json.loads(options.child))))
        return
    if options.quick:
        options.limits, options.steps, options.model = [], 1, "tiny"
    console = Console()
    rows = []
    for name in track(RUNS, "optimizers", console=console):
        rows += ladder(name, options.limits, options.steps, options.model)
    show(rows, console)
    if options.json:
        write_json(options.json, {"steps": options.steps, "model": options.model, "rows": rows})


def ladder(name: str, limits: list[float], steps: int, model: str) -> list[dict[str, Any]]:
    """Rows without a limit and with each, smallest first; what fits in one fits in larger ones."""
    rows = [run_in_process(name, UNLIMITED, steps, model)]
    for limit in sorted(limits):
        if any(row["limit_gib"] and row["completed"] for row in rows):
            rows.append({"name": name, "limit_gib": limit, "completed": True, "implied": True})
        else:
            rows.append(run_in_process(name, limit, steps, model))
    return rows


def run_in_process(name: str, limit_gib: float, steps: int, model: str) -> dict[str, Any]:
    """One row: the run's figures, or the last line of what it had to say."""
    case = {"name": name, "limit_gib": limit_gib, "steps": steps, "model": model}
    child = subprocess.run(
        [sys.executable, "-m", "bench.memory_limits", "--child", json.dumps(case)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    row = {"name": name, "limit_gib": limit_gib, "completed": child.returncode == 0}
    if child.returncode == 0:
        return {**row, **json.loads(child.stdout.splitlines()[-1])}
    lines = child.stderr.strip().splitlines() or [f"signal {-child.returncode}"]
    return {**row, "reason": lines[-1][:200]}


def run_here(name: str, limit_gib: float, steps: int, model: str) -> dict[str, Any]:
    """Fine-tune in this process; returns its figures in bytes."""
    if limit_gib:
        size = int(limit_gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
    settings = FinetuneSettings(
        model=model, steps=steps, eval_before=False, sample_tokens=0, save_every=0, threads=1,
        held_out_tokens=1024, tokens_per_step=256, **RUNS[name],
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneRun(settings, Path(folder), Console(quiet=True))
        watch = GradientWatch(run)
        losses = [run.step() for _ in range(steps)]
    return {
        "peak_resident_bytes": peak_memory_bytes(),
        "peak_address_space_bytes": peak_address_space(),
        "state_bytes": run.optimizer.state_bytes(),
        "gradient_bytes": watch.most,
        "weight_bytes": sum(p.nbytes for p in run.model.parameters()),
        "last_loss": losses[-1],
    }


def peak_address_space() -> int | None:
    """Most of the address space that this process had, bytes; None where nothing says so."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmPeak:"))
    return int(line.split()[1]) * 1024


class GradientWatch:
    """The most bytes of gradients alive at once, looked at whenever one is complete."""

    def __init__(self, run: FinetuneRun) -> None:
        self.most = 0
        self._parameters = list(run.model.parameters())
        for parameter in self._parameters:
            parameter.register_post_accumulate_grad_hook(self._look)

    def _look(self, ready: Tensor) -> None:
        # A gradient that was released a moment ago counts: it was there.
        alive = [p for p in self._parameters if p.grad is not None or p is ready]
        self.most = max(self.most, sum(parameter.nbytes for parameter in alive))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A row for each optimizer: bytes without a limit, then whether it completes under each."""
    limits = sorted({row["limit_gib"] for row in rows if row["limit_gib"]}, reverse=True)
    table = Table(title=f"full fine-tune, torch {torch.__version__}, MiB")
    for heading in ("optimizer", "state", "gradients", "peak resident"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for limit in limits:
        table.add_column(f"{limit:g} GiB", justify="right")
    for name in RUNS:
        of_name = {row["limit_gib"]: row for row in rows if row["name"] == name}
        free = of_name[UNLIMITED]
        figures = ("state_bytes", "gradient_bytes", "peak_resident_bytes")
        table.add_row(
            name,
            *(f"{free[figure] / MIB:,.0f}" if figure in free else "" for figure in figures),
            *("completes" if of_name[limit]["completed"] else "fails" for limit in limits),
        )
    console.print(table)


if __name__ == "__main__":
    main()
