"""Which measure of a stored momentum's error orders formats as training does?

    python -m bench.predictors [--json FILE] RECORDING...

Every measure compares updates after Newton-Schulz, the momentum stored in every step of a recording
(`bench.capture`), with those of full-precision momentum, over the last 20 steps that have 10 more
after them. E is the difference, O the exact update, G a later gradient. |.| is the Frobenius norm
over all these steps; both halves of a ratio are summed over the matrices first:

    plain             |E| / |O|
    sum of 20         |sum E| / |sum O|: what does not average out
    next step         1 - <O + E, G> / <O, G>, G of the next step: progress lost along it
    next 10           the same with the mean of the next ten gradients
    weighted          E in the singular directions of what was orthogonalised, each with the next
                      ten gradients' mean there as its weight (where it is positive)
    leading rows      of E and O within the leading quarter of the left singular directions
    leading           within the leading quarter on both sides
    next leading      within the leading quarter of the next ten gradients' mean, on both sides
    curvature         |L E R| / |L O R|, L and R the fourth roots of sum G G^T and sum G^T G of all
                      these steps: Shampoo's curvature (arXiv 1802.09568)

Orders are compared pair by pair, where training decided: where the losses of two differ by more
than two standard errors over seeds. Formats are ordered by `results/training.json`, shifts of
`spectral4` and `spectral3` by two experiments: `results/training_shifts.json`, by `bench.training`
itself, and `results/training_shifts_3_layers.json`, by an earlier program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.capture import SHIPPED, load
from bench.closed_loop import MEMORY, Sequence
from bench.harness import write_json
from bench.training.methods import BASELINE, METHODS
from bench.training.report import rows as training_rows
from lowbit_muon import StateFormat, quantize
from lowbit_muon.formats.presets import resolve_format

RESULTS = Path(__file__).with_name("results")
FOLLOWING = 10  # gradients that say where the signal is
TABLE_WIDTH = 160  # that no terminal shows
LEADING = 4  # of min(m, n) directions one in so many
Losses = Mapping[str, Mapping[int, float]]  # name -> seed -> held-out loss


def formats() -> dict[str, StateFormat]:
    """name -> format: all that `bench.training` trains under torch's momentum."""
    return {
        name: resolve_format(method.state_format)
        for name, method in METHODS.items()
        if method.state_format is not None and method.baseline == BASELINE and name != BASELINE
    }


class Signal:
    """What the measures need of one matrix's sequence; all [measured, m, n] or bases of that."""

    def __init__(self, sequence: Sequence) -> None:
        self.exact = sequence.updates
        grads, steps = sequence.grads, sequence.measured
        self.next = grads[steps.start + 1 : steps.stop + 1]
        self.future = torch.stack([grads[t + 1 : t + 1 + FOLLOWING].mean(dim=0) for t in steps])
        self.left, self.right = _directions(sequence.directions)
        self.next_left, self.next_right = _directions(self.future)
        self.weights = _diagonal(_within(self.left, self.future, self.right)).clamp_min(0)
        seen = grads[steps.start : steps.stop + FOLLOWING]
        self.rows = _fourth_root(torch.einsum("tij,tkj->ik", seen, seen))
        self.columns = _fourth_root(torch.einsum("tji,tjk->ik", seen, seen))

    def measures(self, updates: Tensor) -> dict[str, tuple[float, float]]:
        """All of them, of the updates with a stored momentum: what is divided by what."""
        error, exact = updates - self.exact, self.exact
        k = max(1, exact.shape[1] // LEADING)
        left, right = self.left[..., :k], self.right[..., :k]
        next_left, next_right = self.next_left[..., :k], self.next_right[..., :k]

        def lost(grads: Tensor) -> tuple[float, float]:
            return -float((error * grads).sum()), float((exact * grads).sum())

        def sizes(part: Callable[[Tensor], Tensor]) -> tuple[float, float]:
            return float(part(error).norm()), float(part(exact).norm())

        def weighted(x: Tensor) -> Tensor:
            return self.weights.sqrt() * _diagonal(_within(self.left, x, self.right))

        return {
            "plain": sizes(lambda x: x),
            "sum of 20": sizes(lambda x: x.sum(dim=0)),
            "next step": lost(self.next),
            "next 10": lost(self.future),
            "weighted": sizes(weighted),
            "leading rows": sizes(lambda x: left.mT @ x),
            "leading": sizes(lambda x: _within(left, x, right)),
            "next leading": sizes(lambda x: _within(next_left, x, next_right)),
            "curvature": sizes(lambda x: self.rows @ x @ self.columns),
        }


def _directions(matrices: Tensor) -> tuple[Tensor, Tensor]:
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    return left, right.mT


def _within(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    return left.mT @ x @ right


def _diagonal(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1)


def _fourth_root(gram: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(gram.double())
    return (vectors * values.clamp_min(0) ** 0.25 @ vectors.mT).float()


def measure(
    recording: dict[str, Tensor], stored: Mapping[str, StateFormat], console: Console
) -> dict[str, dict[str, float]]:
    """format -> measure -> its value over all the matrices."""
    collected: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in stored}
    for grads in recording.values():
        last = len(grads) - FOLLOWING
        if last < MEMORY:
            raise SystemExit(
                f"expected recordings of at least {MEMORY + FOLLOWING} steps, got {len(grads)}"
            )
        sequence = Sequence.of(grads, range(last - MEMORY, last))
        signal = Signal(sequence)
        for name, f in track(stored.items(), console=console, transient=True):
            updates = sequence.closed(lambda x, f=f: quantize(x, f).dequantize())  # type: ignore[misc]
            collected[name].append(signal.measures(updates))
    return {
        name: {key: pooled(row[key] for row in rows) for key in rows[0]}
        for name, rows in collected.items()
    }


def pooled(fractions: Iterable[tuple[float, float]]) -> float:
    """The sum of what is divided, by the sum of what it is divided by."""
    above, below = zip(*fractions, strict=True)
    return sum(above) / sum(below)


def decided_pairs(losses: Losses) -> list[tuple[str, str]]:
    """(better, worse), where the losses differ by more than two standard errors over seeds."""
    found = []
    for one, other in itertools.combinations(losses, 2):
        seeds = losses[one].keys() & losses[other].keys()
        differences = [losses[other][seed] - losses[one][seed] for seed in sorted(seeds)]
        if len(differences) < 2:
            continue
        mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
        if abs(mean) > 2 * deviation / len(differences) ** 0.5:
            found.append((one, other) if mean > 0 else (other, one))
    return found


def training_orders() -> dict[str, list[tuple[str, str]]]:
    """What training decided: of shifts, in two experiments, and of formats on two models."""

    def results(name: str) -> Any:
        return json.loads((RESULTS / f"{name}.json").read_text())["results"]

    runs = results("training")
    earlier = results("training_shifts_3_layers")["losses"]
    with_shifts = losses({**runs, **results("training_shifts")}, "gpt")
    return {
        "shifts": decided_pairs({n: x for n, x in with_shifts.items() if "spectral4" in n}),
        "shifts, 3 layers": decided_pairs(
            {name: dict(enumerate(x)) for name, x in earlier.items() if name in formats()}
        ),
        **{f"formats, {model}": decided_pairs(losses(runs, model)) for model in ("gpt", "llama")},
    }


def losses(runs: Mapping[str, Any], model: str) -> Losses:
    """Of the formats that are compared here."""
    return {row.method: row.losses for row in training_rows(runs, model) if row.method in formats()}


def in_order(pairs: Iterable[tuple[str, str]], values: Mapping[str, float]) -> int:
    """How many of the pairs (better, worse) have the smaller value first."""
    return sum(values[better] < values[worse] for better, worse in pairs)


def agreement(found: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, list[int]]]:
    """measure -> what was trained -> [pairs in training's order, pairs that training decided]."""
    orders = training_orders()
    return {
        key: {
            what: [in_order(pairs, {name: row[key] for name, row in found.items()}), len(pairs)]
            for what, pairs in orders.items()
        }
        for key in next(iter(found.values()))
    }


def tables(name: str, found: Mapping[str, Mapping[str, float]]) -> list[Table]:
    """Measures by format, and how each agrees with training."""
    agreed = agreement(found)
    first, second = Table(title=name), Table(title=f"{name}: pairs in training's order")
    for table, headings in ((first, agreed), (second, next(iter(agreed.values())))):
        table.add_column("")
        for heading in headings:
            table.add_column(heading, justify="right")
    for row_name, row in found.items():
        first.add_row(row_name, *(f"{row[key]:.3f}" for key in agreed))
    for key, by_order in agreed.items():
        second.add_row(key, *(f"{right} of {pairs}" for right, pairs in by_order.values()))
    return [first, second]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="which error orders formats as training does?")
    parser.add_argument("recordings", type=Path, nargs="*", default=[SHIPPED])
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    console = Console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    results = {}
    for path in options.recordings:
        results[path.stem] = measure(load(path), formats(), console)
        for table in tables(path.stem, results[path.stem]):
            console.print(table)
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
