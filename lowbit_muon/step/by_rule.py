"""The part of a step that rules other than Muon's change: from the momentum to the update.

It exists as a matrix here, which stages look at and change; Muon's own step never forms it
(`step.update`). `step.rule_weights` applies it. Nothing waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lowbit_muon.backends.codes import Terms
from lowbit_muon.state.operands import Dense, Operand
from lowbit_muon.state.stored import RULE_PREFIX, StoredBatch
from lowbit_muon.step.rule_weights import RuleWeights, as_parameters, read_weights
from lowbit_muon.step.rules.direction import DirectionMap, Polar
from lowbit_muon.step.rules.gains import Factors, GainRates
from lowbit_muon.step.rules.precondition import to_norm_one
from lowbit_muon.step.rules.stage import AGE, TINY, Matrices, norm

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
    parameters = as_parameters(grads, rows, columns)
    if rule.gains is not None:
        asynchronous = stored.backend.asynchronous
        lr = _learning_rate(options, grads.device, asynchronous)
        rates = GainRates(lr, options.weight_decay, stored[RULE_PREFIX + AGE] + 1)
        new, factors = rule.gains.split(torch.stack(read_weights(batch)), parameters, state, rates)
        return Taken(as_parameters(new, rows, columns), state, factors=factors)
    assert rule.gradient is not None
    momentum = None
    if rule.gradient.needs_stored:
        momentum = as_parameters(stored.add(Terms(1.0))[0], rows, columns)
    new, rate = rule.gradient.apply(parameters, state, options.momentum, momentum)
    return Taken(as_parameters(new, rows, columns), state, rate)


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
    rule = options.rule
    weights = RuleWeights.of(batch, rule, given.x.backend)
    matrices = _matrices(batch, given, stored, accepted, options)
    matrices.weights = weights.values
    if given.taken is not None and given.taken.factors is not None:
        matrices.weights = list(given.taken.factors.directions(torch.stack(weights.values)))
    update = _direction(given, matrices, options, polar)
    for stage in rule.scaling:
        update = stage.apply(update if stage.takes_half else update.float(), matrices)
    size = rule.step_size.size(update, scale, matrices.weights, matrices)
    weights.move(update, size, accepted, matrices, scale)
    for name, new in matrices.state.items():
        stored.replace(RULE_PREFIX + name, new, accepted)


def _matrices(
    batch: Batch, given: Given, stored: StoredBatch, accepted: Tensor, options: StepOptions
) -> Matrices:
    """What the stages see."""
    rows, columns = batch.weights[0].shape
    asynchronous = given.x.backend.asynchronous
    taken = given.taken
    state = {name: stored[RULE_PREFIX + name] for name in options.rule.state((rows, columns))}
    if AGE in state:
        state[AGE] = state[AGE] + 1

    def read_grads() -> Tensor:
        of_gains = taken is not None and taken.factors is not None
        grads = taken.grads if taken is not None and of_gains else batch.stacked_gradients()
        if asynchronous:
            grads = torch.where(accepted.view(-1, 1, 1), grads, 0)
        return as_parameters(grads, rows, columns)

    return Matrices(
        (rows, columns),
        read_grads,
        given.size.float().view(-1, 1, 1),
        _steps(batch, asynchronous),
        _learning_rate(options, accepted.device, asynchronous),
        options.weight_decay,
        options.momentum,
        state | (taken.state if taken else {}),
        rate=taken.rate if taken else None,
        numbers=batch.numbers,
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


def _direction(given: Given, matrices: Matrices, options: StepOptions, polar: PolarMap) -> Tensor:
    """The direction map of the preconditioned momentum [b, rows, columns]: float32, or of
    Newton-Schulz in half precision, which a device's kernels read as it is."""
    rule, (rows, columns) = options.rule, matrices.shape
    is_polar = isinstance(rule.direction, Polar)
    if is_polar and not rule.precondition and not rule.needs("momentum"):
        update = polar(given.x, given.norm, given.inverse, options).rows(slice(None))
        return as_parameters(update, rows, columns)
    backend, matrix = given.x.backend, given.x.dense()
    inverse = given.norm.clamp_min(TINY).reciprocal().masked_fill(given.inverse == 0, 0.0)
    if backend.asynchronous:  # zeros whatever it is
        backend.scaled(matrix, inverse, out=matrix)
    else:
        matrix.mul_(inverse.float().view(-1, 1, 1))
    x = as_parameters(matrix, rows, columns)
    for stage in rule.precondition:
        x = stage.apply(x, matrices)
        x = to_norm_one(x) if stage.to_norm_one else x
    if rule.needs("momentum"):
        matrices.momentum = x.clone()
    if isinstance(rule.direction, DirectionMap):
        return rule.direction.apply(x, matrices)
    # (what is below eps is not brought to norm one)
    factor = (given.norm * given.inverse).clamp_max(1.0)
    operand = Dense(as_parameters(x, rows, columns).contiguous(), backend)
    update = polar(operand, norm(x).to(factor).view(-1), factor, options).rows(slice(None))
    return as_parameters(update, rows, columns)
