"""The step on a device, in batches, against the step on the host."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from stored_direction import stored_direction
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    Muon,
    MuonWithAuxAdam,
    QuantizedMatrix,
    StateFormat,
)
from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg import spectral
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.state.stored import ROLES
from lowbit_muon.step import batches

SHAPES = ((24, 40), (24, 40), (40, 24), (33, 33), (1, 7))


# float32 Newton-Schulz is within 2.4e-3 of float64 whatever the order of its sums.
NS_FLOAT32 = 2 * 2.4e-3
# The spectral encoder enlarges rounding by up to 1/shift, so that a code in a thousand may fall on
# the other side of a threshold; half of one level in so small a matrix moves its update by 2%, and
# the next step's codes with it.
FLIPPED = 0.04


def half_bound(dtype: torch.dtype, rows: int) -> float:
    """Twice what rounding the input does to five steps on small singular values.

    It adds noise of eps/(2*sqrt(3)) of the norm, which the steps multiply by a^5 = 485 where the
    matrix has next to nothing, beside a result of norm about sqrt(rows).
    """
    return 2 * torch.finfo(dtype).eps / (2 * 3**0.5) * 3.4445**5 / rows**0.5


def step_on(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers step with this backend, whatever they ask for."""
    monkeypatch.setattr(muon_module, "get_backend", lambda *_: backend)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Switches optimizers to a device."""
    return functools.partial(step_on, DeviceReference(), monkeypatch)


@pytest.fixture(autouse=True)
def by_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder's root as on devices, for hosts too: another program moves codes of its own."""
    monkeypatch.setattr(spectral, "root_fractions", lambda _: None)


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        rows, columns = param.shape
        thin = torch.randn(rows, 3, generator=generator) @ torch.randn(
            3, columns, generator=generator
        )
        param.grad = (thin + 0.1 * torch.randn(param.shape, generator=generator)).to(param.dtype)


def train(steps: int = 3, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = parameters(dtype)
    optimizer = Muon(params, lr=0.02, **options)
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()
    return params, optimizer


@torch.no_grad()
def relative_change(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> float:
    """The largest difference of a weight, relative to how far training has moved it."""
    return max(
        float((a - b).norm() / (b - start).norm())
        for a, b, start in zip(ours, theirs, parameters(), strict=True)
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_float32_stores_the_same_codes_as_the_host(
    name: str, nesterov: bool, on_device: Callable[[], None]
) -> None:
    expected, host = train(state_format=name, nesterov=nesterov)
    on_device()
    params, device = train(state_format=name, nesterov=nesterov, ns_dtype="float32")
    spectral = PRESETS[name].spectral
    assert relative_change(params, expected) < (FLIPPED if spectral else NS_FLOAT32)
    for ours, theirs in zip(device.state.values(), host.state.values(), strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, Tensor) and value.dtype == torch.uint8:
                # Levels of 8 bits are 16 times as near as those of 4: 16 codes in a thousand in
                # each of three steps, and as many again that the step before has moved.
                share = (0.1 if PRESETS[name].bits == 8 else 0.05) if spectral else 0.0
                assert int((ours[key] != value).sum()) <= share * value.numel(), key
            elif isinstance(value, Tensor):
                # A flipped code moves one of at least 24 entries of its row by a level, which is at
                # most one RMS (2 bits): two of them change the row's RMS by up to 2 * 2/24 / 2.
                # Without flips: float32 sums of some dozen terms in another order, 2**-24 a term.
                rtol = 0.1 if spectral else 1e-5
                torch.testing.assert_close(ours[key], value, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mulaw4", "linear8", "fp32"])
def test_half_precision_is_near(
    name: str, dtype: torch.dtype, on_device: Callable[[], None]
) -> None:
    expected, _ = train(state_format=name)
    on_device()
    params, _ = train(state_format=name, ns_dtype=str(dtype).removeprefix("torch."))
    assert relative_change(params, expected) < half_bound(dtype, 24)


def test_float16_encoder_keeps_the_quality_of_float32(on_device: Callable[[], None]) -> None:
    """Other codes here and there, but the same distance from momentum that is not quantised."""
    exact, _ = train(12, state_format="fp32")
    on_device()
    errors = {
        dtype: relative_change(train(12, state_format="spectral4", ns_dtype=dtype)[0], exact)
        for dtype in ("float32", "float16")
    }
    assert errors["float16"] < 1.1 * errors["float32"]


@pytest.mark.parametrize("name", PRESETS)
def test_stored_input_orthogonalises_what_the_codes_hold(
    name: str, on_device: Callable[[], None]
) -> None:
    on_device()
    params = parameters()
    optimizer = Muon(params, 0.02, 0.0, state_format=name, ns_input="stored", ns_dtype="float32")
    for step in range(2):
        give_gradients(params, step)
        before = [param.detach().clone() for param in params]
        optimizer.step()
    for param, start in zip(params, before, strict=True):
        stored = QuantizedMatrix(
            PRESETS[name],
            tuple(param.shape),
            {k: v for k, v in optimizer.state[param].items() if k in ROLES},
        )
        scale = 0.02 * max(1.0, param.shape[0] / param.shape[1]) ** 0.5
        update = scale * stored_direction(stored)
        assert (start - param.detach() - update).norm() < NS_FLOAT32 * update.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "muonq4", "linear8", "bf16", "fp32"])
def test_a_nonfinite_gradient_changes_nothing(
    name: str, bad: float, on_device: Callable[[], None]
) -> None:
    on_device()
    params, optimizer = train(2, state_format=name)
    weights = [param.detach().clone() for param in params]
    states = [copy.deepcopy(optimizer.state[param]) for param in params]
    untouched = copy.deepcopy((params, optimizer.state_dict()))
    give_gradients(params, 2)
    params[1].grad[3, 5] = bad
    optimizer.step()
    assert torch.equal(params[1], weights[1])
    for key, value in states[1].items():
        if key in ROLES:
            assert torch.equal(optimizer.state[params[1]][key], value), key
    counts = [
        (state["step"], state["skipped"]) for state in optimizer.state_dict()["state"].values()
    ]
    assert counts == [(3, 0), (2, 1), (3, 0), (3, 0), (3, 0)]
    # and its neighbours in the batch step as if it had been finite
    others, state_dict = untouched
    twin = Muon(others, lr=0.02, state_format=name)
    twin.load_state_dict(state_dict)
    give_gradients(others, 2)
    twin.step()
    for index in (0, 2, 3, 4):
        assert torch.equal(params[index], others[index])


def test_a_parameter_of_several_matrices_is_skipped_as_a_whole(
    on_device: Callable[[], None],
) -> None:
    on_device()
    weight = nn.Parameter(torch.randn(30, 8))
    optimizer = Muon([weight], row_splits=[10, 20])
    weight.grad = torch.randn(30, 8)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.randn(30, 8)
    weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state_dict()["state"][0]["skipped"] == 1
    assert optimizer.state_dict()["state"][0]["step"] == 1


def test_experts_are_a_batch(on_device: Callable[[], None]) -> None:
    def step() -> Tensor:
        torch.manual_seed(2)
        weight = nn.Parameter(torch.randn(3, 10, 12))
        optimizer = Muon([weight], batch_experts=True, ns_dtype="auto")
        weight.grad = torch.randn(3, 10, 12)
        optimizer.step()
        return weight.detach()

    expected = step()
    on_device()
    start = torch.manual_seed(2) and torch.randn(3, 10, 12)
    error = (step() - expected).norm() / (expected - start).norm()
    assert error < half_bound(torch.float16, 10)


@pytest.mark.parametrize("batch", [1, 2**24])
def test_parameters_of_one_and_of_several_matrices_share_a_batch(
    batch: int, on_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one shape: only a parameter whose own gradient is not finite is skipped."""
    on_device()
    monkeypatch.setattr(batches, "DEVICE_ELEMENTS", batch)
    shapes = ((16, 24), (4, 16, 24), (1, 16, 24))
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    optimizer = Muon(params, batch_experts=True)
    for param in params:
        param.grad = torch.randn_like(param)
    params[1].grad[2, 3, 4] = float("nan")
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before)
    counts = [(s["step"], s["skipped"]) for s in optimizer.state_dict()["state"].values()]
    assert counts == [(1, 0), (0, 1), (1, 0)]


def test_a_gradient_beyond_float32_is_not_finite(on_device: Callable[[], None]) -> None:
    on_device()
    weight = nn.Parameter(torch.randn(30, 8, dtype=torch.float64))
    optimizer = Muon([weight], row_splits=[10, 20], state_format="linear8")
    weight.grad = torch.randn(30, 8, dtype=torch.float64)
    weight.grad[0, 0] = 1e300
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state_dict()["state"][0]["skipped"] == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_dtypes(dtype: torch.dtype, on_device: Callable[[], None]) -> None:
    exact, _ = train(state_format="fp32")
    on_device()
    params, _ = train(dtype=dtype, state_format="fp32", ns_dtype="float32")
    assert all(param.dtype == dtype for param in params)
    rounding = 3 * torch.finfo(dtype).eps
    for ours, theirs, start in zip(params, exact, parameters(), strict=True):
        error = (ours.detach().double() - theirs.detach().double()).norm()
        # three roundings of weights (and gradients) of about one; what they do to the update is
        # enlarged as half_bound says
        lifted = half_bound(dtype, 1) * (theirs - start).norm()
        assert error < rounding * start.norm() + lifted + NS_FLOAT32 * (theirs - start).norm()


@pytest.mark.parametrize("splits", [[0, 16], [16, 0], [4, 12]])
def test_seeds_do_not_depend_on_batches(
    splits: list[int], on_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def final(batch: int) -> Tensor:
        torch.manual_seed(3)
        weight = nn.Parameter(torch.randn(16, 8).bfloat16())
        experts = nn.Parameter(torch.randn(3, 4, 8).bfloat16())
        optimizer = Muon(
            [{"params": [weight], "row_splits": splits},
             {"params": [experts], "batch_experts": True}],
            stochastic_rounding=True, ns_dtype="float32",
        )  # fmt: skip
        monkeypatch.setattr(batches, "DEVICE_ELEMENTS", batch)
        for _ in range(3):
            for param in (weight, experts):
                param.grad = torch.ones_like(param) + torch.randn(param.shape).bfloat16()
            optimizer.step()
        assert {s["step"] for s in optimizer.state_dict()["state"].values()} == {3}
        return torch.cat([weight.detach().flatten(), experts.detach().flatten()])

    on_device()
    assert torch.equal(final(1), final(2**24))


def test_every_matrix_rounds_with_bits_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    class Watched(DeviceReference):
        def update_weight(self, weight: Tensor, update: Tensor, **options: Any) -> None:
            seen.append(int(options["seed"]))
            super().update_weight(weight, update, **options)

    step_on(Watched(), monkeypatch)
    train(2, dtype=torch.bfloat16, stochastic_rounding=True)
    assert len(set(seen)) == len(seen) == 2 * len(SHAPES)


@pytest.mark.parametrize("option", [{"adjust_lr_fn": "match_rms_adamw"}, {"eps": 100.0}])
@pytest.mark.parametrize("name", ["fp32", "linear8", "muonq4"])
def test_options_are_those_of_the_host(
    name: str, option: dict[str, Any], on_device: Callable[[], None]
) -> None:
    expected, _ = train(state_format=name, **option)
    on_device()
    params, _ = train(state_format=name, ns_dtype="float32", **option)
    assert relative_change(params, expected) < NS_FLOAT32


@pytest.mark.parametrize("scale", [0.0, 1e-36, 1e-28, 1e-20, 1e13])
@pytest.mark.parametrize("name", ["fp32", "muonq4", "spectral4"])
def test_gradients_of_any_size(name: str, scale: float, on_device: Callable[[], None]) -> None:
    def step(ns_dtype: str) -> Tensor:
        torch.manual_seed(5)
        weight = nn.Parameter(torch.zeros(24, 40))
        optimizer = Muon([weight], state_format=name, ns_dtype=ns_dtype, nesterov=False)
        weight.grad = torch.randn(24, 40) * scale
        optimizer.step()
        return weight.detach()

    expected = step("auto")
    on_device()
    for ns_dtype, bound in (("float32", NS_FLOAT32), ("float16", half_bound(torch.float16, 24))):
        error = (step(ns_dtype) - expected).norm()
        # entries below 2**-24 of an update vanish in float16 (lr is 1e-3)
        assert error <= bound * expected.norm() + 1e-3 * 2.0**-24 * (24 * 40) ** 0.5


@pytest.mark.parametrize("eps", [1e-38, 1e-45])
def test_zero_gradients_with_a_tiny_eps(eps: float, on_device: Callable[[], None]) -> None:
    on_device()
    for ns_dtype in ("float16", "float32"):
        weight = nn.Parameter(torch.ones(4, 6))
        optimizer = Muon([weight], eps=eps, ns_dtype=ns_dtype)
        weight.grad = torch.zeros(4, 6)
        optimizer.step()
        assert weight.isfinite().all()


def test_batches_may_be_of_any_size(
    on_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device()
    together, _ = train(state_format="spectral4")
    monkeypatch.setattr(batches, "DEVICE_ELEMENTS", 1)
    one_by_one, _ = train(state_format="spectral4")
    assert relative_change(one_by_one, together) < 1e-6


def test_saving_resumes_exactly(on_device: Callable[[], None]) -> None:
    on_device()
    options = {"state_format": "spectral4", "stochastic_rounding": True}
    straight, _ = train(4, dtype=torch.bfloat16, **options)
    params, optimizer = train(2, dtype=torch.bfloat16, **options)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert all(type(state["step"]) is int for state in saved["state"].values())
    twin = Muon(params, lr=0.02, **options)
    twin.load_state_dict(saved)
    for step in (2, 3):
        give_gradients(params, step)
        twin.step()
    for ours, theirs in zip(params, straight, strict=True):
        assert torch.equal(ours, theirs)


def test_the_host_continues_what_the_device_began(on_device: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        step_on(DeviceReference(), patch)
        params, optimizer = train(2)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    give_gradients(params, 2)
    optimizer.step()
    assert optimizer.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("device", [True, False])
def test_stochastic_rounding_keeps_small_updates(
    device: bool, on_device: Callable[[], None]
) -> None:
    """An update of a 64th of a bfloat16 step is lost by rounding and kept on average with it."""
    if device:
        on_device()

    def final(stochastic: bool, seed: int = 0) -> Tensor:
        weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
        optimizer = Muon(
            [weight], lr=2**-9, weight_decay=0.0, seed=seed, stochastic_rounding=stochastic
        )
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
        for _ in range(64):  # entries of the update are about 1/8 of lr: 2**-12
            weight.grad = basis.bfloat16()
            optimizer.step()
        return weight.detach().float()

    plain, rounded, again, other = final(False), final(True), final(True), final(True, seed=1)
    assert torch.equal(rounded, again)
    assert not torch.equal(rounded, other)
    reference = nn.Parameter(torch.ones(64, 64))
    optimizer = Muon([reference], lr=2**-9, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    for _ in range(64):
        reference.grad = basis.bfloat16().float()
        optimizer.step()
    moved = reference.detach() - 1
    share = float(((rounded - 1) * moved).sum() / moved.square().sum())
    # 64 steps of variance below (2**-8)^2 / 4 each, over 4096 entries of size about 2**-6: 0.01
    assert abs(share - 1) < 0.05
    assert abs(float(((plain - 1) * moved).sum() / moved.square().sum())) < 0.5


def test_stochastic_rounding_refuses_float16(on_device: Callable[[], None]) -> None:
    weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="stochastic_rounding: expected"):
        Muon([weight], stochastic_rounding=True)


def test_half_products_need_a_device() -> None:
    weight = nn.Parameter(torch.randn(4, 4))
    optimizer = Muon([weight], ns_dtype="float16")
    weight.grad = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"ns_dtype: expected 'auto'.* or .*, got 'float16'"):
        optimizer.step()


def test_custom_formats_and_auxiliary_parameters(on_device: Callable[[], None]) -> None:
    formats = (
        StateFormat("t", bits=3, granularity="tensor", rotate=True),
        StateFormat("t", bits=4, granularity="tensor", statistic="absmax", clip=1.0),
        StateFormat("t", bits=2, factor_rank=3, granularity="block", block_size=8),
        StateFormat("t", bits=4, spectral=True, snap_levels=False, granularity="block",
                    block_size=16, spectral_shift=0.005),
    )  # fmt: skip
    for state_format in formats:
        expected, _ = train(state_format=state_format)
        with pytest.MonkeyPatch.context() as patch:
            step_on(DeviceReference(), patch)
            params, _ = train(state_format=state_format, ns_dtype="float32")
        bound = FLIPPED if state_format.spectral else NS_FLOAT32
        assert relative_change(params, expected) < bound
    on_device()
    matrix, vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
    both = MuonWithAuxAdam(
        [{"params": [matrix], "use_muon": True}, {"params": [vector], "use_muon": False}],
        aux_adam="adamw",
    )
    for param in (matrix, vector):
        param.grad = torch.randn_like(param)
    both.step()
    both.load_state_dict(both.state_dict())
    assert both.state_dict()["state"][0]["step"] == 1


def test_empty_and_missing_gradients(on_device: Callable[[], None]) -> None:
    on_device()
    empty, idle = nn.Parameter(torch.zeros(0, 5)), nn.Parameter(torch.randn(3, 3))
    optimizer = Muon([empty, idle])
    empty.grad = torch.zeros(0, 5)
    optimizer.step()
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"][:1])
