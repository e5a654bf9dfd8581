"""What of the weights a step takes off: decoupled weight decay and its variants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.step.rules.spectral import leading
from lowbit_muon.step.rules.stage import Stage


@dataclass(frozen=True)
class Rates:
    """What weight decay depends on.

    lr, weight_decay: options of the group. scale: of the learning rate by the matrix's shape; rate:
    what stages made of it, None for one, or what goes with each element or all.
    """

    lr: float | Tensor
    weight_decay: float
    scale: float
    rate: Tensor | None = None


@dataclass(frozen=True)
class WeightDecay(Stage):
    """W <- (1 - lr * weight_decay) * W - change."""

    kind: ClassVar[str] = "decoupled"
    # Whether it looks at the weights' elements, and adds to the change.
    reads_weights: ClassVar[bool] = False

    def factor(self, rates: Rates) -> float | Tensor:
        """What the weights are multiplied by."""
        return 1 - rates.lr * rates.weight_decay

    def add(self, change: Tensor, weight: Tensor, rates: Rates) -> None:
        """Add a part of the weights to what is subtracted from them; only if it `reads_weights`.

        change, weight: float32 of one matrix, or of some of its rows, of one shape.
        """


@dataclass(frozen=True)
class OfGains(WeightDecay):
    """None of directions: gains decay, by the group's weight decay (`gains.Gains`)."""

    kind: ClassVar[str] = "of_gains"

    def factor(self, rates: Rates) -> float | Tensor:
        """See `WeightDecay.factor`."""
        return 1.0


class ReadingWeights(WeightDecay):
    """Weight decay that is a part of the change."""

    reads_weights: ClassVar[bool] = True

    def factor(self, rates: Rates) -> float | Tensor:
        """See `WeightDecay.factor`."""
        return 1.0


@dataclass(frozen=True)
class Cautious(ReadingWeights):
    """W <- W - change - lr * weight_decay * W where W and the change have one sign.

    arXiv 2510.12402. scaled: by the learning rate with its factor of the matrix's shape, as in
    nanochat; squared: times the learning rate once more, as modded-nanogpt has it.
    """

    kind: ClassVar[str] = "cautious"
    scaled: bool = False
    squared: bool = False

    def strength(self, rates: Rates) -> float | Tensor:
        """The share of a weight that is taken off where it is."""
        strength = rates.lr * rates.weight_decay
        if self.scaled:
            strength = strength * rates.scale
        if self.squared:
            strength = strength * rates.lr
        return strength

    def add(self, change: Tensor, weight: Tensor, rates: Rates) -> None:
        """See `WeightDecay.add`."""
        agreeing = (change * weight).ge_(0)
        change.addcmul_(weight, agreeing.mul_(self.strength(rates)))


@dataclass(frozen=True)
class ByRate(ReadingWeights):
    """W <- (1 - weight_decay * min(lr * rate, 1)) * W - change, for each column where rates are.

    NAMO and NAMO-D (arXiv 2602.17080).
    """

    kind: ClassVar[str] = "by_rate"
    needs_rate: ClassVar[bool] = True

    def add(self, change: Tensor, weight: Tensor, rates: Rates) -> None:
        """See `WeightDecay.add`."""
        rate = torch.ones((), device=weight.device) if rates.rate is None else rates.rate
        share = (rate * rates.lr).clamp(max=1.0) * rates.weight_decay
        change.add_(weight * share.clamp(max=1.0))


@dataclass(frozen=True)
class Spectral(ReadingWeights):
    """W <- W - lr * weight_decay * s u v^T - change: only of W's largest singular value s.

    Arongil/lipschitz-transformers, modula/atom.py (arXiv 2507.13338), where it comes after the
    change and without the learning rate. By `rounds` of power iteration.
    """

    kind: ClassVar[str] = "spectral"
    needs_weights: ClassVar[bool] = True
    rounds: int = 16

    def add(self, change: Tensor, weight: Tensor, rates: Rates) -> None:
        """See `WeightDecay.add`."""
        value, left, right = leading(weight, self.rounds)
        change.add_(torch.outer(left, right) * (value * (rates.lr * rates.weight_decay)))
