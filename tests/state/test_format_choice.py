"""state_format="auto": what is chosen, when it is looked at again, what it leaves alone."""

from __future__ import annotations

import copy
import io
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_device_step import FLIPPED, by_products, on_device
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    AutoFormat,
    Muon,
    MuonWithAuxAdam,
    StateFormat,
    muon_param_groups,
    orthogonalize,
    quantize,
)
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.state.format_choice import choose_format
from lowbit_muon.state.parameter import matrix_views, momentum_format, read_matrix
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

__all__ = ["on_device"]  # a fixture

COEFFICIENTS = resolve_coefficients("muon", 5)
SPECTRAL = ("spectral2", "spectral3", "spectral4", "spectral8")


def error_of(matrix: Tensor, state_format: str) -> float:
    """By its definition, in float64."""
    exact = orthogonalize(matrix.double())
    stored = orthogonalize(quantize(matrix, state_format).dequantize().double())
    return float((stored - exact).norm() / exact.norm())


def matrix(rows: int = 48, columns: int = 96, seed: int = 0) -> Tensor:
    return decaying_matrix(rows, columns, torch.Generator().manual_seed(seed))


def parameter(value: Tensor) -> nn.Parameter:
    param = nn.Parameter(torch.zeros_like(value))
    param.grad = value
    return param


def names(optimizer: Muon) -> list[str]:
    return [state_format.name for state_format in optimizer.state_formats().values()]


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
def test_it_takes_the_fewest_bits_whose_error_is_below_the_target(shape: tuple[int, int]) -> None:
    x = matrix(*shape)
    errors = {name: error_of(x, name) for name in SPECTRAL}
    assert sorted(errors.values(), reverse=True) == list(errors.values())
    for name in SPECTRAL:
        auto = AutoFormat(target_error=1.05 * errors[name])
        chosen, error = choose_format(auto, [x], COEFFICIENTS)
        assert chosen == PRESETS[name]
        # float32 Newton-Schulz differs from float64's by up to 2.4e-3 (tests of newton_schulz).
        assert error == pytest.approx(errors[name], abs=5e-3)
    nothing_is_enough = AutoFormat(target_error=errors["spectral8"] / 2)
    assert choose_format(nothing_is_enough, [x], COEFFICIENTS)[0] == PRESETS["spectral8"]


def test_the_worst_matrix_of_a_parameter_counts() -> None:
    easy, hard = matrix(48, 96), matrix(4, 96)
    if error_of(easy, "spectral3") > error_of(hard, "spectral3"):
        easy, hard = hard, easy
    auto = AutoFormat(target_error=(error_of(easy, "spectral3") + error_of(hard, "spectral3")) / 2)
    assert choose_format(auto, [easy], COEFFICIENTS)[0] == PRESETS["spectral3"]
    assert choose_format(auto, [easy, hard], COEFFICIENTS)[0] == PRESETS["spectral4"]


def test_a_smaller_format_has_to_be_better_by_a_margin_than_the_present_one() -> None:
    x = matrix()
    auto = AutoFormat(target_error=1.05 * error_of(x, "spectral3"))
    for present, expected in (
        ("spectral4", "spectral4"),
        ("spectral3", "spectral3"),
        ("spectral2", "spectral3"),
    ):
        chosen, _ = choose_format(auto, [x], COEFFICIENTS, present=PRESETS[present])
        assert chosen == PRESETS[expected]
    relaxed = AutoFormat(target_error=1.2 * error_of(x, "spectral3"))
    chosen, _ = choose_format(relaxed, [x], COEFFICIENTS, present=PRESETS["spectral4"])
    assert chosen == PRESETS["spectral3"]


def test_ranks_are_candidates_like_bits() -> None:
    x = matrix()
    x[:, 0] += 1.0  # one direction above the others, for the factors
    ranks = [StateFormat(f"rank{k}", 4, rotate=True, factor_rank=k) for k in (1, 8)]
    auto = AutoFormat(target_error=1.01 * error_of_format(x, ranks[1]), candidates=tuple(ranks))
    assert error_of_format(x, ranks[0]) > auto.target_error
    assert choose_format(auto, [x], COEFFICIENTS)[0] == ranks[1]


def error_of_format(x: Tensor, state_format: StateFormat) -> float:
    exact = orthogonalize(x)
    return float((orthogonalize(quantize(x, state_format).dequantize()) - exact).norm()) / float(
        exact.norm()
    )


def test_parameters_get_formats_of_their_own_and_the_run_is_that_of_these_formats() -> None:
    values = [
        matrix(48, 96, seed=1),
        torch.randn(32, 32, generator=torch.Generator().manual_seed(0)),
    ]
    errors = [error_of(value, "spectral3") for value in values]
    assert abs(errors[0] - errors[1]) > 0.02  # or this test would say nothing
    auto = AutoFormat(target_error=sum(errors) / 2, recheck_every=1000)
    params = [parameter(value) for value in values]
    optimizer = Muon([("a", params[0]), ("b", params[1])], state_format=auto)
    optimizer.step()
    chosen = optimizer.state_formats()
    assert {f.name for f in chosen.values()} == {"spectral3", "spectral4"}

    fixed = [parameter(value) for value in values]
    other = Muon(
        [{"params": [p], "state_format": f} for p, f in zip(fixed, chosen.values(), strict=True)]
    )
    other.step()
    for one, two in zip(params, fixed, strict=True):
        assert torch.equal(one, two)
    assert optimizer.state_bytes() == other.state_bytes()


def test_it_looks_again_when_it_is_due_and_only_then(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = AutoFormat(recheck_every=6)
    assert [step for step in range(20) if auto.is_due(step)] == [0, 1, 2, 4, 6, 8, 12, 16, 18]
    param = parameter(matrix())
    optimizer = Muon([param], state_format=auto)
    looked = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        looked.append(step)
        return choose_format(*args, **kwargs)

    monkeypatch.setattr("lowbit_muon.state.format_choice.choose_format", watched)
    for step in range(9):
        param.grad = matrix(seed=step)
        optimizer.step()
    assert looked == [0, 1, 2, 4, 6, 8]


@pytest.mark.parametrize(("rule", "share"), [("muon", 0.05), ("moonlight", 1.0)])
def test_what_the_rule_stores_next_is_looked_at(
    rule: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    param = parameter(matrix())
    optimizer = Muon([param], rule=rule, state_format=AutoFormat(), backend="reference")
    optimizer.step()
    seen: list[Tensor] = []

    def watched(auto: AutoFormat, samples: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(samples)
        return choose_format(auto, samples, *args, **kwargs)

    monkeypatch.setattr("lowbit_muon.state.format_choice.choose_format", watched)
    (state,) = optimizer.state.values()
    view = matrix_views(param, optimizer.param_groups[0])[0]
    f = momentum_format(optimizer.param_groups[0], state)
    before = read_matrix(state, view, f).dequantize("reference")
    param.grad = matrix(seed=1)
    optimizer.step()
    # the same operations in the same order
    assert torch.equal(seen[0], 0.95 * before + share * param.grad)


def test_a_change_of_format_keeps_the_momentum(caplog: pytest.LogCaptureFixture) -> None:
    """From a spectrum that 3 bits hold to one that they do not."""
    easy = torch.linalg.qr(torch.randn(96, 48, generator=torch.Generator().manual_seed(0)))[0].mT
    hard = matrix()
    target = (error_of(easy.contiguous(), "spectral3") + error_of(hard, "spectral3")) / 2
    param = parameter(easy.contiguous())
    optimizer = Muon([("w", param)], state_format=AutoFormat(target_error=target, recheck_every=2))
    optimizer.step()
    assert names(optimizer) == ["spectral3"]
    exact = 0.05 * easy
    with caplog.at_level(logging.INFO, logger="lowbit_muon"):
        for _ in range(6):
            param.grad = hard * easy.norm() / hard.norm() * 3
            exact = 0.95 * exact + 0.05 * param.grad
            optimizer.step()
    assert names(optimizer) == ["spectral4"]
    assert any("w (48, 96): spectral3 -> spectral4" in line for line in caplog.messages)
    (stored,) = optimizer.export_full_precision()["state"].values()
    # A momentum that was lost at the change would be off by most of itself; 4 bits are off by an
    # eighth (README), here with what 3 bits (a quarter) left of the first steps.
    assert float((stored["momentum_buffer"] - exact).norm() / exact.norm()) < 0.25


def test_zeros_keep_most_bits_until_there_is_something_to_measure() -> None:
    param = parameter(torch.zeros(48, 96))
    optimizer = Muon([param], state_format="auto")
    optimizer.step()
    assert names(optimizer) == ["spectral8"]
    param.grad = matrix()
    optimizer.step()
    assert names(optimizer) != ["spectral8"]


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
def test_a_gradient_that_is_not_finite_decides_nothing() -> None:
    param = parameter(torch.full((48, 96), math.nan))
    optimizer = Muon([param], state_format="auto")
    optimizer.step()
    assert not param.any()
    param.grad = matrix()
    optimizer.step()
    assert names(optimizer) == ["spectral4"]
    before = copy.deepcopy(optimizer.state[param]["codes"])
    param.grad = torch.full((48, 96), math.inf)
    optimizer.step()
    assert names(optimizer) == ["spectral4"]
    assert torch.equal(before, optimizer.state[param]["codes"])


def run(optimizer: Muon, param: nn.Parameter, steps: range) -> None:
    for step in steps:
        param.grad = matrix(seed=step)
        optimizer.step()


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    one, two = parameter(matrix()), parameter(matrix())
    auto = AutoFormat(target_error=0.25, recheck_every=3)
    first = Muon([one], state_format=auto)
    run(first, one, range(5))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Muon([two], state_format=auto)
    second.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        two.copy_(one)
    third, three = copy.deepcopy((second, two))
    for optimizer, param in ((first, one), (second, two), (third, three)):
        run(optimizer, param, range(5, 10))
    assert torch.equal(one, two)
    assert torch.equal(one, three)


@pytest.mark.parametrize("source", ["fp32", "linear8", "spectral3", "mulaw4"])
def test_states_of_other_formats_load(source: str) -> None:
    one, two = parameter(matrix()), parameter(matrix())
    first = Muon([one], state_format=source)
    run(first, one, range(4))
    second = Muon([two], state_format="auto")
    second.load_state_dict(first.state_dict())
    # A candidate is taken as it is, until the first step measures it.
    assert names(second) == ["spectral3" if source == "spectral3" else "spectral4"]
    momenta = [o.export_full_precision()["state"][0]["momentum_buffer"] for o in (first, second)]
    distance = float((momenta[0] - momenta[1]).norm() / momenta[0].norm())
    assert distance == 0 if source == "spectral3" else distance < 0.2
    run(second, two, range(4, 5))
    # ... and back
    first.load_state_dict(second.state_dict())
    run(first, one, range(5, 6))
    assert one.isfinite().all()


def test_states_of_torch_load() -> None:
    one, two = parameter(matrix()), parameter(matrix())
    theirs = torch.optim.Muon([one])
    for _ in range(3):
        theirs.step()
    ours = Muon([two], state_format="auto")
    ours.load_state_dict(theirs.state_dict())
    assert names(ours) == ["spectral4"]


def test_a_normalised_state_cannot_become_automatic() -> None:
    param = parameter(matrix())
    source = Muon([param], state_format="muonq4", nesterov=False)
    source.step()
    param.grad = None  # whose size the momentum could be given
    target = Muon([param], state_format="auto")
    with pytest.raises(ValueError, match="'auto' needs it"):
        target.load_state_dict(source.state_dict())
    assert not target.state


def test_a_damaged_choice_is_an_error_and_changes_nothing() -> None:
    param = parameter(matrix())
    optimizer = Muon([("w", param)], state_format="auto")
    optimizer.step()
    good = optimizer.state_dict()
    for key, value in (("state_format", None), ("state_format", "spectral4"), ("asked", -1)):
        bad = copy.deepcopy(good)
        bad["state"][0][key] = value
        with pytest.raises(ValueError, match=key):
            optimizer.load_state_dict(bad)
    bad = copy.deepcopy(good)
    del bad["param_groups"][0]["state_format"]["target_error"]
    with pytest.raises(ValueError, match="state_format"):
        optimizer.load_state_dict(bad)
    assert names(optimizer) == ["spectral4"]


@pytest.mark.usefixtures(by_products.__name__)
def test_on_a_device_the_choice_is_the_same(
    on_device: Callable[[], None],
) -> None:
    shapes = ((48, 96), (96, 48), (32, 32), (32, 32))

    def trained() -> tuple[list[Tensor], list[str], dict[str, Any]]:
        params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
        auto = AutoFormat(target_error=0.25, recheck_every=2)
        optimizer = Muon(params, state_format=auto, ns_dtype="float32")
        for step in range(4):
            for number, param in enumerate(params):
                param.grad = matrix(*param.shape, seed=10 * number + step)
            optimizer.step()
        return [p.detach() for p in params], names(optimizer), optimizer.state_dict()

    expected, formats, _ = trained()
    assert len(set(formats)) > 1
    on_device()
    found, device_formats, state_dict = trained()
    assert device_formats == formats
    assert [state["asked"] for state in state_dict["state"].values()] == [4] * len(shapes)
    for ours, theirs in zip(found, expected, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < FLIPPED


def test_overrides_and_groups_mix_with_fixed_formats() -> None:
    model = nn.Sequential(nn.Linear(96, 48), nn.Linear(48, 48))
    groups = muon_param_groups(model, overrides={"0.*": "linear8"})
    optimizer = MuonWithAuxAdam(groups, state_format="auto", aux_adam="adamw")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    found = optimizer.state_formats()
    assert found["0.weight"].name == "linear8"
    assert found["1.weight"].name in SPECTRAL
    assert set(found) == {"0.weight", "1.weight"}
    assert [row.state_format for row in optimizer.diagnose()] == [f.name for f in found.values()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_error": 0.0}, "target_error: expected a number > 0, got 0.0"),
        ({"target_error": math.nan}, "target_error"),
        ({"recheck_every": 0}, "recheck_every: expected a whole number >= 1, got 0"),
        ({"recheck_every": True}, "recheck_every"),
        ({"candidates": ()}, "candidates: expected a sequence of formats"),
        ({"candidates": "spectral4"}, "candidates: expected a sequence of formats"),
        ({"candidates": ("spectral5",)}, "spectral5"),
        ({"candidates": ("muonq4",)}, "candidates: expected formats that keep"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AutoFormat(**options)


def test_quantize_takes_no_choice() -> None:
    with pytest.raises(ValueError, match="auto"):
        quantize(matrix(), "auto")
