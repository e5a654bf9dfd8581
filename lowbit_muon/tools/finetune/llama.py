"""A Llama decoder in plain torch, with the module names of Hugging Face's `LlamaModel`.

Only what a CPU fine-tune needs: rotary attention with grouped key/value heads, gated MLP, RMS norms
and a tied output head whose loss is taken in chunks, because the logits of 1,024 tokens over 49,152
classes would be 200 MB, and as much again for their gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama decoder; the defaults are SmolLM2-135M's."""

    vocabulary: int = 49152
    hidden: int = 576
    intermediate: int = 1536
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    rope_base: float = 1e5
    norm_eps: float = 1e-5

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads


def rotary_table(positions: int, config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Cosine and sine [positions, head_size] of rotary positions (Su et al., arXiv 2104.09864)."""
    half = torch.arange(0, config.head_size, 2, dtype=torch.float32) / config.head_size
    angles = torch.outer(torch.arange(positions, dtype=torch.float32), config.rope_base**-half)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotation to x [batch, heads, tokens, head_size] (half-split pair order)."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


class SelfAttention(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        kv_size = config.kv_heads * config.head_size
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=False)
        self.k_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape

        def heads(y: Tensor) -> Tensor:
            return y.view(batch, tokens, -1, self.config.head_size).transpose(1, 2)

        query = rotate(heads(self.q_proj(x)), cos, sin)
        key = rotate(heads(self.k_proj(x)), cos, sin)
        value = heads(self.v_proj(x))
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=self.config.kv_heads < self.config.heads
        )
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, tokens, hidden))


class GatedMLP(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.intermediate, bias=False)
        self.down_proj = nn.Linear(config.intermediate, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = GatedMLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of a linear head, with its gradient made in the forward pass, by chunks.

    Holds at most `chunk` rows of logits, and multiplies no more than the plain backward pass does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [tokens, hidden]
        weight: Tensor,  # [vocabulary, hidden]
        targets: Tensor,  # int64 [tokens]
        chunk: int,
    ) -> Tensor:
        tokens = targets.numel()
        exact = torch.promote_types(hidden.dtype, torch.float32)  # of bfloat16 weights, too
        wanted = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        grad_hidden = torch.empty_like(hidden) if wanted else None
        grad_weight = torch.zeros_like(weight) if wanted else None
        total = hidden.new_zeros((), dtype=torch.float64)
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]
            log_probs = torch.log_softmax(hidden[rows] @ weight.T, dim=-1, dtype=exact)
            total -= log_probs.gather(1, target).sum(dtype=torch.float64)
            if grad_hidden is None or grad_weight is None:
                continue
            grad = log_probs.exp_()  # softmax - onehot is the gradient by the logits
            grad.scatter_add_(1, target, grad.new_full((), -1.0).expand_as(target))
            grad = grad.div_(tokens).to(weight.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            grad_weight.addmm_(grad.T, hidden[rows])
        ctx.save_for_backward(grad_hidden, grad_weight)
        return (total / tokens).to(exact)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None


class Llama(nn.Module):
    """Decoder with a tied head: `embed_tokens`, `layers.N.self_attn.q_proj`, ..., `norm`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.hidden)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        """Final hidden states [batch, tokens, hidden] of ids, int64 [batch, tokens]."""
        x = self.embed_tokens(ids)
        cos, sin = (part.to(x.dtype) for part in rotary_table(ids.shape[1], self.config))
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores [..., vocabulary] of hidden states [..., hidden], by the tied embedding."""
        return F.linear(hidden, self.embed_tokens.weight)

    def loss(self, ids: Tensor, chunk: int = 256) -> Tensor:
        """Mean next-token cross-entropy in nats; ids int64 [batch, tokens + 1]."""
        hidden = self(ids[:, :-1]).flatten(0, 1)
        targets = ids[:, 1:].flatten()
        loss: Tensor = _ChunkedCrossEntropy.apply(hidden, self.embed_tokens.weight, targets, chunk)
        return loss
