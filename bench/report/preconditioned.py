"""Preconditioned rules beside AdamW and Muon: memory, time, loss, and what 8 bits change."""

from __future__ import annotations

from bench.preconditioned import PRECONDITIONED
from bench.report.markdown import results, table
from bench.rule_states import WAYS
from bench.training.methods import wide_states
from bench.training.report import Row, standard_deviation
from bench.training.report import rows as training_rows


def preconditioned() -> str:
    """Bytes an element, time of a step and loss of the small GPT."""
    measured = results("preconditioned")
    trained = {row.method: row for row in training_rows(results("training_rules"), "gpt")}
    names = {"adamw": "adamw", "muon, float32": "muon", "muon, spectral4": "muon, spectral4"}
    for rule in PRECONDITIONED:
        names[f"{rule}, float32"] = wide_states(rule)
        names[f"{rule}, spectral4"] = f"{rule}, spectral4"
    lines = []
    for name, row in measured.items():
        rule, _, kept = name.partition(", ")
        eight = ""
        if kept == "spectral4":
            eight = _difference(trained.get(rule), trained.get(wide_states(rule)))
        figures = f"{row['bytes']:.2f}", f"{row['ratio']:.2f}"
        lines.append([name, *figures, _loss(trained.get(names[name])), eight])
    return table(("", "bytes an element", "time of a step", "loss", "of it by 8 bits"), lines)


def _loss(row: Row | None) -> str:
    if row is None:
        return ""
    seeds = "" if len(row.losses) == 3 else f" ({len(row.losses)})"
    return f"{row.loss:.3f}{seeds}" if row.spread is None else f"{row.loss:.3f} ± {row.spread:.3f}"


def _difference(coded: Row | None, full: Row | None) -> str:
    """Mean over seeds that both have, and its standard error."""
    if coded is None or full is None:
        return ""
    gaps = {s: loss - full.losses[s] for s, loss in coded.losses.items() if s in full.losses}
    error = standard_deviation(gaps)
    mean = sum(gaps.values()) / len(gaps)
    return f"{mean:+.3f}" + ("" if error is None else f" ± {error / len(gaps) ** 0.5:.3f}")


def rule_states() -> str:
    """Relative errors of updates if states beside the momentum have 8 bits, and the momentum 4."""
    lines = [
        [f"`{name}`", *(f"{row[way]:.3f}" for way in WAYS)]
        for name, row in results("rule_states").items()
    ]
    return table(("", *WAYS), lines)
