"""Tables: in 80 columns nothing is cut and no row is broken but in its names; `--wide` has all."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from rich.table import Table

from lowbit_muon import Diagnosis
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.tools.benchmark.measure import Result
from lowbit_muon.tools.benchmark.report import results_table
from lowbit_muon.tools.commands import COMMANDS
from lowbit_muon.tools.console import TABLE_WIDTH, Column, make_table, show_table
from lowbit_muon.tools.doctor.examine import Examined
from lowbit_muon.tools.doctor.report import diagnosis_table
from lowbit_muon.tools.doctor.saved_state import AuxState
from lowbit_muon.tools.finetune.report import comparison_table
from lowbit_muon.tools.plan.command import plans_table
from lowbit_muon.tools.plan.plans import Plan

LONG = "base_model.model.model.layers.127.self_attn.experts.255.down_proj.lora_A.weight[127]"
LONGEST_RULE = max(RULES, key=len)


def diagnoses(wide: bool) -> Table:
    """Of a large model in its millionth step."""
    row = Diagnosis(
        name=LONG, shape=(151936, 16384), state_format="spectral4", rule=LONGEST_RULE,
        nbytes=1_251_999_744, bits_per_element=4.02, rule_nbytes=2**30, steps=1_000_000,
        skipped=999_999, direction_error=0.153, with_gradient=False, effective_rank=16384.0,
        stable_rank=16384.0, end_codes=0.0154,
    )  # fmt: skip
    rows = [row, replace(row, name="w", rule="muon", direction_error=None, end_codes=None)]
    return diagnosis_table(Examined("MuonWithAuxAdam", rows, AuxState(0, 0), ()), 1, wide=wide)


def plans(wide: bool) -> Table:
    """Of a trillion parameters."""
    size = 2 * 10**12
    rows = [
        Plan(name, 32.0, size, size, size, size, size, size)
        for name in ("torch.optim.AdamW", "spectral4")
    ]
    return plans_table(rows, size, LONGEST_RULE, wide=wide)


def timings(wide: bool) -> Table:
    """Of a matrix that takes minutes, and of one that failed."""
    row = Result(
        "bitsandbytes AdamW8bit", (65536, 65536), None, "cuda", "fp32", "measured",
        seconds=[123.4], median=123.456, spread=12.34, ratio=12345.6, error=1e-4,
        allowed_error=1e-3, state_bytes=2**36, bits_per_element=32.0, work=1e15, bytes=4e14,
        flops=1e15, roof="copy from memory", fraction=12.34,
    )  # fmt: skip
    failed = Result("dequantize", (65536, 65536), "spectral4", "cuda", "fp32", "skipped", "why")
    return results_table([row, failed], wide=wide)


def comparison(wide: bool) -> Table:
    """Of several seeds and the longest names."""
    results = [
        {
            "settings": {"seed": seed}, "held_out_after": 10.0 + seed, "held_out_before": 10.123,
            "state_bytes": 2**36, "peak_memory_bytes": 2**37, "seconds_per_step": 123.45,
        }
        for seed in (0, 1)
    ]  # fmt: skip
    names = ("adamw8bit", f"{LONGEST_RULE}+spectral4")
    return comparison_table(dict.fromkeys(names, results), wide=wide)


# Of each command that prints tables; `info` prints lines.
TABLES = {"doctor": diagnoses, "plan": plans, "bench": timings, "finetune": comparison}


def rendered(table: Table, *, wide: bool) -> list[str]:
    console = Console(file=io.StringIO(), width=200, soft_wrap=True)
    show_table(console, table, wide=wide)
    assert console.width == 200
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return [str(line) for line in text.splitlines()]


def assert_whole(table: Table, lines: list[str]) -> None:
    """Each cell is there: a number as a word of its row's first line, a name over some lines."""
    assert not any("…" in line for line in lines)
    head = next(i for i, line in enumerate(lines) if set(line.strip()) == {"─"})
    for column in table.columns:
        assert str(column.header) in " ".join(lines[:head])
    body = [line for line in lines[head + 1 :] if set(line.strip()) - {"─"}]
    cells = list(zip(*(column.cells for column in table.columns), strict=True))
    for row in cells:
        whole = [
            str(cell) for cell, column in zip(row, table.columns, strict=True)
            if column.no_wrap and cell
        ]  # fmt: skip
        line = body[0]
        # Pieces of names may stand between the numbers.
        numbers = r"\s+(?:\S+\s+)*".join(map(re.escape, whole))
        assert re.search(rf"\s{numbers}\s*$", line), (whole, line)
        names = [str(c) for c, column in zip(row, table.columns, strict=True) if not column.no_wrap]
        body = behind(body, names)
    assert " ".join(" ".join(body).split()) == (table.caption or "")


def behind(body: list[str], names: list[str]) -> list[str]:
    """The lines behind a row, whose pieces, column by column, are these names."""
    left = list(names)
    for number, line in enumerate(body, start=1):
        for piece in line.split():
            for index, name in enumerate(left):
                if name.startswith(piece):
                    left[index] = name[len(piece) :].lstrip()
                    break
        if not any(left):
            return body[number:]
    raise AssertionError(f"not shown: {left}")


@pytest.mark.parametrize("name", TABLES)
def test_tables_fit_eighty_columns_and_lose_nothing(name: str) -> None:
    table = TABLES[name](False)
    lines = rendered(table, wide=False)
    assert max(map(len, lines)) <= TABLE_WIDTH
    assert_whole(table, lines)


@pytest.mark.parametrize("name", TABLES)
def test_wide_tables_have_all_columns_and_a_line_for_each_row(name: str) -> None:
    narrow, wide = TABLES[name](False), TABLES[name](True)
    headings = [[str(column.header) for column in table.columns] for table in (narrow, wide)]
    assert set(headings[0]) < set(headings[1])
    lines = rendered(wide, wide=True)
    assert_whole(wide, lines)
    if name == "doctor":
        assert any(LONG in line for line in lines)


def test_every_command_with_a_table_is_here() -> None:
    assert {*TABLES, "info"} == set(COMMANDS)


def test_the_check_finds_what_is_cut_or_broken() -> None:
    columns = [Column("name", text=True), *(Column(f"number {i}") for i in range(8))]
    table = make_table("too wide", columns, [("w", *["1,234,567,890"] * 8)], wide=False)
    with pytest.raises(AssertionError):
        assert_whole(table, rendered(table, wide=False))
    whole = make_table("", columns[:2], [("w" * 100, "1")], wide=False)
    lines = rendered(whole, wide=False)
    assert_whole(whole, lines)
    with pytest.raises(AssertionError):
        assert_whole(whole, [line.replace("www", "", 1) for line in lines])
