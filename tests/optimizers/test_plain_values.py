"""Options of other libraries' types are taken for the values that they are, and stored as those."""

from __future__ import annotations

import decimal
import enum
import fractions
import inspect
import io
from collections import UserDict, UserList
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from lowbit_muon import Muon, MuonWithAuxAdam, StateFormat, muon_param_groups
from lowbit_muon.formats.presets import resolve_format


class Rate(float, enum.Enum):
    SMALL = 0.25


class Name(str, enum.Enum):
    EIGHT = "linear8"


OPTIONS: list[tuple[str, Any, Any]] = [
    ("lr", np.float32(0.25), 0.25), ("lr", np.float64(0.25), 0.25), ("lr", np.array(0.25), 0.25),
    ("lr", fractions.Fraction(1, 4), 0.25), ("lr", decimal.Decimal("0.25"), 0.25),
    ("lr", Rate.SMALL, 0.25), ("lr", np.int64(1), 1), ("nesterov", np.bool_(False), False),
    ("ns_steps", np.int32(3), 3), ("seed", np.uint64(7), 7),
    ("row_splits", UserList([8, 8]), (8, 8)), ("row_splits", np.array([8, 8]), (8, 8)),
    ("row_splits", range(6, 11, 4), (6, 10)),
    ("ns_coefficients", UserList([3.5, -4.75, 2.0]), (3.5, -4.75, 2.0)),
    ("ns_coefficients", np.array([[3.5, -4.75, 2.0]] * 5), ((3.5, -4.75, 2.0),) * 5),
    ("adjust_lr_fn", np.str_("original"), "original"),
    ("backend", np.str_("reference"), "reference"),
    ("state_format", Name.EIGHT, resolve_format("linear8").to_dict()),
    ("state_format", UserDict(resolve_format("nf4").to_dict()), resolve_format("nf4").to_dict()),
]  # fmt: skip


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(is_plain(key) and is_plain(each) for key, each in value.items())
    return value is None or type(value) in (float, int, bool, str, torch.Tensor)


@pytest.mark.parametrize(("name", "value", "plain"), OPTIONS)
@pytest.mark.parametrize("where", ["argument", "group"])
def test_an_option_of_another_type(name: str, value: Any, plain: Any, where: str) -> None:
    param = nn.Parameter(torch.ones(16, 8))
    if where == "argument":
        optimizer = Muon([param], **{name: value})
    else:
        optimizer = Muon([{"params": [param], name: value}])
    param.grad = torch.ones(16, 8)
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0][name] == plain
    assert is_plain(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("betas", [UserList([0.5, 0.75]), np.array([0.5, 0.75]), [0.5, 0.75]])
def test_betas_of_any_sequence(betas: Any) -> None:
    net = nn.Linear(8, 8)
    for groups in (
        muon_param_groups(net, aux_betas=betas),
        [{"params": [net.bias], "use_muon": False, "betas": betas}],
    ):
        optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
        net.bias.grad = torch.ones(8)
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][-1]["betas"] == (0.5, 0.75)


def test_what_a_scheduler_of_other_types_sets_is_resumed() -> None:
    """A step takes them, so a resume does: also a rate that rounding left below zero."""
    net = nn.Linear(8, 8)
    optimizer = MuonWithAuxAdam(muon_param_groups(net), aux_adam="adamw")
    muon, aux = optimizer.param_groups
    muon.update(
        lr=np.float32(-1e-10), momentum=np.float64(0.5), initial_lr=np.float64(0.1),
        weight_decay=np.int64(0), max_lr=decimal.Decimal("0.5"),
    )  # fmt: skip
    aux.update(lr=np.float32(0.5), betas=[np.float64(0.5), np.float32(0.75)])
    for param in net.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    saved = optimizer.state_dict()
    assert is_plain(saved)
    resumed = MuonWithAuxAdam(muon_param_groups(net), aux_adam="adamw")
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["lr"] == float(np.float32(-1e-10))
    assert resumed.param_groups[0]["initial_lr"] == 0.1
    assert resumed.param_groups[1]["betas"] == (0.5, 0.75)
    with pytest.raises(ValueError, match="lr: expected a number"):
        Muon(net.weight.unsqueeze(0), lr=-1e-10)


def test_splits_of_any_sequence_and_number() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)})
    groups = muon_param_groups(
        model, split_fused={"qkv": UserList([8, 8, 8])}, split_heads={"out": np.int64(4)}
    )
    assert {group.get("row_splits") for group in groups} == {(8, 8, 8), (4, 4), None}


def test_global_hooks_are_called_once_for_the_users_optimizer() -> None:
    seen: list[str] = []
    handles = [
        register(lambda optimizer, *_: seen.append(type(optimizer).__name__))
        for register in (register_optimizer_step_pre_hook, register_optimizer_step_post_hook)
    ]
    try:
        for kind in ("adamw", "auto"):
            net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
            optimizer = MuonWithAuxAdam(muon_param_groups(net), aux_adam=kind)  # type: ignore[arg-type]
            for param in net.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["MuonWithAuxAdam"] * 4


def test_a_group_without_use_muon_leads_to_muon_param_groups() -> None:
    """As unfreezing callbacks of frameworks add them."""
    optimizer = MuonWithAuxAdam(muon_param_groups(nn.Linear(4, 4)))
    module = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"for group in muon_param_groups\(module\)"):
        optimizer.add_param_group({"params": list(module.parameters())})
    for group in muon_param_groups(module):
        optimizer.add_param_group(group)
    with pytest.raises(ValueError, match="put it into a group with use_muon=False"):
        MuonWithAuxAdam([{"params": [nn.Parameter(torch.ones(3))], "use_muon": True}])
    with pytest.raises(ValueError, match="give it to AdamW, as MuonWithAuxAdam"):
        Muon([nn.Parameter(torch.ones(3))])


def test_arguments_are_those_of_the_installed_torch() -> None:
    ours, theirs = (inspect.signature(cls).parameters for cls in (Muon, torch.optim.Muon))
    for (name, parameter), mine in zip(theirs.items(), ours.values(), strict=False):
        assert (mine.name, mine.kind) == (name, parameter.kind)
        assert mine.default in (None, parameter.default)
    made, peer = (cls([nn.Parameter(torch.zeros(2, 2))]) for cls in (Muon, torch.optim.Muon))
    assert {name: made.defaults[name] for name in peer.defaults} == peer.defaults


def accepted_rules() -> list[str]:
    """What torch.optim.Muon takes as adjust_lr_fn: it names none that it does not know."""
    found = []
    for name in ("original", "match_rms_adamw", "spectral_unclamped"):
        try:
            torch.optim.Muon([nn.Parameter(torch.ones(2, 2))], adjust_lr_fn=name)
        except ValueError:
            continue
        found.append(name)
    return found


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (8, 8)])
@pytest.mark.parametrize("nesterov", [True, False])
def test_values_are_those_of_the_installed_torch(shape: tuple[int, int], nesterov: bool) -> None:
    """To the bfloat16 that torch multiplies in: 5 steps with an error of 2^-8 each, amplified."""
    for name in (None, *accepted_rules()):
        ours, theirs = (nn.Parameter(torch.ones(shape)) for _ in range(2))
        optimizers = (
            Muon([ours], 0.1, 0.1, 0.9, nesterov, adjust_lr_fn=name, state_format="fp32"),
            torch.optim.Muon([theirs], 0.1, 0.1, 0.9, nesterov, adjust_lr_fn=name),
        )
        for step in range(3):
            grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
            ours.grad, theirs.grad = grad.clone(), grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        assert (ours - theirs).norm() < 0.06 * (theirs - 1).norm(), name


def test_unclamped_scaling_is_the_root_of_the_ratio() -> None:
    for shape in (8, 24), (24, 8):
        updates = {}
        for name in (None, "spectral_unclamped"):
            param = nn.Parameter(torch.zeros(shape))
            optimizer = Muon([param], 1.0, 0.0, adjust_lr_fn=name)  # type: ignore[arg-type]
            param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
            updates[name] = param.detach()
        factor = (shape[0] / shape[1]) ** 0.5 / max(1.0, shape[0] / shape[1]) ** 0.5
        assert torch.allclose(updates["spectral_unclamped"], factor * updates[None], rtol=1e-5)


def test_a_state_format_object_is_no_plain_value() -> None:
    assert isinstance(resolve_format("nf4"), StateFormat)
    optimizer = Muon([nn.Parameter(torch.ones(4, 4))], state_format=resolve_format("nf4"))
    assert optimizer.param_groups[0]["state_format"] == resolve_format("nf4").to_dict()
