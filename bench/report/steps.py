"""Tables of whole steps: other optimizers, update rules, what memory is enough."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from bench.bf16_weights import HEADINGS, lines
from bench.report.markdown import results, table
from bench.step import FULL, RULE_FORMATS
from lowbit_muon import RULES, UpdateRule


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
    """What a rule keeps beside a momentum: bytes a row, a column, an element, a pair of rows."""
    more, fewer = 4001, 2003
    by_side = [
        _kept_units(rule, *shape, "row", "column") for shape in ((more, fewer), (fewer, more))
    ]
    units = by_side[0]
    if by_side[0] != by_side[1]:
        units = _kept_units(rule, more, fewer, "row or column, whichever are more",
                            "row or column, whichever are fewer")  # fmt: skip
    # (a number for each row beside one for each element does not count)
    largest = max(map(len, units), default=0)
    units = Counter({key: size for key, size in units.items() if len(key) == largest})
    if len(units) == 2 and len(set(units.values())) == 1:
        first, second = sorted(units, reverse=True)
        return f"{units[first]} {_unit(first)} and {_unit(second)}"
    parts = [f"{units[key]} {_unit(key)}" for key in sorted(units, reverse=True)]
    return (", " if len(parts) > 2 else " and ").join(parts)


def _kept_units(
    rule: UpdateRule, rows: int, columns: int, row: str, column: str
) -> Counter[tuple[str, ...]]:
    """(what it has so many bytes of: rows, pairs of a row and a column, ...) -> how many."""
    names = {rows: row, columns: column}
    units: Counter[tuple[str, ...]] = Counter()
    for kept in rule.state((rows, columns)).values():
        sides = tuple(sorted(names[size] for size in kept.shape if size in names))
        others = math.prod(size for size in kept.shape if size not in names)
        units[sides] += others * kept.dtype.itemsize
    return units


def _unit(sides: tuple[str, ...]) -> str:
    if len(sides) < 2:
        return f"a {sides[0]}" if sides else "a matrix"
    if sides[0] != sides[1]:
        return "an element"
    noun, _, rest = sides[0].partition(" ")
    return f"a pair of {noun}s{rest and f' {rest}'}".replace("or column,", "or columns,")


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


def bf16_weights() -> str:
    """A fine-tune of bfloat16 weights by the way that updates are rounded."""
    return table(HEADINGS, lines(results("bf16_weights")))
