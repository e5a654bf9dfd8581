"""A small attention model that reports its logits, and what is exact about them."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD

from lowbit_muon import MuonWithAuxAdam, QKClip, attach_qk_clip, muon_param_groups

WIDTH, SIZE, LENGTH = 16, 4, 7


class Attention(nn.Module):
    """Causal attention with `heads` query heads, that reports its logits if it has a clip."""

    def __init__(self, heads: int = 4, key_heads: int = 4, bias: bool = True) -> None:
        super().__init__()
        self.heads, self.key_heads, self.head_dim = heads, key_heads, SIZE
        self.q_proj = nn.Linear(WIDTH, heads * SIZE, bias=bias)
        self.k_proj = nn.Linear(WIDTH, key_heads * SIZE, bias=bias)
        self.v_proj = nn.Linear(WIDTH, key_heads * SIZE, bias=bias)
        self.o_proj = nn.Linear(heads * SIZE, WIDTH, bias=bias)
        self.clip: QKClip | None = None

    def queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.q_proj(x), self.k_proj(x)
        query, key = (part.unflatten(-1, (-1, SIZE)).transpose(1, 2) for part in parts)
        return query, key

    def forward(self, x: Tensor) -> Tensor:
        query, key = self.queries_and_keys(x)
        value = self.v_proj(x).unflatten(-1, (-1, SIZE)).transpose(1, 2)
        if self.clip is not None:
            self.clip.record(self, query, key, causal=True)
        found = nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return x + self.o_proj(found.transpose(1, 2).flatten(2))


class Model(nn.Module):
    """A few layers of `Attention`, whose heads have logits of different sizes."""

    def __init__(self, layers: int = 2, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(Attention(**options) for _ in range(layers))
        with torch.no_grad():
            for layer in self.layers:
                sizes = torch.linspace(1, 6, layer.heads)
                layer.q_proj.weight.unflatten(0, (layer.heads, SIZE)).mul_(sizes[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def attach(model: Model, optimizer: torch.optim.Optimizer, *args: Any, **options: Any) -> QKClip:
    clip = attach_qk_clip(model, optimizer, *args, **options)
    for layer in model.layers:
        layer.clip = clip
    return clip


def inputs(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(seed))


def standing_still(model: nn.Module) -> SGD:
    """An optimizer whose steps change nothing."""
    return SGD(model.parameters(), lr=0.0)


@torch.no_grad()
def exact_logits(layer: Attention, x: Tensor) -> Tensor:
    """The largest causal logit of each head in float64: float64 [heads]."""
    layer = copy.deepcopy(layer).double()
    query, key = layer.queries_and_keys(x.double())
    key = key.repeat_interleave(layer.heads // layer.key_heads, 1)
    logits = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(SIZE)
    logits.masked_fill_(torch.ones(LENGTH, LENGTH).triu(1).bool(), -math.inf)
    return logits.amax((0, 2, 3))


def step(model: nn.Module, optimizer: torch.optim.Optimizer, *batches: Tensor) -> None:
    for x in batches:
        model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def make_muon(model: nn.Module, **options: Any) -> MuonWithAuxAdam:
    groups = muon_param_groups(model, lr=0.02)
    return MuonWithAuxAdam(groups, aux_adam="adamw", **options)
