"""The step of parameters that several processes share against the step of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import run
from torch import Tensor, nn
from torch.distributed.tensor import (
    DTensor,
    Placement,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

from lowbit_muon import Muon

SHAPES = ((24, 40), (40, 24), (33, 33), (1, 7), (16, 16), (7, 3))
STEPS = 3
Result = tuple[list[Tensor], dict[int, dict[str, Any]]]


def start(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(shape: tuple[int, ...], number: int, step: int) -> Tensor:
    return start(shape, 1000 + 100 * number + step)


def train(
    params: list[nn.Parameter], optimizer: Muon, place: Any, steps: range = range(STEPS)
) -> None:
    """Steps with the same gradients in every layout; `place` lays one out as its parameter."""
    for step in steps:
        for number, param in enumerate(params):
            param.grad = place(gradient(tuple(param.shape), number, step))
        optimizer.step()


def whole(tensor: Tensor) -> Tensor:
    found = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone()


def result(params: list[nn.Parameter], optimizer: Muon) -> Result:
    """Weights and state as whole tensors."""
    state = optimizer.state_dict()["state"]
    return [whole(param) for param in params], {
        key: {k: whole(v) if isinstance(v, Tensor) else v for k, v in entries.items()}
        for key, entries in state.items()
    }


def one_process(**options: Any) -> Result:
    params = [nn.Parameter(start(shape, i)) for i, shape in enumerate(SHAPES)]
    optimizer = Muon(params, lr=0.02, **options)
    train(params, optimizer, lambda grad: grad)
    return result(params, optimizer)


def sharded(
    mesh_shape: tuple[int, ...], placements: tuple[Placement, ...], options: dict[str, Any]
) -> Result:
    names = tuple(f"dim{i}" for i in range(len(mesh_shape)))
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)

    def place(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    params = [nn.Parameter(place(start(shape, i))) for i, shape in enumerate(SHAPES)]
    optimizer = Muon(params, lr=0.02, **options)
    train(params, optimizer, place)
    return result(params, optimizer)


def replicated(options: dict[str, Any]) -> Result:
    params = [nn.Parameter(start(shape, i)) for i, shape in enumerate(SHAPES)]
    optimizer = Muon(params, lr=0.02, process_group=dist.group.WORLD, **options)
    train(params, optimizer, lambda grad: grad)
    return result(params, optimizer)


def assert_same_states(found: Result, expected: Result) -> None:
    assert found[1].keys() == expected[1].keys()
    for key, entries in expected[1].items():
        assert found[1][key].keys() == entries.keys()
        for name, value in entries.items():
            if isinstance(value, Tensor):
                assert torch.equal(found[1][key][name], value), (key, name)
            else:
                assert found[1][key][name] == value, (key, name)


def assert_near_weights(found: Result, expected: Result) -> None:
    for ours, theirs in zip(found[0], expected[0], strict=True):
        # One process adds the update within a product; here it is rounded to float32 before: half
        # of 2**-23 of it, and of the weight it is subtracted from, in each of three steps.
        bound = STEPS * 2.0**-23 * (theirs.abs() + 0.1)
        assert ((ours - theirs).abs() <= bound).all()


LAYOUTS = {
    "rows": ((2,), (Shard(0),)),
    "columns": ((2,), (Shard(1),)),
    "rows of four, uneven and empty": ((4,), (Shard(0),)),
    "copies of shards (HSDP)": ((2, 2), (Replicate(), Shard(0))),
    "rows and columns": ((2, 2), (Shard(0), Shard(1))),
    "copies": ((2,), (Replicate(),)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["spectral4", "mulaw4"])
def test_sharded_parameters_step_as_on_one_process(layout: str, name: str, tmp_path: Path) -> None:
    mesh_shape, placements = LAYOUTS[layout]
    processes = int(torch.tensor(mesh_shape).prod())
    options = {"state_format": name}
    expected = one_process(**options)
    for found in run(processes, sharded, tmp_path, mesh_shape, placements, options):
        assert_same_states(found, expected)
        assert_near_weights(found, expected)


@pytest.mark.parametrize("name", ["spectral4", "fp32"])
def test_replicated_parameters_step_as_on_one_process(name: str, tmp_path: Path) -> None:
    options = {"state_format": name}
    expected = one_process(**options)
    for found in run(2, replicated, tmp_path, options):
        assert_same_states(found, expected)
        for ours, theirs in zip(found[0], expected[0], strict=True):
            assert torch.equal(ours, theirs)
