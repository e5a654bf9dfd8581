"""Names of parameters decide whose a state is, where both sides have them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_checkpoint import assert_same, through_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowbit_muon import Muon


def named(names: list[str], seed: int = 0, **options: Any) -> tuple[dict[str, Any], Muon]:
    """Parameters of one shape by their names, and an optimizer of them in this order."""
    params = {name: nn.Parameter(torch.zeros(8, 12)) for name in names}
    return params, Muon(list(params.items()), **options)


def step_named(params: dict[str, Any], optimizer: Muon, number: int) -> None:
    for name, param in params.items():
        seed = 100 * number + sum(map(ord, name))
        param.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(seed))
    optimizer.step()


@pytest.mark.parametrize("state_format", ["spectral4", "auto"])
def test_names_decide_and_not_the_order(state_format: str) -> None:
    names = ["a", "b", "c"]
    params, optimizer = named(names, state_format=state_format)
    other_params, other = named(names[::-1], state_format=state_format)
    step_named(params, optimizer, 0)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == names[::-1]
    for name in names:
        other_params[name].data.copy_(params[name].data)
        assert_same(optimizer.state[params[name]], other.state[other_params[name]])
    for number in range(1, 3):
        step_named(params, optimizer, number)
        step_named(other_params, other, number)
    for name in names:
        assert torch.equal(params[name], other_params[name]), name


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_do_not_count(wrapper: str) -> None:
    params, optimizer = named([wrapper + name for name in "ab"])
    other_params, other = named(["b", "a"])
    step_named(params, optimizer, 0)
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state[other_params["a"]], optimizer.state[params[wrapper + "a"]])
    assert other.param_groups[0]["param_names"] == ["b", "a"]


def test_names_find_their_groups() -> None:
    def build(groups: list[tuple[str, float]], state_format: str) -> tuple[dict[str, Any], Muon]:
        params = {n: nn.Parameter(torch.zeros(8, 12)) for names, _ in groups for n in names}
        return params, Muon(
            [{"params": [(n, params[n]) for n in names], "lr": lr} for names, lr in groups],
            state_format=state_format,
        )

    params, optimizer = build([("ab", 0.1), ("cde", 0.2)], "spectral4")
    step_named(params, optimizer, 0)
    # groups in another order, and one of them in two
    others, other = build([("ed", 0.5), ("ba", 0.5), ("c", 0.5)], "spectral4")
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1, 0.2]
    for name in "abcde":
        assert_same(other.state[others[name]], optimizer.state[params[name]])
    # one of two
    _, mixed = build([("abcd", 0.5), ("e", 0.5)], "spectral4")
    with pytest.raises(
        ValueError, match=r"parameter group 0: .* same options, got two of \['lr'\]"
    ):
        mixed.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 0.2
    mixed.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in mixed.param_groups] == [0.2, 0.2]


def test_other_names_are_refused_and_nothing_changes() -> None:
    params, optimizer = named(["a", "b"])
    step_named(params, optimizer, 0)
    saved = optimizer.state_dict()
    for names, message in (
        (["a", "c"], r"param_names: expected \['c'\], got \['b'\]"),
        (["a", "b", "c"], r"param_names: expected \['c'\], got none of them"),
        (["a"], r"param_names: expected no more, got \['b'\]"),
    ):
        others, other = named(names)
        step_named(others, other, 1)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(saved)
        assert_same(other.state_dict(), before)
        assert other.param_groups[0]["param_names"] == names


def test_without_names_on_one_side_the_order_decides() -> None:
    params, optimizer = named(["a", "b"])
    step_named(params, optimizer, 0)
    unnamed = [nn.Parameter(torch.zeros(8, 12)) for _ in range(2)]
    other = Muon(unnamed)
    other.load_state_dict(optimizer.state_dict())
    assert_same(other.state[unnamed[1]], optimizer.state[params["b"]])
    assert "param_names" not in other.param_groups[0]
    theirs = torch.optim.Muon(unnamed)
    for param in unnamed:
        param.grad = torch.randn(8, 12)
    theirs.step()
    last_params, last = named(["y", "x"])
    last.load_state_dict(theirs.state_dict())
    assert last.param_groups[0]["param_names"] == ["y", "x"]
    assert list(last.state) == list(last_params.values())


def test_names_of_torch_muon_decide_too() -> None:
    params = {name: nn.Parameter(torch.zeros(8, 12)) for name in "ab"}
    theirs = torch.optim.Muon(list(params.items()))
    for param in params.values():
        param.grad = torch.randn(8, 12)
    theirs.step()
    others, other = named(["b", "a"], state_format="fp32")
    other.load_state_dict(theirs.state_dict())
    assert torch.equal(
        other.state[others["a"]]["dense"], theirs.state[params["a"]]["momentum_buffer"]
    )


def test_keys_that_are_names_decide() -> None:
    """torch.distributed.checkpoint puts keys into this model's order, but not `param_names`."""
    model = nn.Sequential(nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False))
    model[1].weight = nn.Parameter(torch.zeros(8, 12))
    forward, backward = list(model.named_parameters()), list(model.named_parameters())[::-1]
    optimizer, other = Muon(forward), Muon(backward)
    step_named(dict(forward), optimizer, 0)
    saved = get_optimizer_state_dict(model, optimizer)
    for load in (
        lambda: set_optimizer_state_dict(model, other, saved),
        lambda: other.load_state_dict(saved),
    ):
        load()
        for _, param in forward:
            assert_same(other.state[param], optimizer.state[param])
        assert other.param_groups[0]["param_names"] == ["1.weight", "0.weight"]
