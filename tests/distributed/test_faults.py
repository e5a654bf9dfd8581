"""Processes that disagree, have gradients that are not finite, hang or die."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import run
from test_sharded_step import gradient, start, train, whole
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import (
    DTensor,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from lowbit_muon import Muon, NonFiniteGradientError, attach_gradient_release
from lowbit_muon.distributed.agreement import ExchangeError, usable_gradients
from lowbit_muon.state.gradients import LARGEST_NORM

# --- disagreements and faults ---


def bad_gradient(kind: str, nonfinite: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))

    def place(tensor: Tensor) -> Tensor:
        if kind == "copies":
            return tensor
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    params = [nn.Parameter(place(start((8, 12), i))) for i in range(3)]
    group = dist.group.WORLD if kind == "copies" else None
    optimizer = Muon(params, process_group=group, nonfinite=nonfinite)  # type: ignore[arg-type]
    train(params, optimizer, place, range(1))
    before = [whole(param) for param in params]
    for number, param in enumerate(params):
        param.grad = place(gradient((8, 12), number, 1))
    if dist.get_rank() == 1:
        local = params[1].grad.to_local() if kind == "shards" else params[1].grad
        local[-1, 0] = float("nan")
    error = ""
    try:
        optimizer.step()
    except NonFiniteGradientError as raised:
        error = str(raised)
    state = optimizer.state_dict()["state"]
    return {
        "changed": [not torch.equal(whole(p), old) for p, old in zip(params, before, strict=True)],
        "counts": [(state[i]["step"], state[i]["skipped"]) for i in range(3)],
        "error": error,
    }


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
@pytest.mark.parametrize("kind", ["shards", "copies"])
def test_a_nonfinite_gradient_on_one_process_is_skipped_on_all(kind: str, tmp_path: Path) -> None:
    for found in run(2, bad_gradient, tmp_path, kind, "skip"):
        assert found["changed"] == [True, False, True]
        assert found["counts"] == [(2, 0), (1, 1), (2, 0)]


@pytest.mark.parametrize("kind", ["shards", "copies"])
def test_or_raises_on_all_before_anything_changes(kind: str, tmp_path: Path) -> None:
    for found in run(2, bad_gradient, tmp_path, kind, "raise"):
        assert found["changed"] == [False, False, False]
        assert "'1'" in found["error"]


def usable_parts(share: float) -> list[bool | None]:
    """Of a gradient in two equal parts, each of which has this share of the largest norm."""
    part = torch.full((8, 8), share * LARGEST_NORM / 8)
    return usable_gradients([part], ["w"], torch.device("cpu"), dist.group.WORLD)


@pytest.mark.parametrize(("share", "usable"), [(0.8, False), (0.6, True)])
def test_parts_that_are_too_large_together_are_not_usable(
    share: float, usable: bool, tmp_path: Path
) -> None:
    """0.8 sqrt(2) > 1 > 0.6 sqrt(2)."""
    assert run(2, usable_parts, tmp_path, share) == [[usable]] * 2


def disagreeing(what: str) -> str:
    second = dist.get_rank() == 1
    mesh = init_device_mesh("cpu", (2,))
    options: dict[str, Any] = {}
    count, shape = 2, (8, 12)
    if what == "state_format":
        options["state_format"] = "spectral3" if second else "spectral4"
    elif what == "momentum":
        options["momentum"] = 0.9 if second else 0.95
    elif what == "number":
        count = 3 if second else 2
    params = [
        (f"w{i}", nn.Parameter(distribute_tensor(start(shape, i), mesh, [Shard(0)],
                                                 src_data_rank=None)))
        for i in range(count)
    ]  # fmt: skip
    optimizer = Muon(params, **options)
    for _, param in params:
        param.grad = distribute_tensor(gradient(shape, 0, 0), mesh, [Shard(0)], src_data_rank=None)
    if what == "gradient" and second:
        params[1][1].grad = None
    with pytest.raises(ValueError, match="expected") as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("state_format", "w0: expected the same state_format on all processes"),
        ("momentum", "w0: expected the same momentum on all processes, got 0.95 on process 0"),
        ("number", "params: expected the same number on all processes, got 2"),
        ("gradient", "w1: expected a gradient on all processes or none"),
    ],
)
def test_a_disagreement_is_an_error_on_all_processes(
    what: str, message: str, tmp_path: Path
) -> None:
    for found in run(2, disagreeing, tmp_path, what):
        assert message in found


def waiting(seconds: float) -> str:
    """The other process does not step for longer than the group's timeout."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))
    param = nn.Parameter(start((8, 12), 0))
    optimizer = Muon([("late", param)], process_group=group)
    train([param], optimizer, lambda grad: grad, range(1))
    if dist.get_rank() == 1:
        time.sleep(2 * seconds)
        return ""
    with pytest.raises(ExchangeError) as caught:
        train([param], optimizer, lambda grad: grad, range(1, 2))
    return str(caught.value)


def test_a_process_that_hangs_is_an_error_after_the_groups_timeout(tmp_path: Path) -> None:
    assert run(2, waiting, tmp_path, 3.0)[0].startswith("late: exchange with other processes")


def left_alone() -> str:
    """The other process dies between two steps."""
    import os
    import signal

    mesh = init_device_mesh("cpu", (2,))

    def place(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    params = [nn.Parameter(place(start((8, 12), i))) for i in range(2)]
    optimizer = Muon([("first", params[0]), ("second", params[1])])
    train(params, optimizer, place, range(1))
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        train(params, optimizer, place, range(1, 3))
    except RuntimeError as error:
        Path(os.environ["FAULT"]).write_text(f"{type(error).__name__}: {error}")
        raise
    return "went on"


def test_a_process_that_died_is_an_error_with_the_parameters_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fault"
    run(2, with_fault_file, tmp_path, str(file), exit_codes={0: 1, 1: -9})
    assert file.read_text().startswith("ExchangeError: first, second: exchange with other")


def with_fault_file(file: str) -> str:
    import os

    os.environ["FAULT"] = file
    return left_alone()


def test_bad_options_are_named() -> None:
    with pytest.raises(ValueError, match="update_dtype: expected 'float32'"):
        Muon([nn.Parameter(torch.zeros(2, 2))], update_dtype="int4")  # type: ignore[arg-type]


def released() -> list[str]:
    model = nn.Linear(4, 4, bias=False)
    mesh = init_device_mesh("cpu", (1,))
    shards = nn.Linear(4, 4, bias=False)
    fully_shard(shards, mesh=mesh)
    messages = []
    for each, group in ((model, dist.group.WORLD), (shards, None)):
        optimizer = Muon(each.parameters(), process_group=group)
        with pytest.raises(ValueError, match="expected") as caught:
            attach_gradient_release(each, optimizer)
        messages.append(str(caught.value))
    return messages


def test_gradient_release_is_for_one_process(tmp_path: Path) -> None:
    (messages,) = run(1, released, tmp_path)
    assert "process_group or DTensors" in messages[0]
    assert all("optimizer" in message or "model" in message for message in messages)
