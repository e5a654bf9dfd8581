"""Time and memory of one optimizer step against size, aspect ratio, bits and threads.

    python -m bench.sweep [--quick] [--seconds S] [--json FILE] [--plot FILE]
    python -m bench.sweep --from FILE --plot FILE        draws an earlier run again

One parameter changes at a time: m x m from 256 to 4096, 512 x n up to n = 8 m, formats of 2 to 8
bits and threads at 1024x4096. Each step passes the gate of `lowbit-muon bench` first. A shape
whose gates and first rounds would not fit into the seconds that are left, going by those before
it, is left out, with rows that say so.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.harness import Record, Run, read_results
from bench.step import peak_bytes
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.benchmark.cases import TORCH_MUON, Case, Prepared, Problem, make_cases
from lowbit_muon.tools.benchmark.measure import Result, measure_cases
from lowbit_muon.tools.benchmark.report import label

FORMATS = ("spectral4", "mulaw4", "linear8", "fp32")
BITS = {2: "spectral2", 3: "spectral3", 4: "spectral4", 8: "spectral8"}
SPECTRAL = f"step {BITS[4]}"  # the line of all bits
LINES = (*(f"step {name}" for name in FORMATS), TORCH_MUON)  # in the order of their colours
MIB = 2**20
LEAST_SECONDS = 10.0  # for a point, if its rounds take so long
PLOT_SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Plan:
    """What is swept: the matrices of each series, and the base of the others."""

    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096)
    aspect_rows: int = 512
    aspects: tuple[int, ...] = (1, 2, 4, 8)
    base: tuple[int, int] = (1024, 4096)
    repeats: int = 7
    seconds: float = 330.0

    @property
    def squares(self) -> list[tuple[int, int]]:
        """m x m."""
        return [(m, m) for m in self.sizes]

    @property
    def oblongs(self) -> list[tuple[int, int]]:
        """Of one number of rows."""
        return [(self.aspect_rows, self.aspect_rows * aspect) for aspect in self.aspects]


FULL = Plan()
QUICK = Plan((128, 256, 512), 256, (1, 2, 4, 8), (512, 2048), repeats=3, seconds=45.0)


@dataclass(frozen=True)
class Point:
    """One matrix on a number of threads, in formats and beside torch.optim.Muon."""

    shape: tuple[int, int]
    threads: int
    formats: tuple[str, ...]


def points(plan: Plan, threads: Sequence[int]) -> list[Point]:
    """Every combination once, smallest first; all but the series of threads on the most."""
    most = max(threads)
    formats = {(shape, most): set(FORMATS) for shape in [*plan.squares, *plan.oblongs]}
    for count in threads:
        formats.setdefault((plan.base, count), set()).update(FORMATS)
    formats[plan.base, most] |= set(BITS.values())
    return [
        Point(shape, count, tuple(name for name in PRESETS if name in formats[shape, count]))
        for shape, count in sorted(formats, key=lambda key: (step_work(key[0]), -key[1]))
    ]


def step_work(shape: tuple[int, int]) -> int:
    """Grows with what a step multiplies."""
    m, n = sorted(shape)
    return m * m * n


def cases(point: Point) -> list[Case]:
    """The steps of `lowbit-muon bench`, and the most that each holds at once."""
    problem = Problem(point.shape, "fp32", torch.device("cpu"))
    return [
        dataclasses.replace(case, prepare=_with_peak(case.prepare))
        for case in make_cases(problem, point.formats)
        if case.name in ("step", TORCH_MUON)
    ]


def _with_peak(prepare: Callable[[], Prepared]) -> Callable[[], Prepared]:
    def prepared() -> Prepared:
        found = prepare()
        return dataclasses.replace(found, peak_bytes=peak_bytes(found.call))

    return prepared


def measure(point: Point, repeats: int, deadline: float) -> tuple[list[Result], float]:
    """Rows of one point, and the seconds that the least of it took: gates and the first rounds.

    deadline: of `time.perf_counter()`; no round but the first starts after it.
    """
    start = time.perf_counter()
    rounds: list[float] = []
    with Run(cpu.isa(), point.threads).applied():
        rows = measure_cases(
            cases(point),
            point.shape,
            repeats,
            deadline=deadline,
            on_round=lambda: rounds.append(time.perf_counter() - start),
        )
    return rows, rounds[1]


def left_out(point: Point) -> list[Result]:
    """Its rows where no time is left for it."""
    return [
        Result(
            case.name, point.shape, case.format, "cpu", case.dtype, "skipped",
            "no time was left", threads=point.threads, isa=case.isa,
        )
        for case in cases(point)
    ]  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One column of the plot: which rows belong to it, and where along x they lie."""

    axis: str
    place: Callable[[Result], float]
    rows: list[Result]
    line: Callable[[Result], str] = label  # what it belongs to


def series(results: Iterable[Result], plan: Plan) -> list[Series]:
    """The four columns, out of the rows of a run."""
    timed = [row for row in results if row.median is not None]
    most = max(row.threads or 1 for row in timed)
    whole = [row for row in timed if row.threads == most]
    bits = {name: float(count) for count, name in BITS.items()}

    def among(shapes: Sequence[tuple[int, int]]) -> list[Result]:
        usual = (row for row in whole if row.format in (*FORMATS, None))
        return sorted((row for row in usual if row.shape in shapes), key=lambda row: row.shape)

    rows, columns = plan.base
    base = [row for row in timed if row.shape == plan.base]
    return [
        Series("m, m x m", lambda row: row.shape[0], among(plan.squares)),
        Series(
            f"n / m, m = {plan.aspect_rows}",
            lambda row: row.shape[1] / row.shape[0],
            among(plan.oblongs),
        ),
        Series(
            f"bits, {rows}x{columns}",
            lambda row: bits[row.format or ""],
            sorted(
                (row for row in base if row.threads == most and row.format in bits),
                key=lambda row: bits[row.format or ""],
            ),
            lambda _: SPECTRAL,
        ),
        Series(
            f"threads, {rows}x{columns}",
            lambda row: row.threads or 1,
            sorted(
                (row for row in base if row.format in (*FORMATS, None)),
                key=lambda row: row.threads or 1,
            ),
        ),
    ]


def plot(path: Path, results: Sequence[Result], plan: Plan) -> None:
    """Milliseconds above, state and peak MiB below, all axes logarithmic. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "sweep"  # the same file for the same rows
    columns = [column for column in series(results, plan) if column.rows]
    figure = Figure(figsize=(4 * len(columns), 6.5), layout="constrained")
    panels = figure.subplots(2, len(columns), sharey="row", squeeze=False)
    for column, upper, lower in zip(columns, panels[0], panels[1], strict=True):
        _draw(upper, column, lambda row: 1e3 * (row.median or 0), "o-")
        _draw(lower, column, lambda row: (row.state_bytes or 0) / MIB, "o-")
        _draw(lower, column, lambda row: (row.peak_bytes or 0) / MIB, "x:", named=False)
        lower.set_xlabel(column.axis)
        places = sorted({column.place(row) for row in column.rows})
        for panel in (upper, lower):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_xticks(places, [f"{place:g}" for place in places])
    panels[0][0].set_ylabel("milliseconds a step")
    panels[1][0].set_ylabel("MiB: state (solid), peak of a step (dotted)")
    panels[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)


def _draw(
    panel: Any, column: Series, value: Callable[[Result], float], style: str, *, named: bool = True
) -> None:
    by_line: dict[str, list[Result]] = {}
    for row in column.rows:
        by_line.setdefault(column.line(row), []).append(row)
    for line, rows in by_line.items():
        places, values = [column.place(row) for row in rows], [value(row) for row in rows]
        color = f"C{LINES.index(line)}"
        panel.plot(places, values, style, color=color, label=line if named else None)


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(PLOT_SUFFIXES)}, got {text!r}")
    return path


def main(arguments: Sequence[str] | None = None, plan: Plan | None = None) -> None:
    """Command line; a plan given takes the place of the two that it knows."""
    parser = argparse.ArgumentParser(description="A step against size, shape, bits and threads.")
    parser.add_argument("--quick", action="store_true", help="smaller matrices, within a minute")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin nothing after so long")
    parser.add_argument("--threads", nargs="+", type=int, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--from", type=Path, metavar="FILE", dest="source", help="time nothing")
    parser.add_argument("--plot", type=_plot_path, metavar="FILE", help=".svg or .png")
    options = parser.parse_args(arguments)
    plan = plan or (QUICK if options.quick else FULL)
    results = run(plan, options) if options.source is None else read_results(options.source)
    if options.plot is not None:
        plot(options.plot, results, plan)


def run(plan: Plan, options: argparse.Namespace) -> list[Result]:
    """Measure, show and save point by point."""
    end = time.perf_counter() + (options.seconds or plan.seconds)
    todo = points(plan, options.threads or sorted({1, torch.get_num_threads()}))
    record = Record(options.json)
    left = sum(step_work(point.shape) for point in todo)
    overhead = slope = 0.0
    for index, point in enumerate(todo):
        work, now = step_work(point.shape), time.perf_counter()
        if now + overhead + slope * work > end:
            record.add(left_out(point))
        else:
            # Shares by work, of which the largest matrix has nearly all.
            share = max(LEAST_SECONDS, work / left * (end - now))
            rows, least = measure(point, plan.repeats, min(end, now + share))
            record.add(rows)
            if index == 0:  # the smallest takes next to nothing but calls
                overhead = least
            slope = max(0.0, least - overhead) / work
        left -= work
    record.close()
    return record.results


if __name__ == "__main__":
    main()
