"""Train a diffusion transformer (arXiv 2212.09748) by flow matching to draw shapes.

    python -m lowbit_muon.examples.diffusion --plot loss.svg

The option that matters: `split_fused`, which has queries, keys and values, and the six parts of
the modulation, orthogonalised for themselves; `aux_patterns` leaves what reads or writes pixels to
AdamW.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, mse_loss, scaled_dot_product_attention
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_muon import MuonWithAuxAdam, muon_param_groups
from lowbit_muon.examples.common import (
    KINDS,
    Run,
    compare,
    counts,
    drawings,
    state_bytes,
    trapezoid,
)

TITLE = "A diffusion transformer, squared error of the velocity"
SIZE, PATCH, WIDTH, LAYERS, HEADS = 12, 2, 64, 2, 2
FREQUENCIES = 16
IMAGES = 16  # a step
STEPS = 80
# For each method the best that bench.gallery found.
RATES = {"fp32": 0.02, "spectral4": 0.02, "adamw": 0.004}


class Block(nn.Module):
    """Attention and an MLP, both modulated by time and kind; what they add is zero at first."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[batch, patches, WIDTH] to the same; condition [batch, WIDTH]."""
        parts = self.modulation(condition)[:, None].chunk(6, dim=2)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts
        qkv = self.qkv(layer_norm(x, (WIDTH,)) * (1 + scale) + shift)
        query, key, value = qkv.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(query, key, value)
        x = x + gate * self.out(mixed.transpose(1, 2).flatten(2))
        hidden = self.up(layer_norm(x, (WIDTH,)) * (1 + mlp_scale) + mlp_shift)
        return x + mlp_gate * self.down(gelu(hidden))


class DiffusionTransformer(nn.Module):
    """The velocity at a point on the way from a picture to noise."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn((SIZE // PATCH) ** 2, WIDTH))
        self.kinds = nn.Embedding(KINDS, WIDTH)
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.pixels = nn.Linear(WIDTH, PATCH * PATCH)

    def forward(self, images: Tensor, time: Tensor, kind: Tensor) -> Tensor:
        """[batch, 1, SIZE, SIZE] to the same; time [batch] from 0 to 1, kind int64 [batch]."""
        angles = time[:, None] * torch.logspace(0, 2, FREQUENCIES)
        condition = self.time(torch.cat([angles.cos(), angles.sin()], dim=1)) + self.kinds(kind)
        x = self.patches(images).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, condition)
        pixels = self.pixels(layer_norm(x, (WIDTH,))).mT  # [batch, PATCH * PATCH, patches]
        return nn.functional.fold(pixels, (SIZE, SIZE), PATCH, stride=PATCH)


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Muon with the momentum in a format, or AdamW."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    groups = muon_param_groups(
        model, lr=lr, aux_lr=3e-3, aux_patterns=["^patches", "^pixels"],
        split_fused={"qkv": 3, "modulation": 6},
    )  # fmt: skip
    return MuonWithAuxAdam(groups, state_format=method, aux_adam="adamw")


def train(method: str, lr: float, steps: int = STEPS, seed: int = 0) -> Run:
    """The loss of each step; weights and data follow from the seed, the same for every method."""
    torch.manual_seed(seed)
    model = DiffusionTransformer()
    optimizer = make_optimizer(model, method, lr)
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in counts(steps, method):
        images, kind = drawings(IMAGES, SIZE, generator)
        noise = torch.randn(images.shape, generator=generator)
        time = torch.rand(IMAGES, generator=generator)
        between = torch.lerp(images, noise, time[:, None, None, None])
        loss = mse_loss(model(between, time, kind), noise - images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return Run(losses, state_bytes(optimizer))


if __name__ == "__main__":
    compare(TITLE, train, RATES, STEPS)
