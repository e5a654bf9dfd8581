"""How far each way of storing a momentum turns the update, against the bits it takes.

    python -m bench.fidelity [--quick] [--data FILE] [--json FILE] [--plot FILE]

On recorded gradients of a training run (`bench.capture`; a small recording is in the repository).
All errors are relative to full-precision momentum, in the Frobenius norm, means over the matrices:

    momentum   of the matrix itself, before the last step, stored once
    once       of the last update, after five Newton-Schulz steps (float32), if the momentum was
               stored in the step before and never before that
    closed     of the same update with the momentum stored in every step, so that errors add up
    mean       the same over the last quarter of the recording, at most 20 steps

`muonq4` normalises gradients and momentum, so it is compared with full precision under that rule;
every other method has torch's momentum and Nesterov.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.capture import SHIPPED, load
from bench.closed_loop import MEMORY, MUONQ, TORCH, Rule, Sequence, relative_error, relative_errors
from bench.harness import write_json
from bench.peer_formats import MUONQ_TORCH_MOMENTUM, grasp
from lowbit_muon import PRESETS, StateFormat, quantize

# OCP Microscaling v1.0, E2M1, without its second zero.
_FP4 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
FAMILIES = ("spectral", "low rank", "8-bit Muon", "blocks", "linear", "mu-law", "GRASP", "dense")
FIGURES = ("momentum", "once", "closed", "mean")
Method = Callable[[Tensor], tuple[Tensor, float]]


def _linear(bits: int) -> StateFormat:
    """Plain: equal steps, one absmax scale a row."""
    return StateFormat(
        f"linear{bits}, rows", bits, codebook="linear", tread="mid_tread", statistic="absmax",
        clip=1.0,
    )  # fmt: skip


def state_formats() -> dict[str, tuple[str, StateFormat]]:
    """name -> (family, format)."""
    fp4 = dataclasses.replace(PRESETS["nf4"], name="fp4", table=tuple(map(float, _FP4)))
    return {
        **{f"spectral{bits}": ("spectral", PRESETS[f"spectral{bits}"]) for bits in (8, 4, 3, 2)},
        "mulaw4": ("low rank", PRESETS["mulaw4"]),
        "muonq4": ("low rank", PRESETS["muonq4"]),
        MUONQ_TORCH_MOMENTUM.name: ("low rank", MUONQ_TORCH_MOMENTUM),
        "linear8": ("8-bit Muon", PRESETS["linear8"]),
        "nf4": ("blocks", PRESETS["nf4"]),
        "fp4": ("blocks", fp4),
        "mulaw8": ("mu-law", PRESETS["mulaw8"]),
        **{f"linear{bits}, rows": ("linear", _linear(bits)) for bits in (8, 4, 3, 2)},
        "bf16": ("dense", PRESETS["bf16"]),
    }


def methods() -> dict[str, tuple[str, Method]]:
    """name -> (family, matrix -> (decoded matrix, bits an element))."""

    def stored(state_format: StateFormat) -> Method:
        def through(matrix: Tensor) -> tuple[Tensor, float]:
            kept = quantize(matrix, state_format)
            return kept.dequantize(), kept.bits_per_element

        return through

    made = {name: (family, stored(f)) for name, (family, f) in state_formats().items()}
    return {**made, "GRASP": ("GRASP", grasp)}


def rule_of(name: str) -> Rule:
    """The update rule that a method belongs to."""
    return MUONQ if name == "muonq4" else TORCH


def figures(sequence: Sequence, method: Method) -> dict[str, float]:
    """Bits an element, and the errors of one matrix."""

    def store(momentum: Tensor) -> Tensor:
        return method(momentum)[0]

    decoded, bits = method(sequence.momenta[-1])
    closed = relative_errors(sequence.closed(store), sequence.updates)
    return {
        "bits": bits,
        "momentum": relative_error(decoded, sequence.momenta[-1]),
        "once": relative_error(sequence.once(store), sequence.updates[-1]),
        "closed": float(closed[-1]),
        "mean": float(closed.mean()),
    }


def measure(recording: dict[str, Tensor], console: Console) -> dict[str, dict[str, Any]]:
    """name -> family, bits and the mean of each figure over the matrices."""
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in methods()}
    for grads in recording.values():
        steps = len(grads)
        measured = range(steps - max(1, min(MEMORY, steps // 4)), steps)
        exact = {rule: Sequence.of(grads, measured, rule) for rule in (TORCH, MUONQ)}
        for name, (_, method) in track(methods().items(), console=console, transient=True):
            collected[name].append(figures(exact[rule_of(name)], method))
    return {
        name: {
            "family": methods()[name][0],
            **{figure: statistics.fmean(row[figure] for row in rows) for figure in rows[0]},
        }
        for name, rows in collected.items()
    }


def pareto_front(results: dict[str, dict[str, Any]]) -> list[str]:
    """Names that no other beats in bits and in the loop's mean error at once, fewest bits first.

    A hundredth of a bit counts for nothing: spectral formats keep 16 bytes a matrix more.
    """

    def point(name: str) -> tuple[float, float]:
        return round(results[name]["bits"], 2), results[name]["mean"]

    return sorted(
        (
            name
            for name in results
            if not any(
                other != name
                and all(a <= b for a, b in zip(point(other), point(name), strict=True))
                for other in results
            )
        ),
        key=point,
    )


def show(results: dict[str, dict[str, Any]], title: str, console: Console) -> None:
    """The results as a table; the Pareto front is marked."""
    front = pareto_front(results)
    table = Table(title=title)
    for heading in ("format", "bits", *FIGURES, "front"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for name, row in results.items():
        errors = [f"{row[figure]:.3f}" for figure in FIGURES]
        table.add_row(name, f"{row['bits']:.2f}", *errors, "*" if name in front else "")
    console.print(table)


def plot(results: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Bits against the error of the update, a marker for each family, and the Pareto front.

    Full markers are means in closed loop; a line leads down to the error of storing once. Dense
    storage is left out.
    """
    from matplotlib.figure import Figure

    results = {name: row for name, row in results.items() if row["family"] != "dense"}
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.add_subplot()
    for family, marker in zip(FAMILIES[:-1], "osD^vPX", strict=True):
        rows = [row for row in results.values() if row["family"] == family]
        bits = [row["bits"] for row in rows]
        loop, once = ([row[figure] for row in rows] for figure in ("mean", "once"))
        full = axes.scatter(bits, loop, marker=marker, label=family, zorder=3)
        color = full.get_facecolor()
        axes.scatter(bits, once, marker=marker, facecolor="none", edgecolor=color, s=16)
        axes.vlines(bits, once, loop, color=color, linewidth=0.5)
    for name, row in results.items():
        side: dict[str, Any] = {"xytext": (5, 4)}
        if row["family"] in ("linear", "spectral"):  # to the left, where there is room
            side = {"xytext": (-5, -3), "ha": "right"}
        position = (row["bits"], row["mean"])
        axes.annotate(name, position, textcoords="offset points", fontsize=7, **side)
    front = pareto_front(results)
    axes.plot(
        [results[name]["bits"] for name in front], [results[name]["mean"] for name in front],
        color="0.6", linewidth=1, label="Pareto front",
    )  # fmt: skip
    axes.set_title(f"{title}: in closed loop (full), stored once (hollow)", fontsize=9)
    axes.set(
        xlabel="bits an element, scales and factors included",
        ylabel="error of the update after Newton-Schulz",
        xlim=(1.2, 9),
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="bits against error of the update, real gradients")
    parser.add_argument("--quick", action="store_true", help="the smallest matrix, fewer steps")
    parser.add_argument("--data", type=Path, default=SHIPPED, help="what bench.capture wrote")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.svg or .png)")
    options = parser.parse_args(arguments)
    recording = load(options.data)
    if options.quick:
        name = min(recording, key=lambda name: recording[name].numel())
        recording = {name: recording[name][-12:]}
    console = Console()
    results = measure(recording, console)
    show(results, options.data.stem, console)
    if options.json:
        shapes = {name: list(grads.shape) for name, grads in recording.items()}
        write_json(options.json, {"recording": shapes, "formats": results})
    if options.plot:
        plot(results, options.data.stem, options.plot)


if __name__ == "__main__":
    main()
