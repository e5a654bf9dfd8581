"""What the benchmarks share: options, instruction-set levels and threads, counts, the table.

Timing and the schema live in the package, where `lowbit-muon bench` needs them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.tools.benchmark.cases import Prepared
from lowbit_muon.tools.benchmark.counts import is_copy
from lowbit_muon.tools.benchmark.measure import Result
from lowbit_muon.tools.benchmark.report import label, machine, significant, write_results
from lowbit_muon.tools.benchmark.report import write_document as write_json
from lowbit_muon.tools.benchmark.timing import interleaved, medians

__all__ = [
    "Record", "Run", "add_options", "interleaved", "machine", "medians", "read_results",
    "results_table", "runs", "with_work", "write_json",
]  # fmt: skip


FILE_WIDTH = 110  # of tables that no terminal shows


@dataclass(frozen=True)
class Run:
    """How the kernels are run: an instruction-set level, and threads of torch and the kernels."""

    isa: str
    threads: int

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Both set in the whole process, and afterwards as before. Raises ValueError for `isa`."""
        before = cpu.isa(), torch.get_num_threads()
        cpu.set_isa(self.isa)
        try:
            if self.threads != before[1]:
                torch.set_num_threads(self.threads)
            yield
        finally:
            cpu.set_isa(before[0])
            if self.threads != before[1]:
                torch.set_num_threads(before[1])


def add_options(
    parser: argparse.ArgumentParser,
    *,
    isas: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
) -> None:
    """What every benchmark of kernels takes; the last two arguments are defaults."""
    highest = cpu.supported_isas()[-1:]
    parser.add_argument("--quick", action="store_true", help="a few shapes and repeats")
    parser.add_argument("--repeats", type=int, metavar="N", help="rounds that count")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument(
        "--isas", nargs="+", metavar="LEVEL", default=list(isas or highest),
        choices=cpu.supported_isas(), help=f"out of {', '.join(cpu.supported_isas())}",
    )  # fmt: skip
    parser.add_argument(
        "--threads", nargs="+", type=int, metavar="N",
        default=sorted(set(threads or (torch.get_num_threads(),))),
    )  # fmt: skip


def runs(options: argparse.Namespace) -> list[Run]:
    """Every level with every number of threads."""
    return [Run(*pair) for pair in itertools.product(options.isas, options.threads)]


def with_work(prepare: Callable[[], Prepared], work: float, roof: str) -> Callable[[], Prepared]:
    """`prepare` whose call does `work` under `roof`."""
    return lambda: replace(prepare(), work={roof: work})


def results_table(results: Sequence[Result]) -> Table:
    """Rows of one shape, level and number of threads, with the share of what limits them."""
    rows, columns = results[0].shape
    threads = results[0].threads
    isas = {result.isa for result in results if result.isa is not None}
    title = [f"{rows}x{columns}"] if rows else []
    title += [*sorted(isas), *([f"{threads} threads"] if threads else [])]
    table = Table(title=", ".join(title), box=None, pad_edge=False)
    table.add_column("what", no_wrap=True)
    cells = [_cells(result) for result in results]
    used = [heading for heading in cells[0] if any(row[heading] for row in cells)]
    for heading in used:
        table.add_column(heading, justify="right", no_wrap=True)
    for result, row in zip(results, cells, strict=True):
        table.add_row(label(result), *(row[heading] for heading in used))
    return table


def _cells(result: Result) -> dict[str, str]:
    """Heading -> text, "" where a row has no such number."""

    def shown(value: float | None, form: Callable[[float], str]) -> str:
        return "" if value is None else form(value)

    def mib(value: float) -> str:
        return significant(value / 2**20)

    return {
        "ms": shown(result.median, lambda value: significant(1e3 * value))
        if result.status == "measured"
        else result.status,
        "spread": shown(result.spread, "{:.0%}".format),
        "ratio": shown(result.ratio, significant),
        "speed": speed(result),
        "of roof": "" if result.roof == result.name else shown(result.fraction, "{:.0%}".format),
        "error": shown(result.error, "{:.0e}".format),
        "state MiB": shown(result.state_bytes, mib),
        "peak MiB": shown(result.peak_bytes, mib),
    }


def speed(result: Result) -> str:
    """Work in a second, "" where a row has none: GB/s where copies are the roof, else GOP/s."""
    if result.work is None or result.median is None:
        return ""
    unit = "GB/s" if is_copy(result.roof or "") else "GOP/s"
    return f"{result.work / result.median / 1e9:,.1f} {unit}"


class Record:
    """The rows of a benchmark: shown and saved group by group, so that little is ever lost."""

    def __init__(self, path: Path | None) -> None:
        self.results: list[Result] = []
        self._path = path
        self._console = Console()
        if not self._console.is_terminal:
            self._console.width = FILE_WIDTH

    def add(self, group: Sequence[Result]) -> None:
        """Rows of one shape, level and number of threads."""
        self.results += group
        self._console.print(results_table(group))
        for row in group:
            if row.status != "measured":
                self._console.print(f"{label(row)}: {row.status}: {row.detail}")
        if self._path is not None:
            write_results(self._path, self.results)

    def close(self) -> None:
        """Raise SystemExit if a result of ours was wrong."""
        failed = [label(row) for row in self.results if row.status == "error"]
        if failed:
            raise SystemExit(f"not timed, since it failed: {', '.join(failed)}")


def read_results(path: Path) -> list[Result]:
    """The rows that `write_results` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))["results"]
    return [Result(**{**row, "shape": tuple(row["shape"])}) for row in rows]
