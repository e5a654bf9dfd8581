"""Does a low-bit momentum train as well as a full one? Small models, real text, seeds.

    python -m bench.training [--quick] [--json FILE] [--plot FILE]

A byte-level GPT, one of modern kind and a byte-level Llama (`models`), 128 wide or as wide as
--width says, on the King James Bible and Python's standard library (`text`). The learning rate is
tuned with seed 0 for fp32 Muon, for AdamW and for MuonQ's own update rule, over a grid; every other
format trains at fp32's rate, as a replacement has to. All methods of one seed share weights and
order of the data. Runs go to the JSON file as they end, so that an interrupted benchmark goes on
where it stopped, and --plot draws what is there: curves, or with --rules (each update rule with its
own rate, and with `spectral4` at that rate) what 4 bits cost.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from bench.harness import write_json
from bench.training.methods import BASELINE, DEFAULT_METHODS, GRIDS, METHODS
from bench.training.models import LAYERS, MODELS, WIDTH, model_label
from bench.training.report import best_rates, final_loss, plot, plot_rules, table
from bench.training.run import Plan, train

DEFAULT_MODELS = ("gpt", "llama")
QUICK_METHODS = (BASELINE, "spectral4")
Runs = dict[str, dict[str, Any]]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    options = parse(arguments)
    console = Console()
    runs: Runs = {}
    if options.json and options.json.exists():
        runs = json.loads(options.json.read_text())["results"]

    def finished(plan: Plan, result: dict[str, Any]) -> None:
        runs[plan.key] = {**asdict(plan), **result}
        console.print(f"{plan.key}: {final_loss(runs[plan.key]):.4f}")
        if options.json:
            write_json(options.json, runs)

    def plan(model: str, method: str, lr: float, seed: int) -> Plan:
        return Plan(
            model,
            method,
            lr,
            seed,
            options.steps,
            options.held_out_bytes,
            options.evaluations,
            options.width,
            options.layers,
        )

    labels = {m: model_label(m, options.width, options.layers) for m in options.models}
    tuned = {METHODS[name].tuned_as for name in options.methods}
    if not options.quick:
        grid = [
            plan(m, t, lr, 0)
            for m in options.models
            for t in sorted(tuned)
            for lr in options.rates or GRIDS[t]
        ]
        carry_out("learning rates", grid, runs, options.jobs, finished, console)
    rates = best_rates(runs)
    middle = {name: grid[len(grid) // 2] for name, grid in GRIDS.items()}
    seeds = [
        plan(m, name, rates.get((labels[m], as_), middle[as_]), seed)
        for seed in range(options.seeds)
        for m in options.models
        for name in options.methods
        for as_ in [METHODS[name].tuned_as]
    ]
    carry_out("seeds", seeds, runs, options.jobs, finished, console)
    for label in labels.values():
        console.print(table(runs, label))
    if options.plot:
        (plot_rules if options.rules else plot)(options.plot, runs)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options; --quick is 60 steps of two methods, one seed, no tuning."""
    parser = argparse.ArgumentParser(description="held-out loss of each way to store the momentum")
    parser.add_argument("--quick", action="store_true", help="two methods, 60 steps, under 60 s")
    parser.add_argument("--models", type=names(MODELS), default=DEFAULT_MODELS)
    parser.add_argument("--methods", type=names(METHODS), default=DEFAULT_METHODS)
    parser.add_argument("--rules", action="store_true", help="update rules instead, in 4 bits too")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rates", type=numbers, help="to choose from, instead of the usual ones")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--held-out-bytes", type=int, default=65536)
    parser.add_argument("--evaluations", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--json", type=Path, help="read and continue the results here")
    parser.add_argument("--plot", type=Path, help="SVG or PNG")
    options = parser.parse_args(arguments)
    if options.rules:
        options.methods = tuple(name for name, method in METHODS.items() if method.rule)
    if options.quick:
        options.methods, options.seeds, options.steps = QUICK_METHODS, 1, 60
        options.held_out_bytes, options.evaluations = 8192, 2
    return options


def names(known: Iterable[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of a list of names out of `known`; semicolons, since some names have commas."""

    def read(value: str) -> tuple[str, ...]:
        given = tuple(name.strip() for name in value.split(";"))
        unknown = set(given) - set(known)
        if unknown:
            raise argparse.ArgumentTypeError(
                f"expected names out of {'; '.join(known)}, got {'; '.join(sorted(unknown))}"
            )
        return given

    return read


def numbers(value: str) -> tuple[float, ...]:
    """A list of numbers, separated by semicolons as names are."""
    return tuple(float(number) for number in value.split(";"))


def carry_out(
    title: str,
    plans: Iterable[Plan],
    runs: Runs,
    jobs: int,
    finished: Callable[[Plan, dict[str, Any]], None],
    console: Console,
) -> None:
    """Carry out the plans whose results are missing or are of other settings."""
    missing = [plan for plan in dict.fromkeys(plans) if not is_done(plan, runs)]
    context = multiprocessing.get_context("spawn")
    with (
        Progress(console=console, disable=not console.is_terminal) as progress,
        ProcessPoolExecutor(jobs, context) as pool,
    ):
        task = progress.add_task(title, total=len(missing))
        futures = {pool.submit(train, plan): plan for plan in missing}
        for future in as_completed(futures):
            finished(futures[future], future.result())
            progress.advance(task)


def is_done(plan: Plan, runs: Runs) -> bool:
    """Whether the results hold this very plan."""
    found = runs.get(plan.key, {})
    return all(found.get(name) == value for name, value in asdict(plan).items())


if __name__ == "__main__":
    main()
