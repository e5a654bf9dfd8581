"""Compensation of half-precision weights: exact to 8 more bits, on the host and on a device."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_device_step import give_gradients, on_device, parameters
from torch import Tensor, nn

from lowbit_muon import Muon, MuonWithAuxAdam
from lowbit_muon.state.rounding import Compensation, restore, spacing, split

__all__ = ["on_device"]  # a fixture

HALVES = (torch.bfloat16, torch.float16)


def every_value(dtype: torch.dtype) -> Tensor:
    """All finite values of a 16-bit dtype, [65536 - not finite]."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("dtype", HALVES)
def test_spacing_is_the_distance_to_the_next_value(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    values = values[values.abs() < torch.finfo(dtype).max]
    following = (values.view(torch.int16) + 1).view(dtype)  # away from zero
    assert torch.equal(spacing(values), (following.float() - values.float()).abs())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_weight_with_every_remainder_is_split_as_it_was(dtype: torch.dtype) -> None:
    """So a weight whose gradient was skipped stays as it is, bit for bit."""
    values = every_value(dtype)
    for part in range(-127, 128):
        remainder = torch.full(values.shape, part, dtype=torch.int8)
        # Below a power of two values are half as far apart: -64 and less belong to the next one.
        mantissa = torch.frexp(values.float()).mantissa
        if part <= -64 or part >= 64:
            edge = mantissa.abs() == 0.5
            inward = (mantissa > 0) == (part < 0)
            remainder[edge & inward] = 0
        weight, again = values.clone(), torch.zeros_like(remainder)
        split(restore(values, remainder), weight, again)
        assert torch.equal(weight, values)
        assert torch.equal(again, remainder)


@pytest.mark.parametrize("dtype", HALVES)
def test_eight_more_bits(dtype: torch.dtype) -> None:
    value = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    weight, remainder = torch.empty_like(value, dtype=dtype), torch.empty(10_000, dtype=torch.int8)
    split(value, weight, remainder)
    assert torch.equal(weight, value.to(dtype))
    # Half of a 256th of the spacing by rounding, a whole one where 128 was cut to 127.
    assert ((restore(weight, remainder) - value).abs() <= spacing(weight) / 256).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_not_finite_has_no_remainder(dtype: torch.dtype) -> None:
    value = torch.tensor([float("inf"), float("-inf"), float("nan"), 1e5, 3e38])
    weight, remainder = torch.empty(5, dtype=dtype), torch.ones(5, dtype=torch.int8)
    split(value, weight, remainder)
    assert torch.equal(weight.isfinite(), value.to(dtype).isfinite())
    assert not remainder[~weight.isfinite()].any()


def test_an_update_in_half_precision_is_multiplied_in_float32() -> None:
    """Of a step of 2**-20 float16 would leave no more than its subnormals do."""
    update = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).half()
    found = []
    for each in (update, update.float()):
        weight, remainder = torch.zeros(24, 40).bfloat16(), torch.zeros(24, 40, dtype=torch.int8)
        Compensation(remainder).update(weight, each, torch.tensor(1.0), torch.tensor(2.0**-20))
        found.append(restore(weight, remainder))
    assert torch.equal(*found)


def drifted(dtype: torch.dtype, steps: int, **options: Any) -> Tensor:
    """Weights after steps that are each a twentieth of the spacing of a bfloat16 near one."""
    weight = nn.Parameter(torch.ones(24, 40).to(dtype))
    # An orthogonal update has entries of about 1/sqrt(40) = 0.16.
    optimizer = Muon([weight], lr=2.0**-7 / 20 / 0.16, weight_decay=0.0, **options)
    gradient = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        weight.grad = gradient.to(dtype)
        optimizer.step()
    state = optimizer.state[weight]
    if "remainder" in state:
        return restore(weight.detach(), state["remainder"])
    return weight.detach().float()


@pytest.mark.parametrize("device", [False, True])
def test_small_updates_add_up(device: bool, on_device: Callable[[], None]) -> None:
    options: dict[str, Any] = {"state_format": "fp32"}
    if device:
        on_device()
        options["ns_dtype"] = "float32"
    exact = drifted(torch.float32, 60, **options)
    lost = drifted(torch.bfloat16, 60, **options)
    kept = drifted(torch.bfloat16, 60, compensation=True, **options)
    moved = float((exact - 1).norm())
    assert float((lost - exact).norm()) > 0.5 * moved
    # Sixty roundings to 2**-16 of weights in [1/2, 2), at random; bfloat16 gradients move the
    # update by 2**-9 of itself, times the lift of small directions (below 10 for a Gaussian one).
    bound = 60**0.5 * 2.0**-16 * (24 * 40) ** 0.5 + 10 * 2.0**-9 * moved
    assert float((kept - exact).norm()) < bound < 0.05 * moved


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("options", [{}, {"row_splits": [10, 14]}])
def test_host_and_device_agree(
    dtype: torch.dtype, options: dict[str, Any], on_device: Callable[[], None]
) -> None:
    def trained(**more: Any) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(24, 40).to(dtype))
        optimizer = Muon(
            [weight], 0.02, state_format="linear8", compensation=True, **options, **more
        )
        for _ in range(3):
            weight.grad = torch.randn(24, 40).to(dtype)
            optimizer.step()
        return weight.detach(), optimizer.state[weight]["remainder"]

    expected = restore(*trained())
    on_device()
    found = restore(*trained(ns_dtype="float32"))
    # Newton-Schulz in float32, 2.4e-3 of updates of 0.02 * 0.16 an entry, for three steps; and a
    # 256th of the spacing for each rounding.
    bound = 3 * 3 * 2.4e-3 * 0.02 * 0.16 * (24 * 40) ** 0.5 + 3 * float(
        (spacing(expected.to(dtype)) / 256).norm()
    )
    assert float((found - expected).norm()) < bound


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
@pytest.mark.parametrize("device", [False, True])
def test_a_skipped_gradient_leaves_weights_and_remainders(
    device: bool, on_device: Callable[[], None]
) -> None:
    if device:
        on_device()
    params = parameters(torch.bfloat16)
    optimizer = Muon(params, 0.02, compensation=True)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    weight, remainder = params[0].detach().clone(), optimizer.state[params[0]]["remainder"].clone()
    assert remainder.any()
    params[0].grad[1, 1] = float("nan")
    optimizer.step()
    assert torch.equal(params[0], weight)
    assert torch.equal(optimizer.state[params[0]]["remainder"], remainder)


def test_a_saved_run_goes_on_bit_for_bit() -> None:
    params = parameters(torch.float16)
    optimizer = Muon(params, 0.02, compensation=True)
    for step in range(2):
        give_gradients(params, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = copy.deepcopy(params)
    resumed = Muon(others, 0.02, compensation=True)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for some, stepped in ((params, optimizer), (others, resumed)):
        give_gradients(some, 2)
        stepped.step()
    for one, two in zip(params, others, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["remainder"], resumed.state[two]["remainder"])


def test_states_with_and_without_load_into_each_other() -> None:
    params = parameters(torch.bfloat16)
    without, kept = Muon(params, 0.02), Muon(params, 0.02, compensation=True)
    give_gradients(params, 0)
    kept.step()
    without.load_state_dict(kept.state_dict())
    assert all("remainder" not in state for state in without.state.values())
    kept.load_state_dict(without.state_dict())
    for param in params:
        assert kept.state[param]["remainder"].shape == param.shape
        assert not kept.state[param]["remainder"].any()
    broken = kept.state_dict()
    broken["state"][0]["remainder"] = torch.zeros(3, dtype=torch.int8)
    with pytest.raises(ValueError, match="remainder"):
        kept.load_state_dict(broken)


def test_bytes_and_dtypes() -> None:
    sizes = {}
    for dtype in (torch.float32, *HALVES):
        for option in (False, True):
            weight = nn.Parameter(torch.randn(24, 40).to(dtype))
            optimizer = Muon([weight], compensation=option)
            weight.grad = torch.randn(24, 40).to(dtype)
            optimizer.step()
            sizes[dtype, option] = optimizer.state_bytes()
    for dtype in HALVES:
        assert sizes[dtype, True] - sizes[dtype, False] == 24 * 40
    assert sizes[torch.float32, True] == sizes[torch.float32, False]
    assert not Compensation.applies_to(torch.zeros(1, dtype=torch.float64))


@pytest.mark.parametrize("stochastic", [True, False])
def test_experts_round_with_bits_of_their_own(stochastic: bool) -> None:
    """Of one parameter with equal matrices and gradients."""
    expert = torch.randn(16, 24).bfloat16()
    experts = nn.Parameter(torch.stack([expert, expert]))
    experts.grad = torch.randn(16, 24).bfloat16().expand(2, 16, 24).clone()
    Muon([experts], lr=1e-4, batch_experts=True, stochastic_rounding=stochastic).step()
    first, second = experts.detach()
    assert torch.equal(first, second) == (not stochastic)


def test_not_together_with_stochastic_rounding() -> None:
    weight = nn.Parameter(torch.randn(4, 6).bfloat16())
    with pytest.raises(ValueError, match="compensation: expected False with stochastic_rounding"):
        Muon([weight], compensation=True, stochastic_rounding=True)
    group = {"params": [weight], "use_muon": True, "compensation": True}
    assert MuonWithAuxAdam([group]).param_groups[0]["compensation"]
