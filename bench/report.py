"""The tables of measurements in README.md, bench/results/README.md and the guides.

    python -m bench.report          writes them between the markers, from bench/results/*.json

A marker is <!-- report: NAME -->, up to <!-- /report -->; a test holds the files to the results.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.fidelity import FIGURES, pareto_front
from bench.gallery import EXAMPLES as GALLERY
from bench.gpu.roofline import markdown as paper
from bench.predictors import agreement
from bench.scaling.report import is_exact
from bench.step import FULL, RULE_FORMATS
from bench.training.methods import BASELINE, METHODS, RULE_RATES, SHIFTS, shifted
from bench.training.report import Row, bits_of, cells, label
from bench.training.report import rows as training_rows
from bench.versions import TESTS
from lowbit_muon import PRESETS, RULES, UpdateRule
from lowbit_muon.examples.common import LABELS as GALLERY_LABELS
from lowbit_muon.examples.common import METHODS as GALLERY_METHODS
from lowbit_muon.tools.benchmark.report import significant

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
# The figures that users look for first, and all of them.
FILES = (
    ROOT / "README.md",
    RESULTS / "README.md",
    *sorted((ROOT / "lowbit_muon" / "guides").glob("*.md")),
)
ISAS = ("baseline", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx")
SIZES = ("64", "256", "576", "1024", "2048")  # rows of README's orthogonalised matrices
WIDTHS = (64, 128, 256)  # of the recorded GPTs
SHIFT_RUNS = ("training", "training_shifts", "training_modern")
_BLOCK = re.compile(r"(<!-- report: (\w+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)


def results(name: str) -> Any:
    """The results of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


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


def step() -> str:
    """One optimizer step, in ratios: ours first, then the others, quickest first."""
    usual, wide, amx, without_bf16, avx2 = (
        step_rows(f"step{case}") for case in ("", "_1024x4096", "_amx", "_without_bf16", "_avx2")
    )
    largest = max(rows * columns for rows, columns in results("step")["shapes"])
    rows = [
        [
            f"ours, {name}" if ours else name,
            ratio(row),
            ratio(wide.get((ours, name))),
            ratio(amx.get((ours, name))),
            *(full_ratio(table, (ours, name)) for table in (without_bf16, avx2)),
            f"{row['state_bytes'] / 2**20:.1f}",
            f"{row['peak_bytes'] / (4 * largest):.1f}",
        ]
        for (ours, name), row in sorted(
            usual.items(), key=lambda item: (-item[0][0], item[1]["median"])
        )
    ]
    headings = (
        "", "x torch.optim.Muon", "1024x4096", "with AMX", "x fp32, without bf16 units",
        "x fp32, AVX2 alone", "state MiB", "peak",
    )  # fmt: skip
    return table(headings, rows) + "".join(step_notes())


def step_rows(name: str) -> dict[tuple[bool, str], dict[str, Any]]:
    """(whether it is ours, what it is called) -> row that was timed."""
    found = {}
    for row in results(name)["rows"]:
        if row["median"] is not None:
            stored = ', `ns_input="stored"`' if "stored" in row["name"] else ""
            ours = row["format"] is not None
            found[ours, f"`{row['format']}`{stored}" if ours else row["name"]] = row
    return found


def full_ratio(rows: dict[tuple[bool, str], dict[str, Any]], key: tuple[bool, str]) -> str:
    """To the time of the iteration in float32; "" for a row that is not there."""
    return f"{rows[key]['median'] / rows[False, FULL]['median']:.2f}" if key in rows else ""


def ratio(row: dict[str, Any] | None) -> str:
    """To torch.optim.Muon's time, which has none itself; "" for a row that is not there."""
    if row is None:
        return ""
    return "1.00" if row["ratio"] is None else f"{row['ratio']:.2f}"


def step_notes() -> list[str]:
    """Why some optimizers have no row."""
    rows = [row for row in results("step")["rows"] if row["median"] is None]
    lines = [f"- {row['name']}: {row['status']}: {row['detail']}\n" for row in rows]
    return ["\nNot timed:\n\n", *lines] if lines else []


def rules() -> str:
    """Every update rule: what it changes, what it keeps, and its time relative to Muon's."""
    times = {(row["name"].removeprefix("step, "), row["format"]): row["median"]
             for row in results("step_rules")["rows"]}  # fmt: skip

    def against_muon(name: str, state_format: str) -> str:
        seconds = times.get((name, state_format))
        return "" if seconds is None else f"{seconds / times['muon', state_format]:.2f}"

    rows = [
        [
            f"`{name}`",
            ", ".join(stage_names(rule)),
            kept_bytes(rule),
            *(against_muon(name, each) for each in RULE_FORMATS),
        ]
        for name, rule in RULES.items()
    ]
    headings = ("", "stages", "state", *(f"time, `{name}`" for name in RULE_FORMATS))
    return table(headings, rows)


def stage_names(rule: UpdateRule) -> list[str]:
    """The stages in which a rule differs from Muon, then its options."""
    values = rule.to_dict()
    stages = [values[field] for field in values if field not in ("name", "options")]
    kinds = [each for stage in stages for each in (stage if isinstance(stage, list) else [stage])]
    return [f"`{stage['kind']}`" for stage in kinds] + [
        f"{name} {value}" for name, value in values.get("options", {}).items()
    ]


def kept_bytes(rule: UpdateRule) -> str:
    """What a rule keeps beside a momentum: bytes a row, a column, an element or a matrix."""

    def found(rows: int, columns: int) -> int:
        kept = rule.state((rows, columns)).values()
        return sum(math.prod(each.shape) * each.dtype.itemsize for each in kept)

    more, fewer = 4001, 2003
    tall, wide = found(more, fewer), found(fewer, more)
    if not tall:
        return ""
    if tall == wide and tall % (more + fewer) == 0:
        return f"{tall // (more + fewer)} a row and a column"
    for of_tall, of_wide, unit in (
        (more * fewer, more * fewer, "an element"),
        (more, more, "a row or column, whichever are more"),
        (fewer, fewer, "a row or column, whichever are fewer"),
        (more, fewer, "a row"),
        (fewer, more, "a column"),
    ):
        # (a number for each row beside one for each element does not count)
        if tall >= of_tall and abs(tall / of_tall - wide / of_wide) < 0.01:
            return f"{tall / of_tall:.2g} {unit}"
    return f"{tall} a matrix"


def kernel_rows(name: str) -> list[dict[str, Any]]:
    """The timed rows of a benchmark of kernels at the highest level; torch's belong to any."""
    rows = [row for row in results(name) if row["median"] is not None]
    levels = {row["isa"] for row in rows}
    highest = max((isa for isa in levels if isa in ISAS), key=ISAS.index)
    return [row for row in rows if row["isa"] in (None, highest)]


def with_most_threads(rows: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(shape, name) -> row on as many threads as any."""
    most = max(row["threads"] for row in rows)
    return {(shape(row), row["name"]): row for row in rows if row["threads"] == most}


def shape(row: dict[str, Any]) -> str:
    """As in "1024x4096"."""
    return "x".join(map(str, row["shape"]))


def of_roof(row: dict[str, Any]) -> str:
    """The share of its roof that a row reaches, in brackets."""
    return "" if row["fraction"] is None else f" ({row['fraction']:.0%})"


def by_shape(
    found: dict[tuple[str, str], dict[str, Any]],
    shapes: Sequence[str],
    names: Sequence[str],
    cell: Callable[[dict[str, Any]], str],
) -> str:
    """A table of cells, a column for each shape."""

    def text(of: str, name: str) -> str:
        return cell(found[of, name]) if (of, name) in found else ""

    return table(("", *shapes), ([name, *(text(of, name) for of in shapes)] for name in names))


def lut_gemm() -> str:
    """Products of codes, times as fast as torch.mm of the decoded matrix (share of their roof)."""
    found = with_most_threads(kernel_rows("lut_gemm"))
    shapes = list(dict.fromkeys(of for of, _ in found))
    names = dict.fromkeys(name for (_, name), row in found.items() if row["ratio"] is not None)
    return by_shape(found, shapes, list(names), lambda row: f"{1 / row['ratio']:.1f}{of_roof(row)}")


ISA_SHAPE = "1024x4096"


def isas() -> str:
    """Products of codes by instruction set and threads, times as fast as torch.mm (of roof)."""
    rows = [r for r in results("lut_gemm") if r["ratio"] is not None and shape(r) == ISA_SHAPE]
    ours = {(r["name"], r["isa"], r["threads"]): r for r in rows if r["isa"] in ISAS}
    columns = sorted(
        {(isa, threads) for _, isa, threads in ours}, key=lambda key: (ISAS.index(key[0]), key[1])
    )
    headings = (f"{isa}, {threads}" for isa, threads in columns)
    return table(
        ("level, threads", *headings),
        (
            [name, *(_cell(ours.get((name, *column))) for column in columns)]
            for name in dict.fromkeys(name for name, _, _ in ours)
        ),
    )


def _cell(row: dict[str, Any] | None) -> str:
    return "" if row is None else f"{1 / row['ratio']:.1f}{of_roof(row)}"


def orthogonalize() -> str:
    """Times the time of the plain float32 iteration (share of their roof)."""
    found = with_most_threads(kernel_rows("orthogonalize"))
    shapes = [of for of in dict.fromkeys(of for of, _ in found) if of.split("x")[0] in SIZES]
    names = dict.fromkeys(
        name
        for (_, name), row in found.items()
        if row["ratio"] is not None and not name.startswith("X")
    )
    return by_shape(found, shapes, list(names), lambda row: f"{row['ratio']:.2f}{of_roof(row)}")


def codec() -> str:
    """Throughput against a copy of as many bytes, matrices from memory, by number of threads."""
    rows = [row for row in kernel_rows("codec") if row["ratio"] is not None]
    first = shape(rows[0])
    cells: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        operation, cache, *peer = row["name"].split()
        if cache == "cold" and shape(row) == first:
            name = " ".join([f"`{row['format']}`" if row["format"] else "nf4", *peer])
            by_operation = cells.setdefault(name, {"quantize": [], "dequantize": []})
            by_operation[operation].append(f"{1 / row['ratio']:.2f}{of_roof(row)}")
    return table(
        ("", "quantise", "dequantise"),
        ([name, *map(", ".join, found.values())] for name, found in cells.items()),
    )


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


def machine() -> str:
    """What the machine does at most, by number of threads: G operations, or GB, a second."""
    rows = results("machine")
    threads = sorted({row["threads"] for row in rows})
    speeds = {
        (row["name"], row["threads"]): f"{row['work'] / row['median'] / 1e9:,.0f}" for row in rows
    }
    return table(
        ("threads", *map(str, threads)),
        (
            [name, *(speeds.get((name, count), "") for count in threads)]
            for name in dict.fromkeys(row["name"] for row in rows)
        ),
    )


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
        for rows in models.values():
            full, coded = rows.get(rule), rows.get(f"{rule}, spectral4")
            if full is None or coded is None or len(coded.gaps) < 2:
                cells_of += [""] * 3
            else:
                cells_of += [f"{full.lr:g}", f"{full.loss:.4f} ± {full.spread:.4f}", gap(coded)]
        if any(cells_of):
            lines.append([f"`{rule}`", *cells_of])
    figures = ("lr", "`fp32`", "`spectral4` minus `fp32`")
    return table(("", *(f"{model}: {each}" for model in models for each in figures)), lines)


def gap(row: Row) -> str:
    """Mean difference to the baseline, its standard error and the seeds that both have."""
    error = "" if row.gap_error is None else f" ± {row.gap_error:.4f}"
    return "" if row.gap is None else f"{row.gap:+.4f}{error} ({len(row.gaps)})"


def memory_limits() -> str:
    """Which fine-tunes complete under which limit of the address space."""
    rows = results("memory_limits")["rows"]
    limits = sorted({row["limit_gib"] for row in rows if row["limit_gib"]}, reverse=True)
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of_name = {row["limit_gib"]: row for row in rows if row["name"] == name}
        free = of_name[0]
        figures = ("state_bytes", "gradient_bytes", "peak_resident_bytes")
        done = ("yes" if of_name[limit]["completed"] else "no" for limit in limits)
        lines.append([name, *(f"{free[figure] / 2**20:,.0f}" for figure in figures), *done])
    headings = ("", "state MiB", "gradients", "peak resident", *(f"{x:g} GiB" for x in limits))
    return table(headings, lines)


def versions() -> str:
    """Tests with other releases of torch and Triton, and the kernels that spill registers there."""
    lines, notes = [], []
    for row in results("versions"):
        counts = [str(row[name]) for name in ("passed", "failed", "skipped")]
        spills = ", ".join(f"`{name}` {count}" for name, count in row["spills"].items())
        checkpoint = row["checkpoint"] or "yes"
        lines.append([row["torch"], row["triton"], checkpoint, *counts, spills or "none"])
        pair = f"- torch {row['torch']}, Triton {row['triton']}:"
        left_out = [f"`{path}`" for path in TESTS if path not in row["tests"]]
        if left_out:
            notes.append(f"{pair} without {', '.join(left_out)}\n")
        by_reason: dict[str, list[str]] = {}
        for test, why in row["failures"].items():
            by_reason.setdefault(why, []).append(test)
        notes += [
            f"{pair} failed: `{tests[0]}`"
            + (f" and {len(tests) - 1} more" if tests[1:] else "")
            + f": {why}\n"
            for why, tests in by_reason.items()
        ]
    headings = (
        "torch", "Triton", "import, step, checkpoint", "tests passed", "failed", "skipped",
        "spills",
    )  # fmt: skip
    return table(headings, lines) + "".join(["\n", *notes] if notes else [])


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


BLOCKS: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "fidelity_training": fidelity_training,
    "predictors": predictors,
    "predictor_values": predictor_values,
    "step": step,
    "rules": rules,
    "training": training,
    "training_shifts": training_shifts,
    "training_rules": training_rules,
    "memory_limits": memory_limits,
    "machine": machine,
    "codec": codec,
    "gallery": gallery,
    "lut_gemm": lut_gemm,
    "isas": isas,
    "orthogonalize": orthogonalize,
    "paper": paper,
    "scaling": scaling,
    "scaling_more": scaling_more,
    "rules_on_paper": rules_on_paper,
    "versions": versions,
}


def fill(text: str) -> str:
    """The text with every block written anew. Raises KeyError for a block that is not known."""
    return _BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[4], text)


def blocks(text: str) -> set[str]:
    """The names of the blocks in a text."""
    return {found[2] for found in _BLOCK.finditer(text)}


if __name__ == "__main__":
    for file in FILES:
        file.write_text(fill(file.read_text(encoding="utf-8")), encoding="utf-8")
