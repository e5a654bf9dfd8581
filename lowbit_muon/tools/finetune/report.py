"""What a run leaves behind: JSON, plots, the table of a comparison; and its peak memory."""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowbit_muon.tools.console import MIB, Column, make_table
from lowbit_muon.tools.finetune.settings import FORMATS_WITHOUT_NESTEROV
from lowbit_muon.tools.output import write_plot

PLOTS = ("loss.png", "loss.svg")
SMOOTHING_STEPS = 5  # running mean of the training losses in plots


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far.

    Linux: VmHWM, which starts with the program. `getrusage` also counts the process that started it
    (the maximum survives fork and exec), so it serves only where there is no /proc.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def plot_losses(
    folder: Path, runs: Mapping[str, Sequence[Mapping[str, Any]]], console: Console
) -> None:
    """Draw the mean training and held-out losses of each method's runs over the steps."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        console.print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for method, results in runs.items():
        curves = [result["train_loss"] for result in results]
        train = _smooth([statistics.fmean(losses) for losses in zip(*curves, strict=True)])
        (line,) = axes.plot(range(1, len(train) + 1), train, alpha=0.4, linewidth=1)
        points = [dict(result["held_out"]) for result in results]
        steps = sorted(set.intersection(*map(set, points)))
        held_out = [statistics.fmean(losses[step] for losses in points) for step in steps]
        label = f"{method}: {held_out[-1]:.4f}"
        axes.plot(steps, held_out, "o-", color=line.get_color(), label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"held-out loss (dots) and training loss (mean of {SMOOTHING_STEPS} steps)")
    axes.legend()
    for name in PLOTS:
        write_plot(folder / name, figure, "--out")


def _smooth(values: Sequence[float]) -> list[float]:
    return [
        statistics.fmean(values[max(0, i + 1 - SMOOTHING_STEPS) : i + 1])
        for i in range(len(values))
    ]


def comparison_table(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], *, wide: bool = False
) -> Table:
    """One row for each method; a mean and standard deviation where it has several seeds.

    The difference to the first method is taken seed by seed: those runs see the same data.
    """
    first = next(iter(runs))
    reference = {result["settings"]["seed"]: result["held_out_after"] for result in runs[first]}
    rows = []
    for method, results in runs.items():
        losses = [result["held_out_after"] for result in results]
        differences = [
            result["held_out_after"] - reference[result["settings"]["seed"]]
            for result in results
            if result["settings"]["seed"] in reference
        ]
        rows.append((
            method,
            _mean_and_deviation(losses, ".4f"),
            "" if method == first or not differences else _mean_and_deviation(differences, "+.4f"),
            f"{max(result['state_bytes'] for result in results) / MIB:,.1f}",
            f"{max(result['peak_memory_bytes'] for result in results) / MIB:,.0f}",
            f"{statistics.median(result['seconds_per_step'] for result in results):.2f}",
        ))  # fmt: skip
    notes = [
        f"{method}: no Nesterov"
        for method in runs
        if method.rpartition("+")[2] in FORMATS_WITHOUT_NESTEROV
    ]
    before = {result["held_out_before"] for results in runs.values() for result in results}
    starts = [f"before: {loss:.4f}" for loss in before if loss is not None]
    seeds = max(len(results) for results in runs.values())
    columns = (
        Column("method", text=True), Column("held-out loss"), Column("less the first's"),
        Column("state MiB"), Column("peak MiB", wide=True), Column("s/step"),
    )  # fmt: skip
    table = make_table("held-out loss in nats per token", columns, rows, wide=wide)
    table.caption = "; ".join([*starts, f"seeds: {seeds}", *notes])
    return table


def _mean_and_deviation(values: Sequence[float], spec: str) -> str:
    mean = format(statistics.fmean(values), spec)
    if len(values) < 2:
        return mean
    return f"{mean} ± {statistics.stdev(values):.4f}"
