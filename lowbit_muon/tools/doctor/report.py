"""What a diagnosis leaves behind: a table, JSON, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.tools.console import KIB, Column, make_table, printable, show_table
from lowbit_muon.tools.doctor.examine import Examined
from lowbit_muon.tools.doctor.findings import findings, matrices
from lowbit_muon.tools.doctor.needs import EXPLANATION as NEEDS_EXPLANATION
from lowbit_muon.tools.doctor.needs import needs_table
from lowbit_muon.tools.output import write_json, write_plot
from lowbit_muon.tools.plan.plans import Plan

_COLUMNS = (
    Column("matrix", text=True), Column("shape"), Column("format", text=True),
    Column("bits", wide=True), Column("KiB"), Column("steps"), Column("skipped", wide=True),
    Column("error"), Column("rank"), Column("stable", wide=True), Column("ends", wide=True),
    Column("rule KiB", wide=True),
)  # fmt: skip
_SIZES = ("weights", "gradients", "state", "workspace", "total", "host")
EXPLANATION = """\
error: of the update, relative, from storing the momentum once more; 0 is exact, 1 is as bad as no \
update; ~: without the next gradient, an estimate. Of another rule than Muon's (RULE+FORMAT) it is \
that of Muon's update.
rank: effective rank, of min(rows, columns)."""
WIDE_EXPLANATION = """\
stable: stable rank; ends: share of codes at the ends of the codebook; rule KiB: what the update \
rule keeps beside the momentum."""


def show_needs(plans: Sequence[Plan], console: Console, *, wide: bool) -> None:
    """Print what a run will hold."""
    show_table(console, needs_table(plans, wide=wide), wide=wide)
    console.print(NEEDS_EXPLANATION)


def show(found: Examined, worst: int | None, console: Console, *, wide: bool) -> None:
    """Print the table of one optimizer, what stands out in it, and what to know of it."""
    show_table(console, diagnosis_table(found, worst, wide=wide), wide=wide)
    console.print(EXPLANATION)
    if wide:
        console.print(WIDE_EXPLANATION)
    for line in (*found.remarks, *_aux_lines(found)):
        console.print(line)
    sentences = findings(found.rows)
    console.print("What stands out:" if sentences else "Nothing stands out.")
    for sentence in sentences:
        console.print(f"- {printable(sentence)}")


def diagnosis_table(found: Examined, worst: int | None, *, wide: bool = False) -> Table:
    """A row for each matrix, or for those of the largest errors, and the sums of all."""
    rows = found.rows
    chosen = rows if worst is None else sorted(rows, key=_sort_key, reverse=True)[:worst]
    title = f"{found.optimizer}, {matrices(len(rows))}"
    if len(chosen) < len(rows):
        title += f", {len(chosen)} of the largest errors shown"
    return make_table(title, _COLUMNS, map(_cells, chosen), wide=wide, sums=_sums(rows))


def _sort_key(row: Diagnosis) -> float:
    return -1.0 if row.direction_error is None else row.direction_error


def _cells(row: Diagnosis) -> list[str]:
    exactness = "" if row.with_gradient else "~"
    return [
        printable(row.name),
        f"{row.shape[0]}x{row.shape[1]}",
        row.state_format if row.rule == "muon" else f"{printable(row.rule)}+{row.state_format}",
        f"{row.bits_per_element:.2f}",
        f"{row.nbytes / KIB:,.1f}",
        str(row.steps),
        str(row.skipped),
        "none" if row.direction_error is None else f"{exactness}{row.direction_error:.3f}",
        f"{row.effective_rank:.0f}/{min(row.shape)}",
        f"{row.stable_rank:.1f}",
        "" if row.end_codes is None else f"{row.end_codes:.2%}",
        f"{row.rule_nbytes / KIB:,.1f}",
    ]


def _sums(rows: Sequence[Diagnosis]) -> list[str]:
    """Totals, the bits of all elements together, and the median error."""
    nbytes = sum(row.nbytes for row in rows)
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    errors = [row.direction_error for row in rows if row.direction_error is not None]
    bits = f"{8 * nbytes / elements:.2f}" if elements else ""
    median = f"{statistics.median(errors):.3f}" if errors else ""
    skipped = str(sum(row.skipped for row in rows))
    rule = f"{sum(row.rule_nbytes for row in rows) / KIB:,.1f}"
    sizes = ["", bits, f"{nbytes / KIB:,.1f}", "", skipped]
    return ["all, median error", "", *sizes, median, "", "", "", rule]


def _aux_lines(found: Examined) -> list[str]:
    if not found.aux.parameters:
        return []
    return [
        f"AdamW, not diagnosed: {found.aux.parameters} parameters, {found.aux.nbytes / KIB:,.1f} "
        "KiB of state."
    ]


def write_diagnoses(path: Path, target: str, version: str, examined: Sequence[Examined]) -> None:
    """Write {"lowbit_muon": version, "torch": version, "target": ..., "optimizers": [...]}.

    optimizers, one for each: optimizer (name of the class), remarks and findings (sentences),
    aux_parameters and aux_bytes (of AdamW), matrices (a list of `Diagnosis.to_dict()`), needs (of a
    script's optimizer: rows of optimizer, weights, gradients, state, workspace, total and host, in
    bytes), changes (of torch.optim.Muon: lines of a diff, and sentences).
    """
    write_json(
        path,
        {
            "lowbit_muon": version,
            "torch": torch.__version__,
            "target": target,
            "optimizers": [_as_json(found) for found in examined],
        },
    )


def _as_json(found: Examined) -> dict[str, Any]:
    return {
        "optimizer": found.optimizer,
        "remarks": list(found.remarks),
        "findings": findings(found.rows),
        "aux_parameters": found.aux.parameters,
        "aux_bytes": found.aux.nbytes,
        "matrices": [row.to_dict() for row in found.rows],
        "needs": [
            {"optimizer": plan.name, **{size: getattr(plan, size) for size in _SIZES}}
            for plan in found.needs
        ],
        "changes": list(found.changes),
    }


def plot_diagnoses(path: Path, rows: Sequence[Diagnosis]) -> None:
    """Direction errors and effective ranks, a line for each matrix, with its name.

    Needs matplotlib. The suffix of the path chooses between SVG and PNG.
    """
    from matplotlib.figure import Figure

    # A line of text of 7 points takes a seventh of an inch; so names stay readable for hundreds.
    figure = Figure(figsize=(10, 1.5 + len(rows) / 7), layout="constrained")
    errors, ranks = figure.subplots(1, 2, sharey=True)
    for name in dict.fromkeys(row.state_format for row in rows):
        lines = [i for i, row in enumerate(rows) if row.state_format == name]
        known = [i for i in lines if rows[i].direction_error is not None]
        errors.plot([rows[i].direction_error for i in known], known, "o", label=name, markersize=4)
        shares = [rows[i].effective_rank / max(1, min(rows[i].shape)) for i in lines]
        ranks.plot(shares, lines, "o", markersize=4)
    known_errors = [row.direction_error for row in rows if row.direction_error is not None]
    if known_errors:
        errors.axvline(statistics.median(known_errors), color="0.5", linewidth=1, label="median")
    names = [printable(row.name) for row in rows]
    errors.set_yticks(range(len(rows)), names, fontsize=7, parse_math=False)
    errors.invert_yaxis()
    errors.set_xlabel("direction error")
    ranks.set_xlabel("effective rank / min(rows, columns)")
    for panel in (errors, ranks):
        panel.set_xlim(left=0)
        panel.margins(y=0.5 / max(1, len(rows)))
        panel.grid(alpha=0.3)
    ranks.set_xlim(0, 1)
    figure.legend(loc="outside upper right", ncols=6, fontsize=8)
    write_plot(path, figure)
