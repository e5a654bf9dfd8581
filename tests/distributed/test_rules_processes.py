"""Every update rule where several processes share the parameters, against one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from pairs import LR, formats_of, groups, numbers
from several_processes import run
from test_sharded_step import Result, assert_same_states, result
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from lowbit_muon import RULES, Muon

STEPS = 2
# In turn; with 25 rows the second process has fewer.
SHAPES = ((16, 24), (25, 16))
LAYOUTS = ("fsdp2", "columns", "copies")
Pairs = list[tuple[str, str]]


def train(pairs: Pairs, layout: str) -> Result:
    """Weights and state after two steps of one optimizer with a group, of a matrix, of each pair.

    layout: one of `LAYOUTS`, or "" for one process.
    """
    shapes = [SHAPES[index % len(SHAPES)] for index in range(len(pairs))]
    model = nn.ParameterList(
        nn.Parameter(0.1 * numbers(shape, index)) for index, shape in enumerate(shapes)
    )
    if layout in ("fsdp2", "columns"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        shard = (lambda _: Shard(1)) if layout == "columns" else None
        fully_shard(model, mesh=mesh, shard_placement_fn=shard)
    params = list(model.parameters())
    group = dist.group.WORLD if layout == "copies" else None
    optimizer = Muon(groups(pairs, [[param] for param in params]), lr=LR, process_group=group)
    for step in range(STEPS):
        for index, param in enumerate(params):
            grad = numbers(param.shape, 10_000 * (step + 1) + index)
            if isinstance(param, DTensor):
                place = param.device_mesh, param.placements
                grad = distribute_tensor(grad, *place, src_data_rank=None)
            param.grad = grad
        optimizer.step()
    return result(params, optimizer)


def assert_rounded_apart(found: Result, expected: Result, pairs: Pairs) -> None:
    """Shared weights take their update after it was rounded to float32, in each step.

    Half of 2^-23 of it and of the weight (see `test_sharded_step.assert_near_weights`).
    """
    for index, (ours, theirs) in enumerate(zip(found[0], expected[0], strict=True)):
        start: Tensor = 0.1 * numbers(theirs.shape, index)
        size = theirs.abs() + (theirs - start).abs() + 0.1
        assert ((ours - theirs).abs() <= STEPS * 2.0**-22 * size).all(), pairs[index]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_pair_steps_as_on_one_process(layout: str, tmp_path: Path) -> None:
    """All pairs of tests/rules/pairs.md with FSDP2; other layouts know nothing of formats."""
    formats = {"columns": ["spectral4"], "copies": ["fp32"]}
    pairs = [(rule, name) for rule in RULES for name in formats.get(layout) or formats_of(rule)]
    expected = train(pairs, "")
    for found in run(2, train, tmp_path, pairs, layout):
        assert_same_states(found, expected)
        if layout == "copies":
            assert all(map(torch.equal, found[0], expected[0]))
        else:
            assert_rounded_apart(found, expected, pairs)
