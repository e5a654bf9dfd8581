"""Rules as values: names, fields, options in groups, recipes from outside, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from rule_steps import ALL, parameters, train
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    RULES,
    Muon,
    MuonWithAuxAdam,
    StateFormat,
    UpdateRule,
    muon_param_groups,
)
from lowbit_muon.state.stored import RULE_PREFIX, Kept, RuleState
from lowbit_muon.step.rules.direction import Polar, Rows, Signs
from lowbit_muon.step.rules.gradient import RowFeedback
from lowbit_muon.step.rules.momentum import SumMomentum, TwoDecays
from lowbit_muon.step.rules.precondition import SelectedRows
from lowbit_muon.step.rules.recipes import newton_muon, pion, resolve_rule
from lowbit_muon.step.rules.scaling import FixedNorm, Scaling, VectorMoment
from lowbit_muon.step.rules.stage import Matrices, Stage
from lowbit_muon.step.rules.step_size import Bounded


@pytest.mark.parametrize("name", ALL)
def test_rules_round_trip(name: str) -> None:
    rule = ALL[name]
    assert rule.name == name
    assert UpdateRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule
    assert pickle.loads(pickle.dumps(rule)) == rule
    assert hash(copy.deepcopy(rule)) == hash(rule)


@pytest.mark.parametrize("rule", [*ALL.values(), newton_muon(), pion(2, 6)], ids=lambda r: r.name)
def test_a_rule_s_name_means_it(rule: UpdateRule) -> None:
    assert resolve_rule(rule.name) == rule


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nomuon", "expected one of .*or pion"),
        ("pion", "expected one of"),
        ("pion(2", "expected one of"),
        ("muon()", "expected one of"),
        ("pion(__import__('os'))", "expected one of"),
        ("pion()", r"pion\(\) missing 1 required positional argument"),
        ("pion(9)", "k: expected a whole number"),
        ("newton_muon(every=0)", "every: expected a whole number"),
    ],
)
def test_a_name_that_means_no_rule_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon(parameters(), rule=name)


def test_a_group_shows_what_its_rule_says() -> None:
    params = parameters()
    optimizer = Muon(
        [{"params": params[:1]}, {"params": params[1:2], "rule": "lion", "momentum": 0.98}],
        rule="dion_muon",
        weight_decay=0.2,
    )
    dion, lion = optimizer.param_groups
    assert (dion["nesterov"], dion["ns_coefficients"]) == (False, "polar_express")
    assert (dion["adjust_lr_fn"], dion["momentum"]) == ("spectral_unclamped", 0.95)
    assert (lion["nesterov"], lion["ns_coefficients"][0]) == (False, 3.4445)
    assert (lion["adjust_lr_fn"], lion["momentum"]) == ("none", 0.98)
    assert dion["weight_decay"] == lion["weight_decay"] == 0.2
    assert dion["rule"] == RULES["dion_muon"].to_dict()
    assert resolve_rule(lion["rule"]) == RULES["lion"]


def test_groups_of_a_model_take_rules() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    groups = muon_param_groups(model, overrides={"1.weight": {"rule": "rmnp"}})
    optimizer = MuonWithAuxAdam(groups, rule="scion", aux_adam="adamw")
    by_name = {n: g for g in optimizer.param_groups for n in g["param_names"]}
    assert by_name["0.weight"]["rule"]["name"] == "scion"
    assert (by_name["0.weight"]["momentum"], by_name["0.weight"]["weight_decay"]) == (0.9, 1.0)
    assert by_name["1.weight"]["rule"]["name"] == "rmnp"
    assert by_name["1.weight"]["momentum"] == 0.95
    assert "rule" not in by_name["0.bias"]


# Options of a rule that none of them are at their defaults with, and the defaults, written out.
STRANGE = UpdateRule(
    "strange",
    options=(
        ("momentum", 0.5), ("nesterov", False), ("ns_coefficients", "polar_express"),
        ("ns_steps", 3), ("adjust_lr_fn", "none"), ("weight_decay", 0.7),
    ),
)  # fmt: skip
WRITTEN = {
    "momentum": 0.95, "nesterov": True, "ns_coefficients": (3.4445, -4.7750, 2.0315),
    "ns_steps": 5, "adjust_lr_fn": "original",
}  # fmt: skip


@pytest.mark.parametrize("name", [*WRITTEN, "weight_decay"])
@pytest.mark.parametrize("cls", [Muon, MuonWithAuxAdam])
def test_a_default_that_is_written_goes_before_the_rule_s(cls: type[Muon], name: str) -> None:
    """In the constructor, for its groups and later ones, after a copy too, and in a group."""
    value = (WRITTEN | {"weight_decay": 0.1 if cls is Muon else 0.0})[name]
    kind = {} if cls is Muon else {"use_muon": True}

    def group(**options: Any) -> dict[str, Any]:
        return {"params": [nn.Parameter(torch.zeros(4, 4))], **kind, **options}

    optimizer = cls([group()], rule=STRANGE, **{name: value})
    for each in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        each.add_param_group(group())
        each.add_param_group(group(rule=replace(STRANGE, name="stranger")))
        for made in each.param_groups:
            assert made[name] == value
            others = {other: made[other] for other, _ in STRANGE.options if other != name}
            assert others == {other: v for other, v in STRANGE.options if other != name}
    (made,) = cls([group(**{name: value})], rule=STRANGE).param_groups
    assert made[name] == value
    # what is None is the rule's
    (made,) = cls([group()], rule=STRANGE, **{name: None}).param_groups
    assert made[name] == dict(STRANGE.options)[name]


@pytest.mark.parametrize("name", ["momentum", "nesterov", "weight_decay", "adjust_lr_fn"])
def test_a_model_s_groups_say_what_was_written(name: str) -> None:
    value = (WRITTEN | {"weight_decay": 0.0})[name]
    model = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))
    for groups in (muon_param_groups(model), muon_param_groups(model, **{name: value})):
        optimizer = MuonWithAuxAdam(groups, rule=STRANGE, aux_adam="adamw")
        found = [made[name] for made in optimizer.param_groups if made["use_muon"]]
        written = any(name in each for each in groups if each["use_muon"])
        assert found == [value if written else dict(STRANGE.options)[name]] * len(found)
    assert written
    optimizer = MuonWithAuxAdam(model, rule=STRANGE, aux_adam="adamw", **{name: value})
    assert {made[name] for made in optimizer.param_groups if made["use_muon"]} == {value}


@dataclass(frozen=True)
class Halved(Scaling):
    """A choice that the library does not have."""

    kind: ClassVar[str] = "halved"
    by: float = 2.0

    def state(self, shape: tuple[int, int]) -> RuleState:
        return {"halved": Kept((1, 1))}

    def apply(self, update: Tensor, matrices: Matrices) -> Tensor:
        matrices.state["halved"] = matrices.state["halved"] + 1
        return update / self.by


def test_a_recipe_from_outside_needs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "halved", UpdateRule("halved", scaling=(Halved(4.0),)))
    params, plain = parameters(), parameters()
    optimizer = Muon(params, lr=0.04, weight_decay=0.0, rule="halved")
    train(optimizer, params, range(2))
    train(Muon(plain, lr=0.01, weight_decay=0.0), plain, range(2))
    for ours, theirs in zip(params, plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert float(optimizer.state[params[2]][f"{RULE_PREFIX}halved"]) == 2
    again = Muon(params, rule="halved")
    again.load_state_dict(optimizer.state_dict())
    assert float(again.state[params[2]][f"{RULE_PREFIX}halved"]) == 2


def test_bits_of_states_are_8_or_32() -> None:
    with pytest.raises(ValueError, match=r"normuon: bits: expected one of \(8, 32\), got 4"):
        RULES["normuon"].with_state_bits(4)


NORMALIZED = PRESETS["muonq4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "normuan"}, "rule: expected one of .*'normuon'.* got 'normuan'"),
        ({"rule": 3}, "rule: expected a name or an UpdateRule, got int"),
        ({"rule": {"name": "x", "direction": {"kind": "polr"}}}, "direction: kind: expected one"),
        ({"rule": {"name": "x", "scaling": [{"kind": "vector_moment", "beta": 1.5}]}}, "beta: exp"),
        ({"rule": {"name": "x", "scaling": [{"kind": "brake", "odd": 1}]}}, "unknown fields"),
        ({"rule": {"direction": {"kind": "polar"}}}, "expected a name and stages"),
        ({"rule": "lion", "momentum": 0.0}, r"momentum: expected a number in \(0, 1\)"),
        ({"rule": "namo", "state_format": NORMALIZED}, "needs the momentum's size .*'muonq4'"),
        ({"rule": "rmnp", "ns_input": "stored"}, "ns_input: expected 'exact' with the rule 'rmnp'"),
        ({"rule": "polargrad", "ns_input": "stored"}, "ns_input: expected 'exact' with the rule"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Muon(parameters(), **options)


def test_lion_has_no_look_ahead_of_nesterov() -> None:
    with pytest.raises(ValueError, match="nesterov: expected False"):
        Muon([{"params": parameters(), "nesterov": True}], rule="lion")


@pytest.mark.parametrize("rule", [name for name, rule in ALL.items() if rule.needs("size")])
def test_rules_that_need_sizes_refuse_formats_without(rule: str) -> None:
    with pytest.raises(ValueError, match="which 'muonq4' divides out in every step"):
        Muon(parameters(), rule=ALL[rule], state_format="muonq4")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UpdateRule(""), "name: expected a string"),
        (lambda: UpdateRule("x", scaling=FixedNorm()), "scaling: expected a tuple of Scaling"),
        (lambda: UpdateRule("x", direction=FixedNorm()), "direction: expected a Direction"),
        (lambda: UpdateRule("x", scaling=(VectorMoment(), VectorMoment())), "different names"),
        (lambda: UpdateRule("x", options=(("lr", 1.0),)), "options: expected values of momentum"),
        (lambda: VectorMoment(axis="rows"), "vector_moment: axis: expected one of"),
        (lambda: VectorMoment(beta=True), "vector_moment: beta: expected a number in"),
        (lambda: Rows("both"), "normalize: axis"),
        (lambda: Signs(by_columns=1), "sign: by_columns: expected a bool"),
        (lambda: Bounded(lowest=-1.0), "bounded: lowest: expected a number >= 0"),
        (lambda: TwoDecays(1.0), r"two_decays: beta: expected a number in \[0, 1\)"),
        (lambda: RowFeedback(1.5), r"fraction: expected a number in \(0, 1\]"),
        (lambda: UpdateRule("x", precondition=(SelectedRows(),)), "stages that keep .'selected'"),
        (lambda: pion(6), "k: expected a whole number from 0 to steps"),
        (lambda: Stage.from_dict(3), "expected a mapping of fields, got 3"),
    ],
)
def test_stages_check_their_fields(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_muon_itself_forms_no_update() -> None:
    fused = {name for name, rule in ALL.items() if rule.is_fused}
    assert fused == {
        *("muon", "moonlight", "dion_muon", "muonclip", "scion", "pion(2, 5)", "drop_muon")
    }
    assert not replace(RULES["muon"], direction=Rows()).is_fused
    assert replace(RULES["muon"], momentum=SumMomentum(), direction=Polar()).is_fused


def test_state_bytes_count_what_a_rule_keeps() -> None:
    """NorMuon's vector: 32 bits a row, 0.1 bits an element at most from 320 columns on."""
    param = nn.Parameter(torch.zeros(64, 640))
    sizes = []
    for rule in ("muon", "normuon"):
        optimizer = Muon([param], rule=rule)
        param.grad = torch.ones_like(param)
        optimizer.step()
        sizes.append(optimizer.state_bytes())
    assert sizes[1] - sizes[0] == 4 * 64
    assert isinstance(PRESETS["spectral4"], StateFormat)
