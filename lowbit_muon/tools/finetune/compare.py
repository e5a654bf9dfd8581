"""Several methods from the same start and data order, each in a process of its own.

A process for each run makes its peak memory its own, and one that fails leaves the others alone.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit_muon.tools.console import show_table
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore
from lowbit_muon.tools.finetune.report import comparison_table, plot_losses
from lowbit_muon.tools.finetune.settings import FREE_ON_RESUME, FinetuneSettings
from lowbit_muon.tools.finetune.training import read_result
from lowbit_muon.tools.output import write_json


def compare(
    methods: Sequence[str],
    seeds: int,
    settings: FinetuneSettings,
    folder: Path,
    console: Console,
    *,
    wide: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Train every method with seeds `settings.seed`, +1, ...; returns the results of each.

    Runs that `folder` already holds with the same settings are not repeated, so an interrupted
    comparison continues. Leaves `compare.json`, `loss.png` and `loss.svg` there and prints a table.
    Raises UserError if a run failed, after all the others.
    """
    plans = [
        dataclasses.replace(settings.with_method(method), seed=seed)
        # Seed by seed, so that an early stop leaves a table of all methods.
        for seed in range(settings.seed, settings.seed + seeds)
        for method in methods
    ]
    # The start is the same for all, so it is evaluated once.
    plans[1:] = [dataclasses.replace(plan, eval_before=False) for plan in plans[1:]]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
    failed = []
    for plan in plans:
        run_folder = folder / f"{plan.method}-seed{plan.seed}"
        result = _finished(plan, run_folder) or _train(plan, run_folder, console)
        if result is None:
            failed.append(f"{plan.method} with seed {plan.seed}")
            continue
        runs[plan.method].append(result)
        write_json(folder / "compare.json", runs, "--out")
    done = {method: results for method, results in runs.items() if results}
    if done:
        plot_losses(folder, done, console)
        show_table(console, comparison_table(done, wide=wide), wide=wide)
        console.print(f"written to {folder}")
    if failed:
        raise UserError(f"failed: {', '.join(failed)} (see above); the same command retries")
    return done


def _finished(plan: FinetuneSettings, folder: Path) -> dict[str, Any] | None:
    result = read_result(folder)
    if result is None:
        return None
    differing = [
        name
        for name, value in dataclasses.asdict(plan).items()
        if name not in FREE_ON_RESUME and result["settings"].get(name) != value
    ]
    if not differing:
        return result
    raise UserError(
        f"--out: {folder} holds a run with other settings ({', '.join(differing)}); "
        "choose another folder"
    )


def _train(plan: FinetuneSettings, folder: Path, console: Console) -> dict[str, Any] | None:
    command = [
        *(sys.executable, "-m", "lowbit_muon.tools.cli", "finetune", f"--out={folder}"),
        *plan.to_arguments(),
    ]
    if CheckpointStore(folder / "checkpoints").checkpoints():
        command.append("--resume")
    console.rule(folder.name)
    if subprocess.run(command, check=False).returncode != 0:
        return None
    return read_result(folder)
