"""The guides say what is so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import documentation
import pytest
import torch
from documentation import GUIDES, README, ROOT
from torch import nn

from lowbit_muon.tools import cli
from lowbit_muon.tools.plan.advice import gibibytes
from lowbit_muon.tools.plan.memory import route
from lowbit_muon.tools.plan.model_shapes import read_model
from lowbit_muon.tools.plan.plans import Setup, make_plans, our_plans

ids = [guide.stem for guide in GUIDES]
# The fields of Llama-3.1-8B's config.json that sizes depend on.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def save_foreign_checkpoints() -> None:
    """What the guide on replacing other Muons loads: its network's states, as they save them."""
    layer = nn.TransformerEncoderLayer(64, 4, 256)
    network = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    shapes = [param.shape for param in network.parameters()]
    matrices = [shape for shape in shapes if len(shape) >= 2]
    others = [shape for shape in shapes if len(shape) < 2]
    first, second = list(range(len(matrices))), list(range(len(matrices), len(shapes)))
    momenta = {i: {"momentum_buffer": torch.randn(matrices[i])} for i in first}

    def moments(step: str, one: str, two: str) -> dict[int, dict[str, Any]]:
        pairs = zip(second, others, strict=True)
        return {i: {step: 3, one: torch.randn(s), two: torch.rand(s)} for i, s in pairs}

    muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.01, "use_muon": True, "params": first}
    adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.01}
    groups = [muon, {**adam, "use_muon": False, "params": second}]
    states = momenta | moments("step", "exp_avg", "exp_avg_sq")
    torch.save({"state": states, "param_groups": groups}, "kellerjordan.pt")

    group = {
        "lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
        "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "params": first + second,
    }  # fmt: skip
    states = {i: {"use_muon": True, **state} for i, state in momenta.items()} | {
        i: {"use_muon": False, **state}
        for i, state in moments("step", "moment1", "moment2").items()
    }
    torch.save({"state": states, "param_groups": [group]}, "moonlight.pt")


@pytest.mark.parametrize("guide", GUIDES, ids=ids)
def test_the_code_runs(guide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_foreign_checkpoints()
    assert documentation.run_python(guide)


@pytest.mark.parametrize("path", [README, *GUIDES], ids=["README", *ids])
def test_commands_are_understood(path: Path) -> None:
    parser = cli.make_parser()
    for arguments in documentation.commands(path):
        if "..." not in arguments:  # something is left out
            parser.parse_args(cli.split_at_dashes(arguments)[0])


@pytest.mark.parametrize("path", [README, *GUIDES], ids=["README", *ids])
def test_links_lead_somewhere(path: Path) -> None:
    for target in documentation.relative_links(path):
        assert (path.parent / target).is_file(), target


@pytest.mark.parametrize("guide", GUIDES, ids=ids)
def test_the_tests_that_are_named_exist(guide: Path) -> None:
    for file, name in documentation.named_tests(guide):
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), (file, name)


def test_measurements_are_those_of_the_results() -> None:
    from bench import report

    texts = [guide.read_text(encoding="utf-8") for guide in GUIDES]
    named = {
        "bf16_weights", "gallery", "memory_limits", "paper", "preconditioned", "rule_states",
        "rules", "scaling", "training_rules",
    }  # fmt: skip
    assert set().union(*map(report.blocks, texts)) == named
    for text in texts:
        assert report.fill(text) == text


def test_the_plan_is_what_the_planner_says(tmp_path: Path) -> None:
    text = (ROOT / "lowbit_muon" / "guides" / "fit_a_finetune.md").read_text(encoding="utf-8")
    table = text.split("<!-- plan: llama-8b -->")[1].split("<!-- /plan -->")[0]
    stated = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")[3:-1]]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    routing = route(read_model(tmp_path).model)
    plans = {plan.name: plan for plan in make_plans(routing, Setup())}
    released = Setup(gradient_release=True)
    plans |= {
        f"{plan.name}, gradient release": plan
        for plan in our_plans(routing, released, ("spectral4", "spectral2"))
    }
    assert len(stated) > 3
    for name, *sizes in stated:
        plan = plans[name]
        found = (plan.weights, plan.gradients, plan.state, plan.workspace, plan.total)
        assert sizes == [gibibytes(size) for size in found], name
