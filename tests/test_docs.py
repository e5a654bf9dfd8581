"""The guides say what is so, and the reference shows everything that is public."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import documentation
import pytest
import torch
from documentation import GUIDES, MODULES, README, ROOT
from torch import nn

import lowbit_muon
from lowbit_muon.tools import cli
from lowbit_muon.tools.plan.command import DTYPES, gibibytes
from lowbit_muon.tools.plan.memory import make_plans, route
from lowbit_muon.tools.plan.model_shapes import read_model

ids = [guide.stem for guide in GUIDES]
# The fields of Llama-3.1-8B's config.json that sizes depend on.
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


# The guides


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
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    for add_command in cli.COMMANDS:
        add_command(commands)
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
    named = {"memory_limits", "rules", "paper", "scaling", "gallery"}
    assert set().union(*map(report.blocks, texts)) == named
    for text in texts:
        assert report.fill(text) == text


def test_the_plan_is_what_the_planner_says(tmp_path: Path) -> None:
    text = (ROOT / "lowbit_muon" / "guides" / "fit_a_finetune.md").read_text(encoding="utf-8")
    table = text.split("<!-- plan: llama-8b -->")[1].split("<!-- /plan -->")[0]
    stated = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")[3:-1]]
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    routing = route(read_model(tmp_path).model)
    plans = {plan.name: plan for plan in make_plans(routing, DTYPES["bf16"], "cuda", "adamw8bit")}
    assert len(stated) > 3
    for name, *sizes in stated:
        plan = plans[name]
        found = (plan.weights, plan.gradients, plan.state, plan.workspace, plan.total)
        assert sizes == [gibibytes(size) for size in found], name


# The reference


def public_members(module: ModuleType) -> dict[str, Any]:
    """What a page shows: __all__, or what the module defines and does not hide."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    return {name: getattr(module, name) for name in names}


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_described(name: str) -> None:
    module = importlib.import_module(name)
    assert inspect.getdoc(module)
    for member, value in public_members(module).items():
        if inspect.isroutine(value):
            assert inspect.getdoc(value), f"{name}.{member}"
        elif inspect.isclass(value):
            assert value.__doc__, f"{name}.{member}"
            assert not value.__doc__.startswith(f"{member}("), f"{name}.{member}: a dataclass's own"
            for method, found in vars(value).items():
                if not method.startswith("_") and inspect.isroutine(found):
                    assert inspect.getdoc(getattr(value, method)), f"{name}.{member}.{method}"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pdoc")
    folder = tmp_path_factory.mktemp("reference")
    documentation.build_reference(folder)
    return folder


def read_page(pages: Path, name: str) -> str:
    """The page of a module, without its scripts."""
    html = (pages / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
    return re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)


@pytest.mark.parametrize("name", MODULES)
def test_pages_show_everything_public(name: str, pages: Path) -> None:
    html = read_page(pages, name)
    for member in public_members(importlib.import_module(name)):
        assert f'id="{member}"' in html, f"{name}.{member}"
    for target in re.findall(r'href="([^"#]*)"', html):
        if target and not re.match(r"\w+:", target):
            assert ((pages / name.replace(".", "/")).parent / target).is_file(), target


def test_sections_of_docstrings_are_lists(pages: Path) -> None:
    html = read_page(pages, "lowbit_muon")
    assert re.search(r"<h6[^>]*>Arguments:</h6>", html)
    for argument in inspect.signature(lowbit_muon.Muon).parameters:
        assert re.search(rf"<li><strong>{argument}:</strong>", html), argument


def test_the_guides_are_on_their_page(pages: Path) -> None:
    html = read_page(pages, "lowbit_muon.guides")
    for guide in GUIDES:
        title = guide.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        assert re.search(rf"<h1[^>]*>{re.escape(title)}</h1>", html)
        assert f'id="{guide.stem}"' in html
        assert f'href="#{guide.stem}"' in html
    code = re.compile(r'<div class="pdoc-code codehilite">.*?</div>', re.DOTALL)
    assert len(code.findall(html)) >= sum(
        len(documentation.code_blocks(g, "python")) for g in GUIDES
    )
    # Nothing is left of Markdown or of the directives that include it.
    assert not re.search(r"```|\.\. include|\]\(|\.md\"", code.sub("", html))
