"""QK-clip's rule: heads whose logits are too large are scaled down, and nothing else is."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from attention_model import (
    SIZE,
    WIDTH,
    Model,
    attach,
    exact_logits,
    inputs,
    standing_still,
    step,
)
from torch import Tensor, nn

from lowbit_muon import (
    HeadRows,
    QKProjections,
    attach_qk_clip,
)
from lowbit_muon.optimizers.qk_clip import head_factors


@pytest.mark.parametrize(("key_heads", "bias"), [(4, True), (2, False), (1, True)])
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


@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0])
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
