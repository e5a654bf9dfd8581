"""Small parameters of several shapes, their gradients, and every rule to step them by."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from lowbit_muon import RULES, Muon
from lowbit_muon.step.rules.recipes import fismo, pion

# The first and the third are a batch.
SHAPES = ((24, 40), (40, 24), (24, 40), (1, 7))
ALL = {**RULES, "pion(2, 5)": pion(2), "fismo(0.9, 0.1)": fismo(0.9, 0.1)}


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter((0.1 * torch.randn(shape, generator=generator)).to(dtype)) for shape in SHAPES
    ]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    """With a common part, as training has; zeros in the second step of the first two."""
    generator = torch.Generator().manual_seed(100 + step)
    for index, param in enumerate(params):
        rows, columns = param.shape
        thin = torch.randn(rows, 2, generator=generator) @ torch.randn(
            2, columns, generator=generator
        )
        grad = thin + 0.3 * torch.randn(param.shape, generator=generator)
        if step == 1 and index < 2:
            grad.zero_()
        param.grad = grad.to(param.dtype)


def train(optimizer: Muon, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def values(optimizer: Muon) -> dict[str, Any]:
    """All weights and all of the state."""
    found: dict[str, Any] = {}
    for number, (param, state) in enumerate(optimizer.state.items()):
        found[f"{number}"] = param.detach().clone()
        found |= {f"{number} {key}": copy.deepcopy(value) for key, value in state.items()}
    return found
