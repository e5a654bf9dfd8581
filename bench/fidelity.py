"""How far each way of storing a momentum turns the update, against the bits it takes.

    python -m bench.fidelity [--quick] [--json FILE] [--plot FILE]

On matrices captured from a real fine-tune (`bench.capture`; a small set is in the repository), each
quantised once. All errors are relative, in the Frobenius norm, averaged over the matrices:

    momentum   of the matrix itself
    update     after five Newton-Schulz steps (float32)
    polar      of the exact polar factor (float64), which all directions share alike
    angle      largest principal angle between the leading right singular subspaces, of dimension
               min(m, n)/16, exact and decoded, in degrees

Quantised once says what one step loses; `bench.fidelity_training` says what remains when errors add
up in a training run.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.capture import SHIPPED, load
from bench.harness import write_json
from bench.peer_formats import grasp
from lowbit_muon import PRESETS, StateFormat, orthogonalize, quantize
from lowbit_muon.state.stored import orient

# OCP Microscaling v1.0, E2M1, without its second zero.
_FP4 = (-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)
FAMILIES = ("spectral", "low rank", "8-bit Muon", "blocks", "linear", "mu-law", "GRASP")
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
        "linear8": ("8-bit Muon", PRESETS["linear8"]),
        "nf4": ("blocks", PRESETS["nf4"]),
        "fp4": ("blocks", fp4),
        "mulaw8": ("mu-law", PRESETS["mulaw8"]),
        **{f"linear{bits}, rows": ("linear", _linear(bits)) for bits in (8, 4, 3, 2)},
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


def polar_factor(matrix: Tensor) -> Tensor:
    """U V^T of U S V^T, float64."""
    u, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ vt


def leading_directions(matrix: Tensor) -> Tensor:
    """The leading right singular vectors, float64 [n, min(m, n)/16]."""
    _, _, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return vt[: max(1, min(matrix.shape) // 16)].mT


def largest_angle(a: Tensor, b: Tensor) -> float:
    """Largest principal angle of two subspaces with orthonormal bases [n, k], in degrees."""
    cosine = torch.linalg.svdvals(a.mT @ b).amin().clamp(max=1)
    return math.degrees(math.acos(float(cosine)))


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference relative to the exact matrix."""
    return float((approximation - exact).norm() / exact.norm())


def measure(matrices: dict[str, Tensor], console: Console) -> dict[str, dict[str, Any]]:
    """name -> family, bits and the mean of each figure."""
    collected: dict[str, list[dict[str, float]]] = {name: [] for name in methods()}
    for matrix in track(list(matrices.values()), "matrices", console=console, transient=True):
        exact = orient(matrix)
        update, polar = orthogonalize(exact), polar_factor(exact)
        directions = leading_directions(exact)
        for name, (_, method) in methods().items():
            decoded, bits = method(exact)
            collected[name].append(
                {
                    "bits": bits,
                    "momentum": relative_error(decoded, exact),
                    "update": relative_error(orthogonalize(decoded), update),
                    "polar": relative_error(polar_factor(decoded), polar),
                    "angle": largest_angle(leading_directions(decoded), directions),
                }
            )
    return {
        name: {
            "family": methods()[name][0],
            **{figure: statistics.fmean(row[figure] for row in rows) for figure in rows[0]},
        }
        for name, rows in collected.items()
    }


def pareto_front(results: dict[str, dict[str, Any]]) -> list[str]:
    """Names that no other beats in bits and in the update's error at once, fewest bits first.

    A hundredth of a bit counts for nothing: spectral formats keep 16 bytes a matrix more.
    """

    def point(name: str) -> tuple[float, float]:
        return round(results[name]["bits"], 2), results[name]["update"]

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


def show(results: dict[str, dict[str, Any]], console: Console) -> None:
    """The results as a table; the Pareto front is marked."""
    front = pareto_front(results)
    table = Table(title="momentum of the SmolLM2-135M fine-tune, quantised once")
    for heading in ("format", "bits", "momentum", "update", "polar", "angle, degrees", "front"):
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for name, row in results.items():
        figures = [f"{row[key]:.3f}" for key in ("momentum", "update", "polar")]
        mark = "*" if name in front else ""
        table.add_row(name, f"{row['bits']:.2f}", *figures, f"{row['angle']:.1f}", mark)
    console.print(table)


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits against the error of the update, one marker for each family, and the Pareto front."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for family, marker in zip(FAMILIES, "osD^vPX", strict=True):
        names = [name for name, row in results.items() if row["family"] == family]
        axes.scatter(
            [results[name]["bits"] for name in names],
            [results[name]["update"] for name in names],
            marker=marker, label=family, zorder=3,
        )  # fmt: skip
        for name in names:
            position = (results[name]["bits"], results[name]["update"])
            axes.annotate(name, position, xytext=(5, 4), textcoords="offset points", fontsize=7)
    front = pareto_front(results)
    axes.plot(
        [results[name]["bits"] for name in front], [results[name]["update"] for name in front],
        color="0.6", linewidth=1, label="Pareto front",
    )  # fmt: skip
    axes.set(
        xlabel="bits an element, scales and factors included",
        ylabel="error of the update after Newton-Schulz",
        yscale="log",
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="bits against direction error, real momentum")
    parser.add_argument("--quick", action="store_true", help="the smallest matrix only")
    parser.add_argument("--data", type=Path, default=SHIPPED, help="what bench.capture wrote")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write a plot here (.svg or .png)")
    options = parser.parse_args(arguments)
    matrices = load(options.data)
    if options.quick:
        name = min(matrices, key=lambda name: matrices[name].numel())
        matrices = {name: matrices[name]}
    console = Console()
    results = measure(matrices, console)
    show(results, console)
    if options.json:
        shapes = {name: list(matrix.shape) for name, matrix in matrices.items()}
        write_json(options.json, {"matrices": shapes, "formats": results})
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
