"""torch.amp.GradScaler in float16 on a CPU: what it skips, both kinds of parameters skip."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon import MuonWithAuxAdam, muon_param_groups


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 5))


def step(
    model: nn.Module, optimizer: MuonWithAuxAdam, scaler: torch.amp.GradScaler, x: Tensor
) -> None:
    with torch.autocast("cpu", dtype=torch.float16):
        loss = model(x).square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: MuonWithAuxAdam) -> dict[str, Any]:
    return copy.deepcopy({"weights": model.state_dict(), "state": optimizer.state_dict()["state"]})


def flatten(values: Any) -> list[Any]:
    if isinstance(values, dict):
        return [leaf for value in values.values() for leaf in flatten(value)]
    return [values]


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    pairs = zip(flatten(first), flatten(second), strict=True)
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)


def test_an_overflow_leaves_everything_and_halves_the_scale() -> None:
    model = make_model()
    optimizer = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    x = torch.randn(8, 12)
    step(model, optimizer, scaler, x)
    before = snapshot(model, optimizer)
    # One gradient alone is inf: the others are finite, and their parameters have to stay, too.
    hook = model[3].bias.register_hook(lambda gradient: gradient * torch.inf)
    step(model, optimizer, scaler, x)
    hook.remove()
    assert same(before, snapshot(model, optimizer))
    assert scaler.get_scale() == 128.0
    step(model, optimizer, scaler, x)
    assert not same(before, snapshot(model, optimizer))
    assert all(state["skipped"] == 0 for state in optimizer.state_dict()["state"].values())


def test_the_scale_itself_makes_no_difference() -> None:
    """Powers of two are exact in float16, as long as nothing is too small or too large for it."""
    trained = []
    for scale in (8.0, 64.0):
        model = make_model()
        optimizer = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for x in torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(1)):
            step(model, optimizer, scaler, x)
        trained.append(snapshot(model, optimizer))
    assert same(*trained)
