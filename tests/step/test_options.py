"""One table of options, and what becomes of keys of a group that are not in it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lowbit_muon
from lowbit_muon import RULES, AutoFormat, Muon, MuonWithAuxAdam, StateFormat
from lowbit_muon.checkpoint.dicts import convert_state_dict
from lowbit_muon.step import options as module
from lowbit_muon.step.options import AUX_OPTIONS, GROUP_DEFAULTS, OPTIONS, MuonOptions
from lowbit_muon.step.rules.rule import RULE_OPTIONS

BY_NAME = {option.name: option for option in OPTIONS}


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.ones(3, 4))


def documented(cls: type) -> list[str]:
    """The arguments that a class's docstring has an entry for: lines "        a, b: text"."""
    arguments = re.search(r"Args:\n(.*?)\n\n", inspect.cleandoc(cls.__doc__ or ""), re.DOTALL)
    assert arguments is not None
    entries = re.findall(r"^    (\w[\w,\s]*?):", arguments[1], re.MULTILINE)
    return [name.strip() for entry in entries for name in entry.split(",")]


@pytest.fixture(autouse=True)
def _forget_warnings() -> None:
    module._warn_of_tag.cache_clear()


# --- the table ---


def test_signatures_docstrings_and_groups_are_those_of_the_table() -> None:
    signature = inspect.signature(Muon).parameters
    assert {n: p.default for n, p in signature.items() if n != "params"} == {
        option.name: None if option.name in RULE_OPTIONS else option.default for option in OPTIONS
    }
    assert sorted(documented(Muon)) == sorted(["params", *BY_NAME])

    aux = {option.name: option for option in AUX_OPTIONS}
    own = inspect.signature(MuonWithAuxAdam).parameters
    plain = ["params", "lr", "weight_decay", "momentum", "aux_lr", "aux_adam"]
    assert list(own) == [*plain, "options"]
    assert own["aux_adam"].default == aux["aux_adam"].default
    # eps means something else to AdamW, and so its groups set it; the others are arguments.
    in_the_groups = {"momentum", "lr", "weight_decay", "eps"}
    assert set(MuonOptions.__annotations__) == set(BY_NAME) - in_the_groups
    for name in MuonOptions.__annotations__:  # types are those of Muon's arguments
        annotation = MuonOptions.__annotations__[name].__forward_arg__
        assert annotation == signature[name].annotation
    expected = [*plain, *MuonOptions.__annotations__]
    assert sorted(documented(MuonWithAuxAdam)) == sorted(expected)

    optimizer = MuonWithAuxAdam(
        [{"params": [matrix()], "use_muon": True}, {"params": [matrix()], "use_muon": False}],
        aux_adam="adamw",
    )
    muon, adamw = optimizer.param_groups
    assert set(muon) == {"params", "use_muon", "format_version", *GROUP_DEFAULTS}
    assert set(adamw) == {"params", "use_muon", "format_version", *aux}
    for option in AUX_OPTIONS[:-1]:
        assert adamw[option.name] == option.default
    # Of torch's groups everything is loaded, and of no others.
    assert {o.name for o in OPTIONS if o.load == "saved"} == set(
        torch.optim.Muon([matrix()]).defaults
    )


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_every_row_checks_its_value_and_names_itself(option: module.Option) -> None:
    values = {**{o.name: o.default for o in OPTIONS}, option.name: object()}
    with pytest.raises((TypeError, ValueError), match=f"^{option.name}: expected"):
        module.check_values(OPTIONS, values)
    with pytest.raises((TypeError, ValueError), match=f"^{option.name}: expected"):
        Muon([matrix()], **{option.name: values[option.name]})


@pytest.mark.parametrize("option", AUX_OPTIONS, ids=lambda option: option.name)
def test_every_row_of_adamw_checks_its_value(option: module.Option) -> None:
    group = {"params": [matrix()], "use_muon": False, option.name: object()}
    with pytest.raises(ValueError, match=f"^{option.name}: expected"):
        MuonWithAuxAdam([group], aux_adam="adamw")


OTHER_VALUES: dict[str, Any] = {
    "lr": 0.5, "weight_decay": 0.5, "momentum": 0.5, "nesterov": False, "eps": 0.5, "ns_steps": 3,
    "ns_coefficients": "polar_express", "adjust_lr_fn": "original", "state_format": "linear8",
    "rule": RULES["normuon"].to_dict(),
    "batch_experts": True, "row_splits": (1, 2), "ns_input": "stored", "ns_dtype": "float32",
    "stochastic_rounding": True, "compensation": True, "backend": "reference", "nonfinite": "raise",
    "seed": 3, "offload": True,
}  # fmt: skip


def test_a_load_leaves_in_a_group_what_the_table_says() -> None:
    assert set(OTHER_VALUES) == set(GROUP_DEFAULTS)  # a new option is tried here too
    optimizer = Muon([matrix()])
    own = copy.deepcopy(optimizer.param_groups[0])
    for name, value in OTHER_VALUES.items():
        saved = {**optimizer.state_dict(), "state": {}}
        saved["param_groups"][0][name] = value
        (loaded,), _ = convert_state_dict(optimizer, saved)
        expected = value if BY_NAME[name].load == "saved" else own[name]
        assert loaded[name] == expected, name


# --- keys of a group that are not in the table ---

REFUSED: list[tuple[bool, str, Any, str]] = [
    # misspelt
    (True, "state_fromat", "fp32", "did you mean 'state_format'?"),
    (True, "Momentum", 0.9, "did you mean 'momentum'?"),
    (True, "weight-decay", 0.1, "did you mean 'weight_decay'?"),
    (True, "update_dtyp", "int8", "did you mean 'update_dtype'?"),
    (False, "betaz", (0.9, 0.9), "did you mean 'betas'?"),
    # of the whole optimizer
    (True, "update_dtype", "nonsense", "'update_dtype' of the whole optimizer"),
    (True, "process_group", None, "'process_group' of the whole optimizer"),
    # of torch
    (True, "maximize", True, "has no such option"),
    (False, "maximize", True, "has no such option"),
    (False, "amsgrad", True, "has no such option"),
    (False, "fused", True, "has no such option"),
    (False, "decoupled_weight_decay", False, "has no such option"),
    # of microsoft/dion
    (True, "mu", 0.9, "it is the option 'momentum' of a group"),
    (True, "algorithm", "adamw", "'use_muon'; from_groups('dion', groups) translates them"),
    (True, "num_heads", 12, "it is the option 'row_splits'"),
    (True, "split_sizes", (1, 2), "it is the option 'row_splits'"),
    (True, "adjust_lr", "rms_norm", "it is the option 'adjust_lr_fn'"),
    (True, "epsilon", 1e-8, "it is the option 'eps'"),
    (True, "distributed_mesh", None, "'process_group' of the whole optimizer"),
    (True, "cautious_wd", True, "here it is another update rule: a rule with weight_decay=Cau"),
    (False, "cautious_wd", True, "has no such option"),
    (True, "muon_beta2", 0.95, "rule='normuon' (NorMuon(..., beta2=...))"),
    (True, "rank_fraction", 0.5, "has no such option"),
    # of NorMuon and nanochat
    (True, "beta2", 0.95, "here it is another update rule: rule='normuon' (NorMuon(..., beta2="),
    (False, "beta2", 0.95, "it is the option 'betas'"),
    (True, "kind", "adamw", "'use_muon'; from_groups('nanochat', groups) translates them"),
    # of NAMO, PolarGrad, Scion and MuonH
    (True, "mu2", 0.99, "rule='namo' (NAMO(..., mu2=...))"),
    (True, "col_state_clamp_c", 0.75, "rule='namo_d' (NAMOD(..., col_state_clamp_c=...))"),
    (True, "polar_first", True, "PolarGrad(..., polar_first=True)"),
    (True, "unconstrained", True, "rule='scion' (Scion(..., unconstrained=...))"),
    (True, "hyperball_eps", 1e-10, "rule='muonh' (MuonH(...))"),
    # of Moonlight and KellerJordan's older Muon
    (True, "wd", 0.1, "it is the option 'weight_decay'"),
    (True, "adamw_betas", (0.9, 0.95), "'betas' is an option of groups with use_muon=False"),
    (True, "backend_steps", 5, "it is the option 'ns_steps'"),
    # of Emerging-Optimizers
    (True, "num_ns_steps", 5, "it is the option 'ns_steps'"),
    (True, "coefficient_type", "quintic", "it is the option 'ns_coefficients'"),
    (True, "extra_scale_factor", 0.2, "has no such option"),
    # of heavyball and pytorch-optimizer
    (True, "storage_dtype", "bfloat16", "it is the option 'state_format'"),
    (True, "caution", True, "rule='cautious_muon'"),
    (False, "caution", True, "has no such option"),
    (True, "ns_coeffs", (1, 2, 3), "it is the option 'ns_coefficients'"),
    (False, "adamw_eps", 1e-8, "it is the option 'eps'"),
    # of the other kind of group
    (True, "betas", (0.9, 0.95), "'betas' is an option of groups with use_muon=False"),
    (False, "momentum", 0.95, "'momentum' is an option of groups with use_muon=True"),
    (False, "state_format", "fp32", "'state_format' is an option of groups with use_muon=True"),
]


@pytest.mark.parametrize(("uses_muon", "key", "value", "reason"), REFUSED)
def test_keys_that_ask_for_another_update_are_refused_and_nothing_is_added(
    uses_muon: bool, key: str, value: Any, reason: str
) -> None:
    kind = "Muon" if uses_muon else "AdamW"
    message = f"{key}: expected an option of {kind} groups, got {value!r}; "
    both = MuonWithAuxAdam([{"params": [matrix()], "use_muon": True}], aux_adam="adamw")
    optimizers: list[Muon] = [both, Muon([matrix()])] if uses_muon else [both]
    for optimizer in optimizers:
        before = copy.deepcopy(optimizer.state_dict()["param_groups"])
        group = {"params": [matrix()], key: value}
        if optimizer is both:
            group["use_muon"] = uses_muon
        given = dict(group)
        with pytest.raises(ValueError, match=re.escape(message) + ".*" + re.escape(reason)):
            optimizer.add_param_group(group)
        assert optimizer.state_dict()["param_groups"] == before
        assert group == given


@pytest.mark.parametrize(("key", "answer"), module._ANOTHER_RULE.items())
def test_the_rules_and_classes_that_a_message_names_exist(key: str, answer: str) -> None:
    for rule in re.findall(r"rule='(\w+)'", answer):
        assert rule in RULES
    for cls, argument in re.findall(r"(\w+)\(\.\.\., (\w+)=", answer):
        if cls != "replace":
            assert argument in inspect.signature(getattr(lowbit_muon, cls)).parameters
    assert not any(key == option.name or key in option.elsewhere.split() for option in OPTIONS)


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.elsewhere], ids=lambda o: o.name)
def test_every_other_name_of_an_option_is_refused_by_its_name_here(option: module.Option) -> None:
    for name in option.elsewhere.split():
        with pytest.raises(ValueError, match=rf"^{name}: .* '{option.name}'"):
            Muon([{"params": [matrix()], name: None}])


def test_muon_alone_refuses_a_group_for_adamw() -> None:
    with pytest.raises(ValueError, match=r"use_muon: .* MuonWithAuxAdam has groups of both kinds"):
        Muon([{"params": [matrix()], "use_muon": False}])


def test_what_comes_after_the_check_of_keys_fails_without_a_trace() -> None:
    optimizer = Muon([matrix()])
    vector = {"params": [nn.Parameter(torch.ones(3))], "state_format": "linear8"}
    given = dict(vector)
    with pytest.raises(ValueError, match="2 or more dimensions"):
        optimizer.add_param_group(vector)
    assert len(optimizer.param_groups) == 1
    assert vector == given
    with pytest.raises(TypeError, match="param_group: expected a dict, got list"):
        optimizer.add_param_group([matrix()])  # type: ignore[arg-type]


SILENT: list[tuple[str, Any]] = [
    *((key, 0.5) for key in module.SCHEDULER_KEYS),
    ("name", "blocks"), ("lr_scale", 0.5), ("lr_mult", 2.0), ("wd_mult", 0.0), ("moe", True),
    ("format_version", 1), ("maximize", False), ("foreach", None), ("foreach", False),
    ("capturable", False), ("differentiable", False), ("fused", None), ("amsgrad", False),
    ("decoupled_weight_decay", True), ("beta2", None), ("cautious_wd", False),
    ("weight_decay_method", "decoupled"), ("extra_scale_factor", 1.0),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), SILENT)
def test_keys_of_frameworks_and_options_that_are_off_pass(key: str, value: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Muon([{"params": [matrix()], key: value}]).param_groups[0][key] == value
        if key != "beta2":  # which is one of AdamW's betas
            group = {"params": [matrix()], "use_muon": False, key: value}
            assert MuonWithAuxAdam([group], aux_adam="adamw").param_groups[0][key] == value


@pytest.mark.parametrize("uses_muon", [True, False])
def test_a_tag_is_kept_with_one_warning_and_survives_a_load(uses_muon: bool) -> None:
    tags: dict[Any, Any] = {"layer": 3, "backbone": True, "dtype": "bf16", 7: "seven"}

    def make() -> MuonWithAuxAdam:
        group = {"params": [matrix()], "use_muon": uses_muon, **tags}
        return MuonWithAuxAdam([group], aux_adam="adamw")

    with pytest.warns(UserWarning, match="parameter groups: ") as caught:
        optimizer, other = make(), make()
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == len(tags)
    for tag, text in zip(tags, texts, strict=True):
        assert f"has no option {tag!r}; the key is kept and does nothing" in text
    other.load_state_dict(optimizer.state_dict())
    for tag, value in tags.items():
        assert other.param_groups[0][tag] == value


def test_a_warning_turned_into_an_error_adds_nothing_and_comes_again() -> None:
    optimizer = Muon([matrix()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(UserWarning, match="layer"):
                optimizer.add_param_group({"params": [matrix()], "layer": 3})
    assert len(optimizer.param_groups) == 1


def test_what_cycling_schedulers_leave_in_adamws_groups_still_loads() -> None:
    """They write a momentum, an option of Muon's groups, into every group."""

    def make() -> MuonWithAuxAdam:
        groups = [{"params": [matrix()], "use_muon": muon} for muon in (True, False)]
        return MuonWithAuxAdam(groups, aux_adam="adamw")

    optimizer, resumed = make(), make()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=4)
    assert optimizer.param_groups[1]["momentum"] == optimizer.param_groups[0]["momentum"]
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.param_groups[1]["momentum"] == optimizer.param_groups[1]["momentum"]


@pytest.mark.parametrize("name", ["eps", "betas", "state_fromat", "maximize"])
def test_the_constructor_of_both_names_what_it_does_not_take(name: str) -> None:
    group = {"params": [matrix()], "use_muon": True}
    with pytest.raises(TypeError, match=f"^{name}: expected an option of all groups"):
        MuonWithAuxAdam([group], **{name: 0.1})  # type: ignore[arg-type]


# --- formats are resolved once ---


@pytest.fixture
def constructed(monkeypatch: pytest.MonkeyPatch) -> list[StateFormat]:
    """The formats that were constructed."""
    made: list[StateFormat] = []
    check = StateFormat.__post_init__

    def counted(self: StateFormat) -> None:
        made.append(self)
        check(self)

    monkeypatch.setattr(StateFormat, "__post_init__", counted)
    return made


def give_gradients(optimizer: Muon) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))


def through_a_file(optimizer: Muon) -> Muon:
    made = Muon(
        [nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]],
        state_format="auto" if "candidates" in optimizer.defaults["state_format"] else "spectral3",
    )
    made.load_state_dict(optimizer.state_dict())
    return made


@pytest.mark.parametrize("state_format", ["spectral3", "auto"])
@pytest.mark.parametrize(
    "copied",
    [lambda o: o, copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), through_a_file],
    ids=["itself", "deepcopy", "pickle", "load_state_dict"],
)
def test_a_step_of_several_parameters_constructs_no_format(
    state_format: str, copied: Callable[[Muon], Muon], constructed: list[StateFormat]
) -> None:
    optimizer = Muon([matrix() for _ in range(5)], state_format=state_format)
    give_gradients(optimizer)
    optimizer.step()
    optimizer = copied(optimizer)
    give_gradients(optimizer)
    constructed.clear()
    optimizer.step()
    optimizer.state_formats()
    assert constructed == []
    StateFormat("counted", 4)
    assert len(constructed) == 1  # it does count


def test_a_format_that_is_edited_in_its_group_is_noticed(constructed: list[StateFormat]) -> None:
    optimizer = Muon([matrix()], state_format="linear8")
    fields = optimizer.param_groups[0]["state_format"]
    give_gradients(optimizer)
    fields["bits"] = 4
    optimizer.step()
    (found,) = optimizer.state_formats().values()
    assert found.bits == 4
    # Equal to what is resolved already, as keys of a dict are, and yet no bool and no whole number.
    for name, bad in (("spectral", 0), ("bits", 4.0), ("bits", True), ("clip", float("nan"))):
        good, fields[name] = fields[name], bad
        for _ in range(2):  # an error is not remembered as a format
            with pytest.raises(ValueError, match=name):
                optimizer.step()
        fields[name] = good
    optimizer.step()


def test_a_choice_that_is_edited_in_its_group_is_noticed() -> None:
    optimizer = Muon([matrix()], state_format=AutoFormat(candidates=("linear8",)))
    optimizer.param_groups[0]["state_format"]["candidates"][0]["bits"] = 4
    give_gradients(optimizer)
    optimizer.step()
    assert [found.bits for found in optimizer.state_formats().values()] == [4]
