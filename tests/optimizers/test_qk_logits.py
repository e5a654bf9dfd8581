"""The largest logits that QK-clip records."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from attention_model import (
    Model,
    attach,
    exact_logits,
    inputs,
    standing_still,
    step,
)
from torch import Tensor

from lowbit_muon.optimizers import qk_attention
from lowbit_muon.optimizers.qk_attention import largest_logits


def dense_logits(query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
    """The largest logits by all of them at once, in float64."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
    return logits.masked_fill(~seen, -math.inf).amax((0, 2, 3)).float()


@pytest.mark.parametrize("block", [1, 40, 10**6])
@pytest.mark.parametrize(("keys", "key_heads"), [(6, 4), (9, 2), (9, 1)])
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
    query, key = torch.randn(1, 2, 2048, 8), torch.randn(1, 2, 2048, 8)
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
    assert largest <= 2**24 < 4 * 2 * 2048 * 2048
    seen = torch.ones(2048, 2048).tril().bool()
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
