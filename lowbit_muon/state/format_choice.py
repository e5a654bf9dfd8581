"""Which of an `AutoFormat`'s candidates a parameter's momentum is stored in."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import Triple, resolve_coefficients
from lowbit_muon.state.gradients import is_usable
from lowbit_muon.state.parameter import (
    MatrixView,
    assemble,
    flatten,
    momentum_format,
    quantized_state,
    read_matrix,
    stored_keys,
)
from lowbit_muon.state.update_error import UpdateError, next_momentum

# A smaller format than the present one has to be better than the target by this share: errors of
# one matrix vary by about a hundredth from step to step, and every change quantises once more.
_MARGIN = 0.1

_log = logging.getLogger(__name__)


def choose_format(
    auto: AutoFormat,
    samples: Sequence[Tensor],
    coefficients: Sequence[Triple],
    *,
    present: StateFormat | None = None,
    backend: str = "auto",
) -> tuple[StateFormat, float | None]:
    """(format, its error) for matrices [rows, columns] like these, stored together.

    Zeros have no error: the present format, or else the last candidate, is kept for them.
    """
    formats = auto.formats
    index = formats.index(present) if present in formats else 0
    errors = [UpdateError(sample, coefficients, backend) for sample in samples]
    largest = None
    for place, candidate in enumerate(formats):
        known = [error for error in (each.of(candidate) for each in errors) if error is not None]
        if not known:
            return present or formats[-1], None
        largest = max(known)
        if largest <= auto.target_error * (1 - _MARGIN if place < index else 1):
            return candidate, largest
    return formats[-1], largest


def revise_format(
    auto: AutoFormat,
    grad: Tensor,  # of the parameter's shape
    state: dict[str, Any],
    views: list[MatrixView],
    group: dict[str, Any],
    name: str,
    weights: tuple[float, float],
) -> None:
    """Before a step: choose the parameter's format, where that is due, and convert its momentum.

    weights: of momentum and gradient, see `next_momentum`.

    The state keeps the choice, and how many steps it was asked for: unlike the number of those
    that were taken, a device need not be waited for to know it.
    """
    asked = state.get("asked", 0)
    state["asked"] = asked + 1
    if not auto.is_due(asked):
        return
    present = momentum_format(group, state) if state.get("state_format") else None
    chosen, error = present or auto.formats[-1], None
    if bool(is_usable(grad)):
        samples = _next_momenta(flatten(grad, group), state, views, group, present, weights)
        coefficients = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
        chosen, error = choose_format(
            auto, samples, coefficients, present=present, backend=group["backend"]
        )
    if chosen == present:
        return
    if present is not None:
        converted = quantized_state(
            assemble(grad, views, present, state, group["backend"]), chosen, views, group
        )
        for key in stored_keys(state, views):
            del state[key]
        state.update(converted)
    state["state_format"] = chosen.to_dict()
    _log.info(
        "%s %s: %s -> %s (error of the update %s, target %g, step %d)",
        name,
        tuple(grad.shape),
        present.name if present else "none",
        chosen.name,
        "unknown" if error is None else f"{error:.3f}",
        auto.target_error,
        asked + 1,
    )


def _next_momenta(
    grad: Tensor,  # [all rows, columns]
    state: dict[str, Any],
    views: list[MatrixView],
    group: dict[str, Any],
    present: StateFormat | None,
    weights: tuple[float, float],
) -> list[Tensor]:
    """What is to be stored after this step; of a momentum of zeros, but for its size."""
    if present is None:
        return [grad[view.rows].float() for view in views]
    return [
        next_momentum(
            read_matrix(state, view, present, grad.device),
            grad[view.rows],
            weights,
            group["backend"],
        )
        for view in views
    ]
