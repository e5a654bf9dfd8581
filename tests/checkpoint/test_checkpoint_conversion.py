"""States of other formats and other optimizers: converted on the way in and out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_checkpoint import (
    SHAPES,
    assert_equal_optimizers,
    assert_same,
    copy_params,
    make_params,
    momentum_of,
    run,
    through_file,
)

from lowbit_muon import PRESETS, Muon, quantize
from lowbit_muon.state.gradients import NonFiniteGradientError


def test_formats_are_switched_on_the_way() -> None:
    """spectral4 -> fp32 -> mulaw4 -> spectral3: each is what `quantize` makes of the last."""
    optimizer = Muon(make_params(), state_format="spectral4", lr=0.5)
    run(optimizer, 0, 3)
    for name in ("fp32", "mulaw4", "bf16", "spectral3"):
        other = Muon(make_params(), state_format=name, ns_input="stored", seed=3)
        other.load_state_dict(through_file(optimizer.state_dict()))
        for index, param in enumerate(make_params()):
            previous = momentum_of(optimizer, index).flatten(1)
            expected = quantize(previous, name, seed=3).dequantize().view(param.shape)
            assert torch.equal(momentum_of(other, index), expected)
        group = other.param_groups[0]
        assert group["lr"] == 0.5
        assert group["ns_input"] == "stored"
        assert group["seed"] == 3
        assert group["state_format"] == PRESETS[name].to_dict()
        assert {state["step"] for state in other.state.values()} == {3}
        optimizer = other
    run(optimizer, 3, 5)


def test_splits_are_changed_on_the_way() -> None:
    whole = Muon(make_params([(24, 16)]), state_format="fp32")
    run(whole, 0, 2)
    split = Muon(make_params([(24, 16)]), state_format="fp32", row_splits=(8, 16))
    split.load_state_dict(whole.state_dict())
    assert set(split.state_dict()["state"][0]) == {
        "step",
        "skipped",
        "rows",
        "columns",
        "0.dense",
        "1.dense",
    }
    assert torch.equal(momentum_of(split), momentum_of(whole))
    again = Muon(make_params([(24, 16)]), state_format="fp32")
    again.load_state_dict(split.state_dict())
    assert_same(again.state_dict()["state"], whole.state_dict()["state"])


def test_a_normalised_momentum_has_no_size_to_go_on_with() -> None:
    optimizer = Muon(make_params(), state_format="muonq4")
    run(optimizer, 0, 2)
    other = Muon(make_params(), state_format="spectral4")
    with pytest.raises(ValueError, match=r"'muonq4' divides .* 'spectral4' needs it"):
        other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="cannot be exported"):
        optimizer.export_full_precision()


def test_a_momentum_loaded_into_a_normalising_format_has_norm_one() -> None:
    optimizer = Muon(make_params(), state_format="fp32")
    run(optimizer, 0, 2)
    other = Muon(make_params(), state_format="muonq4")
    other.load_state_dict(optimizer.state_dict())
    for state in other.state.values():
        # One float32 rounding of each element of a matrix of norm one.
        assert float(state["norm"]) == pytest.approx(1, abs=2**-23)


# Other optimizers' states


def test_a_state_of_torch_muon_loads_exactly_and_goes_back_exactly() -> None:
    theirs = torch.optim.Muon(make_params(SHAPES[:2]), lr=0.01, momentum=0.9, weight_decay=0.0)
    run(theirs, 0, 3)
    ours = Muon(make_params(SHAPES[:2]), state_format="fp32", lr=0.5)
    ours.load_state_dict(through_file(theirs.state_dict()))
    options = ours.param_groups[0]
    assert (options["lr"], options["momentum"], options["weight_decay"]) == (0.01, 0.9, 0.0)
    for index, state in enumerate(theirs.state.values()):
        assert torch.equal(momentum_of(ours, index), state["momentum_buffer"].float())
    exported = through_file(ours.export_full_precision())
    assert exported["param_groups"][0].keys() == theirs.state_dict()["param_groups"][0].keys()
    back = torch.optim.Muon(copy_params(theirs.param_groups[0]["params"]), lr=0.7)
    back.load_state_dict(exported)
    assert_same(back.state_dict(), theirs.state_dict())
    run(theirs, 3, 4)
    run(back, 3, 4)
    assert_equal_optimizers(back, theirs)


@pytest.mark.parametrize("name", ["spectral4", "mulaw4"])
def test_a_state_of_torch_muon_is_quantised_on_the_way(name: str) -> None:
    theirs = torch.optim.Muon(make_params(SHAPES[:2]), lr=0.01)
    run(theirs, 0, 3)
    ours = Muon(make_params(SHAPES[:2]), state_format=name)
    ours.load_state_dict(theirs.state_dict())
    for index, state in enumerate(theirs.state.values()):
        expected = quantize(state["momentum_buffer"].float(), name).dequantize()
        assert torch.equal(momentum_of(ours, index), expected)
    run(ours, 3, 4)


def test_export_of_convolutions_and_experts_has_the_parameters_shape() -> None:
    params = make_params([(8, 4, 3, 3), (3, 8, 12)])
    optimizer = Muon(
        [{"params": params[:1]}, {"params": params[1:], "batch_experts": True}],
        state_format="fp32",
        momentum=0.0,
    )
    run(optimizer, 0, 1)
    for index, param in enumerate(params):
        assert param.grad is not None
        assert torch.equal(momentum_of(optimizer, index), param.grad.float())


def test_export_refuses_coefficients_that_torch_does_not_take() -> None:
    optimizer = Muon(make_params(), ns_coefficients="polar_express")
    with pytest.raises(ValueError, match="ns_coefficients: expected one triple"):
        optimizer.export_full_precision()


def test_a_state_of_kellerjordans_muon_loads_and_keeps_our_other_options() -> None:
    buffers = [torch.randn(8, 12), torch.randn(6, 4)]
    saved = {
        "state": {i: {"momentum_buffer": b} for i, b in enumerate(buffers)},
        "param_groups": [{"lr": 0.02, "momentum": 0.9, "weight_decay": 0.01, "params": [0, 1]}],
    }
    ours = Muon(make_params([(8, 12), (6, 4)]), state_format="fp32", ns_steps=3, nesterov=False)
    ours.load_state_dict(saved)
    options = ours.param_groups[0]
    assert (options["lr"], options["momentum"], options["weight_decay"]) == (0.02, 0.9, 0.01)
    assert (options["ns_steps"], options["nesterov"]) == (3, False)
    for index, buffer in enumerate(buffers):
        assert torch.equal(momentum_of(ours, index), buffer)


def test_the_sum_of_moonlights_muon_becomes_an_average() -> None:
    """Moonlight's M <- momentum*M + G is our momentum / (1 - momentum)."""
    momentum, steps = 0.9, 4
    ours = Muon(make_params([(8, 12)]), state_format="fp32", momentum=momentum)
    total = torch.zeros(8, 12)
    size = torch.zeros(8, 12)
    for step in range(steps):
        run(ours, step, step + 1)
        grad = ours.param_groups[0]["params"][0].grad
        total.mul_(momentum).add_(grad)
        size.mul_(momentum).add_(grad.abs())
    saved = {
        "state": {0: {"use_muon": True, "momentum_buffer": total}},
        "param_groups": [
            {"lr": 1e-3, "wd": 0.2, "momentum": momentum, "nesterov": False, "ns_steps": 6,
             "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8, "params": [0]},
        ],
    }  # fmt: skip
    loaded = Muon(make_params([(8, 12)]), state_format="fp32")
    loaded.load_state_dict(saved)
    # Both sides round a product and a sum in every step, and one scales in the end.
    bound = (4 * steps + 2) * 2**-24 * (1 - momentum) * size
    assert bool(((momentum_of(loaded) - momentum_of(ours)).abs() <= bound).all())
    options = loaded.param_groups[0]
    assert (options["weight_decay"], options["nesterov"], options["ns_steps"]) == (0.2, False, 6)
    assert options["adjust_lr_fn"] == "match_rms_adamw"
    assert options["eps"] == 1e-7
    assert not {"wd", "adamw_eps", "adamw_betas"} & set(options)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"momentum_buffer": torch.ones(12, 8)}, r"expected shape \(8, 12\), got \(12, 8\)"),
        ({"momentum_buffer": torch.full((8, 12), torch.nan)}, "finite"),
        ({"momentum_buffer": torch.ones(8, 12).byte()}, "finite"),
        ({"momentum_buffer": None}, "NoneType"),
        ({"momentum_buffer": torch.ones(8, 12), "exp_avg": torch.ones(8, 12)}, "exp_avg"),
        ({"exp_avg": torch.ones(8, 12)}, "expected 'momentum_buffer'"),
        ({"use_muon": False, "momentum_buffer": torch.ones(8, 12)}, "use_muon"),
    ],
)
def test_a_bad_foreign_state_is_refused(entries: dict[str, Any], message: str) -> None:
    optimizer = Muon(make_params([(8, 12)]))
    before = copy.deepcopy(optimizer.state_dict())
    saved = {"state": {0: entries}, "param_groups": [{"lr": 0.5, "params": [0]}]}
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


# Non-finite gradients and states


def test_a_skipped_gradient_is_in_the_state_and_is_resumed() -> None:
    params = make_params(SHAPES[:1])
    optimizer = Muon(params)
    run(optimizer, 0, 1)
    before = copy.deepcopy(optimizer.state_dict())
    params[0].grad = torch.full_like(params[0], torch.nan)
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        optimizer.step()
    before["state"][0]["skipped"] = 1
    assert_same(optimizer.state_dict(), before)
    resumed = Muon(make_params(SHAPES[:1]), nonfinite="raise")
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.state_dict()["state"][0]["skipped"] == 1
    resumed.param_groups[0]["params"][0].grad = params[0].grad
    with pytest.raises(NonFiniteGradientError):
        resumed.step()
