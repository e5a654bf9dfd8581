"""The small byte-level models: a GPT, a GPT of modern kind and a Llama, of about the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit_muon.tools.finetune.llama import Llama, LlamaConfig

VOCABULARY = 256  # bytes
WIDTH, LAYERS, HEADS, CONTEXT = 128, 4, 4, 128
MODERN_HEAD = 64  # columns of a head, so that a wider model has more of them
MODELS = ("gpt", "modern", "llama")


class Block(nn.Module):
    """Attention and a GELU MLP, each after a LayerNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, width] to the same."""
        normed = self.norms[0](x)
        query, key, value = (
            layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class ModernBlock(nn.Module):
    """Normalised queries and keys, a squared-ReLU MLP, RMS norms without weights, no biases.

    What either part adds is zero at first.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, elementwise_affine=False)
        self.head_norm = nn.RMSNorm(MODERN_HEAD, elementwise_affine=False)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, width] to the same."""
        normed = self.norm(x)
        query, key, value = (
            layer(normed).unflatten(-1, (-1, MODERN_HEAD)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            self.head_norm(query), self.head_norm(key), value, is_causal=True
        )
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(self.norm(x)).relu().square())


class GPT(nn.Module):
    """Learned positions and an output head of its own; 128 wide: 0.85M parameters."""

    def __init__(
        self, width: int, layers: int, block: Callable[[int], nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.tokens, self.positions = (
            nn.Embedding(VOCABULARY, width),
            nn.Embedding(CONTEXT, width),
        )
        self.blocks = nn.Sequential(*(block(width) for _ in range(layers)))
        self.norm, self.head = norm, nn.Linear(width, VOCABULARY, bias=False)

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats; ids int64 [batch, tokens + 1], of CONTEXT tokens at most."""
        x = self.tokens(ids[:, :-1]) + self.positions.weight[: ids.shape[1] - 1]
        logits = self.head(self.norm(self.blocks(x)))
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def make_model(name: str, seed: int, width: int = WIDTH, layers: int = LAYERS) -> GPT | Llama:
    """One of `MODELS`.

    Matrices are drawn with standard deviation 0.02, as GPT-2's; the modern one's as torch draws
    them, its head zero.
    """
    torch.manual_seed(seed)
    if name == "modern":
        modern = GPT(width, layers, ModernBlock, nn.RMSNorm(width, elementwise_affine=False))
        nn.init.zeros_(modern.head.weight)
        return modern
    if name == "gpt":
        model: GPT | Llama = GPT(width, layers, Block, nn.LayerNorm(width))
    elif name == "llama":
        # Rotary positions, RMSNorm, SwiGLU, two heads to a key, a tied head; 0.83M parameters.
        model = Llama(
            LlamaConfig(
                vocabulary=VOCABULARY,
                hidden=width,
                intermediate=3 * width,
                layers=layers,
                heads=HEADS,
                kv_heads=2,
                rope_base=1e4,
            )
        )
    else:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


def model_label(name: str, width: int, layers: int) -> str:
    """What results call a model: its name, with its size where that is not the usual one."""
    return name if (width, layers) == (WIDTH, LAYERS) else f"{name} {width}x{layers}"
