"""What `lowbit-muon doctor` says before a run: its needs, and the lines of torch's Muon."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_muon import PRESETS, RULES, Muon, MuonWithAuxAdam, muon_param_groups
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.doctor.needs import needs
from lowbit_muon.tools.doctor.replacement import changes, differences
from lowbit_muon.tools.plan.memory import route
from lowbit_muon.tools.plan.plans import TORCH_MUON, Setup, make_plans


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 32, bias=False), nn.Linear(32, 48)])
    found = nn.ModuleDict({"embed": nn.Embedding(100, 32), "layers": layers})
    return found.to(dtype)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()


OPTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "rule": {"rule": "normuon", "state_format": "linear8"},
    "half precision": {"compensation": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_needs_are_those_of_plan(name: str) -> None:
    options, dtype = OPTIONS[name], torch.bfloat16 if name == "half precision" else torch.float32
    net = model(dtype)
    optimizer = MuonWithAuxAdam(muon_param_groups(net), aux_adam="adamw", **options)
    (found,) = needs(optimizer, released=False, other_format="spectral4")
    rule = RULES[options.get("rule", "muon")]
    compensation = name == "half precision"
    setup = Setup(dtype, "cpu", "adamw", rule=rule, compensation=compensation)
    chosen = options.get("state_format", "spectral4")
    planned = {plan.name: plan for plan in make_plans(route(net), setup)}[chosen]
    sizes = ("weights", "gradients", "state", "workspace", "total", "host")
    assert [getattr(found, s) for s in sizes] == [getattr(planned, s) for s in sizes]
    step(optimizer)
    # torch's AdamW has a count of its steps, a float32 each: of the embedding and two biases.
    assert found.state == optimizer.state_bytes() - 3 * 4


def test_groups_of_any_kind_are_summed() -> None:
    """Formats, rules, stacks, split rows and dtypes of their own: the state is what it is then."""
    shapes = {
        "plain": (24, 40), "stack": (3, 16, 24), "split": (24, 40), "kernel": (8, 4, 3, 3),
        "half": (32, 64),
    }  # fmt: skip
    params = {name: nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    params["half"] = nn.Parameter(params["half"].bfloat16())
    custom = dataclasses.replace(PRESETS["linear8"], name="mine", granularity="block", block_size=8)
    optimizer = Muon([
        {"params": [params["plain"], params["half"]], "compensation": True},
        {"params": [params["stack"]], "batch_experts": True, "rule": "adamuon"},
        {"params": [params["split"]], "row_splits": [8, 16], "state_format": custom},
        {"params": [params["kernel"]], "state_format": "fp32"},
    ])  # fmt: skip
    (found,) = needs(optimizer, released=False, other_format="spectral4")
    step(optimizer)
    assert found.state == optimizer.state_bytes()
    assert found.weights == found.gradients == sum(param.nbytes for param in params.values())
    assert found.total == 2 * found.weights + found.state + found.workspace
    assert found.workspace > 0
    (released,) = needs(optimizer, released=True, other_format="spectral4")
    assert released.gradients == max(param.nbytes for param in params.values())


def test_an_automatic_format_takes_no_more_than_its_largest() -> None:
    optimizer = Muon([nn.Parameter(torch.zeros(32, 64))], state_format="auto")
    (found,) = needs(optimizer, released=False, other_format="spectral4")
    step(optimizer)
    assert optimizer.state_bytes() <= found.state


def test_torchs_muon_is_shown_beside_ours() -> None:
    params = [nn.Parameter(torch.zeros(size)) for size in ((32, 64), (64, 32))]
    optimizer = torch.optim.Muon(params)
    theirs, ours = needs(optimizer, released=False, other_format="spectral2")
    step(optimizer)
    kept = sum(state["momentum_buffer"].nbytes for state in optimizer.state.values())
    assert (theirs.name, theirs.state) == (TORCH_MUON, kept)
    replaced = Muon([nn.Parameter(p.detach().clone()) for p in params], state_format="spectral2")
    step(replaced)
    assert (ours.name, ours.state) == ("spectral2", replaced.state_bytes())


# Lines to change ------------------------------------------------------------------------------

BEGIN = "import torch\nfrom torch import nn\n"
PARAM = "param = nn.Parameter(torch.ones(4, 8))\n"
MADE = "Muon([param], lr=0.5)\n"
SOURCES = {
    "attribute": f"{BEGIN}{PARAM}optimizer = torch.optim.{MADE}",
    "module": f"{BEGIN}import torch.optim as to\n{PARAM}optimizer = to.{MADE}",
    "from torch": f"{BEGIN}from torch import optim\n{PARAM}'na\u00efve'; optimizer = optim.{MADE}",
    "class": f"{BEGIN}from torch.optim import Muon\n{PARAM}optimizer = {MADE}",
    "renamed": f"{BEGIN}from torch.optim import AdamW, Muon as Muon\n{PARAM}optimizer = {MADE}"
    "other = AdamW([param])\n",
    "parentheses": f"{BEGIN}from torch.optim import (\n    AdamW,\n    Muon,\n)\n{PARAM}"
    f"optimizer = {MADE}other = AdamW([param])\n",
    "in a function": f"{BEGIN}{PARAM}def make(param):\n    import torch.optim as to\n"
    f"    return to.{MADE}optimizer = make(param)\n",
    "twice in a line": f"{BEGIN}{PARAM}M = torch.optim.Muon or torch.optim.Muon\n"
    "optimizer = M([param], lr=0.5)\n",
}


def patched(source: str) -> str:
    """The source after the diff, each line of which must be in the source where it says."""
    lines = source.splitlines()
    after: list[str] = []
    at = 0
    for line in changes(source, "train.py")[2:]:
        if line.startswith("@@"):
            start = int(line.split()[1].split(",")[0][1:]) - 1
            after += lines[at:start]
            at = start
        elif line.startswith("+"):
            after.append(line[1:])
        else:
            assert lines[at] == line[1:]
            if line.startswith(" "):
                after.append(lines[at])
            at += 1
    return "\n".join([*after, *lines[at:]]) + "\n"


@pytest.mark.parametrize("name", SOURCES)
def test_after_the_changes_a_script_has_our_muon(name: str) -> None:
    source = SOURCES[name]
    names: dict[str, Any] = {}
    exec(source, names)
    assert type(names["optimizer"]) is torch.optim.Muon
    after: dict[str, Any] = {}
    exec(patched(source), after)
    assert type(after["optimizer"]) is Muon
    assert after["optimizer"].param_groups[0]["lr"] == 0.5
    assert changes(patched(source), "train.py") == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.optim.AdamW([])", "from lowbit_muon import Muon\nMuon([])",
        "from .torch.optim import Muon", "torch.optim.Muon", "optim.Muon", "'torch.optim.Muon'",
    ],
)  # fmt: skip
def test_other_names_stay(source: str) -> None:
    assert changes(source, "a.py") == []


def test_differences_are_those_of_the_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    same, different, loads = differences()
    for name in inspect.signature(torch.optim.Muon).parameters:
        assert name in same

    class Other:
        def __init__(self, params: Any, lr: float = 0.5, fused: bool = True) -> None: ...

    monkeypatch.setattr(torch.optim, "Muon", Other)
    assert differences() == [
        "lr is 0.5 in torch and 0.001 here.", "fused: there is no such option here.", different,
        loads,
    ]  # fmt: skip


def test_what_is_said_of_other_behaviour_is_so() -> None:
    for kind, dtype, skipped in ((torch.optim.Muon, torch.bfloat16, False), (Muon, None, True)):
        param = nn.Parameter(torch.ones(4, 8).bfloat16())
        optimizer = kind([param])
        step(optimizer)
        if dtype is not None:
            assert optimizer.state[param]["momentum_buffer"].dtype == dtype
        param.grad = torch.full_like(param, torch.nan)
        with (
            pytest.warns(RuntimeWarning, match="inf or nan")
            if skipped
            else contextlib.nullcontext()
        ):
            optimizer.step()
        assert bool(param.isfinite().all()) == skipped


# The command ----------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn
from parts import make

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False))
optimizer = make(model)
for step in range(9):
    model(torch.randn(4, 16)).square().mean().backward()
    print("step", step)
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command on SCRIPT, whose optimizer another file makes; its JSON."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "parts", raising=False)

    def run(made: str, *arguments: str) -> dict[str, Any]:
        Path("parts.py").write_text(f"import torch, lowbit_muon\ndef make(m):\n    return {made}\n")
        Path("train.py").write_text(SCRIPT)
        assert main(["doctor", "train.py", "--json=a.json", *arguments]) == 0
        (found,) = json.loads(Path("a.json").read_text())["optimizers"]
        result: dict[str, Any] = found
        return result

    return run


def test_needs_are_known_before_the_first_step(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run("lowbit_muon.Muon(m.parameters())", "--steps=1")
    shown = capsys.readouterr().out
    assert shown.index("step 0") < shown.index("what a run will need")
    assert "step 1" not in shown
    assert (found["matrices"], found["changes"], found["remarks"]) == ([], [], [])
    (needed,) = found["needs"]
    assert needed["optimizer"] == "Muon"
    assert needed["weights"] == needed["gradients"] == 4 * (16 * 32 + 32 * 8)
    sizes = ("weights", "gradients", "state", "workspace")
    assert needed["total"] == sum(needed[name] for name in sizes)


THEIRS = "torch.optim.Muon(m.parameters())"


def test_a_script_with_torchs_muon(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(THEIRS, "--steps=4")
    shown = capsys.readouterr().out
    assert found["optimizer"] == TORCH_MUON
    assert [row["optimizer"] for row in found["needs"]] == [TORCH_MUON, "spectral4"]
    # The file that the script imports is named, and only the line to change is.
    assert "-    return torch.optim.Muon(m.parameters())" in found["changes"]
    assert "+    return lowbit_muon.Muon(m.parameters())" in found["changes"]
    assert any(line.startswith("--- ") and "parts.py" in line for line in found["changes"])
    assert not any(line.startswith("--- train.py") for line in found["changes"])
    assert found["changes"][-3:] == differences()
    assert shown.index("what a run will need") < shown.index("step 1")
    assert found["remarks"] == [
        "Diagnosed before step 4: errors are exact for that step.",
        "The saved momentum is in full precision: the rows say what storing it in spectral4 would "
        "do.",
    ]
    assert [row["with_gradient"] for row in found["matrices"]] == [True, True]
    # Ours, loaded with the momentum before the fourth step, finds the same.
    names: dict[str, Any] = {}
    source = SCRIPT.replace("from parts import make", "make = lambda m: " + THEIRS)
    stopped = "    if step == 3:\n        break\n    optimizer.step()"
    exec(source.replace("    optimizer.step()", stopped), names)
    params = list(names["model"].parameters())
    ours = Muon(params)
    ours.load_state_dict(names["optimizer"].state_dict())
    for row, wanted in zip(found["matrices"], ours.diagnose(), strict=True):
        assert {**row, "name": ""} == {**wanted.to_dict(), "name": ""}


def test_an_optimizer_that_no_line_names(run: Any) -> None:
    found = run("getattr(torch.optim, 'Mu' + 'on')(m.parameters())", "--steps=1")
    assert found["changes"][0].startswith("No line of train.py, nor of what it imports")


def test_a_checkpoint_of_torchs_muon(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optimizer = torch.optim.Muon([nn.Parameter(torch.ones(8, 16))])
    step(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    assert main(["doctor", str(tmp_path / "a.pt")]) == 0
    shown = capsys.readouterr().out
    assert "-optimizer = torch.optim.Muon(params)\n+optimizer = lowbit_muon.Muon(params)" in shown
    assert all(sentence in shown for sentence in differences())
