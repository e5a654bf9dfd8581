"""Ways of torch.distributed.checkpoint on two processes, against an uninterrupted run.

Each layout runs all its ways in one pair of processes, since starting them takes longer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from several_processes import run
from test_distributed_checkpoint import Model, build, step
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

FLAT = {"flatten_optimizer_state_dict": True}
FULL = {"full_state_dict": True}
WAYS: dict[str, tuple[str, dict[str, bool]]] = {
    "functions": ("functions", {}),
    "functions, flat": ("functions", FLAT),
    "functions, flat, cpu": ("functions", {**FLAT, "cpu_offload": True}),
    "functions, full": ("functions", FULL),
    "from the first": ("from the first", {**FULL, "cpu_offload": True}),
    "files, flat": ("files", FLAT),
    "files, async": ("async", FLAT),
    "optimizer itself": ("itself", {}),
}


def make(kind: str, options: dict[str, Any]) -> tuple[Model, MuonWithAuxAdam]:
    if kind != "tp":
        return build(kind, options)
    model = Model()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    groups = muon_param_groups(model, lr=0.02, aux_lr=0.01)
    return model, MuonWithAuxAdam(groups, aux_adam="adamw", **options)


def transfer(way: str, model: Model, source: Any, new: Model, target: Any, folder: Path) -> None:
    how, values = WAYS[way]
    options = StateDictOptions(**values)
    if how == "itself":
        dcp.save({"optimizer": source}, checkpoint_id=folder)
        dcp.load({"optimizer": target}, checkpoint_id=folder)
        return
    saved = get_optimizer_state_dict(model, source, options=options)
    if how == "from the first":
        assert bool(saved) == (dist.get_rank() == 0)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    if how in ("files", "async"):
        if how == "files":
            dcp.save(saved, checkpoint_id=folder)
        else:
            dcp.async_save(saved, checkpoint_id=folder).result()
        saved = get_optimizer_state_dict(new, target, options=options)
        dcp.load(saved, checkpoint_id=folder)
    set_optimizer_state_dict(new, target, saved, options=options)


def local_weights(model: Model) -> list[Tensor]:
    values = [param.detach() for param in model.parameters()]
    return [v.to_local().clone() if isinstance(v, DTensor) else v.clone() for v in values]


def round_trips(kind: str, options: dict[str, Any], folder: str) -> list[str]:
    """Names of the ways, after whose round trip the next steps were others."""
    wrong = []
    for stepped in (0, 2):
        for way in WAYS:
            model, optimizer = make(kind, options)
            other_model, other = make(kind, options)
            for number in range(stepped):
                step(model, optimizer, number)
                step(other_model, other, number)
            new_model, new = make(kind, options)
            path = Path(folder) / f"{stepped} {way}"
            transfer(way, other_model, other, new_model, new, path)
            new_model.load_state_dict(model.state_dict())
            for number in range(2, 5):
                step(model, optimizer, number)
                step(new_model, new, number)
            same = map(torch.equal, local_weights(model), local_weights(new_model))
            if not all(same):
                wrong.append(f"{way}, {stepped} steps before")
    return wrong


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("fsdp", {"state_format": "spectral4"}),
        ("fsdp", {"state_format": "mulaw4", "compensation": True}),
        pytest.param("tp", {"state_format": "muonq4"}, marks=pytest.mark.long),
        ("ddp", {"state_format": "linear8", "compensation": True}),
        pytest.param("fsdp", {"rule": "normuon"}, marks=pytest.mark.long),
        ("tp", {"rule": "namo_d"}),
    ],
    ids=["fsdp", "fsdp, compensation", "tp", "ddp", "fsdp, normuon", "tp, namo_d"],
)
def test_a_round_trip_leaves_no_trace(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    assert run(2, round_trips, tmp_path, kind, options, str(tmp_path)) == [[], []]


def flat_on_fewer(source: str, options: dict[str, Any]) -> list[Tensor]:
    """The weights after three more steps; what two processes saved flat is loaded on these."""
    model, optimizer = make("fsdp", options)
    flat = StateDictOptions(**FLAT)
    saved = get_optimizer_state_dict(model, optimizer, options=flat)
    dcp.load(saved, checkpoint_id=source)
    set_optimizer_state_dict(model, optimizer, saved, options=flat)
    return after(model, optimizer)


def flat_saved(target: str, options: dict[str, Any]) -> list[Tensor]:
    model, optimizer = make("fsdp", options)
    for number in range(2):
        step(model, optimizer, number)
    saved = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(**FLAT))
    dcp.save(saved, checkpoint_id=target)
    return after(make("fsdp", options)[0], optimizer, like=model)


def after(model: Model, optimizer: Any, like: Model | None = None) -> list[Tensor]:
    """Weights after three steps from those of a new model."""
    trained = like or model
    with torch.no_grad():
        for param, value in zip(trained.parameters(), model.parameters(), strict=True):
            param.copy_(value)
    for number in range(2, 5):
        step(trained, optimizer, number)
    values: list[Callable[[], Tensor]] = [
        param.full_tensor if isinstance(param, DTensor) else param.detach
        for param in trained.parameters()
    ]
    return [value().detach() for value in values]


@pytest.mark.parametrize("options", [{}, {"rule": "normuon"}, {"rule": "muon2"}], ids=str)
def test_a_flat_state_loads_on_another_number_of_processes(
    options: dict[str, Any], tmp_path: Path
) -> None:
    path = str(tmp_path / "saved")
    expected = run(2, flat_saved, tmp_path / "two", path, options)[0]
    found = run(1, flat_on_fewer, tmp_path / "one", path, options)[0]
    assert all(map(torch.equal, found, expected))
