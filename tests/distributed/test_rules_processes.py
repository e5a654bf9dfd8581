"""Every update rule where several processes share the parameters, against one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
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
from torch.distributed.tensor import Shard

from lowbit_muon import RULES


def every_rule(layout: str, state_format: str) -> dict[str, Result]:
    """The results of each rule, in one start of the processes."""
    found = {}
    for name in RULES:
        options: dict[str, Any] = {"rule": name, "state_format": state_format}
        if layout == "copies":
            found[name] = replicated(options)
        else:
            placement = Shard(0) if layout == "rows" else Shard(1)
            found[name] = sharded((2,), (placement,), options)
    return found


@pytest.mark.parametrize("state_format", ["spectral4", "fp32"])
@pytest.mark.parametrize("layout", ["rows", "columns", "copies"])
def test_every_rule_steps_as_on_one_process(layout: str, state_format: str, tmp_path: Path) -> None:
    results = run(2, every_rule, tmp_path, layout, state_format)
    assert set(results[0]) == set(RULES)
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
