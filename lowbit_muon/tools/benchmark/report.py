"""What a benchmark leaves behind: a table, JSON with a description of the machine, a plot."""

from __future__ import annotations

import csv
import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.tools.benchmark.cases import TORCH_MUON
from lowbit_muon.tools.benchmark.measure import Result
from lowbit_muon.tools.console import MIB, Column, make_table
from lowbit_muon.tools.output import replacing, write_json, write_plot


def machine() -> dict[str, Any]:
    """What a timing depends on: processor, GPU, cores, threads, ISA level, versions."""
    on_gpu = torch.cuda.is_available()
    return {
        "cpu": _cpu_model(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": cpu.isa() if cpu.unavailable_reason() is None else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_document(path: Path, results: object) -> None:
    """Write {"machine": ..., "results": results} to `path`, creating its folder."""
    write_json(path, {"machine": machine(), "results": results})


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Write a benchmark's rows as {"machine": {...}, "results": [...]}.

    machine: cpu, gpu, cuda, cores, threads, isa, torch, python, system (null: not there).
    results, every key in every row, null (or []) where it does not apply:
      name: "step", "quantize", "dequantize", "lut_gram", "orthogonalize", what a script of bench/
        times, or the name of a peer or a roof.
      shape: [rows, columns], [0, 0] for what has no matrix; format: name of the state format, null
        for rows that have none.
      device: "cpu" or "cuda"; dtype: "fp32", "bf16" or "fp16", or an integer's name, of what is
        read and written.
      status: "measured"; "skipped" (a peer that is missing, a product a format does not allow);
        "error" (a gate that failed, or an exception); detail: why, for the last two.
      seconds: of one call, a number for each round, oldest first, [] where none was kept;
        median; spread: interquartile range / median, null for one round.
      baseline: name (and format, if it has one) of the row of the same shape, threads and run that
        it is compared with; ratio: median / its median, below 1 is faster.
      error, allowed_error: what the gate found and allows, relative errors in the Frobenius norm.
      state_bytes: storage of the optimizer's state or of the stored matrix; bits_per_element: the
        same in bits for each element.
      peak_bytes: most that a call held at once above its inputs and state.
      threads: of torch and the kernels; isa: the level of the CPU kernels, null for what takes none
        of them.
      bytes, read and written, and flops, operations (a multiply-add is two), of a call, those it
        really does (`counts`): a product that computes one triangle has about half of torch.mm's.
      work: those of the two that the machine has less of to spare. roof: name of the row of the
        same run whose work / median is the most that part of the machine can do (`peaks`,
        bench/machine_peaks.py); fraction: work / median / that. All null where none was timed.
    """
    write_document(path, [result.to_dict() for result in results])


def results_table(results: Sequence[Result], *, wide: bool = False) -> Table:
    """The rows of one shape."""
    rows, columns = results[0].shape
    rounds = max(len(result.seconds) for result in results)
    dtype = next((result.dtype for result in results if result.name == "step"), "")
    title = f"{rows}x{columns}, {dtype} weights, {results[0].device}, {rounds} rounds"
    headings = (
        Column("what", text=True), Column("ms"), Column("spread"), Column("ratio"), Column("GB/s"),
        Column("GFLOP/s"), Column("of peak"), Column("peak", text=True, wide=True),
        Column("error", wide=True), Column("bits", wide=True), Column("MiB", wide=True),
    )  # fmt: skip
    return make_table(title, headings, map(_cells, results), wide=wide)


def _cells(result: Result) -> list[str]:
    return [
        label(result),
        result.status if result.median is None else significant(1e3 * result.median),
        "" if result.spread is None else f"{result.spread:.0%}",
        "" if result.ratio is None else significant(result.ratio),
        _billions(result.bytes, result.median),
        _billions(result.flops, result.median),
        "" if result.fraction is None else f"{result.fraction:.0%}",
        "" if result.fraction is None else result.roof or "",
        "" if result.error is None else f"{result.error:.1e}",
        "" if result.bits_per_element is None else f"{result.bits_per_element:.2f}",
        "" if result.state_bytes is None else significant(result.state_bytes / MIB),
    ]


def _billions(work: float | None, seconds: float | None) -> str:
    """In a second."""
    return "" if work is None or seconds is None else f"{work / seconds / 1e9:,.1f}"


def notes(results: Sequence[Result]) -> list[str]:
    """Lines for below the table: what is compared with what, and why rows were not timed."""
    return [
        f"ratio of medians, below 1 is faster: {_comparisons(results)}",
        "of peak: of a copy from memory, or in L2 of what fits there, or of torch.mm, whichever is "
        "nearer; more than 100% where a last-level cache or integer products are faster",
    ] + [
        f"{label(result)}: {result.status}: {result.detail}"
        for result in results
        if result.status != "measured"
    ]


def label(result: Result) -> str:
    """What a row is called in tables and plots."""
    return f"{result.name} {result.format or ''}".strip()


def significant(value: float) -> str:
    """With three digits at least and no exponent."""
    digits = 0 if value >= 100 else 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:,.{digits}f}"


def _comparisons(results: Sequence[Result]) -> str:
    """Which rows are compared with which."""
    compared: dict[str, list[str]] = {}
    for result in results:
        if result.baseline is not None:
            names = compared.setdefault(result.baseline, [])
            names += [] if result.name in names else [result.name]
    return "; ".join(f"{', '.join(names)} to {base}" for base, names in compared.items())


def plot_results(path: Path, results: Sequence[Result]) -> None:
    """Bars in units of one row's time, from zero, a panel for each shape, with milliseconds.

    That row is torch.optim.Muon's step, or the first that was timed where there is none; the lines
    at the ends are interquartile ranges. Needs matplotlib. The suffix of the path chooses between
    SVG and PNG.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(result.shape for result in results))
    drawn = [r for r in results if r.median and r.roof != r.name]  # peaks are of other sizes
    timed = [[r for r in drawn if r.shape == shape] for shape in shapes]
    height = 1.4 + 0.28 * max(map(len, timed))
    figure = Figure(figsize=(7.0 * len(shapes), height), layout="constrained")
    panels = figure.subplots(1, len(shapes), squeeze=False, sharex=True)[0]
    for panel, shape, rows in zip(panels, shapes, timed, strict=True):
        unit = _baseline(rows)
        lengths = [(row.median or 0.0) / (unit.median or 1.0) for row in rows]
        half = [size * (row.spread or 0.0) / 2 for size, row in zip(lengths, rows, strict=True)]
        colors = ["tab:blue" if row.error is not None else "0.7" for row in rows]
        bars = panel.barh(range(len(rows)), lengths, xerr=half, color=colors, ecolor="0.3")
        times = [f"{significant(1e3 * (row.median or 0.0))} ms" for row in rows]
        panel.bar_label(bars, times, padding=4, fontsize=8)
        panel.axvline(1.0, color="0.7", linewidth=1, zorder=0)
        panel.set_yticks(range(len(rows)), list(map(label, rows)))
        panel.margins(x=0.15, y=0.01)
        panel.set_xlim(left=0)
        panel.invert_yaxis()
        panel.set_xlabel(f"times {label(unit)}")
        panel.set_title(f"{shape[0]}x{shape[1]} on {rows[0].device}; grey: torch and other peers")
    write_plot(path, figure)


def _baseline(rows: Sequence[Result]) -> Result:
    """The row that all bars of a panel are compared with."""
    return next((row for row in rows if row.name == TORCH_MUON), rows[0])


def write_csv(path: Path, results: Sequence[Result]) -> None:
    """Write a line for each row, with the columns of `write_results` but `seconds`."""
    rows = [result.to_dict() for result in results]
    names = [name for name in rows[0] if name != "seconds"]
    with replacing("--csv", path) as partial, open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow({**row, "shape": "x".join(map(str, row["shape"]))})
