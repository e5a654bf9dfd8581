"""Tables of several processes and of GPUs, by models of them."""

from __future__ import annotations

from typing import Any

from bench.report.markdown import results, table
from bench.scaling.report import is_exact
from lowbit_muon.tools.benchmark.report import significant

SCALING_PROCESSES = (8, 64, 512)


def scaling() -> str:
    """What one of several processes keeps, sends and computes: a model, and how it was checked."""
    found = results("scaling")
    return "\n".join((scaling_table(found, "kimi-k2"), scaling_notes(found)))


def scaling_more() -> str:
    """Of smaller models, and where scaling ends."""
    found = results("scaling")
    tables = (scaling_table(found, name) for name in ("llama3-8b", "llama3-70b", "kimi-k2-stacked"))
    return "\n".join((*tables, scaling_ends(found["models"])))


def scaling_table(found: dict[str, Any], name: str) -> str:
    """One of the models."""
    model = found["models"][name]
    by_design: dict[str, list[dict[str, Any]]] = {}
    for row in model["estimates"]:
        if row["processes"] in SCALING_PROCESSES:
            by_design.setdefault(row["design"], []).append(row)
    lines = []
    for design, rows in by_design.items():
        cells = (
            [significant(row["state_bytes"] / 2**30) for row in rows],
            [significant(row["averaging_bytes"] / 2**30) for row in rows],
            [significant(row["step_bytes"] / 2**30) for row in rows],
            [significant(row["newton_schulz"] / 1e15) for row in rows],
            [f"{100 * row['balance']:.3g}" for row in rows],
        )
        lines.append([design, *map(" / ".join, cells)])
    counts = " / ".join(map(str, SCALING_PROCESSES))
    headings = (
        f"{model['title']}, {counts} GPUs: model, not measured", "state GiB", "averaging sends GiB",
        "step sends GiB", "Newton-Schulz PFLOP", "% of perfect balance",
    )  # fmt: skip
    return table(headings, lines)


def scaling_ends(models: dict[str, Any]) -> str:
    """How far owners scale, and from which number of processes on they pass other designs."""
    kept = {name: model for name, model in models.items() if not name.endswith("stacked")}
    figures = {
        "matrices": lambda model: f"{model['limits']['matrices']:,}",
        "all work over the largest matrix's": (
            lambda model: f"{model['limits']['useful_processes']:,.0f}"
        ),
    }
    rows = [[name, *map(figure, kept.values())] for name, figure in figures.items()]
    for what in next(iter(kept.values()))["crossovers"]:
        firsts = (model["crossovers"][what] for model in kept.values())
        rows.append([what, *("never" if first is None else f"{first:,}" for first in firsts)])
    titles = (model["title"] for model in kept.values())
    return table(("model, not measured: from how many GPUs on", *titles), rows)


def rules_on_paper() -> str:
    """Steps by other update rules against Muon's own, on a GPU and on paper."""
    by_shape: dict[tuple[str, str], list[str]] = {}
    found = results("scaling")["rules"]
    for row in found:
        cells = by_shape.setdefault(("x".join(map(str, row["shape"])), row["format"]), [])
        if row["rule"] == "muon":
            cells.append(f"{1e3 * row['seconds']:.2f}")
        else:
            cells.append(f"{row['relative']:.3f}")
    names = list(dict.fromkeys(row["rule"] for row in found if row["rule"] != "muon"))
    headings = ("on paper, not measured", "format", "`muon`, ms", *(f"`{n}`, times" for n in names))
    return table(headings, [[*key, *cells] for key, cells in by_shape.items()])


def scaling_notes(found: dict[str, Any]) -> str:
    """The calibration."""
    rows = found["calibration"]["rows"]
    counts = ", ".join(str(row["processes"]) for row in rows)
    exact = "the bytes" if all(map(is_exact, rows)) else "NOT the bytes"

    def times(name: str) -> str:
        return ", ".join(f"{row[name] / rows[0][name]:.2f}" for row in rows)

    where = f"gloo, {found['calibration']['cores']} cores"
    return (
        f"Measured here, {counts} processes ({where}): each sent and kept {exact} that the model "
        f"says. The busiest took {times('cpu_seconds')} of one process's processor time, by the "
        f"model {times('modelled_cpu_seconds')}; the clock said {times('seconds')}, with a load of "
        f"{found['calibration']['load']:.1f} from other programs on those cores; "
        f"by the model, without communication and other programs, {times('modelled_seconds')}.\n"
    )
