"""The examples in full (lowbit_muon.examples): rates, seeds and pictures for the guide.

    python -m bench.gallery [--examples NAMES] [--json FILE] [--plots FOLDER]

Each method has a rate of its own: from a first guess, doubled and halved until the rates on both
sides of the best one are worse, all with a seed that is not shown. Methods are stored as they end,
so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from bench.harness import write_json
from lowbit_muon.examples.common import METHODS, Run, plot

EXAMPLES = ("nanochat", "lora", "convnet", "moe", "diffusion")
TUNING_SEED = 100
SEEDS = (0, 1)
# Where the search begins, for Muon in both formats and for AdamW.
FIRST_RATES = {"lora": (0.01, 4e-3), "moe": (0.04, 8e-3), "diffusion": (0.04, 8e-3)}
USUAL_FIRST_RATES = (0.02, 4e-3)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", nargs="+", choices=EXAMPLES, default=EXAMPLES)
    parser.add_argument("--jobs", type=int, default=2, help="methods at once, of one thread each")
    parser.add_argument("--json", type=Path, help="read and continue the results here")
    parser.add_argument("--plots", type=Path, help="folder of pictures, an SVG for each example")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())["results"]
    wanted = [f"{name} {method}" for name in options.examples for method in METHODS]
    with ProcessPoolExecutor(options.jobs) as pool:
        runs = {pool.submit(measure, key): key for key in wanted if key not in found}
        for future in as_completed(runs):
            found[runs[future]] = future.result()
            print(runs[future], found[runs[future]]["lr"], found[runs[future]]["losses"])
            if options.json:
                write_json(options.json, found)
    if options.plots:
        for name in options.examples:
            rows = {method: found[f"{name} {method}"] for method in METHODS}
            shown = {m: Run(row["curve"], row["state_bytes"]) for m, row in rows.items()}
            plot(options.plots / f"{name}.svg", example(name).TITLE, shown)


def example(name: str) -> Any:
    """The module."""
    return importlib.import_module(f"lowbit_muon.examples.{name}")


def measure(key: str) -> dict[str, Any]:
    """The rates that were tried for "EXAMPLE METHOD", and how the best one trains."""
    torch.set_num_threads(1)
    name, method = key.split()
    module = example(name)
    first = FIRST_RATES.get(name, USUAL_FIRST_RATES)[method == "adamw"]

    def train(lr: float, seed: int) -> Run:
        return module.train(method, lr, module.STEPS, seed)

    tried = search(first, lambda lr: train(lr, TUNING_SEED).final_loss)
    lr = min(tried, key=tried.__getitem__)
    runs = [train(lr, seed) for seed in SEEDS]
    return {
        "lr": lr,
        "tried": {f"{rate:g}": round(loss, 4) for rate, loss in sorted(tried.items())},
        "steps": module.STEPS,
        "losses": [round(run.final_loss, 4) for run in runs],
        "state_bytes": runs[0].state_bytes,
        "curve": [round(loss, 4) for loss in runs[0].losses],
    }


def search(first: float, loss: Callable[[float], float]) -> dict[float, float]:
    """The losses of rates, doubled and halved until both neighbours of the best were tried."""
    tried = {first: loss(first)}
    while True:
        best = min(tried, key=tried.__getitem__)
        missing = [rate for rate in (best / 2, best * 2) if rate not in tried]
        if not missing:
            return tried
        tried |= {rate: loss(rate) for rate in missing}


if __name__ == "__main__":
    main()
