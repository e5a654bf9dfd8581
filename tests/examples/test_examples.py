"""The gallery: each example learns, and its state takes the bytes that its shapes say."""

from __future__ import annotations

import importlib
import itertools
import runpy
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from documentation import ROOT, commands
from torch import Tensor
from torch.optim import Optimizer

from bench import gallery
from bench.report.markdown import results
from lowbit_muon import Muon
from lowbit_muon.examples import common

GUIDE = ROOT / "lowbit_muon" / "guides" / "gallery.md"
SHORT_STEPS = 16


@pytest.fixture(params=gallery.EXAMPLES)
def example(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "lora":
        pytest.importorskip("peft")
    return importlib.import_module(f"lowbit_muon.examples.{request.param}")


def short_run(
    example: ModuleType, method: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[common.Run, Optimizer]:
    """A run of a few steps, and the optimizer that it made."""
    made: list[Optimizer] = []
    make_optimizer = example.make_optimizer

    def make_and_keep(*args: Any) -> Optimizer:
        made.append(make_optimizer(*args))
        return made[-1]

    monkeypatch.setattr(example, "make_optimizer", make_and_keep)
    if example.__name__.endswith("lora"):
        monkeypatch.setattr(example, "PRETRAINING_STEPS", SHORT_STEPS)
        example.pretrained.cache_clear()
    run = example.train(method, example.RATES[method], SHORT_STEPS)
    return run, made[0]


def matrices(param: Tensor, group: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of each matrix that Muon makes of a parameter."""
    if group["batch_experts"]:
        return [(param.shape[1], param.shape[2])] * param.shape[0]
    rows, columns = param.shape[0], param[0].numel()
    return [(part, columns) for part in group["row_splits"] or (rows,)]


def spectral4_bytes(shape: tuple[int, int]) -> int:
    """Half a byte an element, a float32 scale for each row of the short side, two float64 norms."""
    short, long = sorted(shape)
    return short * long // 2 + 4 * short + 2 * 8


def expected_bytes(optimizer: Muon) -> int:
    """With AdamW's two float32 moments and its float32 step, and what nanochat's rule keeps."""
    total = 0
    for group in optimizer.param_groups:
        for param in group["params"]:
            if group["use_muon"]:
                shapes = matrices(param, group)
                total += sum(map(spectral4_bytes, shapes))
                if group["rule"]["name"] == "nanochat":  # a float32 for each row of the long side
                    total += sum(4 * max(shape) for shape in shapes)
            else:
                total += 2 * 4 * param.numel() + 4
    return total


def test_a_short_run_learns_and_keeps_four_bits(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, optimizer = short_run(example, "spectral4", monkeypatch)
    assert isinstance(optimizer, Muon)
    assert statistics.fmean(run.losses[-4:]) < statistics.fmean(run.losses[:4])
    assert run.state_bytes == expected_bytes(optimizer)


def test_what_reads_and_writes_goes_to_adamw(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHORT_STEPS", 1)
    _, optimizer = short_run(example, "spectral4", monkeypatch)
    names = {
        name: group["use_muon"] for group in optimizer.param_groups for name in group["param_names"]
    }
    outside = ("tokens", "positions", "head", "stem", "classifier", "depthwise", "router",
               "patches", "kinds", "pixels", "norm", "bias")  # fmt: skip
    assert any(names.values())
    for name, uses_muon in names.items():
        assert uses_muon != any(part in name for part in outside), name


def test_adamw_keeps_two_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    example = importlib.import_module("lowbit_muon.examples.nanochat")
    monkeypatch.setattr(sys.modules[__name__], "SHORT_STEPS", 2)
    run, optimizer = short_run(example, "adamw", monkeypatch)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert run.state_bytes == sum(2 * 4 * param.numel() + 4 for param in params)


# What the examples share


def test_every_kind_of_drawing_shows_and_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    by_kind = []
    for kind in range(common.KINDS):  # in the same places
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda _, size, generator, k=kind: torch.full(size, k))
            images, kinds = common.drawings(50, 16, torch.Generator().manual_seed(0))
        assert images.shape == (50, 1, 16, 16)
        assert (kinds == kind).all()
        # Something is drawn in each, and something is left black.
        assert (images.amax(dim=(1, 2, 3)) == 1).all()
        assert (images.amin(dim=(1, 2, 3)) == -1).all()
        by_kind.append(images)
    for one, other in itertools.combinations(by_kind, 2):
        assert (one != other).flatten(1).any(dim=1).all()


def test_a_trapezoid_ends_near_zero() -> None:
    factors = [common.trapezoid(step, 100) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[9:61] == [1.0] * 52
    assert factors[99] == pytest.approx(1 / 40)  # the last of forty steps down, in rounded floats
    assert max(factors) == 1.0


def test_rates_are_searched_until_both_sides_are_worse() -> None:
    tried = gallery.search(1.0, lambda rate: abs(rate - 5))
    assert tried == {1.0: 4.0, 0.5: 4.5, 2.0: 3.0, 4.0: 1.0, 8.0: 3.0}


def run_as_command(*arguments: str) -> None:
    """`python -m lowbit_muon.examples.nanochat ARGUMENTS`, in this process."""
    name = "lowbit_muon.examples.nanochat"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.delitem(sys.modules, name, raising=False)  # runpy warns of it
        runpy.run_module(name, run_name="__main__")


def test_the_command_line_prints_a_table_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "loss.svg"
    run_as_command("--steps", "2", "--plot", str(picture))
    lines = capsys.readouterr().out.splitlines()
    assert [line[:14].strip() for line in lines[2:]] == list(common.LABELS.values())
    assert all(len(line) <= 80 for line in lines)
    assert all(f"{label}: " in picture.read_text() for label in common.LABELS.values())


def test_no_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_as_command("--steps", "0")
    assert "--steps: expected a whole number above 0, got 0" in capsys.readouterr().err


def test_equal_runs_give_equal_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = {method: common.Run([3.0, 2.0, 1.0], 1024) for method in common.METHODS}
    for name in ("one", "two"):
        common.plot(tmp_path / f"{name}.svg", "title", runs)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


# The results in the guide


def test_the_guide_has_a_command_for_each() -> None:
    named = {call[1].rpartition(".")[2] for call in commands(GUIDE, "python") if call[0] == "-m"}
    assert named >= set(gallery.EXAMPLES)


def test_examples_use_the_rates_that_were_found(example: ModuleType) -> None:
    name = example.__name__.rpartition(".")[2]
    found = results("gallery")
    rates = {method: found[f"{name} {method}"]["lr"] for method in common.METHODS}
    assert rates == example.RATES
    for method in common.METHODS:
        tried = {float(lr): loss for lr, loss in found[f"{name} {method}"]["tried"].items()}
        assert {rates[method] / 2, rates[method] * 2} <= set(tried)
        assert tried[rates[method]] == min(tried.values())


@pytest.mark.long
def test_a_full_run_learns_and_keeps_the_bytes_of_the_results(example: ModuleType) -> None:
    name = example.__name__.rpartition(".")[2]
    for method in common.METHODS:
        found = results("gallery")[f"{name} {method}"]
        run = example.train(method, found["lr"], found["steps"], gallery.SEEDS[0])
        assert run.state_bytes == found["state_bytes"]
        assert run.final_loss < 0.9 * run.losses[0]  # far above what other CPUs' rounding changes
