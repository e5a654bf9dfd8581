"""What the tests of the oracles share: shapes, numbers, and steps of an oracle."""

from __future__ import annotations

from typing import Any

import torch
from oracles import ORACLES, Oracle
from torch import Tensor

# Tall, wide, and a vector: square matrices take the branch of wide ones.
SHAPES = [(12, 5), (5, 12), (1, 7)]
REQUIRED: dict[str, dict[str, Any]] = {"pion": {"k": 2}}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def matrix(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def make(name: str, weight: Tensor, **parameters: Any) -> Oracle:
    return ORACLES[name](weight, **{**REQUIRED.get(name, {}), **parameters})


def gradients(shape: tuple[int, int], steps: int = 4) -> list[Tensor]:
    return [(1 + seed) * draw(*shape, seed=100 + seed) for seed in range(steps)]


def run(oracle: Oracle, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        oracle.step(grad)
    return oracle.weight


def move(name: str, weight: Tensor, grads: list[Tensor], **parameters: Any) -> Tensor:
    """What the last of the steps took off the weight, without weight decay."""
    oracle = make(name, weight, **{"weight_decay": 0.0, **parameters})
    before = run(oracle, grads[:-1])
    return before - run(oracle, grads[-1:])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Within the tolerance of the norm; as it is, some thousand roundings of float64."""
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())
