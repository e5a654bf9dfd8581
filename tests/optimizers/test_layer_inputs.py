"""Inputs of layers, for rules that whiten gradients by them: Newton-Muon."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import ORACLES
from torch import Tensor, nn

from lowbit_muon import (
    LayerInputs,
    Muon,
    MuonWithAuxAdam,
    NonFiniteGradientError,
    UpdateRule,
    attach_gradient_release,
    attach_layer_inputs,
    muon_param_groups,
)
from lowbit_muon.step.rules.direction import ExactPolar
from lowbit_muon.step.rules.inputs import InputWhitened
from lowbit_muon.step.rules.recipes import newton_muon

EVERY = 3


def rule(bits: int = 32) -> UpdateRule:
    return newton_muon(EVERY).with_state_bits(bits)


def make_model(columns: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(columns, 20, bias=False), nn.Tanh(), nn.Linear(20, 7))


def matrices(model: nn.Module) -> list[Tensor]:
    return [param for param in model.parameters() if param.ndim == 2]


def make(model: nn.Module, **options: Any) -> Muon:
    chosen: dict[str, Any] = {"rule": rule(), "state_format": "fp32", "lr": 0.02, "seed": 0}
    return Muon(matrices(model), **(chosen | options))


def batch(step: int, columns: int = 12) -> Tensor:
    """With a common direction, as activations have."""
    generator = torch.Generator().manual_seed(step)
    common = torch.linspace(-2, 2, columns)
    return common + torch.randn(3, 5, columns, generator=generator)


def step(model: nn.Module, optimizer: Muon, number: int) -> None:
    optimizer.zero_grad()
    model(batch(number)).square().mean().backward()
    optimizer.step()


def test_a_step_is_newton_muon_s() -> None:
    """Inputs of the first step and of each third, the second layer's one step earlier."""
    model = make_model()
    optimizer = make(model, rule=replace(rule(), direction=ExactPolar()), weight_decay=0.1)
    assert attach_layer_inputs(model, optimizer).layers == ["0", "1"]
    oracles = [ORACLES["newton_muon"](p, lr=0.02, weight_decay=0.1) for p in matrices(model)]
    for number in range(8):
        model.zero_grad()
        x = batch(number)
        hidden = model[1](model[0](x)).detach()
        model.eval()
        model(10 * x)  # neither this
        with torch.no_grad():
            model.train()(10 * x)  # nor this counts
        model(x).square().mean().backward()
        optimizer.step()
        for index, (oracle, read) in enumerate(zip(oracles, (x, hidden), strict=True)):
            if (number + index) % EVERY == 0:
                oracle.read(read.flatten(0, 1))
            grad = matrices(model)[index].grad
            assert grad is not None
            oracle.step(grad)
    for param, oracle in zip(matrices(model), oracles, strict=True):
        # As in test_recipes.py, with 1 / 0.2 for what float32 leaves of an inverse.
        error = (param.detach().double() - oracle.weight).norm()
        assert float(error) <= 1e-4 * float(oracle.weight.norm())


def test_eight_bits_end_beside_float32() -> None:
    """A basis in codes is wrong by 0.9 %, which on two sides is 1.3 % of what is whitened; a polar
    factor takes 2 E / s of an error E, where s, the least singular value, is above an eighth of the
    root of the sum of squares here: at most 21 % of a step, if all went that way."""
    ends = []
    for bits in (8, 32):
        model = make_model()
        optimizer = make(model, rule=rule(bits), weight_decay=0.0)
        attach_layer_inputs(model, optimizer)
        for number in range(4):
            step(model, optimizer, number)
        ends.append([param.detach() for param in matrices(model)])
    for coded, full, start in zip(*ends, matrices(make_model()), strict=True):
        moved = float((full - start.detach()).norm())
        assert 0 < float((coded - full).norm()) <= 0.21 * moved


def test_gradient_accumulation_and_closures_see_all_inputs() -> None:
    ends = []
    for parts in (1, 3):
        model = make_model()
        optimizer = make(model)
        attach_layer_inputs(model, optimizer)
        x = batch(0)

        def closure(model: nn.Module = model, optimizer: Muon = optimizer) -> float:
            optimizer.zero_grad()
            for part in x.chunk(parts):  # noqa: B023 (called before the next turn)
                (model(part).square().mean() / parts).backward()  # noqa: B023
            return 0.0

        optimizer.step(closure)
        ends.append(optimizer.state[matrices(model)[0]]["rule.inputs_values"])
    torch.testing.assert_close(*ends)
    mean = (batch(0).flatten(0, 1).square().sum(dim=1).mean()) / 12
    torch.testing.assert_close(ends[0].mean(), 0.05 * mean + 0.95e-3)


@pytest.mark.parametrize("bits", [8, 32])
def test_a_resumed_run_is_the_same_to_the_bit(bits: int) -> None:
    model = make_model()
    optimizer = make(model, rule=rule(bits), state_format="spectral4")
    attach_layer_inputs(model, optimizer)
    for number in range(4):
        step(model, optimizer, number)
    again = copy.deepcopy(model)
    resumed = make(again, rule=rule(bits), state_format="spectral4")
    attach_layer_inputs(again, resumed)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for number in range(4, 9):
        step(model, optimizer, number)
        step(again, resumed, number)
    for param, other in zip(matrices(model), matrices(again), strict=True):
        assert torch.equal(param, other)
        for key, value in optimizer.state[param].items():
            assert not isinstance(value, Tensor) or torch.equal(value, resumed.state[other][key])


def test_inputs_that_are_not_finite_never_reach_the_state() -> None:
    model = make_model()
    optimizer = make(model)
    attach_layer_inputs(model, optimizer)
    optimizer.zero_grad()
    model(batch(0) * math.inf).square().mean().backward()
    with pytest.warns(RuntimeWarning, match="held inf or nan"):
        optimizer.step()
    assert not any(
        value.any()
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith("rule.")
    )
    for number in range(1, 4):
        step(model, optimizer, number)
    assert all(optimizer.state[p]["rule.inputs_values"].any() for p in matrices(model))


def test_whole_models_offload_and_fused_rows() -> None:
    model = make_model()
    groups = muon_param_groups(model, aux_patterns=["^2"], split_fused={"0": 2})
    optimizer = MuonWithAuxAdam(groups, rule=rule(8), offload=True)
    inputs = attach_layer_inputs(model, optimizer)
    assert inputs.layers == ["0.weight"]
    before = optimizer.state_bytes()
    step(model, optimizer, 0)
    state = optimizer.state[matrices(model)[0]]
    for prefix in ("0.", "1."):
        assert state[f"{prefix}rule.inputs_basis"].dtype == torch.int8
        assert state[f"{prefix}rule.inputs_values"].any()
    # Codes [12, 12], and scales and values of 12 float32, of each of both matrices.
    kept = sum(value.nbytes for key, value in state.items() if ".rule." in key)
    assert before == 0
    assert kept == 2 * (12 * 12 + 2 * 4 * 12)


def test_without_inputs_no_step_is_taken() -> None:
    model = make_model()
    optimizer = make(model)
    model(batch(0)).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"rule: 'newton_muon\(3\)' looks at what layers read"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    inputs = attach_layer_inputs(model, optimizer)
    with pytest.raises(ValueError, match="without layer inputs; detach"):
        attach_layer_inputs(model, optimizer)
    step(model, optimizer, 0)
    inputs.detach()
    with pytest.raises(ValueError, match="expected attach_layer_inputs"):
        step(model, optimizer, 1)
    with pytest.raises(ValueError, match="expected attach_layer_inputs"):
        copy.deepcopy(optimizer).step()
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_copies_of_a_model_are_not_heard() -> None:
    model = make_model()
    optimizer = make(model)
    attach_layer_inputs(model, optimizer)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    size = len(pickle.dumps(make_model()))
    assert len(pickle.dumps(model)) < size + 1000  # without the optimizer
    averaged.train()
    averaged(10 * batch(1))
    step(model, optimizer, 0)
    mean = batch(0).flatten(0, 1).square().sum(dim=1).mean() / 12
    values = optimizer.state[matrices(model)[0]]["rule.inputs_values"]
    torch.testing.assert_close(values.mean(), 0.05 * mean + 0.95e-3)


def test_a_refused_step_takes_nothing() -> None:
    model = make_model()
    optimizer = make(model, nonfinite="raise")
    attach_layer_inputs(model, optimizer)
    model(batch(0)).square().mean().backward()
    gradient = matrices(model)[1].grad
    assert gradient is not None
    gradient.fill_(math.nan)
    with pytest.raises(NonFiniteGradientError):
        optimizer.step()
    assert not optimizer.state


def test_steps_without_gradients_are_no_turns() -> None:
    """As parameters count their steps, so that a resumed run has its turns where this one has."""
    model = make_model()
    optimizer = make(model)
    inputs = attach_layer_inputs(model, optimizer)
    step(model, optimizer, 0)
    optimizer.zero_grad()
    optimizer.step()
    step(model, optimizer, 1)
    again = make(model)
    resumed = attach_layer_inputs(model, again)
    again.load_state_dict(optimizer.state_dict())
    assert resumed._steps == inputs._steps == 2


def test_parameters_that_came_later_are_refused() -> None:
    model, other = make_model(), nn.Linear(3, 4)
    optimizer = make(model)
    attach_layer_inputs(model, optimizer)
    optimizer.add_param_group({"params": [other.weight]})
    with pytest.raises(ValueError, match="for all parameters of such a rule"):
        step(model, optimizer, 0)


def test_automatic_formats_begin_with_the_next_turn() -> None:
    model = make_model()
    optimizer = make(model, state_format="auto")
    attach_layer_inputs(model, optimizer)
    for number in range(EVERY + 1):
        step(model, optimizer, number)
    assert all(optimizer.state[p]["rule.inputs_values"].any() for p in matrices(model))


def test_autocast_and_compiled_models_are_heard() -> None:
    ends = []
    for compiled in (False, True):
        model = make_model()
        optimizer = make(model)
        attach_layer_inputs(model, optimizer)
        called = torch.compile(model, backend="eager") if compiled else model
        with torch.autocast("cpu", torch.bfloat16), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own, about graph breaks
            called(batch(0)).float().square().mean().backward()
        optimizer.step()
        ends.append([optimizer.state[matrices(model)[0]]["rule.inputs_values"]])
    for ours, theirs in zip(*ends, strict=True):
        assert torch.equal(ours, theirs)
    mean = batch(0).flatten(0, 1).square().sum(dim=1).mean() / 12
    torch.testing.assert_close(ends[0][0].mean(), 0.05 * mean + 0.95e-3)  # float32's, not rounded


def test_a_layer_that_is_never_called_is_named() -> None:
    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 7), nn.Linear(12, 7)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + nn.functional.linear(x, self.two.weight)

    model = Beside()
    optimizer = make(model)
    attach_layer_inputs(model, optimizer)
    for number in range(5):
        if number == 2:
            with pytest.warns(UserWarning, match=r"layer inputs: 1 has read nothing in its turn"):
                step(model, optimizer, number)
        else:  # in its next turn without a warning
            step(model, optimizer, number)


def test_wide_layers_are_not_whitened() -> None:
    model, plain_model = make_model(), make_model()
    optimizer = make(model, rule=replace(rule(), gradient=InputWhitened(EVERY, largest=12)))
    attach_layer_inputs(model, optimizer)
    step(model, optimizer, 0)
    step(plain_model, make(plain_model, rule="muon"), 0)
    narrow, wide = matrices(model)
    assert "rule.inputs_values" in optimizer.state[narrow]
    assert not torch.equal(narrow, matrices(plain_model)[0])
    assert not any(key.startswith("rule.") for key in optimizer.state[wide])
    # Another way to the same update, times the rate of 0.02; each of 5 Newton-Schulz steps enlarges
    # a rounding by 3.4445.
    atol = 0.02 * 3.4445**5 * 2**-24
    torch.testing.assert_close(wide, matrices(plain_model)[1], rtol=0, atol=atol)
    for number in range(1, EVERY):  # the turn that the wide one would have
        step(model, optimizer, number)


def test_what_cannot_be_attached_is_refused() -> None:
    model = make_model()
    with pytest.raises(TypeError, match="optimizer: expected a Muon, got SGD"):
        attach_layer_inputs(model, torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a group whose rule looks at what layers read"):
        attach_layer_inputs(model, Muon(matrices(model)))
    convolution = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=r"parameter '0': expected the weight of one nn\.Linear"):
        attach_layer_inputs(convolution, Muon([convolution.weight], rule=rule()))
    with pytest.raises(TypeError, match=r"process_group: expected one of torch\.distributed"):
        attach_layer_inputs(model, make(model), process_group=3)  # type: ignore[arg-type]
    optimizer = make(model)
    assert isinstance(attach_layer_inputs(model, optimizer), LayerInputs)
    attach_gradient_release(model, optimizer)
    with pytest.raises(ValueError, match="expected one that does not look at what layers read"):
        model(batch(0)).square().mean().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every: expected a whole number >= 1, got 0"),
        ({"largest": 0}, "largest: expected a whole number >= 1, got 0"),
        ({"decay": 1.0}, r"decay: expected a number in \[0, 1\), got 1.0"),
        ({"ridge": 0.0}, "ridge: expected a number > 0, got 0.0"),
        ({"bits": 4}, "bits: expected one of"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"input_whitened: {message}"):
        InputWhitened(**options)
