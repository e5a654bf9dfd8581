"""Muon over 1 to 4096 processes, models of 1B to 1T parameters: bytes, operations, state.

    python -m bench.scaling [--quick] [--json FILE] [--plot FILE]

All of it is a model on paper (`designs`), except the last table: processes of this machine (gloo),
whose counted bytes have to equal the model's, and their time beside the model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.harness import FILE_WIDTH, write_json
from bench.scaling.calibration import calibrate, small_model
from bench.scaling.designs import (
    DTYPE,
    FORMAT,
    NETWORK,
    NODE,
    NVLINK,
    Step,
    limits,
    rules_on_paper,
)
from bench.scaling.models import NAMES, make_model
from bench.scaling.report import (
    calibration_table,
    crossovers,
    estimates_table,
    is_exact,
    models_table,
    plot,
)

PROCESSES = [2**k for k in range(13)]
QUICK_NAMES, QUICK_PROCESSES = ("llama3-1b", "llama3-8b"), (1, 8, 64)
SHOWN = (1, 8, 64, 512, 4096)
PLOT_SUFFIXES = (".svg", ".png")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Muon over several processes, on paper.")
    parser.add_argument("--quick", action="store_true", help="two models, two small processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows here")
    parser.add_argument("--plot", type=_plot_path, metavar="FILE", help=".svg or .png")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH + 20
    names, processes = (QUICK_NAMES, QUICK_PROCESSES) if options.quick else (NAMES, PROCESSES)
    models = {}
    for name in names:
        models[name] = model_rows(name, processes)
        show(models[name], console)
    console.print(models_table(models))
    hidden, layers, counts, steps = (64, 1, (1, 2), 1) if options.quick else (384, 3, (1, 2, 4), 7)
    calibration = calibrate(small_model(hidden, layers), counts, steps)
    console.print(calibration_table(calibration))
    if options.json:
        write_json(
            options.json,
            {
                "assumptions": assumptions(),
                "models": models,
                "rules": rules_on_paper(),
                "calibration": calibration,
            },
        )
    if options.plot:
        plot(options.plot, {n: m for n, m in models.items() if not n.endswith("stacked")})
    if not all(map(is_exact, calibration["rows"])):
        raise SystemExit("bytes, owners or state differ from the model's")


def assumptions() -> dict[str, Any]:
    """What the seconds rest on, bytes a second in one direction; see `designs`."""
    return {
        "measured": False,
        "dtype": str(DTYPE).removeprefix("torch."),
        "format": FORMAT,
        "nvlink": NVLINK,
        "network": NETWORK,
        "node": NODE,
        "compute": "bench.gpu.roofline",
    }


def model_rows(name: str, processes: Sequence[int]) -> dict[str, Any]:
    """One model under every design."""
    model = make_model(name)
    rows = [
        asdict(estimate) for count in processes for estimate in Step(model, count).all_designs()
    ]
    return {
        "title": model.title,
        "source": model.source,
        "published": model.published,
        "elements": model.elements,
        "muon_elements": model.muon_elements,
        "limits": limits(model),
        "crossovers": crossovers(rows),
        "estimates": rows,
    }


def show(model: dict[str, Any], console: Console) -> None:
    """Tables of some numbers of processes, and what holds from which on."""
    for count in SHOWN:
        rows = [row for row in model["estimates"] if row["processes"] == count]
        if rows:
            console.print(estimates_table(model["title"], rows))
    for what, first in model["crossovers"].items():
        console.print(f"{model['title']}: {what}: {_on(first)}")


def _on(first: int | None) -> str:
    return "nowhere" if first is None else f"from {first} on"


def _plot_path(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(f"expected {' or '.join(PLOT_SUFFIXES)}, got {text!r}")
    return path


if __name__ == "__main__":
    main()
