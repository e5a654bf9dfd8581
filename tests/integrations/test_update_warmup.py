"""README's recipe: the rate of the Muon groups alone rises over the first steps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

STEPS, WARMUP = 8, 4


def make() -> tuple[MuonWithAuxAdam, LambdaLR]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.5, aux_lr=0.25), aux_adam="adamw")

    def decay(step: int) -> float:
        return 1 - step / STEPS

    def warm_decay(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP) * decay(step)

    schedules = [warm_decay if group["use_muon"] else decay for group in optimizer.param_groups]
    return optimizer, LambdaLR(optimizer, schedules)


def rates(optimizer: MuonWithAuxAdam, scheduler: Any, steps: int) -> list[tuple[float, ...]]:
    seen = []
    for _ in range(steps):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    return seen


def test_muon_warms_up_and_adamw_does_not() -> None:
    optimizer, scheduler = make()
    muon, aux = zip(*rates(optimizer, scheduler, STEPS), strict=True)
    decay = [1 - step / STEPS for step in range(STEPS)]
    assert aux == pytest.approx([0.25 * d for d in decay])
    strength = [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert muon == pytest.approx([0.5 * s * d for s, d in zip(strength, decay, strict=True)])


def test_a_saved_warm_up_goes_on_where_it_was() -> None:
    optimizer, scheduler = make()
    rates(optimizer, scheduler, 2)
    saved = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
    expected = rates(optimizer, scheduler, STEPS - 2)
    optimizer, scheduler = make()
    optimizer.load_state_dict(saved[0])
    scheduler.load_state_dict(saved[1])
    assert rates(optimizer, scheduler, STEPS - 2) == expected
