"""What storing the momentum in every step does to the updates of a recorded gradient sequence.

The momentum is stored by some method, read in the next step, added to and stored again, so that
errors add up. The gradients are the recording's, whatever the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon import orthogonalize

MOMENTUM = 0.95  # torch.optim.Muon's
MEMORY = 20  # steps, 1 / (1 - MOMENTUM)
Store = Callable[[Tensor], Tensor]  # a matrix -> what is read after it was stored


@dataclass(frozen=True)
class Rule:
    """How a gradient becomes an update: torch's momentum and Nesterov, or MuonQ's (2605.11396)."""

    normalizes: bool = False

    def add(self, momentum: Tensor, grad: Tensor) -> Tensor:
        """The new momentum."""
        if not self.normalizes:
            return MOMENTUM * momentum + (1 - MOMENTUM) * grad
        total = MOMENTUM * momentum + grad / grad.norm()
        return total / total.norm()

    def direction(self, momentum: Tensor, grad: Tensor) -> Tensor:
        """What is orthogonalised, of the new momentum."""
        return momentum if self.normalizes else self.add(momentum, grad)


TORCH, MUONQ = Rule(), Rule(normalizes=True)


@dataclass(frozen=True)
class Sequence:
    """One matrix's gradients, and what full-precision momentum makes of them in some last steps.

    grads: [steps, m, n], m <= n. measured: the steps whose updates are compared.
    momenta, directions, updates: [measured, m, n]; exact momentum before these steps, what is
    orthogonalised in them, and that orthogonalised.
    """

    grads: Tensor
    rule: Rule
    measured: range
    momenta: Tensor
    directions: Tensor
    updates: Tensor

    @classmethod
    def of(cls, grads: Tensor, measured: range, rule: Rule = TORCH) -> Sequence:
        """Carries out the steps in full precision."""
        momentum, momenta, directions = torch.zeros_like(grads[0]), [], []
        for step, grad in enumerate(grads[: measured.stop]):
            if step in measured:
                momenta.append(momentum)
            momentum = rule.add(momentum, grad)
            if step in measured:
                directions.append(rule.direction(momentum, grad))
        updates = torch.stack([orthogonalize(direction) for direction in directions])
        return cls(grads, rule, measured, torch.stack(momenta), torch.stack(directions), updates)

    def closed(self, store: Store) -> Tensor:
        """The updates if the momentum is stored in every step."""
        momentum, updates = torch.zeros_like(self.grads[0]), []
        for step, grad in enumerate(self.grads[: self.measured.stop]):
            momentum = self.rule.add(momentum, grad)
            if step in self.measured:
                updates.append(orthogonalize(self.rule.direction(momentum, grad)))
            momentum = store(momentum)
        return torch.stack(updates)

    def once(self, store: Store) -> Tensor:
        """The last update if the momentum was stored in the step before it, and never before."""
        grad = self.grads[self.measured[-1]]
        momentum = self.rule.add(store(self.momenta[-1]), grad)
        return orthogonalize(self.rule.direction(momentum, grad))


def relative_errors(approximations: Tensor, exact: Tensor) -> Tensor:
    """Frobenius norms of the differences relative to the exact matrices [.., m, n]."""
    difference = torch.linalg.matrix_norm(approximations - exact)
    return difference / torch.linalg.matrix_norm(exact)


def relative_error(approximation: Tensor, exact: Tensor) -> float:
    """The same of one matrix."""
    return float(relative_errors(approximation, exact))
