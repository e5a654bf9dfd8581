"""State dicts that are refused, with nothing changed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
from test_checkpoint import assert_same, make_params, run

from lowbit_muon import Muon


def edit(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A function that sets (or with a function, changes) state_dict[path]."""

    def change(state_dict: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        place: Any = state_dict
        for parent in parents:
            place = place[parent]
        place[last] = value(place[last]) if callable(value) else value

    return change


def remove(path: str) -> Callable[[dict[str, Any]], None]:
    def change(state_dict: dict[str, Any]) -> None:
        *parents, last = [int(p) if p.isdigit() else p for p in path.split("/")]
        place: Any = state_dict
        for parent in parents:
            place = place[parent]
        del place[last]

    return change


CORRUPTIONS = {
    "codes truncated": ("mulaw4", edit("state/1/codes", lambda t: t[:, :-1]), r"codes: expected"),
    "codes cast": ("mulaw4", edit("state/1/codes", lambda t: t.float()), r"codes: expected"),
    "codes not a tensor": ("mulaw4", edit("state/1/codes", [1, 2]), r"codes: expected .* got list"),
    "other shape": ("mulaw4", edit("state/1/codes", lambda t: t.mT), r"codes: expected"),
    "scale nan": ("mulaw4", edit("state/1/scales", lambda t: t * float("nan")), "scales: .*finite"),
    "scale negative": ("mulaw4", edit("state/1/scales", lambda t: -t), "scales: expected .*>= 0"),
    "scale too large": (
        "mulaw4", edit("state/1/left_scales", lambda t: t + 3e38), "finite matrix"
    ),
    "factor missing": ("mulaw4", remove("state/1/right_codes"), "missing .*right_codes"),
    "norm infinite": ("spectral4", edit("state/1/norm", lambda t: t / 0), "norm: .*finite"),
    "norm too large": (
        "spectral4", edit("state/1/norm", lambda t: t * 0 + 1e16), "norm: expected at most 1.05e.15"
    ),
    "norm of muonq too large": (
        "muonq4", edit("state/1/norm", lambda t: t * 0 + 2), "norm: expected at most 1.05"
    ),
    "noise too large": (
        "spectral4", edit("state/1/noise", lambda t: t * 0 + 1e3), "noise: expected at most .* 1000"
    ),
    "noise nan": ("spectral4", edit("state/1/noise", lambda t: t * math.nan), "noise: .*finite"),
    "spectral scale too large": (
        "spectral2", edit("state/1/scales", lambda t: t * 0 + 1e4), "scales: expected at most"
    ),
    "left scale too large": (
        "mulaw4", edit("state/1/left_scales", lambda t: t * 0 + 1e4), "left_scales: expected at mo"
    ),
    "dense too large": (
        "fp32", edit("state/1/dense", lambda t: t * 0 + 1e34), "expected .* norm up to 1.05e.15"
    ),
    "step too large": ("spectral4", edit("state/1/step", 2**31), "step: .* at most 2147483647"),
    "step of another type": ("spectral4", edit("state/1/step", "3"), "step: expected"),
    "step nan": ("spectral4", edit("state/1/step", math.nan), "step: expected"),
    "step infinite": ("spectral4", edit("state/1/step", math.inf), "step: expected"),
    "skipped negative": ("spectral4", edit("state/1/skipped", -1), "skipped: expected"),
    "names of another type": (
        "spectral4", edit("param_groups/0/param_names", [1, 2, 3, 4]), "param_names: expected 4"
    ),
    "norm cast": ("spectral4", edit("state/1/norm", lambda t: t.half()), "norm: expected"),
    "code without a level": (
        "muonq4", edit("state/1/codes", lambda t: t | 255), "codes: expected codes below 15, got 15"
    ),
    "factor code without a level": (
        "muonq4", edit("state/1/left_codes", lambda t: t | 255), "left_codes: expected .*below 15"
    ),
    "dense nan": ("fp32", edit("state/1/dense", lambda t: t / 0), "dense: .*finite"),
    "unknown entry": ("spectral4", edit("state/1/extra", 1), "extra"),
    "step missing": ("spectral4", remove("state/1/step"), "step: expected"),
    "step negative": ("spectral4", edit("state/1/step", -1), "step: expected"),
    "step fractional": ("spectral4", edit("state/1/step", 1.5), "step: expected"),
    "entries no mapping": ("spectral4", edit("state/1", 3), "parameter 1: expected a mapping"),
    "unknown parameter": (
        "spectral4", edit("state", lambda s: {**s, 9: s[1]}), "expected only parameters .*9"
    ),
    "newer version": (
        "spectral4", edit("param_groups/0/format_version", 2), "expected 1 to 1, got 2"
    ),
    "version of another type": (
        "spectral4", edit("param_groups/0/format_version", "1"), "format_version: expected"
    ),
    "no version": ("spectral4", remove("param_groups/0/format_version"), "momentum_buffer"),
    "unknown format": (
        "spectral4", edit("param_groups/0/state_format", "spectral9"), "state_format: expected"
    ),
    "format with unknown field": (
        "spectral4",
        edit("param_groups/0/state_format", lambda f: {**f, "hue": 1}),
        "unknown fields .*hue",
    ),
    "no format": ("spectral4", remove("param_groups/0/state_format"), "state_format"),
    "bad splits": ("spectral4", edit("param_groups/0/row_splits", [1, 2]), "row_splits: expected"),
    "learning rate nan": ("spectral4", edit("param_groups/0/lr", float("nan")), "lr: expected"),
    "momentum one": ("spectral4", edit("param_groups/0/momentum", 1.0), "momentum: expected"),
    "group missing": ("spectral4", edit("param_groups", []), "expected 1 groups"),
    "group too small": ("spectral4", edit("param_groups/0/params", [0, 1]), r"expected 1 groups"),
    "group of another kind": (
        "spectral4", edit("param_groups/0", lambda g: {**g, "use_muon": False}), "use_muon"
    ),
    "no groups": ("spectral4", remove("param_groups"), "param_groups"),
    "no state": ("spectral4", edit("state", None), "state_dict: expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_bad_state_is_refused_before_anything_changes(name: str) -> None:
    state_format, corrupt, message = CORRUPTIONS[name]
    source = Muon(make_params(), lr=0.5, state_format=state_format)
    run(source, 0, 2)
    saved = copy.deepcopy(source.state_dict())
    optimizer = Muon(make_params(), state_format=state_format)
    run(optimizer, 5, 7)
    before = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(copy.deepcopy(before))  # the same state, unharmed, loads
    corrupt(saved)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


def test_a_failure_in_the_last_parameter_leaves_the_first_alone() -> None:
    source = Muon(make_params())
    run(source, 0, 2)
    saved = copy.deepcopy(source.state_dict())
    saved["state"][3]["scales"][0] = -1.0
    optimizer = Muon(make_params())
    with pytest.raises(ValueError, match="parameter 3"):
        optimizer.load_state_dict(saved)
    assert not optimizer.state
