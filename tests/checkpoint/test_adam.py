"""AdamW states of MuonWithAuxAdam: converted, exported, refused."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_checkpoint import assert_same, make_params, run, through_file
from test_muon_adamw import make, parameters, values_of, with_values

from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam

pytest.importorskip("bitsandbytes")


def moments(optimizer: MuonWithAuxAdam) -> list[dict[str, Any]]:
    state = optimizer.export_full_precision()["state"]
    return [state[index] for index in (2, 3, 4)]


def test_exact_states_become_8_bit_and_back() -> None:
    exact = make("adamw", state_format="fp32")
    run(exact, 0, 3)
    coded = make("adamw8bit", state_format="fp32")
    coded.load_state_dict(exact.state_dict())
    assert coded.param_groups[1]["aux_adam"] == "adamw8bit"
    tables = [coded.state[parameters(coded)[2]][name] for name in ("qmap1", "qmap2")]
    names = ("exp_avg", "exp_avg_sq")
    for index, (a, b) in enumerate(zip(moments(exact), moments(coded), strict=True)):
        assert a["step"] == b["step"] == 3
        for name, table in zip(names, tables, strict=True):
            if index:  # small ones stay float32
                assert torch.equal(a[name], b[name])
                continue
            blocks = torch.nn.functional.pad(a[name].flatten(), (0, -a[name].numel() % 256))
            absmax = blocks.view(-1, 256).abs().amax(dim=1, keepdim=True)
            # bitsandbytes looks the value up with about 16 bits, so that near a tie it may take the
            # other neighbour: within a gap of the table, in units of the block's largest.
            bound = absmax * float(table.diff().max())
            error = (a[name] - b[name]).abs().flatten()
            error = torch.nn.functional.pad(error, (0, -error.numel() % 256)).view(-1, 256)
            assert bool((error <= bound).all())
    back = make("adamw", state_format="fp32")
    back.load_state_dict(coded.state_dict())
    assert_same(moments(back), moments(coded))
    run(coded, 3, 4)
    run(back, 3, 4)


def test_an_8_bit_state_loads_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    coded = make("adamw8bit")
    run(coded, 0, 2)
    saved, expected = coded.state_dict(), moments(coded)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    exact = make("adamw")
    exact.load_state_dict(saved)
    assert_same(moments(exact), expected)


def kellerjordan_state(optimizer: MuonWithAuxAdam, order: list[int]) -> dict[str, Any]:
    """What MuonWithAuxAdam of KellerJordan saves; `order` of its Muon parameters."""
    params = parameters(optimizer)
    state: dict[int, Any] = {
        place: {"momentum_buffer": torch.full(params[index].shape, float(index + 1))}
        for place, index in enumerate(order)
    }
    for index in range(len(order), len(params)):
        state[index] = {
            "exp_avg": torch.full(params[index].shape, 0.5),
            "exp_avg_sq": torch.full(params[index].shape, 0.25),
            "step": 7,
        }
    return {
        "state": state,
        "param_groups": [
            {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1, "use_muon": True,
             "params": list(range(len(order)))},
            {"lr": 0.6, "betas": (0.8, 0.95), "eps": 1e-10, "weight_decay": 0, "use_muon": False,
             "params": list(range(len(order), len(params)))},
        ],
    }  # fmt: skip


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]], ids=["as given", "sorted by size"])
def test_a_state_of_kellerjordans_optimizer_loads_in_either_order(order: list[int]) -> None:
    """Its distributed class sorts Muon's parameters by size, its single-device class does not."""
    params = make_params([(4, 6), (4, 6), (9, 3), (5,)], [torch.float32] * 4)
    ours = MuonWithAuxAdam(
        [{"params": params[:3], "use_muon": True}, {"params": params[3:], "use_muon": False}],
        aux_adam="adamw",
        state_format="fp32",
    )
    ours.load_state_dict(through_file(kellerjordan_state(ours, order)))
    muon, aux = ours.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.05, 0.9, 0.1)
    assert (aux["lr"], aux["betas"], aux["weight_decay"]) == (0.6, (0.8, 0.95), 0)
    exported = ours.export_full_precision()
    assert_same(
        exported, kellerjordan_state(ours, [0, 1, 2]) | {"param_groups": exported["param_groups"]}
    )
    assert [set(group) for group in exported["param_groups"]] == [
        {"lr", "momentum", "weight_decay", "use_muon", "params"},
        {"lr", "betas", "eps", "weight_decay", "use_muon", "params"},
    ]


def test_export_goes_back_and_forth() -> None:
    optimizer = make("adamw", state_format="fp32")
    run(optimizer, 0, 3)
    exported = through_file(optimizer.export_full_precision())
    other = with_values(make("adamw", state_format="fp32"), values_of(optimizer))
    other.load_state_dict(exported)
    assert_same(other.export_full_precision(), exported)
    run(optimizer, 3, 4)
    run(other, 3, 4)
    for a, b in zip(parameters(other), parameters(optimizer), strict=True):
        assert torch.equal(a, b)


def test_moonlights_one_group_is_split_into_ours() -> None:
    ours = make("adamw", state_format="fp32")
    shapes = [tuple(param.shape) for param in parameters(ours)]
    buffers = [torch.randn(24, 40), torch.randn(8, 36)]  # it flattens convolutions
    state: dict[int, Any] = {
        index: {"use_muon": True, "momentum_buffer": buffer} for index, buffer in enumerate(buffers)
    }
    for index in (2, 3):
        state[index] = {
            "use_muon": False,
            "step": 4,
            "moment1": torch.randn(shapes[index]),
            "moment2": torch.rand(shapes[index]),
        }
    state[4] = {"use_muon": False}  # never had a gradient
    group = {"lr": 1e-3, "wd": 0.2, "momentum": 0.75, "nesterov": True, "ns_steps": 5,
             "adamw_betas": (0.85, 0.9), "adamw_eps": 1e-8, "params": [0, 1, 2, 3, 4]}  # fmt: skip
    ours.load_state_dict({"state": state, "param_groups": [group]})
    muon, aux = ours.param_groups
    assert (muon["lr"], muon["weight_decay"], muon["momentum"]) == (1e-3, 0.2, 0.75)
    assert (muon["eps"], muon["adjust_lr_fn"]) == (1e-7, "match_rms_adamw")
    assert (aux["lr"], aux["weight_decay"]) == (1e-3, 0.2)
    assert (aux["betas"], aux["eps"]) == ((0.85, 0.9), 1e-8)
    exported = ours.export_full_precision()["state"]
    assert set(exported) == {0, 1, 2, 3}
    for index, buffer in enumerate(buffers):
        # 1 - 0.75 is exact, so is the product.
        expected = buffer.view(shapes[index]) * 0.25
        assert torch.equal(exported[index]["momentum_buffer"], expected)
    assert torch.equal(exported[2]["exp_avg"], state[2]["moment1"])
    assert torch.equal(exported[2]["exp_avg_sq"], state[2]["moment2"])
    run(ours, 0, 1)


Change = Callable[[dict[str, Any]], Any]
AUX_CORRUPTIONS: dict[str, tuple[str, Change, str]] = {
    "codes cast": (
        "adamw8bit", lambda s: s[2].update(state1=s[2]["state1"].float()), "expected entries"
    ),
    "codes truncated": (
        "adamw8bit", lambda s: s[2].update(state1=s[2]["state1"][1:]), "state1: expected"
    ),
    "absmax missing": ("adamw8bit", lambda s: s[2].pop("absmax2"), "expected entries"),
    "absmax nan": ("adamw8bit", lambda s: s[2]["absmax1"].fill_(torch.nan), "absmax1: .*finite"),
    "absmax negative": ("adamw8bit", lambda s: s[2]["absmax1"].fill_(-1), "absmax1: .*>= 0"),
    "absmax short": (
        "adamw8bit", lambda s: s[2].update(absmax1=s[2]["absmax1"][1:]), "absmax1: expected"
    ),
    "table of another size": (
        "adamw8bit", lambda s: s[2].update(qmap1=torch.ones(16)), "qmap1: expected"
    ),
    "moment of another shape": (
        "adamw", lambda s: s[2].update(exp_avg=torch.ones(3)), "exp_avg: expected shape"
    ),
    "moment nan": ("adamw", lambda s: s[3]["exp_avg"].fill_(torch.nan), "exp_avg: .*finite"),
    "second moment negative": (
        "adamw", lambda s: s[3]["exp_avg_sq"].view(-1)[:1].fill_(-1), "exp_avg_sq: expected .*>= 0"
    ),
    "step negative": ("adamw", lambda s: s[3]["step"].fill_(-1), "step: expected"),
    "step missing": ("adamw", lambda s: s[3].pop("step"), "expected entries"),
    "unknown entry": ("adamw", lambda s: s[3].update(max_exp_avg_sq=1), "max_exp_avg_sq"),
    "a momentum": (
        "adamw", lambda s: s.update({3: {"momentum_buffer": torch.ones(40)}}), "moments of AdamW"
    ),
    "flagged as Muon's": ("adamw", lambda s: s[3].update(use_muon=True), "use_muon"),
}  # fmt: skip


@pytest.mark.parametrize("name", AUX_CORRUPTIONS)
def test_a_bad_adamw_state_is_refused_before_anything_changes(name: str) -> None:
    kind, corrupt, message = AUX_CORRUPTIONS[name]
    source = make(kind)
    run(source, 0, 2)
    saved = copy.deepcopy(source.state_dict())
    optimizer = make(kind)
    run(optimizer, 5, 6)
    before = copy.deepcopy(optimizer.state_dict())
    corrupt(saved["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("change", [{"lr": -1.0}, {"betas": (0.9,)}, {"use_muon": True}])
def test_a_bad_adamw_group_is_refused_before_anything_changes(change: dict[str, Any]) -> None:
    optimizer = make()
    run(optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(before)
    saved["param_groups"][1].update(change)
    with pytest.raises(ValueError, match=f"parameter group 1: {next(iter(change))}: expected"):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)
