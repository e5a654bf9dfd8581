"""What the model says, as tables, as statements where one design passes another, and as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]  # of an `Estimate`
OURS = "ours, bfloat16"
IN_PARTS = "Dion's Muon"  # keeps its momentum in equal parts
GIB = 2**30
TIMES = ("seconds", "modelled_seconds", "cpu_seconds", "modelled_cpu_seconds")


def models_table(models: dict[str, Row]) -> Table:
    """The models, and what ends the scaling of owners."""
    table = Table(title="Models: Muon's matrices", box=None, pad_edge=False)
    for heading in ("", "parameters", "published", "matrices", "largest", "useful processes"):
        table.add_column(heading, justify="left" if not heading else "right")
    for model in models.values():
        limit = model["limits"]
        table.add_row(
            model["title"],
            f"{model['elements']:,}",
            f"{model['published']:,}",
            f"{limit['matrices']:,}",
            "x".join(map(str, limit["largest"])),
            f"{limit['useful_processes']:,.0f}",
        )
    return table


def estimates_table(title: str, rows: Sequence[Row]) -> Table:
    """One model over one number of processes. Model, not measured."""
    table = Table(
        title=f"{title}, {rows[0]['processes']} processes: model, not measured",
        box=None,
        pad_edge=False,
    )
    headings = (
        "", "state GiB", "averaging GiB", "step GiB", "PFLOP", "balance", "of time", "compute ms",
        "communication ms", "KiB to a peer",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    for row in rows:
        table.add_row(
            row["design"],
            *(f"{row[name] / GIB:.3f}" for name in ("state_bytes", "averaging_bytes")),
            f"{row['step_bytes'] / GIB:.3f}",
            f"{row['newton_schulz'] / 1e15:.4f}",
            f"{row['balance']:.1%}",
            f"{row['compute_balance']:.1%}",
            f"{1e3 * row['compute_seconds']:.2f}",
            f"{1e3 * row['communication_seconds']:.2f}",
            f"{row['peer_bytes'] / 1024:,.1f}" if row["peer_bytes"] else "",
        )
    return table


def calibration_table(calibration: Row) -> Table:
    """Measured beside modelled."""
    where = f"gloo, {calibration['cores']} cores, load {calibration['load']:.1f} before"
    title = f"Measured here ({where}): bytes sent by all processes, ms of a step"
    table = Table(title=title, box=None, pad_edge=False)
    kinds = list(calibration["rows"][0]["bytes"])
    for heading in ("processes", *kinds, "as modelled", "ms", "modelled", "CPU ms", "modelled"):
        table.add_column(heading, justify="right")
    for row in calibration["rows"]:
        table.add_row(
            str(row["processes"]),
            *(f"{sum(row['bytes'][kind]):,}" for kind in kinds),
            "yes" if is_exact(row) else "NO",
            *(f"{1e3 * row[name]:.1f}" for name in TIMES),
        )
    return table


def is_exact(row: Row) -> bool:
    """Whether a row of the calibration has the model's bytes, state and owners on all processes."""
    return (
        row["bytes"] == row["modelled_bytes"]
        and row["state_bytes"] == row["modelled_state_bytes"]
        and row["owners_equal"]
    )


def _quicker(ours: dict[int, Row], other: dict[int, Row]) -> Callable[[int], bool]:
    """Whether our step takes less than another design's, by the number of processes."""
    return lambda count: _seconds(ours[count]) < _seconds(other[count])


def crossovers(rows: Sequence[Row]) -> dict[str, int | None]:
    """From which number of processes on, of those modelled, something holds; None: nowhere.

    Only ours is looked at where a model's rows have nothing else.
    """
    by_design: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_design.setdefault(row["design"], {})[row["processes"]] = row
    ours = by_design[OURS]
    last = ours[max(ours)]
    found = {
        "balance below 90%": _from(ours, lambda p: ours[p]["balance"] < 0.9),
        "the busiest process has no less to do": _from(
            {p: row for p, row in ours.items() if p < last["processes"]},
            lambda p: ours[p]["newton_schulz"] == last["newton_schulz"],
        ),
        "communication takes longer than computation": _from(
            ours, lambda p: ours[p]["communication_seconds"] > ours[p]["compute_seconds"]
        ),
    }
    for name, other in by_design.items():
        if name.startswith("ours"):
            continue
        found[f"step quicker than {name}"] = _from(ours, _quicker(ours, other))
    if IN_PARTS in by_design:
        parts = by_design[IN_PARTS]
        found["more state than bfloat16 momentum in equal parts"] = _from(
            ours, lambda p: ours[p]["state_bytes"] > parts[p]["state_bytes"]
        )
    return found


def _seconds(row: Row) -> float:
    """Of a step, nothing at the same time, with what averaging takes beyond FSDP2's half."""
    return row["compute_seconds"] + row["communication_seconds"] + row["extra_averaging_seconds"]


def _from(ours: dict[int, Row], holds: Callable[[int], bool]) -> int | None:
    """The first number of processes from which something holds up to the last."""
    first = None
    for processes in sorted(ours, reverse=True):
        if not holds(processes):
            break
        first = processes
    return first


_STYLES = {
    "ours, float32": ("C0", "-."),
    "ours, bfloat16": ("C0", "-"),
    "ours, int8": ("C0", ":"),
    "ours, DDP": ("C0", "--"),
    "ZeRO-1, fp32": ("C1", "--"),
    "replicated, fp32": ("C3", "--"),
    "all-gather": ("C4", "-"),
    "Dion's Muon": ("C5", "-"),
    "muon-fsdp2": ("C2", "--"),
}


def plot(path: Path, models: dict[str, Row]) -> None:
    """Bytes that a step sends once gradients are averaged, and state, the most of any process.

    Needs matplotlib.
    """
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same file for the same rows
    figure = Figure(figsize=(4 * len(models), 7), layout="constrained")
    panels = figure.subplots(2, len(models), squeeze=False)
    for model, (upper, lower) in zip(models.values(), panels.T, strict=True):
        for design, (color, line) in _STYLES.items():
            rows = [row for row in model["estimates"] if row["design"] == design]
            for panel, figures in ((upper, "step_bytes"), (lower, "state_bytes")):
                shown = [row for row in rows if row[figures]]  # zero has no logarithm
                places = [row["processes"] for row in shown]
                values = [row[figures] / GIB for row in shown]
                panel.plot(places, values, line, color=color, label=design)
        upper.set_title(f"{model['title']}\nmodel, not measured")
        lower.set_xlabel("processes")
        for panel in (upper, lower):
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
    panels[0][0].set_ylabel("GiB that a step sends")
    panels[1][0].set_ylabel("GiB of state")
    handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels) // 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=150, metadata=metadata)
