"""Newton-Muon where several processes train a model: means are those of all their inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import run
from test_layer_inputs import batch, make, make_model, matrices
from torch.nn.parallel import DistributedDataParallel

from lowbit_muon import attach_layer_inputs

STEPS = 4


def own_part(rank: int, step: int) -> torch.Tensor:
    """Of the second process twice as many inputs, which count as often."""
    return batch(2 * step + rank)[: 1 + rank]


def end(optimizer: Any, params: Any, weights: Any) -> dict[str, Any]:
    values = [
        optimizer.state[p]["rule.inputs_values"]
        for p in params
        if optimizer.state[p].get("rule.inputs_values") is not None
    ]
    return {"weights": [weight.detach().clone() for weight in weights], "values": values}


def with_copies(rank: int) -> dict[str, Any]:
    model, group = make_model(), dist.group.WORLD
    optimizer, wrapped = make(model, process_group=group), DistributedDataParallel(model)
    with pytest.raises(ValueError, match="process_group: expected the processes"):
        attach_layer_inputs(wrapped, optimizer)
    attach_layer_inputs(wrapped, optimizer, process_group=group)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(own_part(rank, step)).square().mean().backward()
        optimizer.step()
    return end(optimizer, matrices(model), matrices(model))


def in_shards(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make(model)
    with pytest.raises(ValueError, match="process_group: expected the processes"):
        attach_layer_inputs(model, optimizer)
    attach_layer_inputs(model, optimizer, process_group=dist.group.WORLD)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(own_part(rank, step)).square().mean().backward()
        optimizer.step()
    params = matrices(model)
    return end(optimizer, params, [param.full_tensor() for param in params])  # type: ignore[attr-defined]


def alone() -> dict[str, Any]:
    model = make_model()
    optimizer = make(model)
    attach_layer_inputs(model, optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):  # gradients are means over processes, not over inputs
            (model(own_part(rank, step)).square().mean() / 2).backward()
        optimizer.step()
    return end(optimizer, matrices(model), matrices(model))


@pytest.mark.parametrize("how", ["with_copies", "in_shards"])
def test_processes_whiten_by_the_inputs_of_all(how: str, tmp_path: Path) -> None:
    # Sums in another order differ by 1e-7 of them, which a polar factor enlarges by the inverse of
    # its least singular value, at most some hundred here.
    expected = alone()
    results = run(2, _ranked, tmp_path, how)
    for result in results:
        for found, theirs in zip(result["weights"], expected["weights"], strict=True):
            torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-5)
    # Each matrix is kept by one of them, or with copies of it by its owner alone.
    kept = sorted((v for result in results for v in result["values"]), key=lambda v: v.shape[1])
    assert len(kept) == 2
    for found, theirs in zip(kept, expected["values"], strict=True):
        torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-6)


def in_columns(rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = make_model()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    attach_layer_inputs(model, make(model), process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="layer '0': expected a plain tensor"):
        model(batch(0))
    return {}


def test_tensor_parallel_layers_are_refused(tmp_path: Path) -> None:
    assert run(2, _ranked, tmp_path, "in_columns") == [{}, {}]


def _ranked(how: str) -> dict[str, Any]:
    result: dict[str, Any] = globals()[how](dist.get_rank())
    return result
