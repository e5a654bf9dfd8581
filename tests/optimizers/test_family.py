"""Classes with published names: the arguments of their public packages, and the rules they mean."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowbit_muon
from lowbit_muon import (
    NAMO,
    NAMOD,
    RMNP,
    RULES,
    AdaMuon,
    Lion,
    Muon,
    MuonH,
    MuonWithAuxAdam,
    NorMuon,
    PolarGrad,
    Scion,
    UpdateRule,
)
from lowbit_muon.step.options import MuonOptions, PolarOptions, StateOptions
from lowbit_muon.step.rules.direction import ExactPolar, Polar, Rows, Signs
from lowbit_muon.step.rules.momentum import TwoDecays
from lowbit_muon.step.rules.scaling import (
    ColumnSignalToNoise,
    ElementMoment,
    FixedNorm,
    SignalToNoise,
    VectorMoment,
)
from lowbit_muon.step.rules.step_size import Bounded, StepSize

SHAPES = ((12, 20), (20, 12), (8, 8))
CLASSES = (NorMuon, AdaMuon, RMNP, PolarGrad, Scion, MuonH, Lion, NAMO, NAMOD)
# A momentum and a weight decay that are Muon's own defaults, which a rule's options go before.
USUAL = {"momentum": 0.95, "weight_decay": 0.1}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach().clone() for param in params]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def make(cls: Callable[..., Muon], params: list[nn.Parameter], **arguments: Any) -> Muon:
    if cls in (NAMO, NAMOD):
        return cls(muon_params=params, aux_adam="adamw", **arguments)
    return cls(params, **arguments)


def rule(name: str, **changes: Any) -> UpdateRule:
    """One of the rules, changed, without options of its own: what a test says is all there is."""
    return replace(RULES[name], options=(), **changes)


# --- signatures ---

NAMO_DEFAULTS = {
    "lr": 1e-2, "wd": 0.1, "muon_params": None, "momentum": 0.95, "mu2": 0.99,
    "adamnorm_eps": 1e-8, "nesterov": True, "ns_steps": 5, "use_exact_svd": False,
    "scale_coeff": 0.2,
}  # fmt: skip
ADAMW_DEFAULTS = {
    "adamw_params": None, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "adamw_wd": None
}  # fmt: skip
# The positional arguments of the public packages, those that change an update.
PUBLISHED: dict[type, dict[str, Any]] = {
    NorMuon: {"params": None, "lr": 0.02, "weight_decay": 0, "momentum": 0.95, "beta2": 0.95},
    AdaMuon: {
        "params": None, "lr": 0.02, "weight_decay": 0.01, "momentum": 0.95, "nesterov": True,
        "ns_steps": 5, "eps": 1e-8,
    },
    RMNP: {"params": None, "lr": 0.02, "momentum": 0.95, "nesterov": True, "weight_decay": 0.0},
    PolarGrad: {
        "params": None, "lr": 0.02, "weight_decay": 0.0, "momentum": 0.95, "polar_first": False,
        "method": "qdwh", "inner_steps": 2, "a": 3.4445, "b": -4.7750, "c": 2.031,
    },
    Scion: {
        "params": None, "lr": 1e-3, "momentum": 1.0, "norm": "Auto", "norm_kwargs": None,
        "scale": 1.0, "unconstrained": False,
    },
    MuonH: {
        "params": None, "lr": 0.01, "mu": 0.95, "muon_beta2": 0.95, "normalization": None,
        "epsilon": 1e-8, "nesterov": False, "use_polar_express": True,
    },
    Lion: {"params": None, "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0},
    NAMO: {**NAMO_DEFAULTS, **ADAMW_DEFAULTS},
    NAMOD: {**NAMO_DEFAULTS, "col_state_clamp_c": 0.75, **ADAMW_DEFAULTS},
}  # fmt: skip


@pytest.mark.parametrize("cls", CLASSES)
def test_a_signature_is_the_published_one_and_options_by_keyword(cls: type) -> None:
    signature = inspect.signature(cls).parameters.values()
    positional = [each for each in signature if each.kind is each.POSITIONAL_OR_KEYWORD]
    found = {each.name: each.default for each in positional if each.name != "params"}
    assert [each.name for each in positional] == list(PUBLISHED[cls])
    assert found == {name: PUBLISHED[cls][name] for name in found}
    (options,) = (each for each in signature if each.kind is each.VAR_KEYWORD)
    assert options.annotation in ("Unpack[StateOptions]", "Unpack[PolarOptions]")
    names = {each.name for each in signature} - {"options"}
    kinds = {"Unpack[StateOptions]": StateOptions, "Unpack[PolarOptions]": PolarOptions}
    assert not names & kinds[options.annotation].__annotations__.keys()
    assert "rule" not in kinds[options.annotation].__annotations__
    assert "rule" in MuonOptions.__annotations__


@pytest.mark.parametrize("cls", CLASSES)
def test_classes_are_exported_and_say_whose_arguments_they_have(cls: type) -> None:
    assert getattr(lowbit_muon, cls.__name__) is cls
    assert cls.__name__ in lowbit_muon.__all__
    assert "Arguments of " in (cls.__doc__ or "")
    assert "arXiv" in (cls.__doc__ or "")


# --- what they do ---

NO_DECAY = {"weight_decay": 0.0}
KIMI = {**USUAL, "nesterov": False}
# (class, its arguments, the rule that it is with options of Muon)
MEANINGS: list[tuple[type, dict[str, Any], UpdateRule, dict[str, Any]]] = [
    (NorMuon, {}, rule("normuon"), {"lr": 0.02, **NO_DECAY}),
    (
        NorMuon,
        {"lr": 0.1, "beta2": 0.5, "momentum": 0.8, "weight_decay": 0.2, "nesterov": False},
        rule("normuon", scaling=(VectorMoment(beta=0.5),)),
        {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.2, "nesterov": False},
    ),
    (NorMuon, {"ns_steps": 3, "ns_coefficients": "polar_express"}, rule("normuon"),
     {"lr": 0.02, **NO_DECAY, "ns_steps": 3, "ns_coefficients": "polar_express"}),
    (AdaMuon, {}, rule("adamuon"), {"lr": 0.02, "weight_decay": 0.01, "adjust_lr_fn": "none"}),
    (
        AdaMuon,
        {"momentum": 0.7, "eps": 0.1, "nesterov": False, "ns_steps": 3},
        rule("adamuon", scaling=(ElementMoment(0.7, 0.1), FixedNorm("rms"))),
        {"lr": 0.02, "weight_decay": 0.01, "adjust_lr_fn": "none", "momentum": 0.7,
         "nesterov": False, "ns_steps": 3},
    ),
    (RMNP, {}, rule("rmnp"), {"lr": 0.02, **NO_DECAY}),
    (RMNP, {"nesterov": False, **USUAL}, rule("rmnp"), {"lr": 0.02, **KIMI}),
    (PolarGrad, {}, rule("polargrad"),
     {"lr": 0.02, **NO_DECAY, "nesterov": False, "adjust_lr_fn": "none"}),
    (PolarGrad, {"polar_first": True, "method": "zolo-pd", **USUAL}, rule("polargrad_polar_first"),
     {"lr": 0.02, "adjust_lr_fn": "none", **KIMI}),
    (
        PolarGrad,
        {"method": "ns", "inner_steps": 4, "a": 2.0, "b": -1.5, "c": 0.5},
        rule("polargrad", direction=Polar()),
        {"lr": 0.02, **NO_DECAY, "nesterov": False, "adjust_lr_fn": "none", "ns_steps": 4,
         "ns_coefficients": (2.0, -1.5, 0.5)},
    ),
    (PolarGrad, {"method": "polar_express"}, rule("polargrad", direction=Polar()),
     {"lr": 0.02, **NO_DECAY, "nesterov": False, "adjust_lr_fn": "none", "ns_steps": 2,
      "ns_coefficients": "polar_express"}),
    (Scion, {}, rule("scion", step_size=StepSize(1.0)),
     {"momentum": 0.0, "nesterov": False, "weight_decay": 1.0,
      "adjust_lr_fn": "spectral_unclamped"}),
    # (1 - 0.05 is Muon's own default)
    (Scion, {"momentum": 0.05, "scale": 50.0, "norm": "Spectral", "unconstrained": True},
     rule("scion"),
     {"momentum": 0.95, "nesterov": False, "weight_decay": 0.0,
      "adjust_lr_fn": "spectral_unclamped"}),
    (Scion, {"norm": "Spectral", "norm_kwargs": {"max": True, "steps": 3}, "momentum": 0.1},
     rule("scion", step_size=StepSize(1.0)),
     {"momentum": 0.9, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "original",
      "ns_steps": 3}),
    (Scion, {"norm": "Sign", "scale": 3000.0, "momentum": 0.1}, rule("scion_sign"),
     {"momentum": 0.9, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "none"}),
    (Scion, {"norm": "Sign", "norm_kwargs": {"normalized": False}},
     rule("scion_sign", direction=Signs(), step_size=StepSize(1.0)),
     {"momentum": 0.0, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "none"}),
    (Scion, {"norm": "ColNorm", "norm_kwargs": {"transpose": True}},
     rule("scion_columns", direction=Rows("row", rms=True)),
     {"momentum": 0.0, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "none"}),
    (Scion, {"norm": "ColNorm"}, rule("scion_columns"),
     {"momentum": 0.0, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "none"}),
    (Scion, {"norm": "RowNorm", "norm_kwargs": {"normalized": False}},
     rule("scion_columns", direction=Rows("row")),
     {"momentum": 0.0, "nesterov": False, "weight_decay": 1.0, "adjust_lr_fn": "none"}),
    (MuonH, {}, rule("muonh"),
     {"lr": 0.01, **NO_DECAY, "nesterov": False, "eps": 1e-8, "ns_coefficients": "polar_express"}),
    (
        MuonH,
        {"mu": 0.8, "normalization": "short_axis", "muon_beta2": 0.5, "nesterov": True,
         "epsilon": 1e-3, "use_polar_express": False},
        rule("muonh", scaling=(VectorMoment("long", 0.5),)),
        {"lr": 0.01, **NO_DECAY, "momentum": 0.8, "eps": 1e-3,
         "ns_coefficients": "quintic"},
    ),
    (MuonH, {"normalization": "neuron"}, rule("muonh", scaling=(VectorMoment("row", 0.95),)),
     {"lr": 0.01, **NO_DECAY, "nesterov": False, "eps": 1e-8, "ns_coefficients": "polar_express"}),
    (Lion, {}, rule("lion"),
     {"lr": 1e-4, **NO_DECAY, "momentum": 0.99, "nesterov": False, "adjust_lr_fn": "none"}),
    # (0.95 is Muon's own default)
    (Lion, {"lr": 0.01, "betas": (0.5, 0.95), "weight_decay": 0.1},
     rule("lion", momentum=TwoDecays(0.5)),
     {"lr": 0.01, **KIMI, "adjust_lr_fn": "none"}),
    (NAMO, {}, rule("namo"), {"lr": 0.01, **USUAL, "adjust_lr_fn": "match_rms_adamw"}),
    (
        NAMO,
        {"wd": 0.3, "momentum": 0.8, "mu2": 0.5, "adamnorm_eps": 0.1, "nesterov": False,
         "ns_steps": 3, "scale_coeff": 0.4},
        rule("namo", scaling=(SignalToNoise(0.5, 0.1),), step_size=Bounded(2.0, highest=1.0)),
        {"lr": 0.01, "weight_decay": 0.3, "momentum": 0.8, "nesterov": False, "ns_steps": 3,
         "adjust_lr_fn": "match_rms_adamw"},
    ),
    (NAMO, {"use_exact_svd": True}, rule("namo", direction=ExactPolar()),
     {"lr": 0.01, **USUAL, "adjust_lr_fn": "match_rms_adamw"}),
    (NAMOD, {}, rule("namo_d"), {"lr": 0.01, **USUAL, "adjust_lr_fn": "match_rms_adamw"}),
    (NAMOD, {"mu2": 0.5, "col_state_clamp_c": 0.25, "adamnorm_eps": 0.1},
     rule("namo_d", scaling=(ColumnSignalToNoise(0.5, 0.25, 0.1),)),
     {"lr": 0.01, **USUAL, "adjust_lr_fn": "match_rms_adamw"}),
]  # fmt: skip
IDS = [f"{cls.__name__} {' '.join(arguments)}" for cls, arguments, _, _ in MEANINGS]


@pytest.mark.parametrize(("cls", "arguments", "meant", "options"), MEANINGS, ids=IDS)
def test_a_class_steps_as_its_rule(
    cls: type, arguments: dict[str, Any], meant: UpdateRule, options: dict[str, Any]
) -> None:
    ours = train(make(cls, parameters(), **arguments), range(2))
    assert same(ours, train(Muon(parameters(), rule=meant, **options), range(2)))


# Of each class: an argument, and a value that is not its default.
CHANGES: list[tuple[type, dict[str, Any]]] = [
    *((NorMuon, {name: value}) for name, value in
      {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.9, "nesterov": False,
       "ns_steps": 4}.items()),
    *((AdaMuon, {name: value}) for name, value in
      {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9, "nesterov": False, "ns_steps": 4,
       "eps": 0.1}.items()),
    *((RMNP, {name: value}) for name, value in
      {"lr": 0.03, "momentum": 0.9, "nesterov": False, "weight_decay": 0.1}.items()),
    *((PolarGrad, {name: value}) for name, value in
      {"lr": 0.03, "weight_decay": 0.1, "momentum": 0.9, "polar_first": True,
       "method": "ns"}.items()),
    *((Scion, {name: value}) for name, value in
      {"lr": 0.03, "momentum": 0.5, "norm": "Sign", "norm_kwargs": {"max": True}, "scale": 2.0,
       "unconstrained": True}.items()),
    *((MuonH, {name: value}) for name, value in
      {"lr": 0.03, "mu": 0.9, "normalization": "neuron", "nesterov": True, "epsilon": 100.0,
       "use_polar_express": False}.items()),
    *((Lion, {name: value}) for name, value in
      {"lr": 0.03, "betas": (0.5, 0.99), "weight_decay": 0.1}.items()),
    *((cls, {name: value}) for cls in (NAMO, NAMOD) for name, value in
      {"lr": 0.03, "wd": 0.2, "momentum": 0.9, "mu2": 0.9, "adamnorm_eps": 1.0, "nesterov": False,
       "ns_steps": 4, "use_exact_svd": True, "scale_coeff": 0.3}.items()),
    (NAMOD, {"col_state_clamp_c": 1.0}),
]  # fmt: skip


@functools.cache
def usual(cls: type) -> list[Tensor]:
    return train(make(cls, parameters()), range(2))


@pytest.mark.parametrize(
    ("cls", "change"), CHANGES, ids=[f"{cls.__name__} {' '.join(c)}" for cls, c in CHANGES]
)
def test_every_number_makes_a_difference(cls: type, change: dict[str, Any]) -> None:
    assert not same(usual(cls), train(make(cls, parameters(), **change), range(2)))


@pytest.mark.parametrize("name", sorted({rule.name for _, _, rule, _ in MEANINGS}))
def test_with_their_defaults_they_have_the_rules_of_the_table(name: str) -> None:
    """So that a checkpoint of Muon(rule=name) goes on in them with its own options."""
    classes = {"normuon": NorMuon, "adamuon": AdaMuon, "rmnp": RMNP, "polargrad": PolarGrad,
               "lion": Lion, "muonh": MuonH, "namo": NAMO, "namo_d": NAMOD}  # fmt: skip
    if name in classes:
        (group,) = make(classes[name], parameters()).param_groups
        assert group["rule"] == RULES[name].to_dict()


# --- groups ---


def test_groups_may_set_what_the_class_has() -> None:
    params = parameters()
    optimizer = NorMuon(
        [{"params": params[:1], "beta2": 0.5}, {"params": params[1:2], "momentum": 0.8}], beta2=0.7
    )
    optimizer.add_param_group({"params": params[2:], "beta2": 0.6, "lr": 0.1})
    rules = [UpdateRule.from_dict(group["rule"]) for group in optimizer.param_groups]
    assert [each.scaling for each in rules] == [(VectorMoment(beta=b),) for b in (0.5, 0.7, 0.6)]
    assert [group["momentum"] for group in optimizer.param_groups] == [0.95, 0.8, 0.95]
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.1]
    assert all("beta2" not in group for group in optimizer.param_groups)


def test_scion_takes_the_groups_of_its_readme() -> None:
    hidden, head = parameters()[:2]
    groups = [
        {"params": [hidden], "norm": "Spectral", "norm_kwargs": {}, "scale": 50.0},
        {"params": [head], "norm": "Sign", "norm_kwargs": {}, "scale": 3000.0},
    ]
    given = copy.deepcopy([{k: v for k, v in group.items() if k != "params"} for group in groups])
    ours = train(Scion(groups, lr=2**-12, momentum=0.1), range(3))
    assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == given
    hidden, head = parameters()[:2]
    theirs = [{"params": [hidden], "rule": "scion"}, {"params": [head], "rule": "scion_sign"}]
    assert same(ours, train(Muon(theirs, lr=2**-12), range(3)))


def test_namo_gives_adamw_its_own_parameters() -> None:
    bias = nn.Parameter(torch.ones(5))
    lr = torch.tensor(0.03)
    optimizer = NAMO(
        lr, 0.2, parameters(), adamw_params=[bias], adamw_betas=(0.8, 0.9), aux_adam="adamw"
    )
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer, MuonWithAuxAdam)
    assert (vectors["betas"], vectors["eps"], vectors["weight_decay"]) == ((0.8, 0.9), 1e-8, 0.2)
    assert matrices["lr"] is not vectors["lr"]
    assert float(matrices["lr"]) == float(vectors["lr"]) == float(lr)
    assert matrices["weight_decay"] == 0.2
    other = NAMOD(muon_params=parameters(), adamw_params=iter([bias]), adamw_wd=0.0, adamw_eps=1e-6,
                  aux_adam="adamw")  # fmt: skip
    assert (other.param_groups[1]["weight_decay"], other.param_groups[1]["eps"]) == (0.0, 1e-6)
    other.add_param_group({"params": [nn.Parameter(torch.ones(3, 4))], "use_muon": True})
    added = other.param_groups[2]
    assert (added["lr"], added["weight_decay"], added["momentum"]) == (1e-2, 0.1, 0.95)
    assert added["rule"] == other.param_groups[0]["rule"]


# --- life ---


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_as_the_original(cls: type, copied: Callable[[Muon], Muon]) -> None:
    optimizer = make(cls, parameters())
    train(optimizer, range(2))
    other = copied(optimizer)
    assert type(other) is cls
    assert same(train(optimizer, range(2, 4)), train(other, range(2, 4)))
    for each in (optimizer, other):
        each.add_param_group({"params": [nn.Parameter(torch.eye(4))], "use_muon": True})
    assert same(train(optimizer, range(4, 6)), train(other, range(4, 6)))


def test_a_copy_still_translates_its_groups() -> None:
    other = pickle.loads(pickle.dumps(NorMuon(parameters(), beta2=0.7)))
    other.add_param_group({"params": [nn.Parameter(torch.eye(4))], "beta2": 0.5})
    made = UpdateRule.from_dict(other.param_groups[1]["rule"])
    assert made.scaling == (VectorMoment(beta=0.5),)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict_goes_through_a_file_and_a_scheduler_goes_on(cls: type) -> None:
    def scheduled(params: list[nn.Parameter]) -> tuple[Muon, Any]:
        optimizer = make(cls, params)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    whole, schedule = scheduled(parameters())
    for step in range(2):
        train(whole, range(step, step + 1))
        schedule.step()
    file = io.BytesIO()
    weights = [param.detach() for param in whole.param_groups[0]["params"]]
    torch.save([weights, whole.state_dict(), schedule.state_dict()], file)
    file.seek(0)
    weights, saved, saved_schedule = torch.load(file, weights_only=True)
    resumed, other = scheduled([nn.Parameter(weight) for weight in weights])
    resumed.load_state_dict(saved)
    other.load_state_dict(saved_schedule)
    for optimizer, its_schedule in ((whole, schedule), (resumed, other)):
        train(optimizer, range(2, 3))
        its_schedule.step()
    assert whole.param_groups[0]["lr"] == resumed.param_groups[0]["lr"]
    assert same(train(whole, range(3, 4)), train(resumed, range(3, 4)))


# --- what is refused ---


@pytest.mark.parametrize(
    ("make_one", "message"),
    [
        (lambda p: NorMuon(p, beta2=1.0), r"^NorMuon\(beta2=1.0\): .*beta: expected .*got 1.0"),
        (lambda p: NorMuon([{"params": p, "beta2": "x"}]), r"^NorMuon\(beta2='x'\): .*got 'x'"),
        (lambda p: NorMuon(p, momentum=1.0), r"^momentum: expected .*, got 1.0"),
        (lambda p: NorMuon(p, rank=0), "^rank: expected an argument of NorMuon, or an option"),
        (lambda p: NorMuon(p, mu=0.9), "^mu: expected .*; it is the option 'momentum'"),
        (lambda p: NorMuon(p, rule="lion"), r"^rule: expected .*; Muon\(rule=...\) takes any"),
        (lambda p: NorMuon(p, eps=1e-8), "^eps: expected an argument of NorMuon"),
        (lambda p: AdaMuon(p, beta2=0.999), "^beta2: expected an argument of AdaMuon"),
        (lambda p: AdaMuon(p, eps=-1.0), "^AdaMuon.*eps: expected a number >= 0, got -1.0"),
        (lambda p: PolarGrad(p, method="svd"), "^PolarGrad.*: method: expected one of .* 'svd'"),
        (lambda p: PolarGrad(p, polar_first=True, method="ns"), "method: .*with polar_first"),
        (lambda p: PolarGrad(p, method="ns", ns_steps=3), "^ns_steps: expected no such argument"),
        (lambda p: Scion(p, momentum=1.5), "^Scion.*momentum: expected a number in .*got -0.5"),
        (lambda p: Scion(p, norm="BiasRMS"), "^Scion.*norm: expected one of .*got 'BiasRMS'"),
        (lambda p: Scion(p, norm="RowNorm"), "^Scion.*normalized: expected False"),
        (lambda p: Scion(p, norm="ColNorm", norm_kwargs={"normalized": True}), "expected False"),
        (lambda p: Scion(p, norm_kwargs={"normalized": False}), "normalized: expected True"),
        (lambda p: Scion(p, norm_kwargs={"step": 3}), "^Scion.*unexpected keyword argument 'step'"),
        (lambda p: Scion(p, nesterov=True), "^nesterov: expected no such argument of Scion"),
        (lambda p: MuonH(p, weight_decay=0.1), "^weight_decay: expected an argument of MuonH"),
        (lambda p: MuonH(p, normalization="rows"), "^MuonH.*normalization: expected one of"),
        (lambda p: MuonH(p, mu=1.0), r"^MuonH\(mu=1.0.*momentum: expected .*got 1.0"),
        (lambda p: Lion(p, betas=(0.9,)), r"^Lion\(betas=\(0.9,\)\): "),
        (lambda p: Lion(p, betas=(0.9, 1.0)), r"^Lion\(betas=.*: momentum: expected .*got 1.0"),
        (lambda p: Lion(p, nesterov=True), "nesterov: expected False"),
        (lambda p: NAMO(muon_params=p, mu2=1.0), r"^NAMO\(mu2=1.0, .*beta: expected .*got 1.0"),
        (lambda p: NAMO(muon_params=p, beta2=0.9), "^beta2: expected an argument of NAMO"),
        (lambda p: NAMO(p), "^muon_params: expected parameters, by this name, got None"),
        (lambda p: NAMO("0.1", muon_params=p), "lr: expected a number .*, got '0.1'"),
        (lambda p: NAMOD(muon_params=p, col_state_clamp_c=0.0), "^NAMOD.*clamp: expected"),
        (lambda p: NAMO(muon_params=p, state_format="muonq4"), "needs the momentum's size"),
    ],
)
def test_bad_arguments_are_named(make_one: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make_one(parameters())
