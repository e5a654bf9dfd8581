"""Everything that only a GPU can tell, in one command: does it work, how fast is it, what is left?

    python -m bench.gpu_check [--quick] [--backends triton,cuda] [--json FILE]

Correctness of every kernel first, against the reference on the CPU; then the codec against a copy
on the device, products of codes against torch.mm, optimizer steps against torch.optim.Muon,
MuonQ's arithmetic in torch and bitsandbytes, over a decoder layer of Llama 3.2 1B and of Llama 2
7B. A backend that fails a correctness check is not timed. No case begins after eight minutes; how
long it takes on a GPU nobody has seen. Without one every row says why it was skipped, and the
estimates on paper (marked as such) are all there is.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table

from bench.gpu.correctness import CHECKS, Check, Sizes
from bench.gpu.roofline import BANDWIDTH, all_ledgers
from bench.gpu.rows import Case, Row
from bench.gpu.timing import (
    LLAMA_1B,
    LLAMA_7B,
    codec_rows,
    graph_rows,
    product_rows,
    step_rows,
)
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend

BACKENDS = ("triton", "cuda")
QUICK_SIZES = Sizes(
    matrices=((1, 1), (17, 129), (200, 1000)), products=((17, 33, 65), (128, 128, 128))
)
SECONDS = 480.0


def no_gpu_reason() -> str | None:
    """Why nothing can run on a GPU, or None."""
    if torch.version.cuda is None and torch.version.hip is None:
        return "no GPU: this PyTorch was built without CUDA and ROCm"
    if not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is False"
    return None


def backend_or_reason(name: str) -> tuple[Backend | None, str | None]:
    """The backend for the GPU, or why it is not there."""
    reason = no_gpu_reason()
    if reason is not None:
        return None, reason
    try:
        return get_backend(name, torch.device("cuda")), None
    except (RuntimeError, ValueError) as error:
        return None, str(error)


def correctness_case(check: Check, name: str, sizes: Sizes) -> Case:
    """One kernel of one backend."""
    backend, reason = backend_or_reason(name)

    def run() -> Iterator[Row]:
        assert backend is not None
        start = time.perf_counter()
        count = check.run(backend, torch.device("cuda"), sizes)
        detail = f"{count:,} elements in {time.perf_counter() - start:.1f} s"
        yield Row("correct", f"{name}: {check.name}", "passed", detail)

    return Case("correct", f"{name}: {check.name}", run, reason)


def timing_cases(name: str, *, quick: bool, broken: Sequence[str]) -> list[Case]:
    """Timings of one backend; skipped if it has failed a check."""
    found, reason = backend_or_reason(name)
    backend = cast(Backend, found)  # where it is None there is a reason, and nothing runs
    if broken:
        reason = f"not timed: {name} failed {', '.join(broken)}"
    budget = 0.3 if quick else 1.5
    layers = {"Llama-3.2-1B layer": LLAMA_1B, "Llama-2-7B layer": LLAMA_7B}
    runs: list[tuple[str, str, Any]] = [
        ("codec", "codec", functools.partial(codec_rows, backend, budget=budget)),
        ("product", "products", functools.partial(product_rows, backend, budget=budget)),
        ("graph", "CUDA graph", functools.partial(graph_rows, name)),
    ]
    for label, shapes in layers.items():
        run = functools.partial(step_rows, name, label, shapes, budget=2.0 if quick else 15.0)
        runs.append(("step", label, run))
    return [Case(group, f"{name}: {label}", run, reason) for group, label, run in runs]


def paper_rows() -> Iterator[Row]:
    """The least time of one step of one bfloat16 matrix on an H100, by kernel; not measured."""
    for shape, ledgers in all_ledgers().items():
        for name, ledger in ledgers.items():
            largest = sorted(ledger.work.items(), key=lambda item: -item[1].seconds)[:3]
            parts = ", ".join(f"{kernel} {work.seconds * 1e6:.0f}" for kernel, work in largest)
            total = sum(work.bytes for work in ledger.work.values())
            detail = f"us: {parts}; {total / 2**20:.0f} MiB ({total / BANDWIDTH * 1e6:.0f} us)"
            yield Row(
                "paper", f"{shape[0]}x{shape[1]} {name}", "measured", detail,
                ledger.seconds * 1e3, "ms, estimate",
            )  # fmt: skip


def run_all(
    backends: Sequence[str], *, quick: bool, console: Console, seconds: float = SECONDS
) -> list[Row]:
    """All rows. What would begin after `seconds` is skipped, and says so."""
    deadline = time.perf_counter() + seconds
    rows: list[Row] = []

    def run(case: Case) -> None:
        if case.reason is None and time.perf_counter() > deadline:
            case = dataclasses.replace(case, reason=f"not reached within {seconds:.0f} s")
        with console.status(f"{case.group}: {case.name}"):
            rows.extend(case.rows())

    sizes = QUICK_SIZES if quick else Sizes()
    for name in backends:  # the first is timed before the second takes its time
        for check in CHECKS:
            run(correctness_case(check, name, sizes))
        prefix = f"{name}: "
        broken = [
            row.name.removeprefix(prefix)
            for row in rows
            if row.status == "failed" and row.name.startswith(prefix)
        ]
        for case in timing_cases(name, quick=quick, broken=broken):
            run(case)
    rows.extend(Case("paper", "H100 estimates", paper_rows).rows())
    return rows


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """One table."""
    table = Table(title=title)
    for heading in ("", "case", "status", "value", "ratio", "detail"):
        table.add_column(heading, justify="right" if heading in ("value", "ratio") else "left")
    for row in rows:
        value = "" if row.value is None else f"{row.value:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f} x {row.baseline}"
        status = "estimated" if row.group == "paper" else row.status
        table.add_row(row.group, row.name, status, value, ratio, row.detail)
    console.print(table)


def device_description() -> dict[str, Any]:
    """What the results depend on."""
    description: dict[str, Any] = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "device": None,
        "why no device": no_gpu_reason(),
    }
    if description["why no device"] is None:
        properties = torch.cuda.get_device_properties(0)
        description |= {
            "device": properties.name,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
            "memory bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return description


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status is 1 if a check failed."""
    parser = argparse.ArgumentParser(description="correctness and speed on a GPU")
    parser.add_argument("--quick", action="store_true", help="few sizes and rounds: a minute")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="comma-separated")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    backends = options.backends.split(",")
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown:
        parser.error(f"--backends: expected some of {BACKENDS}, got {unknown}")
    console = Console(width=None if sys.stdout.isatty() else 150)
    description = device_description()
    rows = run_all(backends, quick=options.quick, console=console)
    title = description["device"] or f"skipped: {description['why no device']}"
    show(rows, f"lowbit_muon on {title}" if description["device"] else title, console)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        results = [dataclasses.asdict(row) for row in rows]
        document = {"machine": description, "results": results}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return int(any(row.status == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
