"""Groups of other libraries step as groups of ours that say the same by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_muon import RULES, Muon, MuonWithAuxAdam, from_groups
from lowbit_muon.step.rules.momentum import TwoDecays
from lowbit_muon.step.rules.scaling import FixedNorm, VectorMoment
from lowbit_muon.step.rules.weight_decay import Cautious

Group = dict[str, Any]


def new(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator))


def model() -> list[nn.Parameter]:
    """Two matrices, and a bias."""
    return [new(12, 20), new(8, 4), new(12)]


def train(groups: list[Group], params: list[nn.Parameter]) -> list[Tensor]:
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return [param.detach() for param in params]


def assert_steps_as(source: str, theirs: list[Group], ours: list[Group], **arguments: Any) -> None:
    """theirs, ours: groups whose "params" are indices of the model's parameters."""
    first, second = model(), model()
    made = from_groups(source, placed(theirs, first), **arguments)
    results = train(made, first), train(placed(ours, second), second)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def placed(groups: list[Group], params: list[nn.Parameter]) -> list[Group]:
    lists = {"params", "muon_params", "adamw_params"}
    return [
        {k: [params[i] for i in v] if k in lists else v for k, v in group.items()}
        for group in groups
    ]


MATRICES = {"params": [0, 1], "use_muon": True}
BIAS = {"params": [2], "use_muon": False}
POLAR_EXPRESS = {"ns_coefficients": "polar_express"}
DION = {
    **MATRICES, "lr": 0.01, "weight_decay": 0.01, "momentum": 0.95, "nesterov": False, "eps": 1e-8,
    "adjust_lr_fn": "spectral_unclamped", "rule": "dion_muon", **POLAR_EXPRESS,
}  # fmt: skip
DION_ADAMW = {**BIAS, "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
DION_OWN = [{"params": [0, 1]}, {"params": [2], "algorithm": "adamw"}]
CAUTIOUS = replace(RULES["dion_muon"], weight_decay=Cautious())


def dion(**changes: Any) -> list[Group]:
    """Groups of dion, with keys of its Muon groups."""
    return [{**DION_OWN[0], **changes}, DION_OWN[1]]


def dion_ours(**changes: Any) -> list[Group]:
    return [{**DION, **changes}, DION_ADAMW]


NANOCHAT = [
    {"params": [0, 1], "kind": "muon", "lr": 0.02, "momentum": 0.9, "ns_steps": 4, "beta2": 0.8,
     "weight_decay": 0.3},
    {"params": [2], "kind": "adamw", "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-9,
     "weight_decay": 0.1},
]  # fmt: skip
NANOCHAT_OURS = [
    {**MATRICES, "lr": 0.02, "momentum": 0.9, "ns_steps": 4, "weight_decay": 0.3, **POLAR_EXPRESS,
     "rule": replace(RULES["nanochat"], scaling=(FixedNorm(), VectorMoment("long", 0.8)))},
    {**BIAS, "lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-9, "weight_decay": 0.1},
]  # fmt: skip
MOONLIGHT_OURS: list[Group] = [
    {**MATRICES, "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "rule": "moonlight"},
    {**BIAS, "lr": 1e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8},
]

# (source, its groups, ours, what its constructor is given)
MEANINGS: list[tuple[str, list[Group], list[Group], Group]] = [
    ("torch", [{"params": [0, 1]}, {"params": [], "lr": 0.1}],
     [{**MATRICES, "lr": 1e-3, "weight_decay": 0.1}], {}),
    ("torch",
     [{"params": [0], "adjust_lr_fn": "match_rms_adamw"}, {"params": [1], "momentum": 0.8}],
     [{"params": [0], "use_muon": True, "lr": 0.1, "weight_decay": 0.1, "nesterov": False,
       "adjust_lr_fn": "match_rms_adamw"},
      {"params": [1], "use_muon": True, "lr": 0.1, "weight_decay": 0.1, "nesterov": False,
       "momentum": 0.8}],
     {"lr": 0.1, "nesterov": False}),
    ("kellerjordan", [MATRICES, BIAS], [MATRICES, BIAS], {}),
    ("kellerjordan", [{**MATRICES, "lr": 0.1, "momentum": 0.8}, {**BIAS, "betas": (0.5, 0.9)}],
     [{**MATRICES, "lr": 0.1, "momentum": 0.8}, {**BIAS, "betas": (0.5, 0.9)}], {}),
    ("normuon", [MATRICES, BIAS], [{**MATRICES, "rule": "normuon"}, BIAS], {}),
    ("normuon", [{**MATRICES, "beta2": 0.5}, {**BIAS, "lr": 0.1}],
     [{**MATRICES, "rule": replace(RULES["normuon"], scaling=(VectorMoment(beta=0.5),))},
      {**BIAS, "lr": 0.1}], {}),
    ("moonlight", [{"muon_params": [0, 1], "adamw_params": [2]}], MOONLIGHT_OURS, {}),
    ("moonlight",
     [{"muon_params": [0, 1], "adamw_params": [2], "wd": 0.3, "adamw_eps": 0.1, "momentum": 0.8}],
     [{**MOONLIGHT_OURS[0], "lr": 0.1, "weight_decay": 0.3, "momentum": 0.8, "ns_steps": 3},
      {**MOONLIGHT_OURS[1], "lr": 0.1, "weight_decay": 0.3, "eps": 0.1, "betas": (0.5, 0.9)}],
     {"lr": 0.1, "ns_steps": 3, "adamw_betas": (0.5, 0.9)}),
    ("nanochat", NANOCHAT, NANOCHAT_OURS, {}),
    ("dion", dion(), dion_ours(), {}),
    ("dion", dion(algorithm="muon", mu=0.8, nesterov=True, epsilon=0.1),
     dion_ours(momentum=0.8, nesterov=True, eps=0.1), {}),
    ("dion", dion(adjust_lr="rms_norm"), dion_ours(adjust_lr_fn="match_rms_adamw"), {}),
    ("dion", dion(adjust_lr=None), dion_ours(adjust_lr_fn="none"), {}),
    ("dion", dion(cautious_wd=True), dion_ours(rule=CAUTIOUS), {}),
    ("dion", dion(), dion_ours(ns_coefficients="quintic"), {"use_polar_express": False}),
    ("dion", dion(num_heads=4),
     [{**DION, "params": [0], "row_splits": (3,) * 4},
      {**DION, "params": [1], "row_splits": (2,) * 4}, DION_ADAMW], {}),
    ("dion", [{"params": [0], "split_sizes": [6, 4, 2]}, {"params": [1]}, DION_OWN[1]],
     [{**DION, "params": [0], "row_splits": (6, 4, 2)}, {**DION, "params": [1]}, DION_ADAMW], {}),
    ("dion", dion(algorithm="normuon", muon_beta2=0.5),
     dion_ours(rule=replace(RULES["dion_muon"], scaling=(VectorMoment(beta=0.5, eps=1e-8),))), {}),
    ("dion", dion(algorithm="lion", beta1=0.5),
     [{**MATRICES, "lr": 0.01, "weight_decay": 0.01, "momentum": 0.95, "nesterov": False,
       "adjust_lr_fn": "none", "rule": replace(RULES["lion"], momentum=TwoDecays(0.5))},
      DION_ADAMW], {}),
    ("dion", dion(), [{**DION, "lr": 0.1, "weight_decay": 0.3},
     {**DION_ADAMW, "lr": 0.1, "weight_decay": 0.3, "betas": (0.5, 0.6)}],
     {"lr": 0.1, "weight_decay": 0.3, "betas": (0.5, 0.6)}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "theirs", "ours", "arguments"),
    MEANINGS,
    ids=[f"{number} {source}" for number, (source, *_) in enumerate(MEANINGS)],
)
def test_translated_groups_step_as_those_of_ours(
    source: str, theirs: list[Group], ours: list[Group], arguments: Group
) -> None:
    assert_steps_as(source, theirs, ours, **arguments)


# Keys of each kind of group, and values that are not their defaults.
CHANGES: list[tuple[str, list[Group], Group]] = [
    *(("torch", [{"params": [0, 1]}], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8, "nesterov": False, "eps": 100.0,
       "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw",
       "ns_coefficients": "polar_express"}.items()),
    *(("normuon", [MATRICES], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8, "beta2": 0.5}.items()),
    *(("normuon", [BIAS], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "betas": (0.5, 0.9), "eps": 0.1}.items()),
    *(("moonlight", [{"muon_params": [0]}], {name: value}) for name, value in
      {"lr": 0.1, "wd": 0.5, "momentum": 0.8, "nesterov": False, "ns_steps": 3}.items()),
    *(("moonlight", [{"adamw_params": [2]}], {name: value}) for name, value in
      {"lr": 0.1, "wd": 0.5, "adamw_betas": (0.5, 0.9), "adamw_eps": 0.1}.items()),
    *(("nanochat", NANOCHAT[:1], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "momentum": 0.8, "beta2": None, "ns_steps": 3}.items()),
    *(("dion", DION_OWN[:1], {name: value}) for name, value in
      {"lr": 0.1, "mu": 0.8, "weight_decay": 0.5, "cautious_wd": True, "epsilon": 100.0,
       "nesterov": True, "adjust_lr": None, "num_heads": 2, "algorithm": "normuon"}.items()),
    *(("dion", [{"params": [0, 1], "algorithm": "lion"}], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "cautious_wd": True, "beta2": 0.5,
       "betas": (0.5, 0.6)}.items()),
    *(("dion", DION_OWN[1:], {name: value}) for name, value in
      {"lr": 0.1, "weight_decay": 0.5, "epsilon": 0.1, "beta1": 0.5, "betas": (0.5, 0.6)}.items()),
]  # fmt: skip


@pytest.mark.parametrize(("source", "groups", "change"), CHANGES)
def test_every_key_makes_a_difference(source: str, groups: list[Group], change: Group) -> None:
    first, second = model(), model()
    usual = train(from_groups(source, placed(groups, first)), first)
    changed = train(from_groups(source, placed([{**groups[0], **change}], second)), second)
    assert any(not torch.equal(a, b) for a, b in zip(usual, changed, strict=True))


# --- parameters ---


def test_groups_of_matrices_alone_serve_muon() -> None:
    params = model()[:2]
    ours = Muon(from_groups("torch", params, lr=0.1))
    assert ours.param_groups[0]["params"] == params
    assert ours.param_groups[0]["lr"] == 0.1
    (named,) = from_groups("torch", [("a", params[0]), ("b", params[1])])
    assert named["param_names"] == ["a", "b"]
    assert named["params"] == params


def test_what_a_group_is_given_stays_as_it_is() -> None:
    params = model()
    group = {"params": iter(params[:2]), "mu": 0.9, "initial_lr": 0.3, "name": "blocks"}
    lr = torch.tensor(0.1)
    given = dict(group)
    first, second = from_groups("dion", [group, {"params": params[2], "algorithm": "adamw"}], lr=lr)
    assert group == given
    assert first["params"] == params[:2]
    assert second["params"] == params[2:]
    assert (first["initial_lr"], first["name"]) == (0.3, "blocks")
    assert first["lr"] is not second["lr"]
    assert first["lr"] is not lr
    assert float(first["lr"]) == float(second["lr"]) == float(lr)


def test_lists_and_groups_may_be_empty() -> None:
    (made,) = from_groups("moonlight", {"muon_params": model()[:2], "adamw_params": iter(())})
    assert made["use_muon"]
    first, second = from_groups("dion", [{"params": model()[:2]}, {"params": []}])
    assert (len(first["params"]), second["params"]) == (2, [])
    assert len(MuonWithAuxAdam([first, second]).param_groups) == 2


def test_heads_keep_names_beside_their_parameters() -> None:
    wide, narrow, other = new(8, 4), new(4, 8), new(8, 6)
    group = {"params": [wide, narrow, other], "param_names": ["q", "k", "v"], "num_heads": 2}
    first, second = from_groups("dion", [group])
    assert (first["param_names"], first["row_splits"]) == (["q", "v"], (4, 4))
    assert first["params"] == [wide, other]
    assert (second["param_names"], second["row_splits"]) == (["k"], (2, 2))
    assert from_groups("dion", {**group, "num_heads": 1})[0]["row_splits"] is None


@pytest.mark.parametrize(
    ("source", "group", "shape", "stacked"),
    [
        ("kellerjordan", {"use_muon": True}, (2, 4, 6), True),
        ("kellerjordan", {"use_muon": True}, (2, 4, 3, 3), False),
        ("dion", {}, (2, 4, 6), True),
        ("dion", {}, (2, 3, 4, 6), True),
        ("dion", {"flatten": True}, (2, 4, 6), False),
        ("dion", {"algorithm": "normuon"}, (2, 4, 6), True),
        ("nanochat", {k: v for k, v in NANOCHAT[0].items() if k != "params"}, (2, 4, 6), True),
        ("torch", {}, (4, 6), False),
    ],
)
def test_stacks_of_matrices_are_stacks_there(
    source: str, group: Group, shape: tuple[int, ...], stacked: bool
) -> None:
    (made,) = from_groups(source, {**group, "params": [new(*shape), new(4, 4)]})
    assert made.get("batch_experts", False) is stacked


# --- what is refused ---


@pytest.mark.parametrize(
    ("source", "group", "message"),
    [
        ("dions", {}, "^source: expected one of .*'dion'.*, got 'dions'"),
        ("dion", {"algorithm": "dion2"}, "^dion: group 0: algorithm: expected one of .*'normuon'"),
        ("dion", {"adjust_lr": "rms"}, "adjust_lr: expected one of .*'rms_norm', None.*got 'rms'"),
        ("dion", {"num_heads": 5}, r"num_heads: expected a divisor of the rows.*\(5, \[12, 20\]\)"),
        ("dion", {"num_heads": True}, "num_heads: expected None or a whole number"),
        ("dion", {"num_heads": 2, "split_sizes": (6, 6)}, "split_sizes: expected None with num_h"),
        ("dion", {"distributed_mesh": 3}, "distributed_mesh: expected process_group=... of Muon"),
        ("dion", {"newton_schulz_func": print}, "newton_schulz_func: expected None, or ns_coeffi"),
        ("dion", {"rank_fraction": 0.5}, r"rank_fraction: expected a key .*mu.* no such option"),
        ("dion", {"wd": 0.5}, "wd: expected a key .*; it is the option 'weight_decay'"),
        ("dion", {"state_format": "fp32"}, "state_format: .*set it in the groups that are ret"),
        ("dion", {"algorithm": "adamw", "cautious_wd": True}, "cautious_wd: expected False of Ada"),
        ("dion", {"algorithm": "normuon", "muon_beta2": 2.0}, "beta: expected a number in"),
        ("nanochat", {}, r"kind: expected one of \['muon', 'adamw'\], got None"),
        ("nanochat", {**NANOCHAT[0], "kind": "adam"}, "kind: expected one of .*got 'adam'"),
        ("nanochat", {"kind": "muon"}, "lr: expected a value in each such group"),
        ("nanochat", {**NANOCHAT[1], "beta2": 0.9}, "beta2: expected .*the option 'betas'"),
        ("kellerjordan", {}, r"use_muon: expected one of \[True, False\], got None"),
        ("kellerjordan", {"use_muon": True, "beta2": 0.9}, "beta2: .*rule='normuon'"),
        ("kellerjordan", {"use_muon": True, "betas": (0, 0)}, "'betas' is an option of groups wit"),
        (
            "normuon",
            {"use_muon": True, "nesterov": False},
            "nesterov: .*in the groups that are ret",
        ),
        ("moonlight", {}, r"params: expected lists of parameters called \['muon_params', 'adamw_p"),
        ("torch", {"use_muon": True}, "use_muon: expected a key of such a group"),
        ("torch", {"params": ["weight"]}, r"params: expected parameters, got \['weight'\]"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_its_name(
    source: str, group: Group, message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        from_groups(source, [{"params": [new(12, 20)], **placed_if(group)}])


def placed_if(group: Group) -> Group:
    """A group without the indices of the tests above."""
    return {k: v for k, v in group.items() if k != "params" or v == ["weight"]}


def test_vectors_stacks_among_convolutions_and_stray_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="algorithm: expected 'adamw' for vectors, got"):
        from_groups("dion", [{"params": [new(3)], "algorithm": "lion"}])
    with pytest.raises(ValueError, match=r"params: expected stacks apart .*\[3, 4\]"):
        from_groups("kellerjordan", [{"params": [new(2, 3, 4), new(2, 2, 3, 3)], "use_muon": True}])
    with pytest.raises(ValueError, match=r"^lr: expected no argument, since nanochat's groups say"):
        from_groups("nanochat", NANOCHAT, lr=0.1)
    with pytest.raises(ValueError, match="params: expected parameters, got None"):
        from_groups("torch", [{"lr": 0.1}])
    with pytest.raises(ValueError, match=r"^wd: expected an argument of dion's .*'weight_decay'"):
        from_groups("dion", model()[:2], wd=0.1)
