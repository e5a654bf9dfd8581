"""Interleaved timing, ratios of medians, and JSON results with a description of the machine.

Variants are timed in turn, round after round, so that a change of clock or a busy neighbour hits
all of them alike; only their ratios are worth quoting.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lowbit_muon.backends import cpu


def interleaved(
    cases: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` for each case; one call of every case in each round.

    Odd rounds run in reverse order, so that no case always profits from what ran before it.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats, warmup: expected >= 1 and >= 0, got {repeats}, {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for round_ in range(warmup + repeats):
        for name in names if round_ % 2 == 0 else reversed(names):
            start = time.perf_counter()
            cases[name]()
            elapsed = time.perf_counter() - start
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, Sequence[float]], baseline: str) -> dict[str, float]:
    """Median time of each case divided by the median time of the case `baseline`."""
    middle = medians(seconds)
    return {name: value / middle[baseline] for name, value in middle.items()}


def machine() -> dict[str, Any]:
    """What a timing depends on: processor, cores, threads, ISA level, versions."""
    return {
        "cpu": _cpu_model(),
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
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_json(path: Path, results: object) -> None:
    """Write {"machine": ..., "results": results} to `path`, creating its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": machine(), "results": results}
    path.write_text(json.dumps(document, indent=2) + "\n")
