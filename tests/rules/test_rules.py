"""Every update rule with batches, devices, half precision and bad gradients; rules as values."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    RULES,
    Muon,
    MuonWithAuxAdam,
    NonFiniteGradientError,
    StateFormat,
    UpdateRule,
    muon_param_groups,
)
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.state.gradients import LARGEST_NORM
from lowbit_muon.state.rounding import restore
from lowbit_muon.state.stored import RULE_PREFIX, Kept, RuleState
from lowbit_muon.step import rule_weights
from lowbit_muon.step.rules.direction import Polar, Rows, Signs
from lowbit_muon.step.rules.gains import RowGains
from lowbit_muon.step.rules.gradient import RowFeedback
from lowbit_muon.step.rules.momentum import SumMomentum, TwoDecays
from lowbit_muon.step.rules.precondition import SelectedRows
from lowbit_muon.step.rules.recipes import fismo, newton_muon, pion, resolve_rule
from lowbit_muon.step.rules.scaling import FixedNorm, Scaling, VectorMoment
from lowbit_muon.step.rules.stage import Matrices, Stage
from lowbit_muon.step.rules.step_size import Bounded

# The first and the third are a batch.
SHAPES = ((24, 40), (40, 24), (24, 40), (1, 7))
ALL = {**RULES, "pion(2, 5)": pion(2), "fismo(0.9, 0.1)": fismo(0.9, 0.1)}


def sizes_needed(rule: UpdateRule) -> bool:
    return bool(rule.needs("size"))


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES
    ]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """With a common part, as training has; zeros in the second step of the first two."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, param in enumerate(params):
        rows, columns = param.shape
        thin = torch.randn(rows, 2, generator=generator) @ torch.randn(
            2, columns, generator=generator
        )
        grad = thin + 0.3 * torch.randn(param.shape, generator=generator)
        if step == 1 and index < 2:
            grad.zero_()
        param.grad = grad.to(param.dtype)


def train(optimizer: Muon, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def values(optimizer: Muon) -> dict[str, Any]:
    """All weights and all of the state."""
    found: dict[str, Any] = {}
    for number, (param, state) in enumerate(optimizer.state.items()):
        found[f"{number}"] = param.detach().clone()
        found |= {f"{number} {key}": copy.deepcopy(value) for key, value in state.items()}
    return found


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value
        assert same, key


def options_of(rule: str, state_format: str) -> dict[str, Any]:
    return {"rule": ALL[rule], "state_format": state_format, "lr": 0.01}


# --- every rule; with every format: test_pairs.py ---


@pytest.mark.parametrize("rule", ALL)
def test_a_batch_steps_as_each_matrix_alone(rule: str) -> None:
    params, alone = parameters(), parameters()
    options = options_of(rule, "fp32") | {"rule": ALL[rule].with_state_bits(32)}
    together = Muon(params, **options)
    optimizers = [Muon([param], **options) for param in alone]
    for step in range(3):
        give_gradients(params, step)
        give_gradients(alone, step)
        together.step()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(params, alone, strict=True):
        # Sums in another order: some rounding of float32, lifted by Newton-Schulz (a^5 = 485) where
        # a direction is small beside the others.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rule", ["cautious_decay", "nanochat", "namo", "namo_d", "muonh", "lion"])
def test_panels_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for floats in (2**16, 100):  # all rows, and a few
        monkeypatch.setattr(rule_weights, "PANEL_FLOATS", floats)
        params = parameters()
        train(Muon(params, **options_of(rule, "fp32")), params, range(3))
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rule", ALL)
def test_a_device_steps_as_the_host(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(rule, "fp32") | {"rule": ALL[rule].with_state_bits(32)}
    host = parameters()
    train(Muon(host, **options), host, range(3))
    monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    params = parameters()
    train(Muon(params, ns_dtype="float32", **options), params, range(3))
    for ours, theirs, start in zip(params, host, parameters(), strict=True):
        # float32 Newton-Schulz is within 2.4e-3 of float64 whatever the order of its sums.
        moved = float((theirs.detach() - start.detach()).norm())
        assert float((ours.detach() - theirs.detach()).norm()) <= 2 * 2.4e-3 * moved


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize(
    "rule", [rule for rule in ALL if ALL[rule].with_state_bits(32) != ALL[rule]]
)
def test_eight_bits_end_beside_float32(
    rule: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(24, 48, generator=generator)
    grads = [torch.randn(24, 48, generator=generator) for _ in range(4)]
    ends = []
    for each in (ALL[rule], ALL[rule].with_state_bits(32)):
        param = nn.Parameter(start.clone())
        optimizer = Muon([param], rule=each, state_format="fp32", lr=0.01, weight_decay=0.0)
        for grad in grads:
            param.grad = grad.clone()
            optimizer.step()
        ends.append(param.detach())
    error, moved = float((ends[0] - ends[1]).norm()), float((ends[1] - start).norm())
    # Roots of second moments are wrong by 1.1 % at most after one rounding, 3.3 % after three, and
    # MARS-M's gradients by less. A polar factor takes in what is E of a matrix X as 2 ||E|| / s of
    # its own norm sqrt(24), with s the smallest singular value: for independent elements of size
    # one sqrt(48) - sqrt(24) = 2, so that 3.3 % of ||X|| = sqrt(24 * 48) becomes at most 1.1 of
    # 4.9, or 23 % of a step, if all errors went that way; at random it is a tenth of that.
    # SOAP's bases are turned by 0.9 %, which on two sides (of Conda one) makes errors of 1.3 % of
    # its usual size on each rotated element. Adam's first step is the elements' signs, of which as
    # many change as are smaller than that: 1.3 % sqrt(2 / pi) = 1 %, or 2 sqrt(0.01) = 20 % of such
    # a step, and of what SOAP-Muon's polar factor takes. Mousse's, by 1.3 % of X in front of its
    # polar factor: 9 % if all went that way, and 1.3 % behind it.
    rotated = rule in ("soap", "soap_muon", "conda", "mousse")
    assert 0 < error <= (0.2 if rotated else 0.023) * moved


@pytest.mark.parametrize("on_device", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("rule", ALL)
def test_a_gradient_that_is_not_finite_changes_nothing(
    rule: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if on_device:
        monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    params = parameters()
    optimizer = Muon(params, **options_of(rule, "linear8"))
    train(optimizer, params, range(1))
    before = values(optimizer)
    give_gradients(params, 2)
    for param in params:
        assert param.grad is not None
        param.grad[0, 0] = torch.nan
    if on_device:
        optimizer.step()
    else:
        with pytest.warns(RuntimeWarning, match="inf or nan"):
            optimizer.step()
    after = values(optimizer)
    counts = {key for key in before if key.endswith("skipped")}
    assert all(int(after[key]) == 1 for key in counts)
    assert_equal(
        {k: v for k, v in after.items() if k not in counts},
        {k: v for k, v in before.items() if k not in counts},
    )
    raising = Muon(params, nonfinite="raise", **options_of(rule, "linear8"))
    with pytest.raises(NonFiniteGradientError):
        raising.step()


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
@pytest.mark.parametrize("momentum", [0.05, 0.9999])
@pytest.mark.parametrize("rule", ALL)
def test_the_largest_gradients_that_are_taken_stay_finite(rule: str, momentum: float) -> None:
    """What no sum of squares in float32 could hold is skipped; an average takes 1 - momentum."""
    params = parameters()
    optimizer = Muon(params, momentum=momentum, **options_of(rule, "spectral4"))
    for step in range(3):
        give_gradients(params, step)
        for param in params:
            assert param.grad is not None
            if step < 2:
                size = 0.9 * LARGEST_NORM / (1 - momentum)
                param.grad *= size / param.grad.norm().clamp_min(1e-9)
        optimizer.step()
    for key, value in values(optimizer).items():
        assert not isinstance(value, Tensor) or bool(value.isfinite().all()), key


@pytest.mark.parametrize("rule", ALL)
def test_compensation_keeps_half_precision_weights_close_to_float32_ones(rule: str) -> None:
    params = parameters(torch.bfloat16)
    wide = [nn.Parameter(param.detach().float()) for param in params]
    optimizer = Muon(params, compensation=True, **options_of(rule, "fp32"))
    exact = Muon(wide, **options_of(rule, "fp32"))
    largest = [param.detach().abs() for param in wide]
    for step in range(3):
        give_gradients(params, step)
        for param, other in zip(params, wide, strict=True):
            assert param.grad is not None
            other.grad = param.grad.float()
        optimizer.step()
        exact.step()
        largest = [torch.maximum(a, b.detach().abs()) for a, b in zip(largest, wide, strict=True)]
    for param, other, most in zip(params, wide, largest, strict=True):
        found = restore(param.detach(), optimizer.state[param]["remainder"])
        # A remainder counts 256ths of the weight's spacing, which is at most 2^-7 of it, in each of
        # three steps, and ends at 127, one of them before the next weight; the rest is float32's.
        bound = 3 * 2.0**-15 * most + 3 * 2.0**-21 * 0.1
        if any(stage.needs_weights for stage in ALL[rule].precondition):
            # As much of singular vectors as the largest value is of the gap behind it, some 10,
            # and so of the direction, whose elements are one at most.
            bound += 0.01 * 10 * 3 * 2.0**-15
        if isinstance(ALL[rule].gains, RowGains):
            # Tangents to rows are known as rows are, to 2^-17, twice. Newton-Schulz lifts that by
            # a^5 = 485 at most, spread over 16 x 16 elements or more; 0.2 sqrt(16) is the scale.
            bound += 3 * 0.01 * 0.8 * 485 / 16 * 2.0**-16
        assert bool(((found - other).abs() <= bound).all())


@pytest.mark.parametrize("rule", ALL)
def test_stochastic_rounding_ends_beside_the_exact_weight(rule: str) -> None:
    params = parameters(torch.bfloat16)
    wide = [nn.Parameter(param.detach().float()) for param in params]
    give_gradients(params, 0)
    for param, other in zip(params, wide, strict=True):
        assert param.grad is not None
        other.grad = param.grad.float()
    Muon(params, stochastic_rounding=True, **options_of(rule, "fp32")).step()
    Muon(wide, **options_of(rule, "fp32")).step()
    for param, other in zip(params, wide, strict=True):
        # at most one spacing, 2^-7 of the larger end
        bound = 2.0**-7 * torch.maximum(param.abs().float(), other.abs()) + 2.0**-21
        assert bool(((param.float() - other).abs() <= bound).all())


def test_splits_and_experts_have_states_of_their_own() -> None:
    whole = nn.Parameter(torch.randn(3, 8, 12, generator=torch.Generator().manual_seed(0)))
    parts = [nn.Parameter(part.clone()) for part in whole.detach()]
    stacked = Muon([{"params": [whole], "batch_experts": True}], lr=0.01, rule="normuon")
    apart = Muon(parts, lr=0.01, rule="normuon")
    for step in range(3):
        grad = torch.randn(whole.shape, generator=torch.Generator().manual_seed(step))
        whole.grad = grad
        for part, own in zip(parts, grad, strict=True):
            part.grad = own.clone()
        stacked.step()
        apart.step()
    for index, part in enumerate(parts):
        torch.testing.assert_close(whole.detach()[index], part.detach(), rtol=1e-5, atol=1e-6)
        ours = stacked.state[whole][f"{index}.{RULE_PREFIX}vector_moment"]
        torch.testing.assert_close(ours, apart.state[part][f"{RULE_PREFIX}vector_moment"])


# --- rules as values ---


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


# --- conversions ---


def test_a_momentum_goes_over_to_another_rule() -> None:
    params = parameters()
    average = Muon(params, rule="normuon", state_format="fp32")
    train(average, params, range(2))
    total = Muon(params, rule="moonlight", state_format="fp32")
    total.load_state_dict(average.state_dict())
    back = Muon(params, rule="normuon", state_format="fp32")
    back.load_state_dict(total.state_dict())
    for param in params:
        ours, theirs = total.state[param]["dense"], average.state[param]["dense"]
        torch.testing.assert_close(ours, theirs / 0.05)
        torch.testing.assert_close(back.state[param]["dense"], theirs)
        # what only one of them keeps starts anew
        assert not [key for key in total.state[param] if key.startswith(RULE_PREFIX)]
        assert not back.state[param][f"{RULE_PREFIX}vector_moment"].any()
    same = Muon(params, rule=replace(RULES["normuon"], name="mine"), state_format="spectral4")
    same.load_state_dict(average.state_dict())
    moment = f"{RULE_PREFIX}vector_moment"
    assert all(torch.equal(same.state[p][moment], average.state[p][moment]) for p in params)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.needs("age")])
def test_what_starts_anew_in_mid_run_counts_its_own_steps(rule: str) -> None:
    """Averages that start at zero are corrected by how many steps they have taken: the first steps
    behind a change of the rule are of the size of others, or of a new optimizer's first."""
    moved = {}
    for before, steps in ((rule, 30), ("muon", 30), (rule, 0)):
        params = parameters()
        optimizer = Muon(params, rule=before, lr=1e-6, state_format="fp32")
        train(optimizer, params, range(30 - steps, 30))
        went_on = Muon(params, rule=rule, state_format="fp32")
        went_on.load_state_dict(optimizer.state_dict())
        went_on.param_groups[0] |= {"lr": 0.02, "weight_decay": 0.0}
        start = [param.detach().clone() for param in params]
        train(went_on, params, range(30, 32))  # (SOAP takes the first one for its bases)
        moved[before, steps] = [
            float((param.detach() - old).norm()) for param, old in zip(params, start, strict=True)
        ]
    for usual, changed, first in zip(*moved.values(), strict=True):
        assert usual / 3 < changed < 3 * max(usual, first)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (RULES["soap"], RULES["conda"]),
        (RULES["namo"], RULES["soap"]),
        (RULES["namo"], RULES["namo_d"]),
        (RULES["soap"], RULES["soap"].with_state_bits(32)),
    ],
    ids=lambda rule: rule.name,
)
def test_what_a_rule_keeps_goes_over_as_a_whole_or_starts_anew(
    old: UpdateRule, new: UpdateRule
) -> None:
    params = parameters()
    before = Muon(params, rule=old, state_format="fp32")
    train(before, params, range(4))
    after = Muon(params, rule=new, state_format="fp32")
    after.load_state_dict(before.state_dict())
    for param in params:
        kept = {k: v for k, v in after.state[param].items() if k.startswith(RULE_PREFIX)}
        assert f"{RULE_PREFIX}age" in kept
        assert not any(value.any() for value in kept.values())


def test_bits_of_states_are_8_or_32() -> None:
    with pytest.raises(ValueError, match=r"normuon: bits: expected one of \(8, 32\), got 4"):
        RULES["normuon"].with_state_bits(4)


def test_options_of_a_rule_stay_where_another_rule_is_loaded() -> None:
    params = parameters()
    plain = Muon(params, momentum=0.9)
    train(plain, params, range(1))
    lion = Muon(params, rule="lion")
    lion.load_state_dict(plain.state_dict())
    (group,) = lion.param_groups
    assert (group["momentum"], group["nesterov"], group["adjust_lr_fn"]) == (0.99, False, "none")
    train(lion, params, range(1, 2))


def test_sums_are_exported_as_averages() -> None:
    params = parameters()
    total = Muon(params, rule="moonlight", adjust_lr_fn="original", state_format="fp32")
    average = Muon(copy.deepcopy(params), state_format="fp32")
    train(total, params, range(2))
    train(average, average.param_groups[0]["params"], range(2))
    ours, theirs = total.export_full_precision(), average.export_full_precision()
    for key, entries in theirs["state"].items():
        torch.testing.assert_close(
            ours["state"][key]["momentum_buffer"], entries["momentum_buffer"]
        )
    torch.optim.Muon(params).load_state_dict(ours)


# --- what is refused ---

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


@pytest.mark.parametrize("rule", [rule for rule in ALL if sizes_needed(ALL[rule])])
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
