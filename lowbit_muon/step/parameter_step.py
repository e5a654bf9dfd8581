"""One parameter: its state before a step, and its step on a host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.state.momentum_state import NonFiniteGradientError, is_usable
from lowbit_muon.state.offload import keep_on_host
from lowbit_muon.state.parameter import (
    MatrixView,
    ParameterStep,
    flatten,
    momentum_format,
    read_matrix,
    stored_keys,
    write_matrix,
)
from lowbit_muon.state.placement import in_parts, local_part
from lowbit_muon.state.rounding import Compensation, StochasticRounding
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.group_step import (
    GroupStep,
    compensation,
    count_skipped,
    rounding_seed,
    seed_of_step,
)


def prepare_state(
    state: dict[str, Any],
    param: Tensor,
    group: dict[str, Any],
    views: list[MatrixView],
    own: Sequence[bool] | None = None,
) -> None:
    """Make what is missing of a parameter's state.

    own: which of its matrices this process keeps, if others keep the rest.
    """
    local = local_part(param)
    for name in ("step", "skipped"):
        state.setdefault(name, 0)
    for index, view in enumerate(views):
        if stored_keys(state, [view]) or not (own is None or own[index]):
            continue
        matrix = QuantizedMatrix.zeros(
            view.shape,
            momentum_format(group, state),
            seed=group["seed"] + index,
            device=local.device,
        )
        write_matrix(state, view, matrix)
    # Remainders lie beside the weights: with the owner of whole ones, and with every part.
    here = own is None or any(own) or in_parts(param)
    kept = here and group["compensation"] and Compensation.applies_to(param)
    if kept and "remainder" not in state:
        state["remainder"] = torch.zeros_like(local, dtype=torch.int8)
    if group["offload"]:
        keep_on_host(state, views)


def update_parameter(one: ParameterStep, step: GroupStep, group: dict[str, Any]) -> None:
    """One parameter on the host."""
    param, state, views = one.param, one.state, one.views
    # A parameter of several matrices is skipped as a whole, so it is checked as a whole first.
    grad = one.grad.float() if one.grad.dtype == torch.float64 else one.grad
    if len(views) > 1 and not bool(is_usable(grad)):
        count_skipped(state, param)
        return
    grad, weights = flatten(grad, group), flatten(param, group)
    state_format = momentum_format(group, state)
    for index, view in enumerate(views):
        momentum = read_matrix(state, view, state_format)
        rounding: StochasticRounding | Compensation | None = compensation(state, view, group)
        if step.stochastic_rounding and param.dtype == torch.bfloat16:
            start = rounding_seed(group["seed"], one.number, index)
            rounding = StochasticRounding(seed_of_step(start, int(state["step"])))
        try:
            step.update_matrix(weights[view.rows], grad[view.rows], momentum, rounding=rounding)
        except NonFiniteGradientError:
            count_skipped(state, param)
            return
    state["step"] += 1
