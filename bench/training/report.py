"""Tables and curves of the training runs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from bench.training.methods import BASELINE, GRIDS, METHODS, RULE_RATES, bits
from bench.training.models import model_label

Runs = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Row:
    """One method on one model, over seeds, at the learning rate chosen for it; nats a byte."""

    method: str
    lr: float
    losses: dict[int, float]  # final held-out loss by seed
    gaps: dict[int, float]  # loss minus that of its baseline with the same seed
    unit: float | None  # standard deviation of the baseline over seeds
    curves: dict[int, list[list[float]]]
    state_bytes: int

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.losses.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return standard_deviation(self.losses)

    @property
    def gap(self) -> float | None:
        """Mean of the gaps."""
        return statistics.fmean(self.gaps.values()) if self.gaps else None

    @property
    def gap_error(self) -> float | None:
        """Standard error of the mean of the gaps."""
        spread = standard_deviation(self.gaps)
        return None if spread is None else spread / len(self.gaps) ** 0.5


def final_loss(run: Mapping[str, Any]) -> float:
    """Held-out loss at the end."""
    return float(run["curve"][-1][1])


def label(run: Mapping[str, Any]) -> str:
    """The run's model, with its size where that is not the usual one."""
    return model_label(run["model"], run["width"], run["layers"])


def best_rates(runs: Runs) -> dict[tuple[str, str], float]:
    """(model, method) -> the rate with the lowest loss of seed 0, of methods that are tuned."""
    found: dict[tuple[str, str], dict[float, float]] = {}
    for run in runs.values():
        if run["seed"] == 0 and run["method"] in GRIDS:
            found.setdefault((label(run), run["method"]), {})[run["lr"]] = final_loss(run)
    return {
        key: min(losses, key=lambda lr: (math.isnan(losses[lr]), losses[lr]))
        for key, losses in found.items()
    }


def rows(runs: Runs, model: str) -> list[Row]:
    """A row for each method that was run on the model, in the order of `METHODS`."""
    rates = best_rates(runs)
    chosen: dict[str, dict[int, Mapping[str, Any]]] = {}
    for name, method in METHODS.items():
        rate = rates.get((model, method.tuned_as))
        for run in runs.values():
            same = (label(run), run["method"]) == (model, name)
            if same and (rate is None or run["lr"] == rate):
                chosen.setdefault(name, {})[run["seed"]] = run
    losses = {
        name: {seed: final_loss(run) for seed, run in by_seed.items()}
        for name, by_seed in chosen.items()
    }
    made = []
    for name, by_seed in chosen.items():
        baseline = losses.get(METHODS[name].baseline, {})
        first = next(iter(by_seed.values()))
        made.append(
            Row(
                method=name,
                lr=first["lr"],
                losses=losses[name],
                gaps={
                    seed: x - baseline[seed] for seed, x in losses[name].items() if seed in baseline
                },
                unit=standard_deviation(baseline),
                curves={seed: run["curve"] for seed, run in by_seed.items()},
                state_bytes=first["state_bytes"],
            )
        )
    return made


def standard_deviation(by_seed: Mapping[int, float]) -> float | None:
    """Over seeds; None for fewer than two, nan where one has diverged."""
    if any(map(math.isnan, by_seed.values())):
        return math.nan
    return statistics.stdev(by_seed.values()) if len(by_seed) > 1 else None


def cells(row: Row) -> list[str]:
    """Loss and its standard deviation, gap, gap in units of the baseline's deviation."""
    if row.method == METHODS[row.method].baseline or row.gap is None:
        gap = in_units = ""
    else:
        gap = f"{row.gap:+.4f}"
        in_units = f"{row.gap / row.unit:+.1f}" if row.unit else ""
    spread = "" if row.spread is None else f" ± {row.spread:.4f}"
    return [f"{row.loss:.4f}{spread}", gap, in_units]


def bits_of(method: str) -> str:
    """Bits of momentum an element, or what AdamW's two moments take."""
    stored = bits(METHODS[method])
    if stored is None:
        return "2 x 8" if method.endswith("8bit") else "2 x 32"
    return f"{stored:.2f}"


def table(runs: Runs, model: str) -> Table:
    """All methods on one model."""
    found = Table(title=f"{model}: held-out loss, nats a byte")
    for heading in (
        "method",
        "bits",
        "lr",
        "seeds",
        "loss",
        "sd",
        "gap",
        "gap / sd of full momentum",
    ):
        found.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows(runs, model):
        found.add_row(
            row.method, bits_of(row.method), f"{row.lr:g}", str(len(row.losses)), *cells(row)
        )
    return found


# What the plot shows; the others are in the table. Colours of Okabe and Ito.
PLOTTED = {
    BASELINE: "black",
    "linear8": "#56B4E9",
    "spectral4": "#0072B2",
    "spectral3": "#009E73",
    "spectral2": "#E69F00",
    "mulaw4": "#CC79A7",
    "muonq4, torch's momentum": "#D55E00",
}


def plot(path: Path, runs: Runs) -> None:
    """Curves over bytes seen, and below them the gap to the baseline, seed by seed.

    Lines are means over seeds, bands reach from the lowest to the highest seed.
    """
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(label(run) for run in runs.values()))
    figure = Figure(figsize=(5.5 * len(models), 7), layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False, sharex="col")
    for column, model in enumerate(models):
        made = [row for row in rows(runs, model) if row.method in PLOTTED]
        baseline = next((row.curves for row in made if row.method == BASELINE), {})
        top, below = panels[0][column], panels[1][column]
        for row in made:
            _band(top, row.method, row.curves.values())
            paired = [
                [[x, y - base[1]] for (x, y), base in zip(curve, baseline[seed], strict=True)]
                for seed, curve in row.curves.items()
                if seed in baseline
            ]
            _band(below, row.method, paired)
        top.set_title(f"{model}, {len(baseline)} seeds")
        below.set_xlabel("bytes seen")
    panels[0][0].set_ylabel("held-out loss, nats a byte")
    panels[1][0].set_ylabel(f"minus {BASELINE}, same seed")
    panels[0][0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def plot_rules(path: Path, runs: Runs) -> None:
    """What 4 bits cost under each update rule: `spectral4` minus fp32, mean and standard error."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(label(run) for run in runs.values()))
    made = {
        model: {row.method: row for row in rows(runs, model) if row.gap_error is not None}
        for model in models
    }
    rules = [rule for rule in RULE_RATES if any(f"{rule}, spectral4" in of for of in made.values())]
    figure = Figure(figsize=(3.5 * len(models) + 1.5, 0.25 * len(rules) + 1), layout="constrained")
    for axes, model in zip(
        figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models, strict=True
    ):
        axes.axvline(0, color="black", linewidth=0.8)
        for y, rule in enumerate(rules):
            row = made[model].get(f"{rule}, spectral4")
            if row is not None:
                axes.errorbar(row.gap, y, xerr=row.gap_error, fmt="o", color="#0072B2", capsize=2)
        axes.set_yticks(range(len(rules)), rules)
        axes.set_xlabel("nats a byte above fp32")
        axes.set_title(model)
    figure.axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _band(axes: Any, method: str, curves: Any) -> None:
    """Mean and range over curves of equal x."""
    curves = list(curves)
    if not curves:
        return
    x = [point[0] for point in curves[0]]
    values = [[curve[i][1] for curve in curves] for i in range(len(x))]
    axes.plot(x, [statistics.fmean(v) for v in values], color=PLOTTED[method], label=method)
    axes.fill_between(x, *zip(*[(min(v), max(v)) for v in values], strict=True),
                      color=PLOTTED[method], alpha=0.15, linewidth=0)  # fmt: skip
