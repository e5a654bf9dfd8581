"""Steps that take some layers only: which, and that the others stay."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from oracles.sampling import DropMuon, draw
from torch import Tensor, nn

from lowbit_muon import RULES, Muon, MuonWithAuxAdam, UpdateRule, muon_param_groups
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.step.rules.direction import ExactPolar
from lowbit_muon.step.rules.sampling import Progressive

STEPS = 12


def drop_muon(share: float) -> UpdateRule:
    return replace(RULES["drop_muon"], sampling=Progressive(share))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["host", "device"])
def on_either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "device":
        monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    return str(request.param)


def moves(optimizer: Muon, params: list[nn.Parameter], steps: range) -> list[list[bool]]:
    """Of each step, which parameters moved; the others are as they were, with all of their state
    but the count."""
    found = []
    for step in steps:
        before = copy.deepcopy([(p.detach(), optimizer.state.get(p, {})) for p in params])
        for param in params:
            param.grad = randn(*param.shape, seed=step).to(param.dtype)
        optimizer.step()
        found.append([])
        for param, (old, state) in zip(params, before, strict=True):
            moved = not torch.equal(param.detach(), old)
            found[-1].append(moved)
            now = optimizer.state[param]
            assert int(now["step"]) == step + 1
            assert int(now["skipped"]) == 0
            if not moved:
                for key in state.keys() - {"step", "skipped"}:
                    same = now[key] == state[key]
                    assert bool(same.all()) if isinstance(same, Tensor) else same, key
    return found


def test_draws_are_even() -> None:
    """Of n draws the share below p is p but for sqrt(p (1 - p) / n), five times that at most."""
    stage = Progressive(0.3)
    counts = torch.arange(10000)
    for seed in (0, 1, 2**40 + 7):
        taken = stage.takes(seed, counts)
        assert isinstance(taken, Tensor)
        assert abs(float(taken.double().mean()) - 0.3) < 5 * (0.21 / 10000) ** 0.5
        assert taken[:50].tolist() == [stage.takes(seed, t) for t in range(50)]
        assert taken[:50].tolist() == [draw(seed, t) < 0.3 for t in range(50)]
        # and no step tells of the next one
        both = (taken[1:] & taken[:-1]).double().mean()
        assert abs(float(both) - 0.09) < 5 * (0.09 * 0.91 / 10000) ** 0.5
    assert all(Progressive(1.0).takes(0, t) for t in range(1000))


def test_what_is_not_sampled_stays(on_either: str) -> None:
    shares = [0.25, 0.5, 0.5, 1.0]
    shapes = [(8, 12), (12, 8), (8, 12), (8, 12)]
    params = [nn.Parameter(randn(*shape, seed=i)) for i, shape in enumerate(shapes)]
    groups = [{"params": [p], "rule": drop_muon(s)} for p, s in zip(params, shares, strict=True)]
    found = moves(Muon(groups, lr=0.1), params, range(STEPS))
    # sets are nested: whoever has the larger share is taken when others are
    assert found == [[draw(0, step) < share for share in shares] for step in range(STEPS)]
    assert 0 < sum(step[0] for step in found) < sum(step[1] for step in found) < STEPS


def test_a_parameter_of_several_matrices_is_one(on_either: str) -> None:
    params = [nn.Parameter(randn(3, 8, 12)), nn.Parameter(randn(4, 6, 6, seed=1))]
    optimizer = Muon(params, lr=0.1, rule="drop_muon", batch_experts=True)
    found = moves(optimizer, params, range(STEPS))
    assert found == [[draw(0, step) < 0.5] * 2 for step in range(STEPS)]


def test_seeds_have_draws_of_their_own_and_a_resume_the_same() -> None:
    params = [nn.Parameter(randn(8, 12))]
    optimizer = Muon(params, lr=0.1, rule="drop_muon", seed=3)
    found = moves(optimizer, params, range(5))
    again = Muon(params, lr=0.1, rule="drop_muon", seed=3)
    again.load_state_dict(optimizer.state_dict())
    found += moves(again, params, range(5, STEPS))
    assert found == [[draw(3, step) < 0.5] for step in range(STEPS)]
    assert found != [[draw(0, step) < 0.5] for step in range(STEPS)]


def test_a_skipped_gradient_is_counted_and_changes_no_draw(on_either: str) -> None:
    """So that layers stay together whose gradients were not finite once."""
    param = nn.Parameter(randn(8, 12))
    optimizer = Muon([param], lr=0.1, rule="drop_muon")
    skipped = 0
    for step in range(STEPS):
        old, taken = param.detach().clone(), draw(0, step) < 0.5
        param.grad = randn(8, 12, seed=step)
        if step in (0, 3):
            param.grad[0, 0] = torch.nan
            skipped += taken  # what is not sampled is not looked at
            taken = False
        if on_either == "host" and step == 3:
            with pytest.warns(RuntimeWarning, match="inf or nan"):
                optimizer.step()
        else:
            optimizer.step()
        assert torch.equal(param.detach(), old) != taken
    state = optimizer.state[param]
    assert (int(state["skipped"]), int(state["step"])) == (skipped, STEPS - skipped) == (1, 11)


@pytest.mark.parametrize("share", [0.25, 0.8])
def test_other_shares_do_what_the_equations_say(share: float) -> None:
    weight = 0.1 * randn(24, 40)
    oracle = DropMuon(weight, lr=0.02, weight_decay=0.1, share=share, seed=5)
    param = nn.Parameter(weight.clone())
    rule = replace(drop_muon(share), direction=ExactPolar())
    optimizer = Muon([param], 0.02, 0.1, rule=rule, state_format="fp32", seed=5)
    for step in range(20):
        param.grad = randn(24, 40, seed=step)
        oracle.step(param.grad.double())
        optimizer.step()
    # see `test_recipes.assert_close`
    error = float((param.detach() - oracle.weight).norm())
    assert error <= 1e-4 * float(oracle.weight.norm())


def test_layers_of_a_model_take_shares() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    overrides = {f"{i}.weight": {"rule": drop_muon((i + 1) / 4)} for i in range(4)}
    groups = muon_param_groups(model, overrides=overrides)
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    weights = [layer.weight for layer in model]
    seen = set()
    for step in range(30):
        before = [weight.detach().clone() for weight in weights]
        model(randn(16, 8, seed=step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(w.detach(), b) for w, b in zip(weights, before, strict=True)]
        first = moved.index(True)
        assert moved == [i >= first for i in range(4)]
        seen.add(first)
    assert seen == {0, 1, 2, 3}


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0, "half"])
def test_shares_are_checked(share: Any) -> None:
    with pytest.raises(ValueError, match="progressive: share: expected a number"):
        Progressive(share)
