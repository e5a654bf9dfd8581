"""The end of a step by a rule other than Muon's: the update is there, and moves the weights.

Decayed, subtracted from and brought to where the rule constrains them, and rounded once. Nothing
waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.state.rounding import (
    Compensation,
    Rounding,
    exact_weight,
    update_weight,
    updated_by_kernels,
)
from lowbit_muon.state.stored import orient
from lowbit_muon.step.rules.constraint import WeightStep
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.stage import Matrices
from lowbit_muon.step.rules.weight_decay import Cautious, Rates

# Of a host's cache.
PANEL_FLOATS = 2**17

if TYPE_CHECKING:
    from lowbit_muon.step.update import Batch


def as_parameters(x: Tensor, rows: int, columns: int) -> Tensor:
    """A view of matrices [.., m, n], which have the short side first, as [.., rows, columns]."""
    return x if rows <= columns else x.mT


def read_weights(batch: Batch) -> list[Tensor]:
    """In float32 [rows, columns] each, with what rounding left over of them."""
    rows, columns = batch.weights[0].shape
    return [
        as_parameters(exact_weight(orient(weight), rounding), rows, columns)
        for weight, rounding in zip(batch.weights, batch.rounding, strict=True)
    ]


@dataclass(frozen=True)
class RuleWeights:
    """A batch's weights, for stages to look at and for an update to move.

    values: by `read_weights`, none if the rule does not look at them. by_kernels: a decay that goes
    by signs is left to the kernels that update weights: by torch it takes five passes over matrices
    in float32, which a host does in its cache.
    """

    batch: Batch
    rule: UpdateRule
    backend: Backend
    values: list[Tensor]
    by_kernels: bool

    @classmethod
    def of(cls, batch: Batch, rule: UpdateRule, backend: Backend) -> RuleWeights:
        decays = isinstance(rule.weight_decay, Cautious) and rule.constraint is None
        kernels = all(map(updated_by_kernels, batch.weights, batch.rounding))
        by_kernels = backend.asynchronous and kernels and decays
        reads = bool(rule.needs("weights")) if by_kernels else rule.reads_weights
        return cls(batch, rule, backend, read_weights(batch) if reads else [], by_kernels)

    def move(
        self,
        update: Tensor,
        size: float | Tensor,
        accepted: Tensor,
        matrices: Matrices,
        scale: float,
    ) -> None:
        """weight <- decay * weight - size * update, constrained, where accepted (bool [b]).

        update: float32 or half precision [b, rows, columns], used up; size: as of
        `StepSize.size`; scale: of the learning rate, by the matrices' shape.
        """
        if self.values or (isinstance(size, Tensor) and size.ndim):
            update, size = update.float().mul_(size), 1.0
        for index, (part, allowed) in enumerate(zip(update, accepted, strict=True)):
            rate = None if matrices.rate is None else matrices.rate[index]  # [1, 1], [1, columns]
            rates = Rates(matrices.lr, matrices.weight_decay, scale, rate)
            if self.by_kernels:
                self._move_by_kernels(index, part, size, allowed, rates)
            else:
                self._move(index, part, size, allowed, rates, matrices)

    def _move_by_kernels(
        self, index: int, update: Tensor, size: float | Tensor, accepted: Tensor, rates: Rates
    ) -> None:
        assert isinstance(self.rule.weight_decay, Cautious)
        # products with the mask, and no constants to be copied there
        decay, size = 1 - accepted * self.rule.weight_decay.strength(rates), accepted * size
        weight, rounding = orient(self.batch.weights[index]), self.batch.rounding[index]
        update_weight(weight, orient(update), decay, size, rounding, self.backend, cautious=True)

    def _move(
        self,
        index: int,
        update: Tensor,
        size: float | Tensor,
        accepted: Tensor,
        rates: Rates,
        matrices: Matrices,
    ) -> None:
        rule, backend, decays = self.rule, self.backend, self.rule.weight_decay
        value = orient(self.values[index]) if self.values and decays.reads_weights else None
        decay = decays.factor(rates)
        if rule.constraint is not None or rule.gains is not None:
            new = _new_weight(rule, update, index, matrices, rates)
            torch.sub(self.values[index], new, out=update)
            value, decay = None, 1.0
        if backend.asynchronous:  # products with the mask, and no constants to be copied there
            decay, size = 1 - accepted * (1 - decay), accepted * size
        given, rounding = self.batch.weights[index], self.batch.rounding[index]
        weight, update = orient(given), orient(update)
        # Kernels leave weights alone that move by zero, whatever the update is; torch does not.
        masked = backend.asynchronous and not updated_by_kernels(weight, rounding)
        whole = decays.needs_weights or backend.asynchronous
        turned = None  # rates of columns, where a tall weight's columns are the rows
        if rates.rate is not None and rates.rate.numel() > 1 and weight.shape != given.shape:
            turned = rates.rate.mT
        for rows in _panels(weight, rounding, whole=whole):
            part = update[rows]
            if value is not None:
                near = rates if turned is None else replace(rates, rate=turned[rows])
                decays.add(part, value[rows], near)
            if masked:
                part = torch.where(accepted, part, 0)
            of_rows = rounding.rows(rows) if isinstance(rounding, Compensation) else rounding
            update_weight(weight[rows], part, decay, size, of_rows, backend)


def _new_weight(
    rule: UpdateRule, update: Tensor, index: int, matrices: Matrices, rates: Rates
) -> Tensor:
    """Where one matrix is brought, float32 [rows, columns]; the update is used up."""
    weight, decay = matrices.weights[index], rule.weight_decay.factor(rates)
    if rule.weight_decay.reads_weights:
        rule.weight_decay.add(update, weight, rates)
    new = weight * decay - update
    if rule.constraint is not None:
        new = rule.constraint.apply(new, weight, WeightStep(decay, rates.lr * rates.scale))
    if rule.gains is not None:
        kept = {name: value[index] for name, value in matrices.state.items()}
        new = rule.gains.product(new, kept)
    return new


def _panels(weight: Tensor, rounding: Rounding | None, *, whole: bool) -> list[slice]:
    """The rows that are updated at once: what stays in a cache while several passes go over it.

    All of them where bits of stochastic rounding go by places in the whole matrix.
    """
    m, n = weight.shape
    if whole or isinstance(rounding, Tensor):
        return [slice(0, m)]
    height = max(1, PANEL_FLOATS // max(1, n))
    return [slice(start, min(start + height, m)) for start in range(0, m, height)]
