"""Another rule, or a full momentum, in mid-run."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from rule_steps import parameters, train

from lowbit_muon import RULES, Muon, UpdateRule
from lowbit_muon.state.stored import RULE_PREFIX


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
