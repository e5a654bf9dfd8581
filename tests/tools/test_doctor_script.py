"""`lowbit-muon doctor` on training scripts: where they are stopped, and what is found there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_muon import Muon
from lowbit_muon.tools.cli import main

SETUP = """
import sys
from pathlib import Path
import torch
from torch import nn
from lowbit_muon import Muon, MuonWithAuxAdam, attach_gradient_release, muon_param_groups

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
log = Path(sys.argv[0]).with_suffix(".log")

def loss():
    return model(torch.randn(4, 16)).square().mean()
"""
USUAL = """
optimizer = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
for step in range(1, 21):
    loss().backward()
    with log.open("a") as file:
        file.write(f"{step} ")
    optimizer.step()
    optimizer.zero_grad()
"""


def examine(tmp_path: Path, body: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON of every optimizer found in a script."""
    script, path = tmp_path / "train.py", tmp_path / "doctor.json"
    script.write_text(SETUP + body)
    assert main(["doctor", str(script), "--json", str(path), *arguments]) == 0
    found: list[dict[str, Any]] = json.loads(path.read_text())["optimizers"]
    return found


def steps_begun(tmp_path: Path) -> int:
    return len((tmp_path / "train.log").read_text().split())


@pytest.mark.parametrize("steps", [2, 7, 10])
def test_a_script_is_stopped_before_its_step(steps: int, tmp_path: Path) -> None:
    options = [] if steps == 10 else [f"--steps={steps}"]  # 10 is the default
    (found,) = examine(tmp_path, USUAL, *options)
    assert steps_begun(tmp_path) == steps
    assert found["optimizer"] == "MuonWithAuxAdam"
    assert [row["name"] for row in found["matrices"]] == ["0.weight", "2.weight"]
    assert all(row["steps"] == steps - 1 for row in found["matrices"])
    assert found["remarks"] == [f"Diagnosed before step {steps}: errors are exact for that step."]
    # Two norms' and three biases' worth of two moments and a count, in float32.
    assert found["aux_parameters"] == 4
    assert found["aux_bytes"] == 4 * 4 + 2 * 4 * (32 + 32 + 32 + 8)


@pytest.mark.parametrize(
    "made",
    ['MuonWithAuxAdam(groups, rule="normuon", aux_adam="adamw")', "NorMuon(groups)"],
    ids=["option", "class"],
)
def test_the_rule_of_a_script_is_named(made: str, tmp_path: Path) -> None:
    groups = "groups = muon_param_groups(model)\n"
    if made.startswith("NorMuon"):
        groups = "from lowbit_muon import NorMuon\ngroups = [model[0].weight, model[2].weight]\n"
    body = USUAL.replace('MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")', made)
    (found,) = examine(tmp_path, groups + body, "--steps=2")
    assert [row["rule"] for row in found["matrices"]] == ["normuon"] * 2
    assert [row["rule_nbytes"] for row in found["matrices"]] == [4 * 32, 4 * 8]


def test_the_errors_are_those_of_diagnose_at_that_moment(tmp_path: Path) -> None:
    (found,) = examine(tmp_path, USUAL, "--steps=4")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 8))
    scope: dict[str, Any] = {}
    source = (SETUP + USUAL).replace("    optimizer.step()", "    stop(step)\n    optimizer.step()")

    class Stop(Exception):
        pass

    def stop(step: int) -> None:
        if step == 4:
            raise Stop

    scope["stop"] = stop
    with pytest.raises(Stop):
        exec(source, scope)
    assert found["matrices"] == [row.to_dict() for row in scope["optimizer"].diagnose()]
    assert len(found["matrices"]) == sum(p.ndim == 2 for p in model.parameters())


SWALLOWS = """
def write(text):
    with log.open("a") as file:
        file.write(text)

optimizer = Muon([("w", model[0].weight)])
for step in range(1, 9):
    try:
        loss().backward()
        optimizer.step()
    except Exception:
        raise AssertionError("the stop is no Exception")
    except:
        write("swallowed ")
    finally:
        write("cleaned ")
"""


def test_handlers_of_exceptions_let_the_stop_pass(tmp_path: Path) -> None:
    let_pass = SWALLOWS.replace('    except:\n        write("swallowed ")\n', "")
    (found,) = examine(tmp_path, let_pass, "--steps=3")
    assert (tmp_path / "train.log").read_text().split() == ["cleaned"] * 3
    assert found["matrices"][0]["steps"] == 2


def test_a_script_that_swallows_it_gets_no_further_step(tmp_path: Path) -> None:
    (found,) = examine(tmp_path, SWALLOWS, "--steps=3")
    assert (tmp_path / "train.log").read_text().split().count("swallowed") == 6
    assert found["remarks"] == ["Diagnosed before step 3: errors are exact for that step."]
    assert found["matrices"][0]["steps"] == 2


def test_handlers_that_make_an_exception_of_the_stop(tmp_path: Path) -> None:
    body = SWALLOWS.replace("    except:\n", "    except BaseException as stop:\n").replace(
        'write("swallowed ")', "raise RuntimeError from stop"
    )
    (found,) = examine(tmp_path, body, "--steps=3")
    assert found["matrices"][0]["steps"] == 2


def test_arguments_name_and_neighbours_are_those_of_a_run_by_python(tmp_path: Path) -> None:
    (tmp_path / "neighbour_of_script.py").write_text("STEPS = 5\n")
    body = """
from neighbour_of_script import STEPS
assert __name__ == "__main__"
assert sys.argv[1:] == ["--lr", "0.5", "--json", "x"], sys.argv
optimizer = Muon([("w", model[0].weight)], lr=float(sys.argv[2]))
for _ in range(STEPS):
    loss().backward()
    optimizer.step()
"""
    before = (sys.argv, list(sys.path))
    examine(tmp_path, body, "--steps=2", "--", "--lr", "0.5", "--json", "x")
    assert (sys.argv, sys.path) == before


def test_gradients_that_a_closure_makes_are_there(tmp_path: Path) -> None:
    body = """
optimizer = Muon([("w", model[0].weight)])
def closure():
    optimizer.zero_grad()
    value = loss()
    value.backward()
    return value
for step in range(9):
    optimizer.step(closure) if step % 2 else optimizer.step(closure=closure)
"""
    for steps in (4, 5):  # by position and by name
        (found,) = examine(tmp_path, body, f"--steps={steps}")
        assert found["matrices"][0]["steps"] == steps - 1
        assert found["matrices"][0]["with_gradient"]
    # The closure of the step before has left its gradient, which is in the momentum already: the
    # error of such a step would be another one.
    usual = body[: body.index("    optimizer.step")] + "    closure()\n    optimizer.step()\n"
    (same,) = examine(tmp_path, usual, "--steps=5")
    assert same["matrices"] == found["matrices"]


def test_under_gradient_release_it_is_an_estimate(tmp_path: Path) -> None:
    body = USUAL.replace("for step", "attach_gradient_release(model, optimizer)\nfor step")
    (found,) = examine(tmp_path, body, "--steps=3")
    assert found["remarks"] == [
        "Diagnosed before step 3: errors are estimates, since no gradients were there."
    ]
    # The third gradient is in the momentum by then.
    assert [row["steps"] for row in found["matrices"]] == [3, 3]


def test_a_parameter_without_a_gradient_in_that_step(tmp_path: Path) -> None:
    without = "    if step == 4:\n        model[2].weight.grad = None\n    optimizer.step()"
    body = USUAL.replace("    optimizer.step()", without)
    (found,) = examine(tmp_path, body, "--steps=4")
    assert [row["with_gradient"] for row in found["matrices"]] == [True, False]
    assert "exact for 1 of 2 matrices and estimates for those without" in found["remarks"][0]


def test_all_muons_are_diagnosed_when_the_first_gets_there(tmp_path: Path) -> None:
    body = """
first, second = Muon([("a", model[0].weight)]), Muon([("b", model[2].weight)])
other = torch.optim.AdamW(model[1].parameters())
for _ in range(9):
    loss().backward()
    for optimizer in (other, second, first):
        optimizer.step()
"""
    found = examine(tmp_path, body, "--steps=3")
    assert [[row["name"] for row in one["matrices"]] for one in found] == [["b"], ["a"]]
    assert [one["matrices"][0]["steps"] for one in found] == [2, 2]


@pytest.mark.parametrize("ending", ["", "sys.exit()", "sys.exit(3)"])
def test_a_script_that_ends_before(ending: str, tmp_path: Path) -> None:
    (found,) = examine(tmp_path, USUAL.replace("21", "4") + "loss().backward()\n" + ending)
    assert found["remarks"] == [
        "The script ended after 3 steps, before step 10: errors are estimates, since no gradients "
        "were there."
    ]
    assert all(row["steps"] == 3 for row in found["matrices"])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "steps of a lowbit_muon optimizer or torch.optim.Muon, got none: the script ended\n"),
        ("sys.exit(3)", "got none: the script ended with exit status 3\n"),
        ("torch.optim.AdamW(model.parameters()).step()", "got none: the script ended\n"),
        ("Muon([model[0].weight]).step()", "TARGET: expected a matrix with a momentum, got none"),
        ("def f():\n    1 / 0\nf()", "the script failed with ZeroDivisionError\n"),
        ("(", "the script failed with SyntaxError\n"),
    ],
)
def test_scripts_with_nothing_to_diagnose(
    body: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text(SETUP + body)
    assert main(["doctor", str(script)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    last = shown.splitlines()[-1]
    assert last.startswith("lowbit-muon: ")
    if "ZeroDivision" in message:
        # Python's own traceback, from the script's first line on.
        assert shown.splitlines()[1].strip().startswith(f'File "{script}"')
        assert "ZeroDivisionError: division by zero" in shown
        assert "runpy" not in shown


def test_the_hook_is_gone_afterwards(tmp_path: Path) -> None:
    examine(tmp_path, USUAL, "--steps=2")
    param = nn.Parameter(torch.ones(4, 8))
    optimizer = Muon([param])
    for _ in range(3):
        param.grad = torch.randn(4, 8)
        optimizer.step()
    (row,) = optimizer.diagnose()
    assert row.steps == 3


def test_the_script_may_be_interrupted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise KeyboardInterrupt")
    assert main(["doctor", str(script)]) == 130
    assert capsys.readouterr().err == "lowbit-muon: interrupted\n"
