"""Tables of errors: of recorded gradients, and of what predicts training."""

from __future__ import annotations

import statistics

from bench.fidelity import FIGURES, pareto_front
from bench.predictors import agreement
from bench.report.markdown import results, table
from bench.training.report import rows as training_rows

WIDTHS = (64, 128, 256)  # of the recorded GPTs


def fidelity() -> str:
    """Recorded gradients: stored once, and in every step."""
    formats = results("fidelity")["formats"]
    front = pareto_front(formats)
    rows = [
        [
            f"**`{name}`**" if name in front else f"`{name}`",
            f"{row['bits']:.2f}",
            *(f"{row[figure]:.3f}" for figure in FIGURES),
            f"{row['mean'] / row['once']:.1f}",
        ]
        for name, row in sorted(formats.items(), key=lambda item: item[1]["mean"])
    ]
    headings = ("momentum", "update, once", "in closed loop", "mean of 20 steps", "mean / once")
    return table(("", "bits", *headings), rows)


def predictors() -> str:
    """How each measure of the error in closed loop agrees with training, by width."""
    found = results("predictors")
    agreed = {width: agreement(found[f"gpt{width}"]) for width in WIDTHS}
    first = agreed[WIDTHS[0]]
    rows = []
    for measure, by_order in first.items():
        cells = []
        for what, (_, pairs) in by_order.items():
            right = ", ".join(str(agreed[width][measure][what][0]) for width in WIDTHS)
            cells.append(f"{right} of {pairs}")
        rows.append([measure, *cells])
    return table(("", *next(iter(first.values()))), rows)


def predictor_values() -> str:
    """The measures of each format at two widths, beside what training said."""
    found = results("predictors")
    one, other = (found[f"gpt{width}"] for width in WIDTHS[-2:])
    runs = {**results("training"), **results("training_shifts")}
    gaps = {row.method: row.gap for row in training_rows(runs, "gpt")}
    earlier = {
        name: statistics.fmean(values)
        for name, values in results("training_shifts_3_layers")["losses"].items()
    }
    rows = []
    for name, measures in one.items():
        gap = gaps.get(name)
        trained = (
            "" if gap is None else f"{gap:+.4f}",
            f"{earlier[name] - earlier['fp32']:+.4f}" if name in earlier else "",
        )
        cells = (f"{x:.3f} / {other[name][measure]:.3f}" for measure, x in measures.items())
        rows.append([f"`{name}`", *trained, *cells])
    headings = ("minus `fp32`", "3 layers", *next(iter(one.values())))
    return table(("", *headings), rows)


def fidelity_training() -> str:
    """Momentum of a fine-tune, in closed loop."""
    found = {name: row for name, row in results("fidelity_training").items() if "_" not in name}
    formats = {name: row for name, row in found.items() if isinstance(row, dict)}
    published = formats["muonq4"]["update"]
    rows = []
    for name, row in formats.items():
        # muonq4's own normalisation makes its steps another sequence
        closed = ["", ""] if name == "muonq4" else [f"{row['closed']:.3f}", f"{row['cosine']:.3f}"]
        figures = [f"{row['bits']:.2f}", f"{row['momentum']:.3f}", f"{row['update']:.3f}"]
        rows.append([f"`{name}`", *figures, f"{row['update'] / published:.2f}", *closed])
    return table(("", "bits", "momentum", "update", "x `muonq4`", "closed", "cosine"), rows)
