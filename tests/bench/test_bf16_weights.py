"""`bench.bf16_weights`: four ways from the same start, continued where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import bf16_weights


def test_quick_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.json"
    bf16_weights.main(["--quick", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert [row["way"] for row in rows] == list(bf16_weights.WAYS)
    unchanged = {row["way"]: row["unchanged"] for row in rows}
    # Every update of a float32 weight is seen, few of a bfloat16 weight rounded to nearest.
    assert unchanged["float32"] < 0.01 < unchanged["stochastic rounding"] < unchanged["to nearest"]
    assert len({row["held_out_loss"] for row in rows}) == len(rows)

    monkeypatch.setattr(bf16_weights, "fine_tune", lambda *_: pytest.fail("done before"))
    bf16_weights.main(["--quick", "--json", str(file)])
    assert json.loads(file.read_text())["results"] == rows


def test_ways_are_the_names_of_options() -> None:
    options = [own for dtype, own in bf16_weights.WAYS.values() if dtype == torch.bfloat16]
    assert options == [{}, {"stochastic_rounding": True}, {"compensation": True}]
