"""Checkpoints of shared parameters: on another number of processes the next steps are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from several_processes import run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor, init_device_mesh

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

Weights = dict[str, Tensor]


class Model(nn.Module):
    """Sizes that three and four processes cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.up = nn.Linear(12, 21)
        self.down = nn.Linear(21, 12, bias=False)
        self.head = nn.Linear(12, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        scores: Tensor = self.head(hidden + self.down(self.up(hidden).relu()))
        return scores


def build(kind: str, options: dict[str, Any]) -> tuple[Model, MuonWithAuxAdam]:
    """kind: "fsdp", "ddp" or "plain"."""
    model = Model()
    if options.get("compensation"):
        model.bfloat16()
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    group = dist.group.WORLD if kind == "ddp" else None
    groups = muon_param_groups(model, lr=0.02, aux_lr=0.01)
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw", process_group=group, **options)
    return model, optimizer


def step(model: Model, optimizer: MuonWithAuxAdam, number: int) -> None:
    """One step with gradients that depend on its number alone."""
    for index, param in enumerate(model.parameters()):
        generator = torch.Generator().manual_seed(100 * number + index)
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        if isinstance(param, DTensor):
            grad = distribute_tensor(grad, param.device_mesh, param.placements, src_data_rank=None)
        param.grad = grad
    optimizer.step()
    optimizer.zero_grad()


def weights(model: Model) -> Weights:
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def first_part(kind: str, options: dict[str, Any], folder: str, steps: int) -> Weights:
    model, optimizer = build(kind, options)
    for number in range(steps):
        step(model, optimizer, number)
    save(model, optimizer, folder)
    return weights(model)


def next_part(
    kind: str, options: dict[str, Any], source: str, target: str, number: int
) -> tuple[Weights, list[str]]:
    """Loads into a new model, takes one step, saves; (weights, keys of the saved state)."""
    torch.manual_seed(dist.get_rank())
    model, optimizer = build(kind, options)
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.load(state, checkpoint_id=source)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    step(model, optimizer, number)
    save(model, optimizer, target)
    saved = optimizer.state_dict()["state"]
    return weights(model), sorted(f"{i}.{key}" for i, state in saved.items() for key in state)


def save(model: Model, optimizer: MuonWithAuxAdam, folder: str) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    dcp.save(state, checkpoint_id=folder)


def uninterrupted(kind: str, options: dict[str, Any], steps: int) -> Weights:
    model, optimizer = build(kind, options)
    for number in range(steps):
        step(model, optimizer, number)
    return weights(model)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fsdp", {"state_format": "spectral4"}),
        pytest.param("fsdp", {"state_format": "mulaw4"}, marks=pytest.mark.long),
        ("fsdp", {"state_format": "linear8", "compensation": True}),
        pytest.param("ddp", {"state_format": "spectral4"}, marks=pytest.mark.long),
        ("ddp", {"state_format": "fp32", "compensation": True}),
    ],
)
def test_four_processes_to_two_to_one_to_four(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Each goes on where the last stopped; the weights at the end are those of one process."""
    (expected,) = run(1, uninterrupted, tmp_path / "one", kind, options, 5)
    run(4, first_part, tmp_path / "0", kind, options, str(tmp_path / "saved0"), 2)
    for index, processes in enumerate((2, 1, 4)):
        found = run(
            processes,
            next_part,
            tmp_path / str(index + 1),
            kind,
            options,
            str(tmp_path / f"saved{index}"),
            str(tmp_path / f"saved{index + 1}"),
            2 + index,
        )
        assert all(keys == found[0][1] for _, keys in found)
    for ours, _ in found:
        for name, value in expected.items():
            assert torch.equal(ours[name], value), name


def full_state(kind: str, path: str) -> Weights:
    model, optimizer = build(kind, {})
    for number in range(2):
        step(model, optimizer, number)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    values = weights(model)
    if dist.get_rank() == 0:
        torch.save({"model": values, "optimizer": state}, path)
    step(model, optimizer, 2)
    return weights(model)


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
def test_a_full_state_loads_without_other_processes(kind: str, tmp_path: Path) -> None:
    """And the next step is the same, but for the rounding of an update before it is added."""
    path = str(tmp_path / "full.pt")
    expected = run(2, full_state, tmp_path / "run", kind, path)[0]
    saved = torch.load(path, weights_only=True)
    model = Model()
    model.load_state_dict(saved["model"])
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.02, aux_lr=0.01), aux_adam="adamw")
    set_optimizer_state_dict(model, optimizer, saved["optimizer"])
    step(model, optimizer, 2)
    for name, value in model.state_dict().items():
        # Half of 2**-23 for each of two roundings; updates are smaller than the weights plus one.
        assert ((value - expected[name]).abs() <= 2.0**-23 * (value.abs() + 1)).all(), name


def wrong_keys(path: str) -> str:
    model, optimizer = build("fsdp", {"state_format": "spectral4"})
    state = optimizer.state_dict()
    name = next(key for key in state["state"] if "codes" in state["state"][key])
    state["state"][name]["scales"] = -state["state"][name]["scales"]
    state["state"][name]["scales"] = state["state"][name]["scales"] - 1
    step(model, optimizer, 0)
    before = weights(model)
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        assert all(torch.equal(before[name], value) for name, value in weights(model).items())
        step(model, optimizer, 1)  # still in step with each other
        return str(error)
    return "loaded"


def test_a_damaged_state_is_an_error_on_all_processes(tmp_path: Path) -> None:
    for message in run(2, wrong_keys, tmp_path, ""):
        assert "scales: expected values >= 0" in message


def copied() -> list[str]:
    _, optimizer = build("fsdp", {})
    optimizer.state_dict()
    messages = []
    for action in (optimizer.__getstate__, optimizer.export_full_precision):
        with pytest.raises((TypeError, ValueError)) as caught:
            action()
        messages.append(str(caught.value))
    return messages


def test_what_needs_all_the_state_says_so(tmp_path: Path) -> None:
    pickled, exported = run(2, copied, tmp_path)[1]
    assert "state_dict" in pickled
    assert "one process" in exported


def automatic() -> str:
    _, optimizer = build("fsdp", {"state_format": "auto"})
    with pytest.raises(ValueError, match="auto") as caught:
        optimizer.state_dict()
    return str(caught.value)


def test_formats_do_not_depend_on_processes(tmp_path: Path) -> None:
    assert "fixed state_format" in run(2, automatic, tmp_path)[0]


def killed_while_saving(source: str, target: str) -> None:
    import os
    import signal

    model, optimizer = build("fsdp", {})
    step(model, optimizer, 0)
    save(model, optimizer, source)
    step(model, optimizer, 1)
    if dist.get_rank() == 1:
        write = dcp.FileSystemWriter.write_data

        def die(self: Any, *args: Any) -> Any:
            write(self, *args)
            os.kill(os.getpid(), signal.SIGKILL)

        dcp.FileSystemWriter.write_data = die  # type: ignore[method-assign]
    save(model, optimizer, target)


def test_a_process_killed_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    source, target = str(tmp_path / "good"), str(tmp_path / "torn")
    run(2, killed_while_saving, tmp_path / "a", source, target, exit_codes={0: 1, 1: -9})
    assert not (tmp_path / "torn" / ".metadata").exists()  # and so it cannot be taken for whole
    options = {"state_format": "spectral4"}
    found = run(2, next_part, tmp_path / "b", "fsdp", options, source, str(tmp_path / "next"), 1)
    (expected,) = run(1, uninterrupted, tmp_path / "c", "fsdp", options, 2)
    for name, value in expected.items():
        assert torch.equal(found[0][0][name], value), name
