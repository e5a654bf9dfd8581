"""The part of a step that rules other than Muon's change: from the momentum to the weights.

The update exists as a matrix here, which stages look at and change; Muon's own step never forms it
(`step.update`). Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.state.operands import Dense, Operand
from lowbit_muon.state.rounding import (
    Compensation,
    Rounding,
    exact_weight,
    update_weight,
    updated_by_kernels,
)
from lowbit_muon.state.stored import RULE_PREFIX, StoredBatch, orient
from lowbit_muon.step.rules.constraint import WeightStep
from lowbit_muon.step.rules.direction import DirectionMap, Polar
from lowbit_muon.step.rules.gains import Factors, GainRates
from lowbit_muon.step.rules.precondition import to_norm_one
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.stage import TINY, Matrices, norm
from lowbit_muon.step.rules.weight_decay import Cautious, Rates

# Of a host's cache.
PANEL_FLOATS = 2**17

if TYPE_CHECKING:
    from lowbit_muon.step.update import Batch, StepOptions


@dataclass(frozen=True)
class Taken:
    """What became of gradients before the momentum.

    grads: [b, m, n], for the momentum. state: what the stage keeps then, by name. rate: factors of
    the learning rate [b, 1, 1], or None. factors: of the gains before this step, or None.
    """

    grads: Tensor
    state: dict[str, Tensor]
    rate: Tensor | None = None
    factors: Factors | None = None


@dataclass(frozen=True)
class Given:
    """What is to be made a direction.

    x: [b, m, n], used up by whoever takes it; size: Frobenius norms of the momentum that it is a
    multiple of; norm: its own; inverse: 1 / max(norm, eps), 0 where nothing is to move. All
    float64 [b]. taken: in the place of gradients, if they have a transform.
    """

    x: Operand
    size: Tensor
    norm: Tensor
    inverse: Tensor
    taken: Taken | None


class Rows(Protocol):
    """Matrices that come by rows."""

    def rows(self, rows: slice) -> Tensor:
        """These rows, any float dtype [b, rows, n]."""


# Newton-Schulz of (x, norm, inverse, options).
PolarMap = Callable[[Operand, Tensor, Tensor, "StepOptions"], Rows]


def transformed(grads: Tensor, batch: Batch, stored: StoredBatch, options: StepOptions) -> Taken:
    """What the rule's gains, or its transform, make of gradients, finite [b, m, n].

    Nothing is stored yet.
    """
    rule, (rows, columns) = options.rule, batch.weights[0].shape
    stage = rule.gains or rule.gradient
    assert stage is not None
    state = {name: stored[RULE_PREFIX + name] for name in stage.state((rows, columns))}
    parameters = _as_parameters(grads, rows, columns)
    if rule.gains is not None:
        asynchronous = stored.backend.asynchronous
        lr = _learning_rate(options, grads.device, asynchronous)
        rates = GainRates(lr, options.weight_decay, _steps(batch, asynchronous))
        new, factors = rule.gains.split(torch.stack(_values(batch)), parameters, state, rates)
        return Taken(_as_parameters(new, rows, columns), state, factors=factors)
    assert rule.gradient is not None
    momentum = None
    if rule.gradient.needs_stored:
        momentum = _as_parameters(stored.add(Terms(1.0))[0], rows, columns)
    new, rate = rule.gradient.apply(parameters, state, options.momentum, momentum)
    return Taken(_as_parameters(new, rows, columns), state, rate)


def step_by_rule(
    batch: Batch,
    given: Given,
    stored: StoredBatch,
    accepted: Tensor,
    options: StepOptions,
    scale: float,
    polar: PolarMap,
) -> None:
    """Move the weights, and what stages keep of them, where accepted (bool [b]).

    scale: of the learning rate, by the matrices' shape.
    """
    rule, backend = options.rule, given.x.backend
    matrices = _matrices(batch, given, stored, accepted, options)
    cautious = _decays_in_kernels(rule, batch, backend)
    reads_weights = bool(rule.needs("weights")) if cautious else rule.reads_weights
    values = _values(batch) if reads_weights else []
    matrices.weights = values
    if given.taken is not None and given.taken.factors is not None:
        matrices.weights = list(given.taken.factors.directions(torch.stack(values)).unbind())
    update = _direction(given, matrices, options, polar)
    for stage in rule.scaling:
        update = stage.apply(update if stage.takes_half else update.float(), matrices)
    size = rule.step_size.size(update, scale, matrices.weights, matrices)
    if reads_weights or (isinstance(size, Tensor) and size.ndim):
        update, size = update.float().mul_(size), 1.0
    for index, weight in enumerate(batch.weights):
        move = _Move(weight, update[index], size, accepted[index], batch.rounding[index])
        if cautious:
            _apply_cautiously(rule, move, matrices, scale, backend)
        else:
            value = values[index] if values else None
            _apply(rule, move, value, index, matrices, scale, backend)
    for name, new in matrices.state.items():
        stored.replace(RULE_PREFIX + name, new, accepted)


def _matrices(
    batch: Batch, given: Given, stored: StoredBatch, accepted: Tensor, options: StepOptions
) -> Matrices:
    """What the stages see."""
    rows, columns = batch.weights[0].shape
    asynchronous = given.x.backend.asynchronous
    names, taken = options.rule.state((rows, columns)), given.taken

    def read_grads() -> Tensor:
        of_gains = taken is not None and taken.factors is not None
        grads = taken.grads if taken is not None and of_gains else batch.stacked_gradients()
        if asynchronous:
            grads = torch.where(accepted.view(-1, 1, 1), grads, 0)
        return _as_parameters(grads, rows, columns)

    return Matrices(
        (rows, columns),
        read_grads,
        given.size.float().view(-1, 1, 1),
        _steps(batch, asynchronous),
        _learning_rate(options, accepted.device, asynchronous),
        options.weight_decay,
        options.momentum,
        {name: stored[RULE_PREFIX + name] for name in names} | (taken.state if taken else {}),
        rate=taken.rate if taken else None,
    )


def _learning_rate(
    options: StepOptions, device: torch.device, asynchronous: bool
) -> float | Tensor:
    """The group's, as a tensor only if it is one on the device."""
    lr = options.lr
    if not isinstance(lr, Tensor):
        return lr
    # one on the host would have to be copied to the device
    same = asynchronous and lr.device == device
    return lr.reshape(()).float() if same else float(lr)


def _steps(batch: Batch, asynchronous: bool) -> Tensor:
    """How many steps each parameter has taken, with this one, float32 [b, 1, 1]."""
    if asynchronous:
        steps = torch.stack([torch.as_tensor(count) for count in batch.steps]).float()
    else:
        steps = torch.tensor([float(count) for count in batch.steps])
    return (steps + 1).view(-1, 1, 1)


def _as_parameters(x: Tensor, rows: int, columns: int) -> Tensor:
    """A view of matrices [.., m, n], which have the short side first, as [.., rows, columns]."""
    return x if rows <= columns else x.mT


def _direction(given: Given, matrices: Matrices, options: StepOptions, polar: PolarMap) -> Tensor:
    """The direction map of the preconditioned momentum [b, rows, columns]: float32, or of
    Newton-Schulz in half precision, which a device's kernels read as it is."""
    rule, (rows, columns) = options.rule, matrices.shape
    is_polar = isinstance(rule.direction, Polar)
    if is_polar and not rule.precondition and not rule.needs("momentum"):
        update = polar(given.x, given.norm, given.inverse, options).rows(slice(None))
        return _as_parameters(update, rows, columns)
    backend, matrix = given.x.backend, given.x.dense()
    inverse = given.norm.clamp_min(TINY).reciprocal().masked_fill(given.inverse == 0, 0.0)
    if backend.asynchronous:  # zeros whatever it is
        backend.scaled(matrix, inverse, out=matrix)
    else:
        matrix.mul_(inverse.float().view(-1, 1, 1))
    x = _as_parameters(matrix, rows, columns)
    for stage in rule.precondition:
        x = stage.apply(x, matrices)
        x = to_norm_one(x) if stage.to_norm_one else x
    if rule.needs("momentum"):
        matrices.momentum = x.clone()
    if isinstance(rule.direction, DirectionMap):
        return rule.direction.apply(x, matrices)
    # (what is below eps is not brought to norm one)
    factor = (given.norm * given.inverse).clamp_max(1.0)
    operand = Dense(_as_parameters(x, rows, columns).contiguous(), backend)
    update = polar(operand, norm(x).to(factor).view(-1), factor, options).rows(slice(None))
    return _as_parameters(update, rows, columns)


def _values(batch: Batch) -> list[Tensor]:
    """The weights in float32 [rows, columns], with what rounding left over of them."""
    rows, columns = batch.weights[0].shape
    return [
        _as_parameters(exact_weight(orient(weight), rounding), rows, columns)
        for weight, rounding in zip(batch.weights, batch.rounding, strict=True)
    ]


@dataclass(frozen=True)
class _Move:
    """One matrix: weight <- decay * weight - size * update, where accepted."""

    weight: Tensor  # [rows, columns]
    update: Tensor  # [rows, columns], float32 if the rule reads weights
    size: float | Tensor
    accepted: Tensor
    rounding: Rounding | None


def _decays_in_kernels(rule: UpdateRule, batch: Batch, backend: Backend) -> bool:
    """Whether a decay that goes by signs is left to the kernels that update weights: by torch it
    takes five passes over matrices in float32, which a host does in its cache."""
    kernels = all(map(updated_by_kernels, batch.weights, batch.rounding))
    decays = isinstance(rule.weight_decay, Cautious) and rule.constraint is None
    return backend.asynchronous and kernels and decays


def _apply_cautiously(
    rule: UpdateRule, move: _Move, matrices: Matrices, scale: float, backend: Backend
) -> None:
    """`_apply` for `_decays_in_kernels`."""
    assert isinstance(rule.weight_decay, Cautious)
    rates = Rates(matrices.lr, matrices.weight_decay, scale)
    # products with the mask, and no constants to be copied there
    decay = 1 - move.accepted * rule.weight_decay.strength(rates)
    size = move.accepted * move.size
    weight, update = orient(move.weight), orient(move.update)
    update_weight(weight, update, decay, size, move.rounding, backend, cautious=True)


def _apply(
    rule: UpdateRule,
    move: _Move,
    value: Tensor | None,  # the weight in float32, if the rule reads it
    index: int,  # of the matrix
    matrices: Matrices,
    scale: float,
    backend: Backend,
) -> None:
    """Decay the weight, subtract the update and bring it to where the rule constrains it."""
    rate = None if matrices.rate is None else matrices.rate[index]  # [1, 1] or [1, columns]
    decays, rates = rule.weight_decay, Rates(matrices.lr, matrices.weight_decay, scale, rate)
    decay, size = decays.factor(rates), move.size
    if value is not None and (rule.constraint is not None or rule.gains is not None):
        new = _new_weight(rule, move.update, index, matrices, rates)
        torch.sub(value, new, out=move.update)
        value, decay = None, 1.0
    if backend.asynchronous:  # products with the mask, and no constants to be copied there
        size = move.accepted * size
        decay = 1 - move.accepted * (1 - decay)
    weight, update = orient(move.weight), orient(move.update)
    # Kernels leave weights alone that move by zero, whatever the update is; torch does not.
    masked = backend.asynchronous and not updated_by_kernels(weight, move.rounding)
    whole = decays.needs_weights or backend.asynchronous
    for rows in _panels(weight, move.rounding, whole=whole):
        part, rounding = update[rows], move.rounding
        if value is not None and decays.reads_weights:
            near = rates
            if rate is not None and rate.numel() > 1 and weight.shape != move.weight.shape:
                near = replace(rates, rate=rate.mT[rows])
            decays.add(part, orient(value)[rows], near)
        if masked:
            part = torch.where(move.accepted, part, 0)
        if isinstance(rounding, Compensation):
            rounding = rounding.rows(rows)
        update_weight(weight[rows], part, decay, size, rounding, backend)


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
