"""QK-clip behind the steps of optimizers, attached, copied, compiled and detached."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from attention_model import (
    SIZE,
    Model,
    attach,
    exact_logits,
    inputs,
    make_muon,
    standing_still,
    step,
)
from test_device_waits import NoWaiting

from lowbit_muon import (
    attach_gradient_release,
    attach_qk_clip,
)
from lowbit_muon.optimizers import qk_attention, qk_clip
from lowbit_muon.optimizers.qk_clip import head_factors
from lowbit_muon.state.rounding import Compensation, restore, split


def test_a_clip_follows_the_step_and_leaves_the_momentum() -> None:
    """The same as a step without it, and then the rule, in float64, on what it left."""
    plain, model = Model(layers=1), Model(layers=1)
    first, second = make_muon(plain), make_muon(model)
    attach(model, second, 0.5)
    logits = exact_logits(model.layers[0], inputs())
    for one, optimizer in (plain, first), (model, second):
        step(one, optimizer, inputs())
    gamma = (0.5 / logits).clamp(max=1.0).sqrt().repeat_interleave(SIZE)[:, None]
    for name in "q_proj", "k_proj":
        was, now = (getattr(one.layers[0], name).weight for one in (plain, model))
        torch.testing.assert_close(now.double(), was.double() * gamma, rtol=1e-5, atol=0)
        states = first.state[was], second.state[now]
        for key, value in states[0].items():
            assert value is states[1][key] or torch.equal(
                torch.as_tensor(value), torch.as_tensor(states[1][key])
            ), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_rounding_left_over_is_scaled_too(dtype: torch.dtype) -> None:
    model = Model(layers=1, key_heads=2).to(dtype)
    optimizer = make_muon(model, compensation=True)
    x = inputs().to(dtype)
    weight = model.layers[0].q_proj.weight
    step(model, optimizer, x)
    threshold = float(exact_logits(model.layers[0], x).sort().values[1:3].mean())
    seen = {}
    # Before the clip, since hooks are called in their order.
    optimizer.register_step_post_hook(
        lambda *_: seen.update(value=restore(weight.detach(), optimizer.state[weight]["remainder"]))
    )
    clip = attach(model, optimizer, threshold)
    step(model, optimizer, x)
    gamma = head_factors(clip.max_logits["layers.0"], threshold).repeat_interleave(SIZE)
    assert 0 < clip.clipped_heads < 4
    exact = seen["value"].double() * gamma.double()[:, None]
    found = restore(weight.detach(), optimizer.state[weight]["remainder"])
    # Half of a 256th of the weights' spacing, which is at most 2^-7 (2^-10) of them; and float32.
    half_part = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-19
    assert ((found - exact).abs() <= half_part * 1.02 * exact.abs() + 2.0**-33).all()
    untouched = gamma == 1
    assert torch.equal(found[untouched], seen["value"][untouched])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compensated_weights_do_not_drift(dtype: torch.dtype) -> None:
    """A factor of one changes no bit, whatever the weight, next to powers of two as well."""
    near = torch.linspace(-3, 3, 4001)
    near = torch.cat([near, 1 + near * 2.0**-8, -2 + near * 2.0**-8, near * 2.0**-20, near * 0])
    values = near.reshape(5, -1)
    weight, remainder = torch.empty_like(values, dtype=dtype), torch.empty_like(values).char()
    split(values, weight, remainder)
    before = weight.clone(), remainder.clone()
    Compensation(remainder).scale(weight, torch.ones(5, 1))
    assert torch.equal(weight, before[0])
    assert torch.equal(remainder, before[1])
    # Fifty clips by 0.98 lose no more than fifty roundings to a 256th of the spacing; weights that
    # are rounded themselves lose more.
    rows = slice(0, 1)
    start = restore(weight[rows], remainder[rows]).double()
    plain = weight[rows].clone()
    for _ in range(50):
        Compensation(remainder[rows]).scale(weight[rows], torch.tensor([[0.98]]))
        plain.mul_(torch.tensor([[0.98]]))
    exact = start * float(torch.tensor(0.98)) ** 50
    error = (restore(weight[rows], remainder[rows]).double() - exact).abs().mean()
    assert error < (plain.double() - exact).abs().mean() / 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_waits_for_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qk_clip, "_on_host", lambda tensor: False)
    model = Model(layers=1, key_heads=2).to(dtype)
    optimizer = make_muon(model, compensation=True)
    clip = attach(model, optimizer, 0.5)
    step(model, optimizer, inputs().to(dtype))
    layer = model.layers[0]
    query, key = layer.queries_and_keys(inputs().to(dtype))
    with NoWaiting():
        clip.record(layer, query * 100, key, causal=True)
        clip._after_step()
    assert clip.clipped_heads


def test_gradient_release_and_closures_clip_too() -> None:
    plain, released = Model(), Model()
    for model in plain, released:
        optimizer = make_muon(model)
        if model is released:
            attach_gradient_release(model, optimizer)
        clip = attach(model, optimizer, 0.5)
        for seed in range(2):
            step(model, optimizer, inputs(seed))
        assert clip.clipped_heads
    for a, b in zip(plain.parameters(), released.parameters(), strict=True):
        assert torch.equal(a, b)

    model = Model()
    optimizer = make_muon(model)
    clip = attach(model, optimizer, 0.5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = model(inputs()).square().mean()
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    assert clip.clipped_heads


def test_a_step_whose_gradients_are_skipped_is_clipped_by_finite_logits_alone() -> None:
    model = Model(layers=1)
    clip = attach(model, optimizer := standing_still(model), 0.5)
    layer, old = model.layers[0], copy.deepcopy(model.state_dict())
    query, key = layer.queries_and_keys(inputs())
    query = query.detach().clone()
    query[:, 0] = math.inf
    query[:, 1] = math.nan
    query[:, 2] = 0
    clip.record("layers.0", query, key, causal=True)
    optimizer.step()
    for name, value in model.state_dict().items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            assert torch.equal(value[: 3 * SIZE], old[name][: 3 * SIZE])
            assert not torch.equal(value[3 * SIZE :], old[name][3 * SIZE :])


def test_autocast_and_inference_mode_around_a_step_make_no_difference() -> None:
    plain, other = Model(), Model()
    for model in plain, other:
        attach(model, optimizer := standing_still(model), 0.5)
        model(inputs()).square().mean().backward()
        if model is other:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                optimizer.step()
        else:
            optimizer.step()
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_detached_clips_leave_no_trace() -> None:
    model = Model()
    optimizer = standing_still(model)
    hooks = len(optimizer._optimizer_step_post_hooks)
    clip = attach(model, optimizer, 1e-3)
    with pytest.raises(ValueError, match=r"layers\.0: expected a layer without QK-clip"):
        attach_qk_clip(model, optimizer)
    clip.detach()
    clip.detach()
    assert len(optimizer._optimizer_step_post_hooks) == hooks
    assert not any(qk_attention.recorder_of(layer) for layer in model.layers)
    old = copy.deepcopy(model.state_dict())
    step(model, optimizer, inputs())
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    attach(model, optimizer, 1e-3)
    step(model, optimizer, inputs())
    assert not torch.equal(model.layers[0].q_proj.weight, old["layers.0.q_proj.weight"])


def test_dropped_models_are_not_kept_alive() -> None:
    model = Model()
    attach_qk_clip(model, optimizer := standing_still(model))
    gone = weakref.ref(model.layers[0])
    del model, optimizer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("make", [standing_still, make_muon])
def test_copies_of_the_optimizer_do_not_clip_and_what_loads_a_state_does(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    model = Model()
    optimizer = make(model)
    clip = attach(model, optimizer, 0.5)
    step(model, optimizer, inputs())
    for copied in copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)):
        assert not copied._optimizer_step_post_hooks
        copied.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, inputs(1))
    assert clip.clipped_heads


def test_a_compiled_model_clips_as_it_would_uncompiled() -> None:
    torch._dynamo.reset()
    plain, model = Model(layers=1), Model(layers=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about graph breaks
        for one in plain, model:
            optimizer = standing_still(one)
            attach(one, optimizer, 0.5)
            forward = torch.compile(one, backend="aot_eager") if one is model else one
            for seed in range(2):
                step(forward, optimizer, inputs(seed))
            assert one.layers[0].clip is not None
            assert one.layers[0].clip.clipped_heads
    torch._dynamo.reset()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_names_are_without_wrappers() -> None:
    model = Model()
    compiled = torch.compile(model, backend="eager")
    assert attach_qk_clip(compiled, standing_still(model)).layers == ["layers.0", "layers.1"]
