"""Half-precision weights in parts, whose gains lie with the owners of their matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from several_processes import run
from test_sharded_step import SHAPES, Result, assert_same_states, result, start, train
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

from lowbit_muon import Muon

RULES = ("muown", "angular_muown", "md_decoupling")


def trained(place: Any, rule: str) -> Result:
    params = [nn.Parameter(place(start(shape, i).bfloat16())) for i, shape in enumerate(SHAPES)]
    optimizer = Muon(params, lr=0.02, rule=rule, compensation=True, weight_decay=0.3)
    train(params, optimizer, lambda grad: place(grad.bfloat16()))
    return result(params, optimizer)


def in_rows() -> dict[str, Result]:
    mesh = init_device_mesh("cpu", (2,))

    def place(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, (Shard(0),), src_data_rank=None)

    return {rule: trained(place, rule) for rule in RULES}


def test_gains_of_sharded_bfloat16_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """Bit for bit: owners get the weights with what rounding left over, and send differences."""
    results = run(2, in_rows, tmp_path)
    for rule in RULES:
        expected = trained(lambda tensor: tensor, rule)
        for of_rank in results:
            assert_same_states(of_rank[rule], expected)
            for ours, theirs in zip(of_rank[rule][0], expected[0], strict=True):
                assert ours.dtype == torch.bfloat16
                assert torch.equal(ours, theirs), rule
