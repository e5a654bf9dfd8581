"""The `plan` command: sizes, the table, what fits, JSON, and mistakes in one sentence."""

from __future__ import annotations

import argparse
import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_shapes import write_safetensors
from torch import nn

from lowbit_muon import RULES, MuonWithAuxAdam, attach_gradient_release
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.plan.advice import exact_size, gibibytes, script, verdict
from lowbit_muon.tools.plan.command import parse_size
from lowbit_muon.tools.plan.memory import Routing, layer_input_bytes
from lowbit_muon.tools.plan.plans import Plan, Setup

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
        ("512kib", 2**19), ("24G", 24 * 2**30), ("0.5 m", 2**19), ("7B", 7),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "24", "GiB", "24 potatoes", "-1GiB", "1e9", "24Gib/s"])
def test_bad_sizes(text: str) -> None:
    expected = r"expected a size with its unit, such as 24GiB or 24G \(2\^30 bytes each\), 24GB"
    with pytest.raises(argparse.ArgumentTypeError, match=expected):
        parse_size(text)


@pytest.mark.parametrize("size", [0, 1, 1023, 24 * 2**30, 24 * 10**9, 2**40 + 1, 3 * 2**39])
def test_sizes_in_commands_are_exact(size: int) -> None:
    assert parse_size(exact_size(size)) == size
    assert exact_size(24 * 2**30) == "24GiB"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_table_and_json(
    device: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = [f"--device={device}", "--device-memory=2MiB", f"--json={path}"]
    assert main(["plan", model, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Activations are NOT counted" in shown
    for name in (*PRESETS, "AdamW8bit", "torch.optim.AdamW", "torch.optim.Muon"):
        assert f" {name} " in shown
    result = json.loads(path.read_text())
    assert result["parameters"] == 300 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 96 + 128) + 64
    assert result["muon_elements"] + result["aux_elements"] == result["parameters"]
    plans = result["plans"]
    assert all(len(line) <= 80 for line in shown.splitlines() if not line.startswith("  "))
    assert [plan["fits"] for plan in plans] == [plan["total"] <= 2**21 for plan in plans]
    assert result["change"] is None
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
    assert plans("--aux-adam=adamw")["spectral4"]["state"] > usual["state"]
    assert plans("--gradient-release")["spectral4"]["gradients"] < usual["gradients"]
    assert plans("--compensation")["spectral4"]["state"] > usual["state"]
    offloaded = plans("--offload")["spectral4"]
    assert offloaded["state"] + offloaded["host"] == usual["state"]
    assert plans("--lora=4")["spectral4"]["weights"] > usual["weights"]
    more = plans("--activations=500MB")["spectral4"]
    assert more["total"] - more["state"] == 5 * 10**8 + usual["weights"] + usual["gradients"]
    assert "0.466 GiB as given" in capsys.readouterr().out


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
    # A float32 for each column, and one for how many steps it has been kept: of four projections of
    # 64, two of 64 and one of 96, in two layers.
    kept = 4 * 2 * (6 * 64 + 96 + 7)
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


def test_a_rule_with_numbers_and_layer_inputs(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--device-memory=1GiB", "--rule=newton_muon()", f"--json={path}"]
    assert main(["plan", model, *arguments]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    # Eigenvectors in 8 bits, with a scale and an eigenvalue in float32 for each: of six projections
    # that read 64 columns and one that reads 96, in two layers.
    assert json.loads(path.read_text())["rule_state"] == 2 * sum(
        columns**2 + 8 * columns for columns in (*[64] * 6, 96)
    )
    assert "Layers take turns of 32 steps" in shown
    assert "attach_layer_inputs(model, optimizer)" in shown
    assert 'rule="newton_muon(32)"' in shown
    assert main(["plan", model, *arguments, "--gradient-release"]) == 2
    assert "--gradient-release: expected a rule that does not look" in capsys.readouterr().err


def test_layers_too_wide_to_be_whitened_hold_nothing() -> None:
    narrow, wide = ((64, 100), False), ((100, 10001), False)
    routing = Routing(Counter({narrow: 2, wide: 3}), Counter())
    assert layer_input_bytes(routing, resolve_rule("newton_muon()")) == 2 * 4 * 100**2
    assert layer_input_bytes(routing, RULES["mousse"]) == 0


def test_layer_inputs_of_other_modules_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"stem.conv1.weight": (8, 3, 3, 3)})
    assert main(["plan", str(path), "--device-memory=1GiB", "--rule=newton_muon()"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--rule: expected a rule that does not look at what layers read" in error
    assert "(8, 3, 3, 3)" in error


def test_with_adapters_it_tells_of_them(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    arguments = ["--device-memory=1GiB", "--rule=namo_d", "--lora=4", f"--json={path}"]
    assert main(["plan", model, *arguments]) == 0
    # [4, columns] and [rows, 4] of seven projections in two layers.
    columns, rows = 6 * 64 + 96, 5 * 64 + 2 * 96
    elements = 2 * 4 * (columns + rows)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"Muon takes {elements:,} beside them, adapters, in 28 tensors, they stay" in shown
    found = json.loads(path.read_text())
    assert found["muon_elements"] == elements
    # A float32 for each column, and one for how many steps it has been kept.
    assert found["rule_state"] == 4 * 2 * (columns + 7 * 4 + 14)


def test_an_unknown_rule_is_told_the_known_ones(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["plan", model, "--device-memory=1GiB", "--rule=nomuon"])
    error = capsys.readouterr().err
    assert "argument --rule: expected one of [" in error
    assert "got 'nomuon'" in error
    for name in RULES:
        assert name in error


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = main(arguments)
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--device=cpu", "--activations=1KB"], ["--dtype=fp32", "--aux-adam=adamw"]]
)
def test_the_command_that_is_printed_plans_what_fits(
    options: list[str], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A byte less than the smallest of the table is too little without a change."""
    path = tmp_path / "plan.json"
    given = ["plan", model, *options, f"--json={path}"]
    assert run([*given, "--device-memory=1GiB"], capsys)[0] == 0
    memory = json.loads(path.read_text())["plans"][0]["total"] - 1
    status, shown = run([*given, f"--device-memory={memory}B"], capsys)
    assert status == 1
    assert "Nothing fits: the smallest, " in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("  lowbit-muon plan "))
    assert "Smallest change after which something fits: " in " ".join(shown.split())
    change = json.loads(path.read_text())["change"]
    assert change["command"] == line.strip()
    status, shown = run([*shlex.split(line)[1:], f"--json={path}"], capsys)
    assert status == 0
    (row,) = (each for each in json.loads(path.read_text())["plans"]
              if each["optimizer"] == change["optimizer"])  # fmt: skip
    assert row["fits"]
    assert row["total"] == change["total"]
    assert f'state_format="{row["optimizer"]}"' in shown


def test_activations_that_are_too_many_are_told_their_limit(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", model, "--device-memory=8MiB", "--activations=9MiB"]
    status, shown = run(given, capsys)
    assert status == 1
    assert "GiB of activations: measure them with activation checkpointing" in " ".join(
        shown.split()
    )
    (line,) = (line for line in shown.splitlines() if line.startswith("  lowbit-muon plan "))
    assert run(shlex.split(line)[1:], capsys)[0] == 0


def test_what_nothing_helps_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown = run(["plan", model, "--device-memory=1KiB"], capsys)
    assert status == 1
    assert "Neither does anything with gradient release, offload, bf16 and LoRA" in shown
    assert "lowbit-muon plan " not in shown


@pytest.mark.parametrize(
    "setup",
    [
        Setup(gradient_release=True, offload=True, rule=RULES["normuon"]),
        Setup(compensation=True, aux_adam="adamw"),
        Setup(lora=4),
    ],
)
def test_the_lines_of_a_script_train(setup: Setup) -> None:
    peft = pytest.importorskip("peft")
    model: Any = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    names = {
        "torch": torch, "model": model, "peft": peft, "MuonWithAuxAdam": MuonWithAuxAdam,
        "attach_gradient_release": attach_gradient_release,
    }  # fmt: skip
    if setup.aux_adam == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    for line in script(setup, plan("spectral4", 0), converts=True):
        exec(line, names)
    model, optimizer = names["model"], names["optimizer"]
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    for _ in range(2):  # the first factor of an adapter has no gradient while the second is zero
        model(torch.tensor([1, 2])).float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(p, old) for p, old in zip(trained, before, strict=True))
    assert trained[0].dtype == (torch.float32 if setup.lora else torch.bfloat16)
    (group,) = (g for g in optimizer.param_groups if g["use_muon"])
    assert group["offload"] == setup.offload
    assert group["compensation"] == setup.compensation
    assert optimizer.aux_adam == setup.aux_adam


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
    sizes = [gibibytes(size * 2**30) for size in (1, 20, 1250, 10**4)]
    assert sizes == ["1.000", "20.00", "1,250", "10,000"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/does/not/exist"], "MODEL: expected a file or folder that exists, got /does/not/exist"),
        (["{model}", "--json={model}/x.json"], "--json: expected a file that can be written, got"),
        (["{model}", "--json={model}"], "--json: expected a file of its own, got the input"),
        (["{model}", "--offload", "--device=cpu"], "--offload: expected --device cuda, got cpu"),
        (["{model}", "--compensation", "--dtype=fp32"], "--compensation: expected bf16 weights"),
        (["{model}", "--compensation", "--lora=8"], "--compensation: expected bf16 weights"),
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
    assert "argument --device-memory: expected a size with its unit, such as 24GiB" in error
    assert "got 'lots'" in error
