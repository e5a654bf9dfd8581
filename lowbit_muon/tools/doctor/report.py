"""What a diagnosis leaves behind: a table, JSON, a plot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.tools.console import KIB, make_table, printable
from lowbit_muon.tools.doctor.examine import Examined
from lowbit_muon.tools.doctor.findings import findings, matrices
from lowbit_muon.tools.output import write_json, write_plot

_HEADINGS = (
    "matrix", "shape", "format", "bits", "KiB", "steps", "skipped", "error", "rank", "stable",
    "ends",
)  # fmt: skip
# Of tables with another rule than Muon's.
_RULE_HEADINGS = ("rule", "rule KiB")
_RULE_WIDTH = 36  # of both, with the longest name
RULE_EXPLANATION = """\
rule KiB: what the update rule keeps beside the momentum; errors are those of Muon's update."""
EXPLANATION = """\
error: of the update, relative, from storing the momentum once more; 0 is exact, 1 is as bad as no \
update; ~: without the next gradient, an estimate.
rank: effective rank, of min(rows, columns); stable: stable rank; ends: share of codes at the ends \
of the codebook."""
_SHORTEST_NAME = 24  # of the column of names, which is folded on a narrow terminal
_LEAST_WIDTH = 108  # with names of this width, all other columns fit
_NO_LIMIT = 1000  # where there is no terminal; a table is as wide as it needs


def show(found: Examined, worst: int | None, console: Console) -> None:
    """Print the table of one optimizer, what stands out in it, and what to know of it."""
    least = _LEAST_WIDTH + (_RULE_WIDTH if _names_rules(found.rows) else 0)
    console.width = max(console.width, least) if console.is_terminal else _NO_LIMIT
    console.print(diagnosis_table(found, worst))
    console.print(EXPLANATION)
    if _names_rules(found.rows):
        console.print(RULE_EXPLANATION)
    for line in (*found.remarks, *_aux_lines(found)):
        console.print(line)
    sentences = findings(found.rows)
    console.print("What stands out:" if sentences else "Nothing stands out.")
    for sentence in sentences:
        console.print(f"- {printable(sentence)}")


def diagnosis_table(found: Examined, worst: int | None) -> Table:
    """A row for each matrix, or for those of the largest errors, and the sums of all."""
    rows = found.rows
    chosen = rows if worst is None else sorted(rows, key=_sort_key, reverse=True)[:worst]
    title = f"{found.optimizer}, {matrices(len(rows))}"
    if len(chosen) < len(rows):
        title += f", {len(chosen)} of the largest errors shown"
    with_rules = _names_rules(rows)
    headings = _HEADINGS + (_RULE_HEADINGS if with_rules else ())
    table = make_table(title, headings, ("shape", "format", "rule"), wrap=False, box=SIMPLE_HEAD)
    table.pad_edge = False
    names = table.columns[0]
    names.overflow, names.min_width, names.no_wrap = "fold", _SHORTEST_NAME, False
    for row in chosen:
        table.add_row(*_cells(row), *(_rule_cells(row) if with_rules else ()))
    table.add_section()
    sums = _sums(rows)
    if with_rules:
        kept = sum(row.rule_nbytes for row in rows)
        sums += [""] * (len(headings) - 1 - len(sums)) + [f"{kept / KIB:,.1f}"]
    table.add_row(*sums)
    return table


def _names_rules(rows: Sequence[Diagnosis]) -> bool:
    return any(row.rule != "muon" for row in rows)


def _sort_key(row: Diagnosis) -> float:
    return -1.0 if row.direction_error is None else row.direction_error


def _cells(row: Diagnosis) -> list[str]:
    exactness = "" if row.with_gradient else "~"
    return [
        printable(row.name),
        f"{row.shape[0]}x{row.shape[1]}",
        row.state_format,
        f"{row.bits_per_element:.2f}",
        f"{row.nbytes / KIB:,.1f}",
        str(row.steps),
        str(row.skipped),
        "none" if row.direction_error is None else f"{exactness}{row.direction_error:.3f}",
        f"{row.effective_rank:.0f}/{min(row.shape)}",
        f"{row.stable_rank:.1f}",
        "" if row.end_codes is None else f"{row.end_codes:.2%}",
    ]


def _rule_cells(row: Diagnosis) -> list[str]:
    return [printable(row.rule), f"{row.rule_nbytes / KIB:,.1f}"]


def _sums(rows: Sequence[Diagnosis]) -> list[str]:
    """Totals, the bits of all elements together, and the median error."""
    nbytes = sum(row.nbytes for row in rows)
    elements = sum(row.shape[0] * row.shape[1] for row in rows)
    errors = [row.direction_error for row in rows if row.direction_error is not None]
    bits = f"{8 * nbytes / elements:.2f}" if elements else ""
    median = f"{statistics.median(errors):.3f}" if errors else ""
    skipped = str(sum(row.skipped for row in rows))
    return ["all, median error", "", "", bits, f"{nbytes / KIB:,.1f}", "", skipped, median]


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
    aux_parameters and aux_bytes (of AdamW), matrices (a list of `Diagnosis.to_dict()`).
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
