"""What README says runs, and its table of formats is what the formats take."""

from __future__ import annotations

import re

import documentation
import pytest
import torch

from lowbit_muon import PRESETS, QuantizedMatrix

README = documentation.README.read_text(encoding="utf-8")


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    documentation.run_python(documentation.README)
    assert re.fullmatch(r"\d+ bytes of state\n", capsys.readouterr().out)


def test_it_is_read_in_five_minutes_and_in_this_order() -> None:
    assert 8_000 < len(README.encode()) <= 10_240
    assert re.findall(r"^## (.+)$", README, flags=re.MULTILINE) == [
        "Install", "Use", "Which format?", "Which rule?", "What it costs and saves", "Works with",
        "Status", "When not to use it", "Command line", "How it works",
    ]  # fmt: skip


def stated_bits(text: str) -> dict[str, float]:
    """Format -> bits an element by a table whose rows name one or more formats."""
    stated = {}
    for names, bits in re.findall(r"((?:`\"?\w+\"?`(?:, )?)+)[^|]*\| (\d[\d., ]*?) *\|", text):
        formats, values = re.findall(r"\w+", names), bits.split(", ")
        # One figure stands for all formats of its row.
        for index, name in enumerate(formats):
            stated[name] = float(values[min(index, len(values) - 1)])
    return stated


def test_the_tables_of_formats_are_true() -> None:
    guide = (documentation.ROOT / "lowbit_muon/guides/formats.md").read_text(encoding="utf-8")
    section = README.split("## Which format?")[1].split("\n## ")[0]
    short, whole = stated_bits(section), stated_bits(guide)
    assert set(whole) == set(PRESETS)
    assert len(short) == 5
    for name, bits in [*short.items(), *whole.items()]:
        stored = QuantizedMatrix.zeros(
            (576, 1536), PRESETS[name], seed=0, device=torch.device("cpu")
        )
        assert round(stored.bits_per_element, 2) == bits, name


def test_tables_are_those_of_the_results() -> None:
    from bench import report

    texts = [file.read_text(encoding="utf-8") for file in report.FILES]
    assert set().union(*map(report.blocks, texts)) == set(report.BLOCKS)
    for text in texts:
        assert report.fill(text) == text, "python -m bench.report writes the new tables"
