"""Train a ConvNeXt-like network to tell drawn shapes apart, under heavy noise.

    python -m lowbit_muon.examples.convnet --plot loss.svg

Muon takes a kernel [out, in, height, width] as a matrix [out, in * height * width]. The option
that matters: `aux_patterns`, which leaves the first convolution and the classifier to AdamW; no
structure tells that they read pixels and write classes. Depthwise kernels go there by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu
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

TITLE = "A convolutional network, cross-entropy of eight shapes"
SIZE, WIDTHS = 16, (32, 64)
NOISE = 0.5  # standard deviation; pixels are -1 and 1
IMAGES = 16  # a step
STEPS = 100
# For each method the best that bench.gallery found.
RATES = {"fp32": 0.08, "spectral4": 0.08, "adamw": 0.004}


class Block(nn.Module):
    """A depthwise convolution, a norm, a dense convolution and one that mixes channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.up = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.down = nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, height, width] to the same."""
        return x + self.down(gelu(self.up(self.norm(self.depthwise(x)))))


class ConvNet(nn.Module):
    """Two stages of one block each."""

    def __init__(self) -> None:
        super().__init__()
        first, second = WIDTHS
        self.stem = nn.Conv2d(1, first, 4, stride=2, padding=1)
        self.fine = Block(first)
        self.halve = nn.Conv2d(first, second, 2, stride=2)
        self.coarse = Block(second)
        self.norm = nn.LayerNorm(second)
        self.classifier = nn.Linear(second, KINDS)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 1, SIZE, SIZE] to logits [batch, KINDS]."""
        x = self.coarse(self.halve(self.fine(self.stem(images))))
        return self.classifier(self.norm(x.mean(dim=(2, 3))))


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Muon with the momentum in a format, or AdamW."""
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    groups = muon_param_groups(model, lr=lr, aux_lr=3e-3, aux_patterns=["^stem", "^classifier"])
    return MuonWithAuxAdam(groups, state_format=method, aux_adam="adamw")


def train(method: str, lr: float, steps: int = STEPS, seed: int = 0) -> Run:
    """The loss of each step; weights and data follow from the seed, the same for every method."""
    torch.manual_seed(seed)
    model = ConvNet()
    optimizer = make_optimizer(model, method, lr)
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in counts(steps, method):
        images, kinds = drawings(IMAGES, SIZE, generator)
        images += NOISE * torch.randn(images.shape, generator=generator)
        loss = cross_entropy(model(images), kinds)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return Run(losses, state_bytes(optimizer))


if __name__ == "__main__":
    compare(TITLE, train, RATES, STEPS)
