"""Shapes of one layer's matrices in models of several sizes, each with its source."""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]  # [rows, columns], as the weight is stored


@dataclass(frozen=True)
class Layer:
    """The matrices that Muon takes in one layer: no embeddings, norms, biases or router."""

    title: str
    matrices: tuple[Shape, ...]
    source: str  # repository whose config.json has the sizes
    layers: int = 1  # that a benchmark takes if it is not told


def _llama(hidden: int, intermediate: int, keys: int) -> tuple[Shape, ...]:
    """q, k, v, o, gate, up, down of nn.Linear; keys: num_key_value_heads * head_dim."""
    return (
        (hidden, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, hidden),
        (intermediate, hidden),
        (intermediate, hidden),
        (hidden, intermediate),
    )


# All 64 experts of OLMoE have a gradient, 8 are active for a token: those 8 are timed, since 64 of
# one shape take eight times as long and 4.8 GiB in float32 for weights, gradients and momentum.
_EXPERTS = 8

MODELS = {
    "smollm2": Layer(
        "SmolLM2-135M",
        _llama(hidden=576, intermediate=1536, keys=3 * 64),
        "HuggingFaceTB/SmolLM2-135M",
        layers=4,  # of 30: with all of them five rounds take more than 400 s on two cores
    ),
    # Conv1D stores its weights as [inputs, outputs]: c_attn, attn.c_proj, c_fc, mlp.c_proj.
    "gpt2": Layer(
        "GPT-2 124M", ((768, 2304), (768, 768), (768, 3072), (3072, 768)), "openai-community/gpt2"
    ),
    "llama3-1b": Layer(
        "Llama-3.2-1B",
        _llama(hidden=2048, intermediate=8192, keys=8 * 64),
        "meta-llama/Llama-3.2-1B",
    ),
    # 218 million elements: Newton-Schulz in float32 takes minutes on a few cores.
    "llama3-8b": Layer(
        "Llama-3-8B",
        _llama(hidden=4096, intermediate=14336, keys=8 * 128),
        "meta-llama/Meta-Llama-3-8B",
    ),
    "moe": Layer(
        f"OLMoE-1B-7B, {_EXPERTS} of 64 experts",
        ((2048, 2048),) * 4 + ((1024, 2048), (1024, 2048), (2048, 1024)) * _EXPERTS,
        "allenai/OLMoE-1B-7B-0924",
    ),
}
