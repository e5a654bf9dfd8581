"""Pretrain a byte-level GPT of nanochat's kind on the King James Bible.

    python -m lowbit_muon.examples.nanochat --plot loss.svg

The option that matters: rule="nanochat", its Muon (NorMuon on the longer side, Polar Express,
cautious weight decay), whose rate is that of matrices; the embedding and the head keep AdamW's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, rms_norm, scaled_dot_product_attention
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_muon import MuonWithAuxAdam
from lowbit_muon.examples.common import Run, bible, compare, counts, state_bytes, trapezoid, windows

TITLE = "A byte-level GPT, nats a byte"
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 128, 64, 64, 2, 2  # the text is ASCII
SEQUENCES = 8  # a step
STEPS = 120
# For each method the best that bench.gallery found.
RATES = {"fp32": 0.04, "spectral4": 0.04, "adamw": 0.016}


class Block(nn.Module):
    """Attention with normalised queries and keys, and an MLP of squared ReLUs; no biases."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (
            nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4)
        )
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)
        for layer in (self.out, self.down):  # what either part adds is zero at first
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to the same."""
        normed = rms_norm(x, (WIDTH,))
        query, key, value = (
            layer(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        query, key = (rms_norm(each, each.shape[-1:]) for each in (query, key))
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(self.up(rms_norm(x, (WIDTH,))).relu().square())


class GPT(nn.Module):
    """Next-byte logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] to [batch, tokens, VOCABULARY]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(rms_norm(self.blocks(x), (WIDTH,)))


def next_byte_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy in nats; ids int64 [batch, tokens + 1]."""
    return cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Muon with the momentum in a format, or AdamW."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1)
    return MuonWithAuxAdam(
        model, lr=lr, weight_decay=0.1, rule="nanochat", state_format=method,
        aux_lr=3e-3, aux_adam="adamw",
    )  # fmt: skip


def train(method: str, lr: float, steps: int = STEPS, seed: int = 0) -> Run:
    """The loss of each step; weights and data follow from the seed, the same for every method."""
    torch.manual_seed(seed)
    model = GPT()
    optimizer = make_optimizer(model, method, lr)
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in counts(steps, method):
        loss = next_byte_loss(model, windows(bible(), SEQUENCES, CONTEXT + 1, generator))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return Run(losses, state_bytes(optimizer))


if __name__ == "__main__":
    compare(TITLE, train, RATES, STEPS)
