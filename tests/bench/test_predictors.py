"""The measures of `bench.predictors` on errors that are known, and what it takes for an order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recordings import recording
from safetensors.torch import save_file
from torch import Tensor

from bench import predictors
from bench.closed_loop import Sequence


def values(signal: predictors.Signal, updates: Tensor) -> dict[str, float]:
    return {key: predictors.pooled([part]) for key, part in signal.measures(updates).items()}


def test_measures_of_known_errors() -> None:
    grads = recording(40)
    signal = predictors.Signal(Sequence.of(grads, range(10, 30)))
    exact = signal.exact
    assert all(abs(value) < 1e-5 for value in values(signal, exact).values())
    # Half as large everywhere: half of everything is missing.
    half = values(signal, exact / 2)
    assert half == pytest.approx(dict.fromkeys(half, 0.5), abs=1e-5)
    # Only the last left direction is missing: nothing that leads is.
    last = signal.left[..., -1:]
    found = values(signal, exact - last @ (last.mT @ exact))
    assert found["plain"] > 0.1
    assert found["leading rows"] == pytest.approx(0, abs=1e-5)
    assert found["leading"] == pytest.approx(0, abs=1e-5)


def test_what_averages_out_is_not_in_the_sum() -> None:
    signal = predictors.Signal(Sequence.of(recording(40), range(10, 30)))
    noise = 0.3 * torch.randn_like(signal.exact[0])
    signs = torch.tensor([1.0, -1.0] * 10)[:, None, None]
    found = values(signal, signal.exact + signs * noise)
    assert found["plain"] > 0.1
    assert found["sum of 20"] == pytest.approx(0, abs=1e-5)


def test_pairs_are_decided_by_two_standard_errors() -> None:
    losses = {
        "good": {0: 1.0, 1: 1.1},
        "bad": {0: 1.5, 1: 1.61},  # 0.505 apart, standard error 0.005
        "unsure": {0: 1.3, 1: 1.0},  # 0.1, standard error 0.2
        "alone": {0: 9.0},
    }
    pairs = predictors.decided_pairs(losses)
    assert ("good", "bad") in pairs
    assert not any("alone" in pair or set(pair) == {"good", "unsure"} for pair in pairs)
    assert predictors.in_order([("a", "b"), ("c", "b")], {"a": 1.0, "b": 2.0, "c": 2.0}) == 1


def test_shifts_and_formats_that_were_trained_are_measured() -> None:
    orders = predictors.training_orders()
    assert all(orders.values())
    named = {name for pairs in orders.values() for pair in pairs for name in pair}
    assert named <= set(predictors.formats())
    assert predictors.formats()["spectral4, c = 0.1"].spectral_shift == 0.1
    of_4_bits = [pair for pair in orders["shifts, 3 layers"] if "spectral3" not in str(pair)]
    assert len(of_4_bits) == 6  # 0.03, 0.06 and 0.1 before 0.01 and 0.3


def test_command_writes_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, path = tmp_path / "run.safetensors", tmp_path / "out.json"
    save_file({"one": recording(31)}, data)
    predictors.main([str(data), "--json", str(path)])
    assert "leading rows" in capsys.readouterr().out
    found = json.loads(path.read_text())["results"]["run"]
    assert set(found) == set(predictors.formats())
    assert set(predictors.agreement(found)) == set(found["spectral4"])
    save_file({"one": recording(29)}, data)
    with pytest.raises(SystemExit, match="at least 30 steps, got 29"):
        predictors.main([str(data)])
