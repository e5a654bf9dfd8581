"""`bench.preconditioned` and `bench.rule_states`: what they count, on little."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from recordings import recording
from safetensors.torch import save_file

from bench import preconditioned, rule_states
from lowbit_muon import RULES


def test_bytes_and_times_of_preconditioned_rules(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    preconditioned.main(["--quick", "--repeats", "1", "--json", str(file)])
    rows = json.loads(file.read_text())["results"]
    assert set(rows) == set(preconditioned.optimizers())
    assert rows["muon, float32"]["ratio"] == 1
    # Two moments, and two counters of four bytes; a momentum; and V, two bases and two factors.
    elements = 24 * 40
    assert rows["adamw"]["bytes"] == pytest.approx(8, abs=8 / elements)
    assert rows["muon, float32"]["bytes"] == pytest.approx(4, abs=0.01)
    states = 8 + 8 * (24**2 + 40**2) / elements
    assert rows["soap, float32"]["bytes"] == pytest.approx(states, abs=0.02)
    for rule in preconditioned.PRECONDITIONED:
        assert rows[f"{rule}, spectral4"]["bytes"] < 0.5 * rows[f"{rule}, float32"]["bytes"]


def test_states_in_eight_bits_change_updates_a_little(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"soap", "adamuon", "mousse"} <= set(rule_states.rules())
    assert not {"muon", "normuon"} & set(rule_states.rules())
    monkeypatch.setattr(rule_states, "rules", lambda: ["adamuon"])
    file, rows = tmp_path / "recording.safetensors", tmp_path / "rows.json"
    save_file({"one": recording(24)}, str(file))
    rule_states.main(["--recording", str(file), "--json", str(rows)])
    found = json.loads(rows.read_text())["results"]["adamuon"]
    # Roots of second moments are wrong by 2 % (`step.rules.moments`); 4 bits of the sign's argument
    # change more.
    assert 0 < found["8 bits"] < 0.06 < found["spectral4"]
    assert found["bits, 8 bits"] > 32 + 8 > found["bits, both"]
    exact, nbytes = rule_states.updates(RULES["adamuon"].with_state_bits(32), "fp32", recording(24))
    assert exact.shape[0] == 20
    assert nbytes >= 2 * 4 * exact[0].numel()
