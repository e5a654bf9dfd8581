"""The fine-tune on two processes: the numbers of one, and runs that go on with another number."""

from __future__ import annotations

import dataclasses
import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from several_processes import run
from test_finetune import text_file
from torch import Tensor

from lowbit_muon.step.options import DEFAULT_COEFFICIENTS
from lowbit_muon.tools import cli
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune import command
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore, load_checkpoint
from lowbit_muon.tools.finetune.processes import Processes
from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.finetune.training import FinetuneRun, read_result

__all__ = ["text_file"]  # a fixture

STEPS, SEQUENCE = 4, 32
QUIET = Console(file=io.StringIO())
EPS = 2.0**-24  # relative rounding of a float32 sum


@pytest.fixture
def tiny(text_file: Path) -> FinetuneSettings:
    return FinetuneSettings(
        model="tiny",
        text=str(text_file),
        held_out_tokens=1024,
        sequence_length=SEQUENCE,
        tokens_per_step=2 * SEQUENCE,  # a sequence for each of two processes
        steps=STEPS,
        save_every=2,
        sample_tokens=4,
        aux_adam="adamw",
    )


def train(settings: FinetuneSettings, folder: Path, resume: bool = False) -> dict[str, Any]:
    """A run by one process or by several, without its plots."""
    several = dist.is_initialized()
    processes = Processes(dist.get_rank(), dist.get_world_size()) if several else Processes()
    one = FinetuneRun(settings, folder, QUIET, processes)
    if resume:
        one.restore(command._load_newest(CheckpointStore(folder / "checkpoints"), processes)[0])
    return one.train()


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that depend neither on the clock nor on the processes."""
    return {key: result[key] for key in ("train_loss", "held_out", "formats", "muon_matrices")}


def saved(folder: Path) -> dict[str, Any]:
    return load_checkpoint(CheckpointStore(folder / "checkpoints").checkpoints()[-1])


def assert_same(found: Any, expected: Any) -> None:
    """Nested values, tensors to the bit."""
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert_same(ours, theirs)
    else:
        assert found == expected


@pytest.mark.parametrize("method", ["spectral4", "adamw"])
def test_two_processes_are_one_to_the_bit(
    method: str, tiny: FinetuneSettings, tmp_path: Path
) -> None:
    # (g0 + g1) / 2 has one order, so there is nothing to tell them apart by.
    settings = tiny.with_method(method)
    whole = train(settings, tmp_path / "one")
    for result in run(2, train, tmp_path / "run", settings, tmp_path / "two"):
        assert measured(result) == measured(whole)
    ours, theirs = saved(tmp_path / "two"), saved(tmp_path / "one")
    for part in ("settings", "model", "optimizer"):
        assert_same(ours[part], theirs[part])
    assert ours["history"]["samples"] == theirs["history"]["samples"]


def test_momentum_lies_on_one_process_each(tiny: FinetuneSettings, tmp_path: Path) -> None:
    one = FinetuneRun(tiny, tmp_path / "one", QUIET)
    one.step()
    found = run(2, train, tmp_path / "run", tiny, tmp_path / "two")[0]
    adam = sum(
        sum(
            value.nbytes
            for value in one.optimizer.state[param].values()
            if hasattr(value, "nbytes")
        )
        for group in one.optimizer.param_groups
        for param in group["params"]
        if not group["use_muon"]
    )
    sizes = found["state_bytes_of_processes"]
    assert sum(sizes) - 2 * adam == one.optimizer.state_bytes() - adam
    assert found["state_bytes"] == max(sizes) < one.optimizer.state_bytes()
    assert len(found["peak_memory_bytes_of_processes"]) == found["processes"] == 2


# --- four sequences on two processes: sums in another order ---


def step_in_order(one: FinetuneRun, shares: Sequence[Sequence[int]]) -> float:
    """A step of one process that averages gradients as processes with these sequences do."""
    step = one.history.steps
    for group, rate in zip(one.optimizer.param_groups, one.base_rates, strict=True):
        group["lr"] = rate * one.settings.learning_rate_factor(step)
    grads, losses = sequence_gradients(one)
    for number, param in enumerate(one.model.parameters()):
        sums = []
        for share in shares:
            total = grads[share[0]][number]
            for index in share[1:]:
                total = total + grads[index][number]
            sums.append(total)
        # Numbers of sequences and processes are powers of two: the divisions are exact.
        param.grad = sum(sums[1:], start=sums[0]) / len(grads)
    one.optimizer.step()
    one.optimizer.zero_grad()
    one.history.train_loss.append(sum(losses) / len(losses))
    return one.history.train_loss[-1]


def sequence_gradients(one: FinetuneRun) -> tuple[list[list[Tensor]], list[float]]:
    """Of the next step: [sequence][parameter] and [sequence]."""
    settings = one.settings
    batch = one.corpus.batch(one.history.steps, settings.sequences_per_step, settings.seed)
    losses = [one.model.loss(sequence) for sequence in batch.split(1)]
    grads = [list(torch.autograd.grad(loss, list(one.model.parameters()))) for loss in losses]
    return grads, [loss.item() for loss in losses]


def test_more_sequences_differ_from_one_process_by_the_order_of_sums_alone(
    tiny: FinetuneSettings, tmp_path: Path
) -> None:
    settings = dataclasses.replace(tiny, tokens_per_step=4 * SEQUENCE)
    result = run(2, train, tmp_path / "run", settings, tmp_path / "two")[0]
    ordered, plain = (FinetuneRun(settings, tmp_path / name, QUIET) for name in ("a", "b"))
    for loss in result["train_loss"]:
        assert step_in_order(ordered, [(0, 1), (2, 3)]) == loss
        assert step_in_order(plain, [(0, 1, 2, 3)]) == plain.history.train_loss[-1]
    ours = saved(tmp_path / "two")
    assert_same(ours["model"], ordered.model.state_dict())
    assert_same(ours["optimizer"], ordered.optimizer.state_dict())
    # The plain order is that of one process.
    whole = train(settings, tmp_path / "one")
    assert whole["train_loss"] == plain.history.train_loss
    assert_same(saved(tmp_path / "one")["model"], plain.model.state_dict())


def polynomial_slope() -> float:
    """The largest slope on [0, 1] of the Newton-Schulz polynomials, one after the other.

    It bounds ||f(X) - f(Y)|| by ||X - Y|| (Frobenius): the derivative of an odd function of
    singular values has quotients of differences and of sums of its values as coefficients.
    """
    a, b, c = DEFAULT_COEFFICIENTS
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64, requires_grad=True)
    y = x
    for _ in range(5):
        y = a * y + b * y**3 + c * y**5
    (slopes,) = torch.autograd.grad(y.sum(), x)
    return float(slopes.abs().max())


@pytest.mark.parametrize("processes", [2, 4])
def test_loss_after_a_step_is_within_what_the_order_of_sums_allows(
    processes: int, tiny: FinetuneSettings, tmp_path: Path
) -> None:
    # Of the first step alone: later ones depend on codes, and one that falls the other side of a
    # boundary moves by a whole level. Changes are so small that a loss is linear in them.
    settings = dataclasses.replace(tiny, tokens_per_step=4 * SEQUENCE, steps=2, warmup=0)
    results = run(processes, train, tmp_path / "run", settings, tmp_path / "several")
    several = results[0]["train_loss"]
    one = FinetuneRun(settings, tmp_path / "one", QUIET)
    before, _ = sequence_gradients(one)
    first = one.step()
    after, _ = sequence_gradients(one)
    second = one.step()
    assert abs(several[0] - first) <= 3 * EPS * first  # the mean of four, in any order
    matrices = {
        param: group["lr"] for group in one.optimizer.param_groups if group["use_muon"]
        for param in group["params"]
    }  # fmt: skip
    # A loss of 128 float32 terms near 5, of which each is rounded in its logits' sum of 48.
    bound = 5.6 * 2 * 48 * EPS
    for number, param in enumerate(one.model.parameters()):
        parts = [grads[number].double() for grads in before]
        grad = sum(parts[1:], start=parts[0]) / 4
        # Three sums in either order.
        error = 2 * 3 * EPS * sum(part.abs() for part in parts) / 4
        slope = sum(grads[number] for grads in after).abs().double() / 4
        if param in matrices:
            rows, columns = param.shape
            # Twice, since the matrix is divided by its norm, which differs as well. Both runs round
            # three products in each of five steps; k roundings add up like their square root.
            relative = 2 * error.norm() / grad.norm() + 2 * 15 * max(rows, columns) ** 0.5 * EPS
            update = matrices[param] * 0.2 * max(rows, columns) ** 0.5
            change = update * polynomial_slope() * relative
            bound += float(slope.norm() * change)
        else:
            # Adam's first update is lr g / (|g| + eps).
            smaller = (grad.abs() - error).clamp_min(0) + 1e-8
            bound += float((slope * settings.aux_lr * (error / smaller).clamp_max(2)).sum())
    assert bound < 1e-4 < 1e-2 < abs(second - first)
    assert abs(several[1] - second) <= bound


# --- interrupted runs ---


def test_a_run_goes_on_with_two_one_and_two_processes(
    tiny: FinetuneSettings, tmp_path: Path
) -> None:
    whole = train(dataclasses.replace(tiny, steps=6), tmp_path / "whole")
    first, second, third = (dataclasses.replace(tiny, steps=steps) for steps in (2, 4, 6))
    folder = tmp_path / "parts"
    run(2, train, tmp_path / "run", first, folder)
    train(second, folder, resume=True)
    result = run(2, train, tmp_path / "run", third, folder, True)[1]
    assert result["train_loss"] == whole["train_loss"]
    ours, theirs = saved(folder), saved(tmp_path / "whole")
    for part in ("model", "optimizer"):
        assert_same(ours[part], theirs[part])


def train_until_killed(settings: FinetuneSettings, folder: Path, victims: Sequence[int]) -> None:
    """Kills these processes before the third step, of which the second was saved."""
    step = FinetuneRun.step

    def last(self: FinetuneRun) -> float:
        if self.history.steps == 2 and self.processes.rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self)

    FinetuneRun.step = last  # type: ignore[method-assign]
    train(settings, folder)


def test_a_run_of_which_one_was_killed_resumes_under_torchrun(
    tiny: FinetuneSettings, tmp_path: Path
) -> None:
    whole = train(tiny, tmp_path / "whole")
    folder = tmp_path / "killed"
    codes = {0: 1, 1: -signal.SIGKILL}  # the other finds that it is gone
    run(2, train_until_killed, tmp_path / "run", tiny, folder, [1], exit_codes=codes)
    assert saved(folder)["history"]["train_loss"] == whole["train_loss"][:2]
    resumed = torchrun("--resume", "--out", str(folder), "--threads", "1")
    assert resumed.returncode == 0, resumed.stderr
    # By one of them.
    assert resumed.stdout.count("continuing after step 2 of 4") == 1
    assert "2 processes of 1 threads, 1 sequences of a step on each" in resumed.stdout
    result = read_result(folder)
    assert result is not None
    assert result["train_loss"] == whole["train_loss"]
    assert result["processes"] == 2
    assert_same(saved(folder)["model"], saved(tmp_path / "whole")["model"])


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    program = ("--nproc-per-node=2", "-m", "lowbit_muon.tools.cli", "finetune")
    return subprocess.run(
        [*launcher, *program, *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_all_killed_and_the_last_checkpoint_damaged(tiny: FinetuneSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny, save_every=1)
    whole = train(settings, tmp_path / "whole")
    folder = tmp_path / "killed"
    codes = {0: -signal.SIGKILL, 1: -signal.SIGKILL}
    run(2, train_until_killed, tmp_path / "run", settings, folder, [0, 1], exit_codes=codes)
    state = CheckpointStore(folder / "checkpoints").checkpoints()[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    for result in run(2, train, tmp_path / "run", settings, folder, True):
        assert result["train_loss"] == whole["train_loss"]


# --- errors ---


def errors(settings: FinetuneSettings, folder: Path) -> list[str]:
    """Of a run that diverges, of a folder without checkpoints and of one that is a file."""
    found = []
    for attempt in (
        lambda: train(dataclasses.replace(settings, lr=1e30, warmup=0), folder / "nan"),
        lambda: train(settings, folder / "nothing", resume=True),
        lambda: train(dataclasses.replace(settings, eval_before=False), folder / "file"),
    ):
        try:
            attempt()
        except UserError as error:
            found.append(str(error))
    return found


def test_an_error_of_one_is_an_error_of_all(tiny: FinetuneSettings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    of_processes = run(2, errors, tmp_path / "run", tiny, tmp_path)
    for found in of_processes:
        assert "training loss is nan in step 2" in found[0]
        assert "nothing to resume from" in found[1]
        assert "cannot save checkpoint" in found[2]
        assert len(found) == 3


def test_what_processes_cannot_share_is_refused(
    tiny: FinetuneSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.check_processes(2)
    with pytest.raises(
        UserError, match=r"--tokens-per-step: expected .* 3 processes .* of 96, got 64"
    ):
        tiny.check_processes(3)
    released = dataclasses.replace(tiny, gradient_release=True)
    released.check_processes(1)
    with pytest.raises(UserError, match="--gradient-release: expected one process, got 2"):
        released.check_processes(2)
    with pytest.raises(UserError, match="--format: expected a fixed one with 2 processes"):
        dataclasses.replace(tiny, format="auto").check_processes(2)
    monkeypatch.setattr(command, "started_processes", lambda: nullcontext(Processes(0, 2)))
    assert cli.main(["finetune", "--compare", "fp32,spectral4"]) == 2
    assert "--compare: expected one process" in capsys.readouterr().err
