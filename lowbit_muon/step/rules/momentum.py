"""How a momentum takes a gradient, and what of both is orthogonalised."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from lowbit_muon.step.rules.stage import Stage, expect


class Weights(NamedTuple):
    """M <- buffer * M + grad * G, then u = ahead[0] * M + ahead[1] * grad * G, or M for None."""

    buffer: float
    grad: float
    ahead: tuple[float, float] | None


@dataclass(frozen=True)
class Momentum(Stage):
    """M <- momentum * M + (1 - momentum) * G; with Nesterov u = momentum * M + (1 - momentum) * G.

    Of torch.optim.Muon and KellerJordan/Muon.
    """

    kind: ClassVar[str] = "average"

    def weights(self, momentum: float, *, nesterov: bool) -> Weights:
        """For a group's options."""
        return Weights(momentum, 1 - momentum, (momentum, 1.0) if nesterov else None)


@dataclass(frozen=True)
class SumMomentum(Momentum):
    """M <- momentum * M + G; with Nesterov u = momentum * M + G.

    1 / (1 - momentum) times the average as long as the momentum is constant: rules whose direction
    does not depend on the momentum's size make no difference. Of Moonlight, microsoft/dion and
    arXiv 2507.20534.
    """

    kind: ClassVar[str] = "sum"

    def weights(self, momentum: float, *, nesterov: bool) -> Weights:
        """For a group's options."""
        return Weights(momentum, 1.0, (momentum, 1.0) if nesterov else None)


@dataclass(frozen=True)
class TwoDecays(Momentum):
    """u = beta * M + (1 - beta) * G, then M <- momentum * M + (1 - momentum) * G.

    Of Lion (arXiv 2302.06675, algorithm 2; its beta_1 is `beta`, its beta_2 the group's
    `momentum`), where u takes the momentum of the step before. Nesterov's look-ahead is another
    beta, so `nesterov` has to be False.
    """

    kind: ClassVar[str] = "two_decays"
    beta: float = 0.9

    def weights(self, momentum: float, *, nesterov: bool) -> Weights:
        """For a group's options. Raises ValueError for a momentum of zero, or Nesterov's."""
        expect(momentum > 0, "momentum", "a number in (0, 1) with a rule of two decays", momentum)
        expect(not nesterov, "nesterov", "False with a rule of two decays", nesterov)
        # M_old = (M - (1 - momentum) G) / momentum
        old = self.beta / momentum
        grad = 1 - momentum
        return Weights(momentum, grad, (old, (1 - self.beta) / grad - old))


@dataclass(frozen=True)
class FeedbackMomentum(Momentum):
    """M <- M + G, of which a stage takes off what went into the weights (`RowFeedback`).

    Of Dion2 (microsoft/dion, dion/dion2.py), whose `ef_decay` is the group's `momentum`.
    """

    kind: ClassVar[str] = "feedback"

    def weights(self, momentum: float, *, nesterov: bool) -> Weights:
        """For a group's options. Raises ValueError for Nesterov's."""
        expect(not nesterov, "nesterov", "False with a rule of error feedback", nesterov)
        return Weights(1.0, 1.0, None)


@functools.lru_cache(maxsize=256)
def weights_of(stage: Momentum, momentum: float, nesterov: bool) -> Weights:
    """`Momentum.weights`, once for each of a group's options."""
    return stage.weights(momentum, nesterov=nesterov)
