"""What of the weights a step takes off: decoupled weight decay and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.step.rules.spectral import leading
from lowbit_muon.step.rules.stage import Stage, expect


@dataclass(frozen=True)
class WeightDecay(Stage):
    """W <- (1 - lr * weight_decay) * W - change."""

    kind: ClassVar[str] = "decoupled"
    # Whether it looks at the weights' elements, and adds to the change.
    reads_weights: ClassVar[bool] = False

    def factor(self, lr: float | Tensor, weight_decay: float) -> float | Tensor:
        """What the weights are multiplied by."""
        return 1 - lr * weight_decay

    def add(
        self,
        change: Tensor,
        weight: Tensor,
        lr: float | Tensor,
        weight_decay: float,
        *,
        scale: float,
        rate: Tensor | None,
    ) -> None:
        """Add a part of the weights to what is subtracted from them; only if it `reads_weights`.

        change, weight: float32 of one matrix, or of some of its rows, of one shape. scale: of the
        learning rate by the matrix's shape; rate: what stages made of it, None for one, or what
        goes with each element or all.
        """


@dataclass(frozen=True)
class Cautious(WeightDecay):
    """W <- W - change - lr * weight_decay * W where W and the change have one sign.

    arXiv 2510.12402. scaled: by the learning rate with its factor of the matrix's shape, as in
    nanochat; squared: times the learning rate once more, as modded-nanogpt has it.
    """

    kind: ClassVar[str] = "cautious"
    reads_weights: ClassVar[bool] = True
    scaled: bool = False
    squared: bool = False

    def factor(self, lr: float | Tensor, weight_decay: float) -> float | Tensor:
        """See `WeightDecay.factor`."""
        return 1.0

    def add(
        self,
        change: Tensor,
        weight: Tensor,
        lr: float | Tensor,
        weight_decay: float,
        *,
        scale: float,
        rate: Tensor | None,
    ) -> None:
        """See `WeightDecay.add`."""
        strength = lr * weight_decay
        if self.scaled:
            strength = strength * scale
        if self.squared:
            strength = strength * lr
        agreeing = (change * weight).ge_(0)
        change.addcmul_(weight, agreeing.mul_(strength))


@dataclass(frozen=True)
class ByRate(WeightDecay):
    """W <- (1 - weight_decay * min(lr * rate, 1)) * W - change, for each column where rates are.

    NAMO and NAMO-D (arXiv 2602.17080).
    """

    kind: ClassVar[str] = "by_rate"
    reads_weights: ClassVar[bool] = True
    needs_rate: ClassVar[bool] = True

    def factor(self, lr: float | Tensor, weight_decay: float) -> float | Tensor:
        """See `WeightDecay.factor`."""
        return 1.0

    def add(
        self,
        change: Tensor,
        weight: Tensor,
        lr: float | Tensor,
        weight_decay: float,
        *,
        scale: float,
        rate: Tensor | None,
    ) -> None:
        """See `WeightDecay.add`."""
        rates = torch.ones((), device=weight.device) if rate is None else rate
        share = (rates * lr).clamp(max=1.0) * weight_decay
        change.add_(weight * share.clamp(max=1.0))


@dataclass(frozen=True)
class Spectral(WeightDecay):
    """W <- W - lr * weight_decay * s u v^T - change: only of W's largest singular value s.

    Arongil/lipschitz-transformers, modula/atom.py (arXiv 2507.13338), where it comes after the
    change and without the learning rate. By `rounds` of power iteration.
    """

    kind: ClassVar[str] = "spectral"
    reads_weights: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = True
    rounds: int = 16

    def check(self) -> None:
        """See `Stage.check`."""
        good = isinstance(self.rounds, int) and self.rounds >= 1
        expect(good, "spectral: rounds", "a whole number >= 1", self.rounds)

    def factor(self, lr: float | Tensor, weight_decay: float) -> float | Tensor:
        """See `WeightDecay.factor`."""
        return 1.0

    def add(
        self,
        change: Tensor,
        weight: Tensor,
        lr: float | Tensor,
        weight_decay: float,
        *,
        scale: float,
        rate: Tensor | None,
    ) -> None:
        """See `WeightDecay.add`."""
        value, left, right = leading(weight, self.rounds)
        change.add_(torch.outer(left, right) * (value * (lr * weight_decay)))
