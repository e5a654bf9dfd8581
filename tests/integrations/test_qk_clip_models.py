"""QK-clip on transformers' models: what they report by themselves, and what the rule does."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim import SGD
from transformers.modeling_utils import AttentionInterface

from lowbit_muon import MuonWithAuxAdam, attach_qk_clip, find_projections, muon_param_groups
from lowbit_muon.optimizers import qk_attention
from lowbit_muon.optimizers.qk_attention import largest_logits

VOCABULARY, LENGTH, PADDED = 64, 10, 3
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
LATENT: dict[str, Any] = {
    **SIZES, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2,
}  # fmt: skip
BERT = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "llama, grouped": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**GROUPED),
    "mistral, window": lambda: transformers.MistralConfig(**GROUPED, sliding_window=4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32
    ),
    "gpt2, by layer": lambda: transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=32,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**BERT),
    "phi3": lambda: transformers.Phi3Config(**GROUPED, pad_token_id=0),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=32, word_embed_proj_dim=32,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(**LATENT),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(**LATENT),
    "deepseek_v3, one query projection": lambda: transformers.DeepseekV3Config(
        **{**LATENT, "q_lora_rank": None}
    ),
}  # fmt: skip
PROJECTIONS = ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", "c_attn", "qkv_proj", "query_key")


@pytest.fixture(autouse=True)
def detached(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers' own method is back after every test, and none sees the clips of others."""
    monkeypatch.setattr(qk_attention, "_recorders", weakref.WeakKeyDictionary())
    monkeypatch.setattr(qk_attention, "_replaced", {})
    before = AttentionInterface.get_interface
    yield
    assert AttentionInterface.get_interface is before


def make_model(name: str, implementation: str = "sdpa", **options: Any) -> Any:
    """A small model in training mode, whose dropouts are off and whose logits differ by head."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in vars(config).items():
        if ("drop" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, 0.0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation, **options
    )
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.2)  # biases too, and logits of some size
    return model.train()


def batch(padded: int = PADDED) -> dict[str, Tensor]:
    """Two sequences, one of them padded at its end."""
    tokens = torch.randint(1, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[0, LENGTH - padded :] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def standing_still(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.0)


def seen_logits(model: Any, window: int | None = None, padded: int = PADDED) -> list[Tensor]:
    """The largest logits of each layer and head in float64, from what attention is called with.

    By an attention function of transformers' own registry, which makes all logits at once.
    """
    found = []

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any
    ) -> Any:
        scaling = kw.get("scaling")
        groups = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        logits = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        places = torch.arange(LENGTH)
        hidden = places > places[:, None]
        if window is not None:
            hidden = hidden | (places <= places[:, None] - window)
        logits = logits.masked_fill(hidden, -math.inf)
        output = logits.masked_fill(padding[:, None, None, :], -math.inf).softmax(-1) @ value
        real = logits.masked_fill(
            (padding[:, None, None, :] | padding[:, None, :, None]), -math.inf
        )
        found.append(real.amax((0, 2, 3)))
        return output.transpose(1, 2), None

    inputs = batch(padded)
    padding = inputs["attention_mask"] == 0
    model = copy.deepcopy(model).double().eval()
    AttentionInterface.register("exact", attention)
    try:
        model.set_attn_implementation("exact")
        with torch.no_grad():
            model(**inputs)
    finally:
        del AttentionInterface._global_mapping["exact"]
    return found


def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    model(**inputs, labels=labels).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def projected_weights(model: nn.Module) -> list[Tensor]:
    return [
        param
        for name, param in model.named_parameters()
        if any(
            part in name
            for part in ("q_proj", "k_proj", "q_b_proj", "kv_b", "c_attn", "qkv", "query_key")
        )
    ]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_of_common_models_end_at_the_threshold(name: str, implementation: str) -> None:
    window = 4 if "window" in name else None
    model = make_model(name, implementation)
    layers = [module for name, module in model.named_modules() if find_projections(name, module)]
    for number, attention in enumerate(layers):  # one at a time: the first one's changes the second
        before = seen_logits(model, window)[number]
        threshold = float(before.sort().values[1:3].mean())
        optimizer = standing_still(model)
        clip = attach_qk_clip(model, optimizer, threshold, find=only(attention))
        step(model, optimizer)
        (seen,) = clip.max_logits.values()
        torch.testing.assert_close(seen.double(), before, rtol=1e-4, atol=1e-4)
        assert clip.clipped_heads == 2
        clip.detach()
        after = seen_logits(model, window)[number]
        torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama, grouped", "gpt2", "mistral, window", "deepseek_v3"])
def test_causal_logits_without_padding(name: str, implementation: str) -> None:
    """SDPA gets no mask then, but a flag."""
    model = make_model(name, implementation)
    expected = seen_logits(model, 4 if "window" in name else None, padded=0)
    clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
    model(**batch(padded=0)).logits.sum().backward()
    optimizer.step()
    for seen, exact in zip(clip.max_logits.values(), expected, strict=True):
        torch.testing.assert_close(seen.double(), exact, rtol=1e-4, atol=1e-4)
    clip.detach()


def test_the_optimizer_that_accelerate_wraps_is_asked_for() -> None:
    optimizers = pytest.importorskip("accelerate.optimizer")
    model = make_model("llama")
    inner = standing_still(model)
    wrapped = optimizers.AcceleratedOptimizer.__new__(optimizers.AcceleratedOptimizer)
    wrapped.optimizer = inner
    with pytest.raises(TypeError, match=r"got AcceleratedOptimizer.* has it as \.optimizer"):
        attach_qk_clip(model, wrapped)


def only(attention: nn.Module) -> Callable[[str, nn.Module], Any]:
    """A `find` that leaves all other layers out."""
    return lambda name, module: find_projections(name, module) if module is attention else None


@pytest.mark.parametrize("name", CONFIGS)
def test_models_compute_what_they_did_and_unclipped_ones_keep_every_bit(name: str) -> None:
    model = make_model(name)
    plain = copy.deepcopy(model)
    implementation = model.config._attn_implementation
    clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
    assert len(clip.layers) == 2
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(**batch()).logits, plain(**batch()).logits)
    step(model, optimizer)
    for layer in clip.layers:
        assert clip.max_logits[layer].isfinite().all()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
    clip.detach()


def test_only_queries_and_keys_are_scaled() -> None:
    for name in CONFIGS:
        model = make_model(name)
        plain = copy.deepcopy(model)
        clip = attach_qk_clip(model, optimizer := standing_still(model), 0.05)
        step(model, optimizer)
        assert clip.clipped_heads > 4, name
        clip.detach()
        projected = set(projected_weights(model))
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            assert one in projected or torch.equal(one, other), name


def test_gpt2_keeps_the_columns_of_its_values() -> None:
    model = make_model("gpt2")
    old = copy.deepcopy(model.transformer.h[0].attn.c_attn)
    clip = attach_qk_clip(model, optimizer := standing_still(model), 0.05)
    step(model, optimizer)
    new = model.transformer.h[0].attn.c_attn
    gamma = (0.05 / clip.max_logits["transformer.h.0.attn"]).clamp(max=1).sqrt()
    clip.detach()
    factors = torch.cat([gamma.repeat_interleave(8)] * 2 + [torch.ones(32)])
    torch.testing.assert_close(new.weight, old.weight * factors, rtol=1e-5, atol=0)
    torch.testing.assert_close(new.bias, old.bias * factors, rtol=1e-5, atol=0)
    assert torch.equal(new.weight[:, 64:], old.weight[:, 64:])


def test_the_rotary_key_of_latent_attention_stays() -> None:
    model = make_model("deepseek_v3")
    old = copy.deepcopy(model.model.layers[0].self_attn)
    clip = attach_qk_clip(model, optimizer := standing_still(model), 0.05)
    step(model, optimizer)
    new = model.model.layers[0].self_attn
    gamma = (0.05 / clip.max_logits["model.layers.0.self_attn"]).clamp(max=1)[:, None, None]
    clip.detach()
    assert torch.equal(new.kv_a_proj_with_mqa.weight, old.kv_a_proj_with_mqa.weight)
    was, now = (one.q_b_proj.weight.unflatten(0, (4, 12)) for one in (old, new))
    torch.testing.assert_close(now[:, :8], was[:, :8] * gamma.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(now[:, 8:], was[:, 8:] * gamma, rtol=1e-5, atol=0)
    was, now = (one.kv_b_proj.weight.unflatten(0, (4, 16)) for one in (old, new))
    torch.testing.assert_close(now[:, :8], was[:, :8] * gamma.sqrt(), rtol=1e-5, atol=0)
    assert torch.equal(now[:, 8:], was[:, 8:])


@pytest.mark.parametrize("config", ["Qwen3Config", "Olmo2Config", "Gemma3TextConfig"])
def test_models_that_normalise_queries_are_refused(config: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, config)(**GROUPED, head_dim=8, pad_token_id=0)
    )
    message = r"^model\.layers\.0\.self_attn: expected .* got \w+ with q_norm and k_norm, behind"
    with pytest.raises(ValueError, match=message):
        attach_qk_clip(model, standing_still(model))


def test_encoders_see_both_ways() -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **BERT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    model = transformers.BertModel(config).train()
    clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
    queries = []
    layer = model.encoder.layer[0].attention.self
    layer.query.register_forward_hook(lambda *args: queries.append(args[2]))
    layer.key.register_forward_hook(lambda *args: queries.append(args[2]))
    inputs = batch()
    model(**inputs)
    optimizer.step()
    query, key = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in queries)
    expected = largest_logits(query, key, mask=inputs["attention_mask"] != 0)
    torch.testing.assert_close(clip.max_logits["encoder.layer.0.attention.self"], expected)
    clip.detach()


def test_models_that_have_no_clip_are_not_recorded() -> None:
    model, other = make_model("llama"), make_model("llama")
    clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
    copied = copy.deepcopy(model)
    for one in other, copied:
        one(**batch()).logits.sum().backward()
    model.eval()(**batch())
    model.train()
    with torch.no_grad():
        model(**batch())
    optimizer.step()
    assert all(bool((seen == -math.inf).all()) for seen in clip.max_logits.values())
    second = attach_qk_clip(other, standing_still(other))
    clip.detach()
    assert "get_interface" in vars(AttentionInterface)
    assert qk_attention._replaced  # the second still needs it
    second.detach()
    assert not qk_attention._replaced


def test_transformers_gets_its_method_back_from_models_that_are_dropped() -> None:
    before = AttentionInterface.get_interface
    model = make_model("llama")
    attach_qk_clip(model, standing_still(model))
    assert AttentionInterface.get_interface is not before
    del model
    gc.collect()
    assert AttentionInterface.get_interface is before


def test_masks_of_flex_attention_are_refused_and_flash_attention_orders_time_itself() -> None:
    model = make_model("llama")
    clip = attach_qk_clip(model, standing_still(model), 1e6)
    attention = model.model.layers[0].self_attn
    query, key = torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    with pytest.raises(TypeError, match=r"layers\.0\.self_attn: expected a mask that is a tensor"):
        qk_attention._report("flex_attention", attention, query, key, object(), {})
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    arguments = {"scaling": 0.5, "sliding_window": 2}
    qk_attention._report("flash_attention_2", attention, query, key, mask, arguments)
    found = clip._layers["model.layers.0.self_attn"].largest
    expected = largest_logits(query, key, scale=0.5, causal=True, window=2, mask=mask != 0)
    assert torch.equal(found, expected)
    clip.detach()


def test_muon_trains_a_llama_in_bfloat16_with_compensation() -> None:
    model = make_model("llama, grouped", dtype=torch.bfloat16)
    optimizer = MuonWithAuxAdam(
        muon_param_groups(model, lr=0.05), aux_adam="adamw", compensation=True
    )
    clip = attach_qk_clip(model, optimizer, 2.0)
    clipped = 0
    for _ in range(4):
        step(model, optimizer)
        clipped += clip.clipped_heads
    assert clipped
    for seen in clip.max_logits.values():
        assert seen.isfinite().all()
    clip.detach()


def test_gradient_checkpointing_and_compiled_models_report_the_same() -> None:
    plain = make_model("llama, grouped")
    clip = attach_qk_clip(plain, optimizer := standing_still(plain), 1e6)
    step(plain, optimizer)
    expected = clip.max_logits
    clip.detach()
    for reentrant in True, False:
        model = make_model("llama, grouped")
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
        step(model, optimizer)
        for name, seen in clip.max_logits.items():
            torch.testing.assert_close(seen, expected[name], rtol=1e-5, atol=1e-5)
        clip.detach()
    torch._dynamo.reset()
    model = make_model("llama, grouped")
    clip = attach_qk_clip(model, optimizer := standing_still(model), 1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about graph breaks
        step(torch.compile(model, backend="aot_eager"), optimizer)
    torch._dynamo.reset()
    for name, seen in clip.max_logits.items():
        torch.testing.assert_close(seen, expected[name], rtol=1e-5, atol=1e-5)
    clip.detach()


def test_adapters_are_refused_by_name() -> None:
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT's own, about transformers
        config = peft.LoraConfig(target_modules=["q_proj"], r=2)
        model = peft.get_peft_model(make_model("llama"), config)
    with pytest.raises(TypeError, match=r"self_attn: query: expected .* got peft\..*Linear"):
        attach_qk_clip(model, standing_still(model))
