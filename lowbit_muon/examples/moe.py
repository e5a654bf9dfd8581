"""Pretrain a small mixture of experts on the King James Bible.

    python -m lowbit_muon.examples.moe --plot loss.svg

Experts are stacks of matrices, [experts, rows, columns]; `muon_param_groups` sees that and has
each matrix orthogonalised for itself. The option that matters: `aux_patterns`, which leaves the
router, whose rows are names of experts rather than an operator, to AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, one_hot, rms_norm, scaled_dot_product_attention
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_muon import MuonWithAuxAdam, muon_param_groups
from lowbit_muon.examples.common import Run, bible, compare, counts, state_bytes, trapezoid, windows
from lowbit_muon.examples.nanochat import next_byte_loss

TITLE = "A mixture of eight experts, nats a byte"
VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 128, 64, 64, 2, 2  # the text is ASCII
EXPERTS, CHOSEN, HIDDEN = 8, 2, 64
BALANCE = 0.01  # weight of the loss that spreads tokens over experts (arXiv 2101.03961)
SEQUENCES = 8  # a step
STEPS = 60
# For each method the best that bench.gallery found.
RATES = {"fp32": 0.08, "spectral4": 0.08, "adamw": 0.008}


class Experts(nn.Module):
    """An MLP for each expert; a token goes to the CHOSEN that its router likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.zeros(EXPERTS, WIDTH, HIDDEN))
        self.imbalance = torch.zeros(())  # of the last pass; 1 where all experts have equal shares

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to the same."""
        tokens = x.flatten(0, 1)
        likings = self.router(tokens).softmax(dim=1)
        weights, chosen = likings.topk(CHOSEN)
        shares = one_hot(chosen, EXPERTS).float().mean(dim=(0, 1))
        self.imbalance = EXPERTS * (shares * likings.mean(dim=0)).sum()
        out = torch.zeros_like(tokens)
        for expert in range(EXPERTS):
            rows, rank = (chosen == expert).nonzero(as_tuple=True)
            hidden = gelu(tokens[rows] @ self.up[expert].T)
            part = weights[rows, rank, None] * (hidden @ self.down[expert].T)
            out = out.index_add(0, rows, part)
        return out.view_as(x)


class Block(nn.Module):
    """Attention, then the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to the same."""
        qkv = self.qkv(rms_norm(x, (WIDTH,))).unflatten(-1, (3, HEADS, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.experts(rms_norm(x, (WIDTH,)))


class MixtureOfExperts(nn.Module):
    """Next-byte logits."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """int64 [batch, tokens] to [batch, tokens, VOCABULARY]."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        return self.head(rms_norm(self.blocks(x), (WIDTH,)))


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Muon with the momentum in a format, or AdamW."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    groups = muon_param_groups(
        model, lr=lr, aux_lr=3e-3, aux_patterns=["router"], split_fused={"qkv": 3}
    )
    return MuonWithAuxAdam(groups, state_format=method, aux_adam="adamw")


def train(method: str, lr: float, steps: int = STEPS, seed: int = 0) -> Run:
    """The loss of each step; weights and data follow from the seed, the same for every method."""
    torch.manual_seed(seed)
    model = MixtureOfExperts()
    optimizer = make_optimizer(model, method, lr)
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, steps))
    generator = torch.Generator().manual_seed(seed)
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    losses = []
    for _ in counts(steps, method):
        loss = next_byte_loss(model, windows(bible(), SEQUENCES, CONTEXT + 1, generator))
        imbalance = torch.stack([each.imbalance for each in experts]).mean()
        (loss + BALANCE * imbalance).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return Run(losses, state_bytes(optimizer))


if __name__ == "__main__":
    compare(TITLE, train, RATES, STEPS)
