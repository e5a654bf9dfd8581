"""What README says runs, and its table of formats is what the formats take."""

from __future__ import annotations

import re

import documentation
import pytest
import torch

from lowbit_muon import PRESETS, QuantizedMatrix

README = documentation.README.read_text(encoding="utf-8")


def test_the_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    names = documentation.run_python(documentation.README)
    assert isinstance(names["moved"], torch.Tensor)
    assert re.fullmatch(r"\d+ bytes of state\n", capsys.readouterr().out)


def test_the_table_of_formats_is_true() -> None:
    section = README.split("## Formats")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| ([\d., ]+) \|", section, flags=re.MULTILINE)
    stated = {}
    for names, bits in rows:
        formats, values = re.findall(r"`(\w+)`", names), bits.split(", ")
        # One figure stands for all formats of its row.
        for index, name in enumerate(formats):
            stated[name] = float(values[min(index, len(values) - 1)])
    assert set(stated) == set(PRESETS)
    for name, bits in stated.items():
        stored = QuantizedMatrix.zeros(
            (576, 1536), PRESETS[name], seed=0, device=torch.device("cpu")
        )
        assert round(stored.bits_per_element, 2) == bits


def test_tables_are_those_of_the_results() -> None:
    from bench import report

    texts = [file.read_text(encoding="utf-8") for file in report.FILES]
    assert set().union(*map(report.blocks, texts)) == set(report.BLOCKS)
    for text in texts:
        assert report.fill(text) == text, "python -m bench.report writes the new tables"
