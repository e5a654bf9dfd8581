"""Tables of losses: formats, spectral shifts, update rules, the examples."""

from __future__ import annotations

from bench.gallery import EXAMPLES as GALLERY
from bench.report.markdown import results, table
from bench.training.methods import BASELINE, METHODS, RULE_RATES, SHIFTS, shifted
from bench.training.report import Row, bits_of, cells, label
from bench.training.report import rows as training_rows
from lowbit_muon import PRESETS
from lowbit_muon.examples.common import LABELS as GALLERY_LABELS
from lowbit_muon.examples.common import METHODS as GALLERY_METHODS

SHIFT_RUNS = ("training", "training_shifts", "training_modern")


def training() -> str:
    """Held-out loss of the small models, and below it what rates and seeds they had."""
    runs = results("training")
    made = {
        model: {row.method: row for row in training_rows(runs, model)} for model in ("gpt", "llama")
    }
    gpt, llama = made["gpt"], made["llama"]
    lines = [
        [f"`{method}`", bits_of(method), *cells(gpt[method]), *cells(llama[method])]
        for method in gpt
    ]
    figures = ("loss ± sd", "gap", "gap / sd")
    headings = [f"{model}: {figure}" for model in ("GPT", "Llama") for figure in figures]
    rates = "; ".join(
        f"{tuned} {gpt[tuned].lr:g} and {llama[tuned].lr:g}"
        for tuned in dict.fromkeys(METHODS[method].tuned_as for method in gpt)
    )
    usual = min(len(row.losses) for row in gpt.values())
    more = [
        f"{len(row.losses)} of `{name}`" for name, row in gpt.items() if len(row.losses) > usual
    ]
    seeds = ", ".join([f"{usual} seeds", *more])
    return f"{table(('', 'bits', *headings), lines)}\nLearning rates: {rates}; {seeds}.\n"


def training_shifts() -> str:
    """What each spectral shift loses against full precision, by model, and what was trained."""
    runs = {name: run for file in SHIFT_RUNS for name, run in results(file).items()}
    # A rate that `fp32` alone has been trained at has no differences to show.
    compared = {(label(run), run["lr"]) for run in runs.values() if run["method"] != BASELINE}
    runs = {name: run for name, run in runs.items() if (label(run), run["lr"]) in compared}
    models = {
        model: {row.method: row for row in training_rows(runs, model)}
        for model in dict.fromkeys(label(run) for run in runs.values())
        if model != "llama"
    }
    widths = {label(run): run["width"] for run in runs.values()}
    lines, notes = [], []
    for name, shifts in SHIFTS.items():
        for shift in shifts:
            found = [
                rows.get(shifted(name, shift).name)
                or (rows.get(name) if PRESETS[name].shift(widths[model]) == shift else None)
                for model, rows in models.items()
            ]
            if any(found):
                lines.append(
                    [f"`{name}`, {shift:g}", *("" if row is None else gap(row) for row in found)]
                )
    for model, rows in models.items():
        steps = next(run["steps"] for run in runs.values() if label(run) == model)
        row = rows[BASELINE]
        notes.append(f"{model} {row.loss:.4f} after {steps} steps at lr {row.lr:g}")
    return f"{table(('', *models), lines)}\n`{BASELINE}`: {'; '.join(notes)}.\n"


def training_rules() -> str:
    """What 4 bits lose under each update rule, by model: those that have been trained."""
    runs = results("training_rules")
    models = {
        model: {row.method: row for row in training_rows(runs, model)}
        for model in dict.fromkeys(label(run) for run in runs.values())
    }
    lines = []
    for rule in RULE_RATES:
        cells_of = []
        for model, rows in models.items():
            full, coded = rows.get(rule), rows.get(f"{rule}, spectral4")
            if full is None or coded is None or len(coded.gaps) < 2:
                cells_of += [""] * 3
            else:
                tried = [
                    run["lr"]
                    for run in runs.values()
                    if (label(run), run["method"], run["seed"]) == (model, rule, 0)
                ]
                end = " (end)" if full.lr in (min(tried), max(tried)) else ""
                loss = f"{full.loss:.4f} ± {full.spread:.4f}"
                cells_of += [f"{full.lr:g}{end}", loss, gap(coded)]
        if any(cells_of):
            lines.append([f"`{rule}`", *cells_of])
    figures = ("lr", "`fp32`", "`spectral4` minus `fp32`")
    return table(("", *(f"{model}: {each}" for model in models for each in figures)), lines)


def gap(row: Row) -> str:
    """Mean difference to the baseline, its standard error and the seeds that both have."""
    error = "" if row.gap_error is None else f" ± {row.gap_error:.4f}"
    return "" if row.gap is None else f"{row.gap:+.4f}{error} ({len(row.gaps)})"


def gallery() -> str:
    """The examples: what each method ends at, seed by seed, at its rate, and its state."""
    found = results("gallery")
    rows = []
    for name in GALLERY:
        made = [found[f"{name} {method}"] for method in GALLERY_METHODS]
        losses = (" and ".join(f"{loss:.3f}" for loss in row["losses"]) for row in made)
        state = (f"{row['state_bytes'] / 1024:,.0f}" for row in made)
        rows.append([f"`{name}`", *losses, *state, *(f"{row['lr']:g}" for row in made)])
    labels = [GALLERY_LABELS[method] for method in GALLERY_METHODS]
    headings = (f"{what} {label}" for what in ("loss,", "KiB,", "rate,") for label in labels)
    return table(("", *headings), rows)
