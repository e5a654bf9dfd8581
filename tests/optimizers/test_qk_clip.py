"""QK-clip: heads whose logits are too large are scaled down, by the rule, and nothing else is."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_model import (
    SIZE,
    WIDTH,
    Attention,
    Model,
    attach,
    exact_logits,
    inputs,
    make_muon,
    standing_still,
    step,
)
from test_device_waits import NoWaiting
from torch import Tensor, nn
from torch.optim import SGD

from lowbit_muon import (
    HeadRows,
    Muon,
    QKProjections,
    attach_gradient_release,
    attach_qk_clip,
)
from lowbit_muon.optimizers import qk_attention, qk_clip
from lowbit_muon.optimizers.qk_attention import largest_logits
from lowbit_muon.optimizers.qk_clip import head_factors
from lowbit_muon.state.rounding import Compensation, restore, split

# The rule


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_after_a_step_no_logit_is_above_the_threshold(key_heads: int, bias: bool) -> None:
    model = Model(layers=1, key_heads=key_heads, bias=bias)
    x = inputs()
    before = exact_logits(model.layers[0], x)
    threshold = float(before.sort().values[1:3].mean())  # two heads above it, two below
    clip = attach(model, optimizer := standing_still(model), threshold)
    step(model, optimizer, x)
    torch.testing.assert_close(clip.max_logits["layers.0"].double(), before, rtol=1e-5, atol=1e-5)
    assert clip.clipped_heads == 2
    after = exact_logits(model.layers[0], x)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 0.25, 0.0, 1.0])
def test_queries_and_keys_share_a_clip_by_alpha(alpha: float) -> None:
    model = Model(layers=1)
    old = copy.deepcopy(model.layers[0]).double()
    x = inputs()
    logits = exact_logits(model.layers[0], x)
    clip = attach(model, optimizer := standing_still(model), 0.5, alpha=alpha)
    step(model, optimizer, x)
    gamma = (0.5 / logits).clamp(max=1.0).repeat_interleave(SIZE)
    assert clip.clipped_heads >= 3
    new = model.layers[0]
    for name, power in ("q_proj", alpha), ("k_proj", 1 - alpha):
        was, now = getattr(old, name), getattr(new, name)
        factors = gamma**power
        torch.testing.assert_close(
            now.weight.double(), was.weight * factors[:, None], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(now.bias.double(), was.bias * factors, rtol=1e-5, atol=0)
    for name in "v_proj", "o_proj":
        assert torch.equal(getattr(new, name).weight.double(), getattr(old, name).weight)


def test_a_key_that_heads_share_stays_as_it_is() -> None:
    model = Model(layers=1, key_heads=2)
    old = copy.deepcopy(model.layers[0])
    x = inputs()
    logits = exact_logits(old, x)
    attach(model, optimizer := standing_still(model), 0.5)
    step(model, optimizer, x)
    new, gamma = model.layers[0], (0.5 / logits).clamp(max=1.0).repeat_interleave(SIZE)
    assert torch.equal(new.k_proj.weight, old.k_proj.weight)
    assert torch.equal(new.k_proj.bias, old.k_proj.bias)
    expected = old.q_proj.weight.double() * gamma[:, None]
    torch.testing.assert_close(new.q_proj.weight.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_heads_below_the_threshold_keep_every_bit(dtype: torch.dtype, key_heads: int) -> None:
    model = Model(layers=1, key_heads=key_heads).to(dtype)
    layer, x = model.layers[0], inputs().to(dtype)
    old = copy.deepcopy(layer)
    logits = exact_logits(layer, x)
    threshold = float(logits.sort().values[1:3].mean())
    attach(model, optimizer := standing_still(model), threshold)
    step(model, optimizer, x)
    changed = (layer.q_proj.weight != old.q_proj.weight).unflatten(0, (4, SIZE)).any(2).any(1)
    assert torch.equal(changed, logits > threshold)
    if key_heads == 4:
        changed = (layer.k_proj.weight != old.k_proj.weight).unflatten(0, (4, SIZE)).any(2).any(1)
        assert torch.equal(changed, logits > threshold)


@pytest.mark.parametrize("rotary", [2, 0])
def test_latent_attention_takes_the_rotary_part_from_queries_alone(rotary: int) -> None:
    heads, plain, value = 3, 4, 5
    layer = nn.Module()
    layer.q_b_proj = nn.Linear(WIDTH, heads * (plain + rotary), bias=False)
    layer.kv_b_proj = nn.Linear(WIDTH, heads * (plain + value), bias=False)
    layer.rope_key = nn.Linear(WIDTH, max(rotary, 1), bias=False)
    old = copy.deepcopy(layer).double()
    x = inputs()

    def queries_and_keys(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        query = layer.q_b_proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = layer.kv_b_proj(x).unflatten(-1, (heads, -1))[..., :plain].transpose(1, 2)
        shared = layer.rope_key(x)[:, None, :, :rotary].expand(-1, heads, -1, -1)
        return query, torch.cat([key, shared], -1)

    def find(name: str, module: nn.Module) -> QKProjections | None:
        if module is not layer:
            return None
        stride = plain + rotary
        part = HeadRows(layer.q_b_proj, heads, rotary, plain, stride) if rotary else None
        return QKProjections(
            HeadRows(layer.q_b_proj, heads, plain, 0, stride),
            HeadRows(layer.kv_b_proj, heads, plain, 0, plain + value),
            part,
        )

    with torch.no_grad():
        query, key = queries_and_keys(old, x.double())
    before = (query @ key.mT).amax((0, 2, 3)) / math.sqrt(plain + rotary)
    threshold = float(before.sort().values[:2].mean())
    clip = attach_qk_clip(layer, optimizer := standing_still(layer), threshold, find=find)
    clip.record(layer, *queries_and_keys(layer, x))
    optimizer.step()
    assert clip.clipped_heads == 2
    with torch.no_grad():
        query, key = queries_and_keys(copy.deepcopy(layer).double(), x.double())
    after = (query @ key.mT).amax((0, 2, 3)) / math.sqrt(plain + rotary)
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=1e-5)
    gamma = (threshold / before).clamp(max=1.0)[:, None, None]
    root = gamma.sqrt().expand(-1, plain, 1)
    scale = torch.cat([root, gamma.expand(-1, rotary, 1)], 1)
    was, now = (m.q_b_proj.weight.double().unflatten(0, (heads, -1)) for m in (old, layer))
    torch.testing.assert_close(now, was * scale, rtol=1e-5, atol=0)
    scale = torch.cat([root, torch.ones(heads, value, 1)], 1)
    was, now = (m.kv_b_proj.weight.double().unflatten(0, (heads, -1)) for m in (old, layer))
    torch.testing.assert_close(now, was * scale, rtol=1e-5, atol=0)
    assert torch.equal(layer.rope_key.weight.double(), old.rope_key.weight)


def test_values_that_a_fused_projection_holds_stay_as_they_are() -> None:
    layer = nn.Module()
    layer.qkv = nn.Linear(WIDTH, 3 * 2 * SIZE)
    old = copy.deepcopy(layer.qkv)

    def find(name: str, module: nn.Module) -> QKProjections | None:
        if module is not layer:
            return None
        return QKProjections(
            HeadRows(layer.qkv, 2, SIZE, 0, 3 * SIZE), HeadRows(layer.qkv, 2, SIZE, SIZE, 3 * SIZE)
        )

    clip = attach_qk_clip(layer, optimizer := standing_still(layer), 1.0, find=find)
    ones = torch.ones(1, 2, 1, SIZE)
    clip.record(layer, ones * torch.tensor([2.0, 0.5])[:, None, None], ones)  # logits 4 and 1
    optimizer.step()
    now, was = (m.weight.unflatten(0, (2, 3, SIZE)) for m in (layer.qkv, old))
    torch.testing.assert_close(now[0, :2], was[0, :2] / 2)
    assert torch.equal(now[1], was[1])
    assert torch.equal(now[:, 2], was[:, 2])
    torch.testing.assert_close(layer.qkv.bias[: 2 * SIZE], old.bias[: 2 * SIZE] / 2)
    assert torch.equal(layer.qkv.bias[2 * SIZE :], old.bias[2 * SIZE :])


@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_the_rule_is_that_of_pytorch_optimizer(alpha: float) -> None:
    """Its MuonClip is told the logits and the roles, a group each; without GQA."""
    peer = pytest.importorskip("pytorch_optimizer")
    layer = nn.Module()
    roles = {"query": 4, "key": 4, "query_rotary": 2}
    for role, size in roles.items():
        setattr(layer, role, nn.Linear(WIDTH, 3 * size, bias=False))
    old = copy.deepcopy(layer)

    def find(name: str, module: nn.Module) -> QKProjections | None:
        parts = (HeadRows(getattr(layer, role), 3, size) for role, size in roles.items())
        return QKProjections(*parts) if module is layer else None

    clip = attach_qk_clip(layer, optimizer := standing_still(layer), 2.0, alpha=alpha, find=find)
    logits = torch.tensor([1.0, 3.0, 700.0])
    clip.record(layer, logits[None, :, None, None], torch.ones(1, 3, 1, 1))
    optimizer.step()
    groups = [
        {"params": [getattr(old, role).weight], "qk_clip": role, "attention_name": "a"}
        for role in roles
    ]
    groups = [{**group, "use_muon": True} for group in groups]
    other = peer.MuonClip(groups, lr=1e-9, qk_clip_threshold=2.0, qk_clip_alpha=alpha)
    other.step(attention_max_logits={"a": logits})
    for mine, theirs in zip(layer.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)


def test_the_factor_is_one_for_logits_that_say_nothing() -> None:
    largest = torch.tensor([-math.inf, -500.0, 0.0, 100.0, math.inf, math.nan, 400.0])
    assert head_factors(largest, 100.0).tolist() == [1, 1, 1, 1, 1, 1, 0.25]


# What is recorded


def dense_logits(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """The largest logits by all of them at once, in float64."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
    return logits.masked_fill(~seen, -math.inf).amax((0, 2, 3)).float()


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("keys", [6, 9])
def test_logits_that_are_not_seen_do_not_count(
    keys: int, key_heads: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qk_attention, "_BLOCK_LOGITS", block)
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, key_heads, keys, 8)
    query[:, :, 0] *= 100  # what is hidden is large
    key[:, :, -1] *= 100
    places = torch.arange(6)[:, None] + keys - 6
    causal = torch.arange(keys) <= places
    window = torch.arange(keys) > places - 3
    everything = torch.ones(6, keys, dtype=torch.bool)

    def check(seen: Tensor, **options: Any) -> None:
        found = largest_logits(query, key, **options)
        torch.testing.assert_close(found, dense_logits(query, key, seen))

    check(everything)
    check(causal, causal=True)
    check(causal & window, causal=True, window=3)
    check(causal, mask=causal[None, None])
    check(causal, mask=torch.zeros(6, keys).masked_fill(~causal, -1e9)[None, None])
    least = torch.finfo(torch.float32).min
    check(causal, mask=torch.zeros(6, keys).masked_fill(~causal, least)[None, None])
    heads = torch.rand(1, 4, 6, keys) < 0.7
    heads[..., 0] = heads[..., 0, :] = True  # all are seen, and so no padding
    check(heads, mask=heads)
    check(causal, causal=True, mask=torch.randn(1, 4, 6, keys))  # a bias hides nothing


def test_padding_counts_neither_as_key_nor_as_query() -> None:
    query, key = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    real = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    query[0, :, 3:] *= 100
    key[0, :, 3:] *= 100
    both = real[:, None, :, None] & real[:, None, None, :]
    causal = torch.ones(5, 5).tril().bool()
    expected = dense_logits(query, key, both & causal)
    torch.testing.assert_close(largest_logits(query, key, mask=real, causal=True), expected)
    mask = real[:, None, None, :] & causal  # as transformers makes it: padding sees what is before
    torch.testing.assert_close(largest_logits(query, key, mask=mask), expected)
    torch.testing.assert_close(
        largest_logits(query, key, mask=real), dense_logits(query, key, both)
    )


def test_a_block_of_logits_is_all_that_exists_at_a_time() -> None:
    query, key = torch.randn(1, 4, 4096, 8), torch.randn(1, 4, 4096, 8)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    with Watch():
        found = largest_logits(query, key, causal=True)
    assert largest <= 2**24 < 4 * 4096 * 4096
    seen = torch.ones(4096, 4096).tril().bool()
    torch.testing.assert_close(found, dense_logits(query, key, seen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_near_the_exact_ones(dtype: torch.dtype) -> None:
    query, key = torch.randn(2, 4, 6, 8).to(dtype) * 100, torch.randn(2, 4, 6, 8).to(dtype) * 100
    exact = dense_logits(query, key, torch.ones(6, 6).bool())
    # float16 in float32; the largest of bfloat16's products is rounded once, by at most 2^-8.
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which makes no difference
        found = largest_logits(query, key)
    torch.testing.assert_close(found, exact, rtol=rtol, atol=0)
    assert found.isfinite().all()


def test_nothing_to_see_is_no_logit() -> None:
    query, key = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 8)
    nothing = torch.full((3,), -math.inf)
    assert torch.equal(largest_logits(query[:0], key[:0]), nothing)
    assert torch.equal(largest_logits(query[:, :, :0], key), nothing)
    assert torch.equal(largest_logits(query, key, mask=torch.zeros(2, 5).bool()), nothing)


def test_the_maximum_is_over_all_batches_of_a_step_and_then_starts_anew() -> None:
    model = Model(layers=1)
    clip = attach(model, optimizer := standing_still(model), 1e6)
    first, second = inputs(1), inputs(2)
    layer = model.layers[0]
    step(model, optimizer, first, second)
    expected = torch.maximum(exact_logits(layer, first), exact_logits(layer, second)).float()
    torch.testing.assert_close(clip.max_logits["layers.0"], expected)
    step(model, optimizer, second)
    torch.testing.assert_close(clip.max_logits["layers.0"], exact_logits(layer, second).float())
    assert clip.clipped_heads == 0


def test_evaluation_is_not_recorded() -> None:
    model = Model()
    clip = attach(model, optimizer := standing_still(model), 1e-3)
    old = copy.deepcopy(model.state_dict())
    assert clip.max_logits == {}
    model.eval()
    model(inputs())
    model.train()
    with torch.no_grad():
        model(inputs())
    optimizer.step()
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert clip.max_logits["layers.1"].tolist() == [-math.inf] * 4
    step(model, optimizer, inputs())
    assert clip.clipped_heads > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_makes_no_difference(reentrant: bool) -> None:
    plain, model = Model(), Model()
    clips = []
    for one in plain, model:
        clips.append(attach(one, optimizer := standing_still(one), 0.5))
        x = inputs().requires_grad_()
        for layer in one.layers:
            if one is model:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
            else:
                x = layer(x)
        x.square().mean().backward()
        optimizer.step()
    for name in clips[0].layers:
        assert torch.equal(clips[0].max_logits[name], clips[1].max_logits[name])


def test_layers_that_report_nothing_are_told_of() -> None:
    model = Model()
    clip = attach(model, optimizer := standing_still(model))
    model.layers[1].clip = None
    step(model, optimizer, inputs())  # could have been a step that only makes states
    with pytest.warns(UserWarning, match=r"layers\.1 \(1 of 2 layers\) has reported no logits"):
        step(model, optimizer, inputs())
    step(model, optimizer, inputs())
    assert clip.layers == ["layers.0", "layers.1"]


# Optimizers


def test_muon_trains_with_logits_that_stay_below_the_threshold() -> None:
    model = Model()
    optimizer = make_muon(model)
    clip = attach(model, optimizer, 2.0)
    clipped = 0
    for seed in range(5):
        step(model, optimizer, inputs(seed))
        clipped += clip.clipped_heads
    assert clipped
    assert all(param.isfinite().all() for param in model.parameters())


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


# The attached clip


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
def test_copies_of_the_optimizer_do_not_clip(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = Model()
    optimizer = make(model)
    attach(model, optimizer, 0.5)
    step(model, optimizer, inputs())
    for copied in copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)):
        assert not copied._optimizer_step_post_hooks
        copied.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    step(model, optimizer, inputs())


def test_the_clip_survives_a_loaded_state_and_a_new_group() -> None:
    model = Model()
    optimizer = make_muon(model)
    clip = attach(model, optimizer, 0.5)
    step(model, optimizer, inputs())
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, inputs(1))
    assert clip.clipped_heads


def test_a_compiled_model_clips_as_it_would_uncompiled() -> None:
    torch._dynamo.reset()
    plain, model = Model(), Model()
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


# Bad input


def rows(model: Model, **options: Any) -> Callable[[str, nn.Module], Any]:
    """A `find` that changes the query's rows."""

    def find(name: str, module: nn.Module) -> Any:
        if not isinstance(module, Attention):
            return None
        given = {"projection": module.q_proj, "heads": 4, "size": SIZE, **options}
        return QKProjections(HeadRows(**given), HeadRows(module.k_proj, 4, SIZE))

    return find


BAD_ARGUMENTS = [
    ({"threshold": 0}, ValueError, r"threshold: expected a number > 0, got 0"),
    ({"threshold": math.inf}, ValueError, r"threshold: expected a number > 0, got inf"),
    ({"threshold": "100"}, ValueError, r"threshold: expected a number > 0, got '100'"),
    ({"alpha": 1.5}, ValueError, r"alpha: expected a number in \[0, 1\], got 1\.5"),
    ({"process_group": "all"}, TypeError, r"process_group: expected one of torch.distributed"),
    ({"find": lambda *_: None}, ValueError, r"got none in Model; say where they are with find="),
    ({"find": lambda name, _: 3}, TypeError, r"Model: expected QKProjections or None from find"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    optimizer = standing_still(model)
    with pytest.raises(error, match=message):
        attach_qk_clip(model, optimizer, **options)
    assert not optimizer._optimizer_step_post_hooks
    assert not any(qk_attention.recorder_of(layer) for layer in model.layers)


BAD_ROWS = [
    ({"heads": 5}, ValueError, r"layers\.0: query: expected heads within the 16 outputs .* 5 of 4"),
    ({"start": 1}, ValueError, r"layers\.0: query: expected heads within the 16 outputs"),
    ({"size": 0}, ValueError, r"layers\.0: query: expected heads within"),
    ({"stride": 3}, ValueError, r"layers\.0: query: expected heads within .* 3 apart"),
    (
        {"heads": 3},
        ValueError,
        r"layers\.0: expected a number of key heads that div.* 3 query",
    ),
    ({"projection": nn.Identity()}, TypeError, r"layers\.0: query: .*got torch.nn.*Identity"),
    ({"projection": 3}, TypeError, r"layers\.0: query: expected a projection .*got builtins\.int"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_ROWS)
def test_heads_that_do_not_fit_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    with pytest.raises(error, match=message):
        attach_qk_clip(model, standing_still(model), find=rows(model, **options))


def test_projections_that_cannot_be_scaled_are_named() -> None:
    model = Model()
    optimizer = standing_still(model)
    with pytest.raises(TypeError, match="optimizer: expected a torch Optimizer, got Model"):
        attach_qk_clip(model, model)  # type: ignore[arg-type]
    model.layers[1].k_proj.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"^layers\.1\.k_proj\.weight: expected .* got a frozen"):
        attach_qk_clip(model, optimizer)
    model.layers[1].k_proj.weight.requires_grad_(True)
    few = SGD([p for n, p in model.named_parameters() if n != "layers.1.q_proj.weight"], lr=0.1)
    with pytest.raises(ValueError, match=r"^layers\.1\.q_proj\.weight: .*of the optimizer"):
        attach_qk_clip(model, few)
    matrices = [param for param in model.parameters() if param.ndim == 2]
    attach_qk_clip(model, SGD(matrices, lr=0.1)).detach()  # biases are another optimizer's
    model.layers[1].q_proj = nn.utils.parametrizations.weight_norm(model.layers[1].q_proj)
    with pytest.raises(TypeError, match=r"layers\.1: query: .*a weight of its own.*got none"):
        attach_qk_clip(model, optimizer)
    model = Model()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    with pytest.raises(ValueError, match=r"^layers\.1\.q_proj\.weight: .*layers\.0\.q_proj"):
        attach_qk_clip(model, standing_still(model))


def test_gains_that_would_undo_a_clip_are_refused() -> None:
    model = Model()
    matrices = [param for param in model.parameters() if param.ndim == 2]
    with pytest.raises(ValueError, match=r"q_proj\.weight: .*'muown', whose gains would bring"):
        attach_qk_clip(model, Muon(matrices, rule="muown"))
    attach_qk_clip(model, Muon(matrices, rule="md_decoupling")).detach()


def test_normalised_queries_are_refused_by_name() -> None:
    model = Model()
    model.layers[1].q_norm = nn.RMSNorm(SIZE)
    with pytest.raises(ValueError, match=r"layers\.1: .* got Attention with q_norm, behind"):
        attach_qk_clip(model, standing_still(model))


def test_what_is_recorded_has_to_fit() -> None:
    model = Model(key_heads=2)
    clip = attach(model, standing_still(model))
    query, key = torch.randn(2, 4, 5, SIZE), torch.randn(2, 2, 5, SIZE)
    clip.record("layers.1", query, key)
    clip.record("layers.1", query, key.repeat_interleave(2, 1))

    def check(
        message: str, *args: Any, error: type[Exception] = ValueError, **options: Any
    ) -> None:
        with pytest.raises(error, match=message):
            clip.record(*args, **options)

    check(r"layer: expected one of \['layers.0', 'layers.1'\]", "layers.2", query, key)
    check("layer: .* got a Linear", model.layers[0].q_proj, query, key)
    check(r"layers\.1: expected queries \[batch, 4, .*got \(2, 2, 5, 4\)", "layers.1", key, key)
    check(r"layers\.1: expected queries", "layers.1", query[0], key[0])
    check(r"layers\.1: expected queries", "layers.1", query, key[:1])
    check(r"layers\.1: .*as many keys", "layers.1", query, key[:, :, :3], causal=True)
    check(r"layers\.1: expected a scale > 0, got -1", "layers.1", query, key, scale=-1)
    check(r"layers\.1: .*mask.*got list", "layers.1", query, key, mask=[1], error=TypeError)
    check(r"layers\.1: expected a mask that fits", "layers.1", query, key, mask=torch.ones(2, 4))
    check(r"layers\.1: expected a mask that fits", "layers.1", query, key, mask=torch.ones(5))
