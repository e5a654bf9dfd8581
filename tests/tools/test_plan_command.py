"""The `plan` command: sizes, the table, what fits, JSON, and mistakes in one sentence."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from lowbit_muon import RULES
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.plan.command import gibibytes, parse_size, verdict
from lowbit_muon.tools.plan.memory import Plan

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "vocab_size": 300, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30), ("24GB", 24 * 10**9), ("8192MiB", 2**33), ("1.5 TB", 15 * 10**11),
        ("512kib", 2**19), ("100", 100), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 potatoes", "-1GiB", "1e9", "24Gib/s"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 24GiB"):
        parse_size(text)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_table_and_json(
    device: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = [f"--device={device}", "--device-memory=2MiB", f"--json={path}"]
    assert main(["plan", model, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Activations are NOT counted" in shown
    for name in (*PRESETS, "AdamW8bit", "torch.optim.AdamW", "torch.optim.Muon + AdamW"):
        assert f" {name} " in shown
    result = json.loads(path.read_text())
    assert result["parameters"] == 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 128) + 64
    assert result["muon_elements"] + result["aux_elements"] == result["parameters"]
    plans = result["plans"]
    assert [plan["fits"] for plan in plans] == [plan["total"] <= 2**21 for plan in plans]
    for plan in plans:
        parts = ("weights", "gradients", "state", "workspace")
        assert plan["total"] == sum(plan[part] for part in parts)


def test_options_change_what_is_planned(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def plans(*options: str) -> dict[str, dict[str, int]]:
        path = tmp_path / "plan.json"
        assert main(["plan", model, "--device-memory=1GiB", f"--json={path}", *options]) == 0
        return {plan["optimizer"]: plan for plan in json.loads(path.read_text())["plans"]}

    usual = plans()["spectral4"]
    assert plans("--dtype=fp32")["spectral4"]["weights"] == 2 * usual["weights"]
    assert plans("--aux=adamw")["spectral4"]["state"] > usual["state"]
    more = plans("--activations=1GB")["spectral4"]
    assert more["total"] - more["state"] == 10**9 + usual["weights"] + usual["gradients"]
    assert "0.931 GiB as given" in capsys.readouterr().out


def test_a_rule_adds_what_it_keeps_and_its_update(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def result(rule: str) -> dict[str, Any]:
        path = tmp_path / "plan.json"
        arguments = ["--device-memory=1GiB", "--device=cpu", f"--rule={rule}", f"--json={path}"]
        assert main(["plan", model, *arguments]) == 0
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    plain, ours = result("muon"), result("namo_d")
    shown = capsys.readouterr().out
    assert "our formats with rule muon, in GiB" in shown
    assert "our formats with rule namo_d, in GiB" in shown
    before, after = ({plan["optimizer"]: plan for plan in r["plans"]} for r in (plain, ours))
    # A float32 for each column: of four projections of 64, two of 64 and one of 96, in two layers.
    kept = 4 * 2 * (6 * 64 + 96)
    assert (plain["rule_state"], ours["rule_state"]) == (0, kept)
    for name in PRESETS.keys() - {"muonq4"}:
        assert after[name]["state"] - before[name]["state"] == kept
        assert after[name]["workspace"] > before[name]["workspace"]
        assert after[name]["momentum_bits"] == before[name]["momentum_bits"]
    assert after["AdamW8bit"] == before["AdamW8bit"]
    assert "are what namo_d keeps beside the momentum" in shown
    assert plain["refused"] == {}
    refused = ours["refused"]
    assert set(refused) == {"muonq4"} == before.keys() - after.keys()
    assert refused["muonq4"].startswith("rule: 'namo_d' needs the momentum's size")
    assert f"muonq4 is left out: {refused['muonq4']}" in " ".join(shown.split())


def test_an_unknown_rule_is_told_the_known_ones(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", model, "--device-memory=1GiB", "--rule=nomuon"])
    error = capsys.readouterr().err
    assert "argument --rule: invalid choice: 'nomuon'" in error
    for name in RULES:
        assert name in error


def plan(name: str, state: int) -> Plan:
    return Plan(name, 4.0, 2**30, 2**30, state, 0, 0)


def test_verdict_names_the_smallest_and_the_most_exact() -> None:
    plans = [plan("spectral2", 0), plan("spectral4", 2**30), plan("fp32", 2**32)]
    assert verdict(plans, 4 * 2**30) == (
        "Smallest: spectral2, 2.000 GiB. Most exact momentum of our formats that fits: spectral4, "
        "3.000 GiB, 1.000 GiB left."
    )
    assert verdict(plans, 2**30) == (
        "Nothing fits: the smallest, spectral2, takes 2.000 GiB, 1.000 GiB too much."
    )
    assert gibibytes(20 * 2**30) == "20.00"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/does/not/exist"], "MODEL: expected a file or folder that exists, got /does/not/exist"),
        (["{model}", "--json={model}/x.json"], "--json: expected a file that can be written, got"),
        (["{model}", "--json={model}"], "--json: expected a file of its own, got the input"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.format(model=model) for argument in arguments]
    assert main(["plan", *given, "--device-memory=1GiB"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lowbit-muon: {message}")
    assert error.count("\n") == 1


def test_argparse_names_the_argument(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", model, "--device-memory=lots"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "argument --device-memory: expected a size such as 24GiB" in error
    assert "got 'lots'" in error
