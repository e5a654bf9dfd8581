"""Every update rule where several processes share the parameters, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from several_processes import run
from test_sharded_step import (
    SHAPES,
    Result,
    assert_same_states,
    one_process,
    replicated,
    sharded,
    start,
)
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from lowbit_muon import RULES, Muon

# Whose step looks at whole weights, or at the learning rate where weights lie.
NOT_IN_PARTS = {name for name, rule in RULES.items() if rule.needs("weights") or rule.needs("rate")}


def every_rule(layout: str, state_format: str) -> dict[str, Result]:
    """The results of each rule that goes with a layout, in one start of the processes."""
    found = {}
    for name in RULES:
        options: dict[str, Any] = {"rule": name, "state_format": state_format}
        if layout == "copies":
            found[name] = replicated(options)
        elif name not in NOT_IN_PARTS:
            placement = Shard(0) if layout == "rows" else Shard(1)
            found[name] = sharded((2,), (placement,), options)
    return found


@pytest.mark.parametrize("state_format", ["spectral4", "fp32"])
@pytest.mark.parametrize("layout", ["rows", "columns", "copies"])
def test_every_rule_steps_as_on_one_process(layout: str, state_format: str, tmp_path: Path) -> None:
    results = run(2, every_rule, tmp_path, layout, state_format)
    assert set(results[0]) == set(RULES) - (set() if layout == "copies" else NOT_IN_PARTS)
    for name in results[0]:
        expected = one_process(rule=name, state_format=state_format)
        for of_rank in results:
            assert_same_states(of_rank[name], expected)
            for ours, theirs, shape, number in zip(
                of_rank[name][0], expected[0], SHAPES, range(len(SHAPES)), strict=True
            ):
                if layout == "copies":
                    assert torch.equal(ours, theirs), name
                    continue
                # The update is rounded to float32 before it is subtracted, in each of three steps:
                # half of 2^-23 of it and of the weight (see `assert_near_weights`).
                size = theirs.abs() + (theirs - start(shape, number)).abs()
                assert ((ours - theirs).abs() <= 3 * 2.0**-22 * (size + 0.1)).all(), name


def refused() -> list[str]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    param = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [Shard(0)]))
    messages = []
    for name in sorted(NOT_IN_PARTS):
        param.grad = torch.ones_like(param)
        optimizer = Muon([param], rule=name)
        with pytest.raises(ValueError, match="expected a rule that looks at no whole weights") as e:
            optimizer.step()
        messages.append(str(e.value))
    return messages


def test_rules_that_need_whole_weights_say_so(tmp_path: Path) -> None:
    for messages in run(2, refused, tmp_path):
        assert all(
            f"'{name}'" in message
            for name, message in zip(sorted(NOT_IN_PARTS), messages, strict=True)
        )
