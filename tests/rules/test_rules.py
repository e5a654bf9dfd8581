"""Every update rule with batches, devices, half precision and bad gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from rule_steps import ALL, give_gradients, parameters, train, values
from torch import Tensor, nn

from lowbit_muon import Muon, NonFiniteGradientError
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.state.gradients import LARGEST_NORM
from lowbit_muon.state.rounding import restore
from lowbit_muon.state.stored import RULE_PREFIX
from lowbit_muon.step import rule_weights
from lowbit_muon.step.rules.gains import RowGains


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        same = torch.equal(ours[key], value) if isinstance(value, Tensor) else ours[key] == value
        assert same, key


def options_of(rule: str, state_format: str) -> dict[str, Any]:
    return {"rule": ALL[rule], "state_format": state_format, "lr": 0.01}


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


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)], ids=str)
@pytest.mark.parametrize("rule", ALL)
def test_a_direction_far_above_the_others_goes_downhill(rule: str, shape: tuple[int, int]) -> None:
    """As the largest of a gradient in training, which no polynomial may turn round."""
    left, right = (torch.nn.functional.normalize(torch.randn(size), dim=0) for size in shape)
    # With nothing in that direction, and at the bound of constraints: these are no step in it.
    weight = torch.randn(shape)
    weight -= (left @ weight @ right) * torch.outer(left, right)
    param = nn.Parameter(weight / torch.linalg.matrix_norm(weight, 2))
    optimizer = Muon([param], rule=ALL[rule], lr=0.05, weight_decay=0.0, state_format="fp32")
    for _ in range(5):
        param.grad = torch.outer(left, right) + 0.01 * torch.randn(shape)
        optimizer.step()
    assert left @ param.detach() @ right < 0


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
