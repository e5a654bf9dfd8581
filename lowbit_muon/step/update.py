"""The step: decode, add the gradient, encode, look ahead, orthogonalise, update the weights.

One for hosts and devices, on a batch of matrices of one shape. What depends on values (norms, which
gradients are finite) stays in tensors. A host reads them where it would otherwise do work for
nothing; a device is never waited for, and writes through masks instead, so that a matrix with a
gradient that is not finite keeps its momentum and its weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.linalg.coefficients import Triple, cached_coefficients, resolve_coefficients
from lowbit_muon.linalg.newton_schulz import (
    ROUNDED_ROWS,
    gram_form_rounds,
    gram_operator,
    orthogonalize_half,
    standard_form,
    takes_gram_form,
)
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.codecs.spectral import Spectral
from lowbit_muon.state.gradients import LARGEST_NORM, NORM_EPS, frobenius_norm
from lowbit_muon.state.operands import SCRATCH_FLOATS, Companded, Dense, Operand, Panels, row_slices
from lowbit_muon.state.rounding import Compensation, Rounding, update_weight
from lowbit_muon.state.stored import QuantizedMatrix, StoredBatch, orient, rescaling
from lowbit_muon.step.by_rule import Given, Taken, step_by_rule, transformed
from lowbit_muon.step.options import AdjustLr, NsDtype, plain_value
from lowbit_muon.step.rules.momentum import Weights, weights_of
from lowbit_muon.step.rules.recipes import rule_of_json
from lowbit_muon.step.rules.rule import UpdateRule

_T = TypeVar("_T")

_PLAIN = {float, int, bool, str, type(None)}
# Small enough for float32 beside the square root of a matrix's size.
_SMALLEST_DIVISOR = 1e-30


@dataclass(frozen=True)
class StepOptions:
    """A group's options, as a step of its matrices needs them. lr may be a tensor on the device."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    coefficients: tuple[Triple, ...]
    eps: float
    adjust_lr_fn: AdjustLr | None
    ns_input: Literal["exact", "stored"]
    ns_dtype: NsDtype
    rule: UpdateRule
    weights: Weights  # of momentum and gradient

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> StepOptions:
        names = (name for name in _OPTION_NAMES if name in group)
        rule = rule_of_json(json.dumps(group["rule"]))
        given = group["ns_coefficients"], group["ns_steps"]
        try:
            coefficients = cached_coefficients(*given)
        except TypeError:  # lists
            coefficients = resolve_coefficients(*given)
        values = {name: group[name] for name in names}
        for name, value in values.items():
            if type(value) not in _PLAIN:
                values[name] = plain_value(value)
        weights = weights_of(rule.momentum, values["momentum"], group["nesterov"])
        return cls(coefficients=coefficients, rule=rule, weights=weights, **values)


_OPTION_NAMES = [
    field.name for field in dataclasses.fields(StepOptions) if field.name not in ("rule", "weights")
]
_SCALES: dict[str | None, Callable[[int, int], float]] = {
    None: lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "original": lambda rows, columns: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
    "megatron": lambda rows, columns: math.sqrt(max(rows, columns)),
    "none": lambda rows, columns: 1.0,
}


def update_scale(adjust_lr_fn: AdjustLr | None, shape: Sequence[int]) -> float:
    """Factor of the learning rate for a matrix [rows, columns] (see `lowbit_muon.Muon`)."""
    return _SCALES[adjust_lr_fn](*shape)


def check_ns_dtype(group: dict[str, Any], backend: Backend) -> None:
    """Raise ValueError unless a backend takes a group's `ns_dtype`."""
    if backend.asynchronous:
        return
    taken = ("auto", "float32", "bfloat16") if backend.rounded_dtype else ("auto", "float32")
    if group["ns_dtype"] not in taken:
        names = ", ".join(map(repr, taken[:-1]))
        raise ValueError(
            f"ns_dtype: expected {names} or {taken[-1]!r} with backend '{backend.name}' on this "
            f"processor, which computes in no other dtype, got {group['ns_dtype']!r}"
        )


@dataclass(frozen=True)
class Batch:
    """Matrices of one shape, format, dtype of weight and of gradient, and device.

    weights, grads: [rows, columns] each, any float dtype and strides. rounding: of the new weights;
    to the nearest where None. allowed: bool [b], False for those that are to be left as they are.
    steps: that their parameters have taken so far, and numbers: their places in the optimizer, for
    rules that are not fused.
    """

    weights: Sequence[Tensor]
    grads: Sequence[Tensor]
    momenta: Sequence[QuantizedMatrix]
    rounding: Sequence[Rounding | None]
    allowed: Tensor | None = None
    steps: Sequence[int | Tensor] = ()
    numbers: Sequence[int] = ()

    def where(self, chosen: Sequence[bool]) -> Batch:
        """Those that are chosen, all of them allowed."""

        def some(values: Sequence[_T]) -> list[_T]:
            return list(itertools.compress(values, chosen))

        return Batch(
            some(self.weights),
            some(self.grads),
            some(self.momenta),
            some(self.rounding),
            steps=some(self.steps),
            numbers=some(self.numbers),
        )

    def stacked_gradients(self) -> Tensor:
        """[b, m, n], in a dtype that kernels take; a view if there is one matrix."""
        grads = [orient(g.float() if g.dtype == torch.float64 else g) for g in self.grads]
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


def update(batch: Batch, options: StepOptions, backend: Backend) -> Tensor:
    """Update momenta and weights; returns which matrices were accepted, bool [b].

    M <- momentum*M + (1 - momentum)*G; W <- (1 - lr*wd)*W - lr*scale*orthogonalize(X) with X = M,
    or with Nesterov momentum*M + (1 - momentum)*G, or what the codes hold then (`ns_input`). Other
    rules than Muon's may do otherwise with all but the stored momentum (`step.by_rule`). A
    format with `normalize` divides G by its norm, sums, and divides M by its norm
    (arXiv 2605.11396). Where G is zero, M becomes smaller and its codes stay.
    """
    stored = StoredBatch(batch.momenta, backend)
    grads = batch.stacked_gradients()
    taken = None
    if options.rule.gradient is not None or options.rule.gains is not None:
        usable = torch.linalg.vector_norm(grads, ord=math.inf, dim=(1, 2)) <= LARGEST_NORM
        if not backend.asynchronous and not bool(usable.all()):
            return _update_in_parts(usable.tolist(), batch, options, backend, skipped=True)
        batch, taken = _transform(grads, usable, batch, stored, options)
        grads = taken.grads
    idle = _idle(grads, stored)
    if isinstance(idle, list):
        return _update_in_parts(idle, batch, options, backend)
    terms = _terms(grads, stored, options)
    fresh, squares = _add_gradient(stored, terms, options)

    accepted = squares <= LARGEST_NORM**2  # false for nan
    if batch.allowed is not None:
        accepted &= batch.allowed
    if backend.asynchronous:
        idle = None if idle is None else idle & accepted
        stored.accepted = accepted if idle is None else accepted > idle
    elif not bool(accepted.all()):
        return _update_in_parts(accepted.tolist(), batch, options, backend, skipped=True)
    refused = ~accepted
    norm = squares.masked_fill(refused, 0.0).sqrt()

    scale, terms = _scale(fresh, norm, terms, stored)
    # Codes that products go on reading are replaced last.
    encode_last = isinstance(fresh, Panels) and options.ns_input == "exact"
    if not encode_last:
        _encode(stored, fresh, norm, scale, options, idle)
    if options.ns_input == "stored":
        x, x_norm, scale, options = _stored_operand(stored, norm, options)
    elif options.weights.ahead is not None:
        x, x_norm = _look_ahead(fresh, terms, options.weights.ahead)
    else:
        x, x_norm = fresh, norm if scale is None else norm * scale
    divisor = x_norm.clamp_min(max(options.eps, _SMALLEST_DIVISOR))
    if scale is not None:
        divisor = torch.maximum(x_norm, options.eps * scale).clamp_min(_SMALLEST_DIVISOR)
    inverse = divisor.reciprocal().masked_fill(refused, 0.0)
    if options.rule.is_fused:
        _update_weights(batch, _orthogonalize(x, x_norm, inverse, options), accepted, options)
    else:
        size = x_norm.masked_fill(refused, 0.0)
        momentum = Given(x, size if scale is None else size / scale, size, inverse, taken)
        lr_scale = options.rule.step_size.factor
        lr_scale *= update_scale(options.adjust_lr_fn, batch.weights[0].shape)
        step_by_rule(batch, momentum, stored, accepted, options, lr_scale, _orthogonalize)
    if encode_last:
        _encode(stored, fresh, norm, scale, options, idle)
    return accepted


def _transform(
    grads: Tensor, usable: Tensor, batch: Batch, stored: StoredBatch, options: StepOptions
) -> tuple[Batch, Taken]:
    """What the rule's transform makes of gradients [b, m, n]; only usable ones, bool [b], count."""
    grads = torch.where(usable.view(-1, 1, 1), grads, 0)
    allowed = usable if batch.allowed is None else batch.allowed & usable
    batch = dataclasses.replace(batch, allowed=allowed)
    return batch, transformed(grads, batch, stored, options)


class _Ahead(Dense):
    """X that looks ahead already; its codes wait to be committed (`StoredBatch.add_and_encode`)."""

    def __init__(self, matrix: Tensor, backend: Backend, squares: Tensor) -> None:
        super().__init__(matrix, backend)
        self.squares = squares


def _terms(grads: Tensor, stored: StoredBatch, options: StepOptions) -> Terms:
    """What the new momentum is the sum of."""
    weights = options.weights
    if not stored.codec.state_format.normalize:
        return Terms(weights.buffer, grad=grads, grad_weight=weights.grad)
    norms = torch.stack([frobenius_norm(grad) for grad in grads])
    return _weighted(Terms(weights.buffer, grad=grads), 1 / (norms + NORM_EPS), stored.backend)


def _weighted(terms: Terms, weights: Tensor, backend: Backend) -> Terms:
    """The terms with the gradients times `weights`, float64 [b]."""
    if not backend.asynchronous and len(weights) == 1:
        return dataclasses.replace(terms, grad_weight=terms.grad_weight * float(weights))
    assert terms.grad is not None
    grad = terms.grad.float() * weights.float().view(-1, 1, 1)
    return dataclasses.replace(terms, grad=grad)


def _add_gradient(
    stored: StoredBatch, terms: Terms, options: StepOptions
) -> tuple[Dense | Panels, Tensor]:
    """The new momentum, and its sums of squares, float64 [b], not finite where it is not."""
    codec, backend = stored.codec, stored.backend
    if codec.by_rows and len(row_slices(stored.shape, backend)) > 1:
        panels = Panels(stored, terms)
        return panels, panels.squares()
    exact, normalize = options.ns_input == "exact", codec.state_format.normalize
    if backend.asynchronous and codec.is_plain and exact and not normalize:
        momentum, share = options.weights.ahead or (1.0, 0.0)
        ahead = (momentum, share * terms.grad_weight)
        matrix, squares, ahead_squares = stored.add_and_encode(terms, ahead)
        return _Ahead(matrix, backend, ahead_squares), squares
    matrix, squares = stored.add(terms)
    # Without a look-ahead the encoder and the iteration start from the same Gram matrix.
    return Dense(matrix, backend, keep_gram=exact and options.weights.ahead is None), squares


def _idle(grads: Tensor, stored: StoredBatch) -> Tensor | list[bool] | None:
    """Which gradients are zero, as those of an expert without tokens: bool [b], or None if none is.

    A host that finds some of both kinds gets a list, to step each kind by itself. Dense formats
    store a smaller momentum as exactly as it was.
    """
    if not isinstance(stored.codec, Coded):
        return None
    if stored.backend.asynchronous:
        return torch.linalg.vector_norm(grads, ord=math.inf, dim=(1, 2)) == 0
    if bool(grads[:, 0].any(dim=1).all()):  # most often one row tells
        return None
    idle = ~grads.flatten(1).any(dim=1)
    if bool(idle.all()):
        return idle
    return idle.tolist() if bool(idle.any()) else None


def _update_in_parts(
    flags: list[bool],
    batch: Batch,
    options: StepOptions,
    backend: Backend,
    *,
    skipped: bool = False,
) -> Tensor:
    """`update` of those with a flag and, unless they are skipped, of the others by themselves.

    Only hosts come here; nothing has changed so far.
    """
    accepted = torch.zeros(len(flags), dtype=torch.bool, device=batch.weights[0].device)
    for kind in (True,) if skipped else (True, False):
        chosen = [flag == kind for flag in flags]
        if any(chosen):
            accepted[torch.tensor(chosen)] = update(batch.where(chosen), options, backend)
    return accepted


def _scale(
    fresh: Dense | Panels, norm: Tensor, terms: Terms, stored: StoredBatch
) -> tuple[Tensor | None, Terms]:
    """Multiply the momentum, in place, before products square it; (factors or None, new terms)."""
    backend = stored.backend
    if stored.codec.state_format.normalize:
        scale: Tensor | None = 1 / (norm + NORM_EPS)
    else:  # devices scale for each product instead of looking
        scale = None if backend.asynchronous else rescaling(norm)
    if scale is None:
        return None, terms
    _multiply(fresh, scale)
    return scale, _weighted(terms, scale, backend)


def _multiply(x: Dense | Panels, factors: Tensor) -> None:
    """Each matrix by its factor, float64 [b], in place."""
    if isinstance(x, Panels):
        x.scale(float(factors))
    else:
        x.matrix.mul_(factors.float().view(-1, 1, 1))


def _encode(
    stored: StoredBatch,
    fresh: Dense | Panels,
    norm: Tensor,
    scale: Tensor | None,
    options: StepOptions,
    idle: Tensor | None,
) -> None:
    """Store the new momentum, of which `fresh` is `scale` times."""
    shrinks = idle is not None and not stored.backend.asynchronous
    if not (isinstance(fresh, _Ahead) or shrinks):
        if stored.codec.state_format.normalize and scale is not None:
            norm, scale = norm * scale, None  # what is stored is the scaled momentum itself
        # bfloat16 would be a tenth of 4-bit noise after the encoder has enlarged it
        dtype = torch.float32 if options.ns_dtype == "float32" else torch.float16
        stored.codec.encode(stored, fresh, norm, scale, dtype)
    stored.commit()
    if idle is not None and not stored.codec.state_format.normalize:
        assert isinstance(stored.codec, Coded)
        stored.codec.shrink(stored, idle, options.weights.buffer)
    if isinstance(fresh, Panels):
        fresh.release()


def _look_ahead(
    fresh: Dense | Panels, terms: Terms, ahead: tuple[float, float]
) -> tuple[Dense | Panels, Tensor]:
    """u of `Weights`, in the place of M if that is in memory, and its norm."""
    if isinstance(fresh, _Ahead):
        return fresh, fresh.squares.sqrt()
    if isinstance(fresh, Panels):
        panels = fresh.ahead(*ahead)
        return panels, panels.squares().sqrt()
    momentum, share = ahead
    terms = dataclasses.replace(
        terms, buffer_weight=momentum, grad_weight=share * terms.grad_weight
    )
    squares = fresh.backend.accumulate(fresh.matrix, terms).sum(dim=-1)
    return fresh, squares.sqrt()


def _stored_operand(
    stored: StoredBatch, norm: Tensor, options: StepOptions
) -> tuple[Operand, Tensor, Tensor | None, StepOptions]:
    """What the codes hold, its norm, its size relative to the momentum, and the options for it.

    Of a spectral format that is the codes' own matrix Y, whose polar factor is the momentum's. Its
    small singular values are 1/(c ||Y||) times larger, both of norm one, and ||Y|| is at most
    m^(1/3), where all singular values are equal: as many first steps, each of which multiplies
    small singular values by its a, are left out, but for one.
    """
    codec, backend = stored.codec, stored.backend
    if isinstance(codec, Spectral) and codec.reads_integers:
        f = codec.state_format
        y = Companded(codec.codes(stored), backend, rotated=f.rotate)
        lift, steps = 1 / (codec.shift * codec.m ** (1 / 3)), list(options.coefficients)
        while len(steps) > 1 and lift >= steps[0][0]:
            lift /= steps.pop(0)[0]
        scale = torch.where(norm > 0, y.norm() / norm, 1.0)
        return y, y.norm(), scale, dataclasses.replace(options, coefficients=tuple(steps))
    if codec.by_rows and len(row_slices(stored.shape, backend)) > 1:
        panels = Panels(stored, Terms(1.0))
        x: Dense | Panels = panels
        x_norm = panels.squares().sqrt()
    else:
        matrix, squares = stored.add(Terms(1.0))
        x, x_norm = Dense(matrix, backend), squares.sqrt()
    factors = None if backend.asynchronous else rescaling(x_norm)
    if factors is not None:
        _multiply(x, factors)
        x_norm = x_norm * factors
    return x, x_norm, factors, options


@dataclass(frozen=True)
class _Direction:
    """What the weights move by: inverse * Q X, which need not exist as a whole, or `update`."""

    backend: Backend
    update: Tensor | None = None  # float32 or half precision [b, m, n]
    x: Operand | None = None
    operator: Tensor | None = None  # Q, float32 [b, m, m]
    inverse: Tensor | None = None  # float64 [b]
    rounded: bool = False  # Q and X to bfloat16, before they are multiplied

    def rows(self, rows: slice) -> Tensor:
        """These rows of each matrix."""
        if self.update is not None:
            return self.update[:, rows]
        assert self.x is not None
        assert self.operator is not None
        assert self.inverse is not None
        a = self.operator[:, rows]
        shape = (*a.shape[:2], self.x.shape[2])
        out = torch.empty(shape, dtype=torch.float32, device=self.x.device)
        diagonal = -(rows.start or 0) if self.rounded else None
        return self.x.multiply(a, out, alpha=self.inverse, diagonal=diagonal)


def _orthogonalize(x: Operand, norm: Tensor, inverse: Tensor, options: StepOptions) -> _Direction:
    """The Newton-Schulz direction of inverse * X; x is used up.

    norm: of X, float64 [b]; inverse: float64 [b], 0 for zeros.
    """
    backend, coefficients = x.backend, options.coefficients
    if not backend.asynchronous:
        factor = inverse.float()
        rounded = options.ns_dtype != "float32" and backend.rounded_dtype is not None
        rounded = rounded and x.shape[1] >= ROUNDED_ROWS
        if not takes_gram_form(x.shape, coefficients, torch.float32, backend, rounded=rounded):
            matrix = x.dense().mul_(factor.view(-1, 1, 1))
            update = standard_form(matrix, coefficients, backend, rounded=rounded)
            return _Direction(backend, update)
        rounded = rounded and gram_form_rounds(coefficients)
        r = x.gram(rounded=rounded)
        r.mul_(factor.view(-1, 1, 1)).mul_(factor.view(-1, 1, 1))
        operator = gram_operator(r, coefficients, backend, rounded=rounded)
        return _Direction(backend, None, x, operator, inverse, rounded)
    matrix = x.dense()
    if options.ns_dtype == "float32":
        backend.scaled(matrix, inverse, out=matrix)
        if not takes_gram_form(x.shape, coefficients, torch.float32, backend):
            return _Direction(backend, standard_form(matrix, coefficients, backend))
        operator = gram_operator(backend.symmetric_product(matrix), coefficients, backend)
        return _Direction(backend, backend.product(operator, matrix))
    unit = 1 / math.sqrt(x.shape[1] * x.shape[2])
    dtype = torch.bfloat16 if options.ns_dtype == "bfloat16" else torch.float16
    half = torch.empty(x.shape, dtype=dtype, device=x.device)
    backend.scaled(matrix, inverse / unit, out=half)
    del matrix  # nobody else holds it, and what follows takes as much again
    update = orthogonalize_half(half, norm * inverse, coefficients, backend, unit=unit)
    return _Direction(backend, update)


def _update_weights(
    batch: Batch, direction: _Direction, accepted: Tensor, options: StepOptions
) -> None:
    """W <- (1 - lr*wd)*W - lr*scale*O, where accepted."""
    backend, lr = direction.backend, options.lr
    weights = [orient(weight) for weight in batch.weights]
    scale = update_scale(options.adjust_lr_fn, batch.weights[0].shape)
    scale *= options.rule.step_size.factor
    rounding = batch.rounding
    if backend.asynchronous:
        if isinstance(lr, Tensor):  # a CPU scalar would have to be copied to the device
            lr = lr.reshape(()).float() if lr.device == accepted.device else float(lr)
        # Products with the mask and no constants, which would have to be copied to the device.
        step_sizes = accepted * (lr * scale)
        decays = torch.rsub(step_sizes, 1.0, alpha=options.weight_decay / scale)
        update = direction.rows(slice(None))
        for i, weight in enumerate(weights):
            update_weight(weight, update[i], decays[i], step_sizes[i], rounding[i], backend)
        return
    lr = float(lr)
    decay, step_size = 1 - lr * options.weight_decay, lr * scale
    plain = all(w.dtype == torch.float32 for w in weights) and not any(
        each is not None for each in rounding
    )
    if direction.operator is not None and plain:
        _multiply_into(weights, direction, step_size, decay)
        return
    # Bits of stochastic rounding go by places in the whole matrix.
    whole = any(isinstance(each, Tensor) for each in rounding)
    m, n = weights[0].shape
    # Rounding takes three float32 of each element. (Panels are decoded for each of these parts.)
    height = m if whole else max(1, SCRATCH_FLOATS // (2 * n * len(weights)))
    for rows in (slice(start, start + height) for start in range(0, m, height)):
        update = direction.rows(rows)
        for weight, new, each in zip(weights, update, rounding, strict=True):
            part = each.rows(rows) if isinstance(each, Compensation) else each
            update_weight(weight[rows], new, decay, step_size, part, backend)


def _multiply_into(
    weights: list[Tensor], direction: _Direction, step_size: float, decay: float
) -> None:
    """One product with the weights as its addend: the update itself is never stored."""
    x, operator, inverse = direction.x, direction.operator, direction.inverse
    assert x is not None
    assert operator is not None
    assert inverse is not None
    out = weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)
    diagonal = 0 if direction.rounded else None
    x.multiply(operator, out, alpha=-step_size * inverse, beta=decay, diagonal=diagonal)
    if len(weights) > 1:
        torch._foreach_copy_(weights, list(out.unbind()))
