"""A group's parameters in batches of matrices of one shape; their counters, seeds and flags."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.state.gradients import count_skipped, is_usable
from lowbit_muon.state.offload import Fetched
from lowbit_muon.state.parameter import ParameterStep, part_of, read_matrix
from lowbit_muon.state.rounding import Compensation, Rounding, rounding_seed, seed_of_step
from lowbit_muon.state.stored import QuantizedMatrix, orient
from lowbit_muon.step.rules.sampling import Sampling
from lowbit_muon.step.update import Batch, StepOptions, update

State = dict[str, Any]

# Elements that a batch of several matrices has at most. On a device 16 Mi: enough to fill it; while
# they are worked on they take 10 to 16 bytes each, and with a spectral encoder's m x m matrices,
# for m = n, up to 50. On a host, where a batch saves calls and nothing else, what stays in a cache.
DEVICE_ELEMENTS = 2**24
HOST_ELEMENTS = 2**17


@dataclass(frozen=True)
class _Item:
    """One matrix, and what its parameter is told of it."""

    weight: Tensor  # [rows, ...], see `part_of`
    grad: Tensor
    momentum: QuantizedMatrix
    rounding: Rounding | None
    one: ParameterStep
    counts: bool  # whether its parameter is counted by it
    usable: Tensor | None  # whether its whole parameter is to be stepped, if that is known


def step_parameters(
    steps: Sequence[ParameterStep], options: StepOptions, group: dict[str, Any]
) -> None:
    """One step of parameters of one group, each with its gradient."""
    if options.rule.sampling is not None:
        steps = list(_taken(steps, options.rule.sampling, group["seed"]))
    buckets: dict[Hashable, list[_Item]] = defaultdict(list)
    for one in steps:
        for item in _items(one, group):
            momentum, weight = item.momentum, item.weight
            dtypes = (weight.dtype, item.grad.dtype)
            key = (momentum.shape, momentum.state_format, dtypes, item.one.backend, weight.device)
            buckets[key].append(item)
    batches = [part for items in buckets.values() for part in _parts(items)]
    fetched = _fetched(batches) if group["offload"] else ((items, None) for items in batches)
    for items, momenta in fetched:
        weights = [item.weight.flatten(1) for item in items]
        batch = Batch(
            weights,
            [item.grad.flatten(1) for item in items],
            momenta or [item.momentum for item in items],
            [item.rounding for item in items],
            _flags(items) if any(item.usable is not None for item in items) else None,
            [] if options.rule.is_fused else [_steps(item) for item in items],
            [item.one.number for item in items],
        )
        _count(items, update(batch, options, items[0].one.backend))
        for item, weight in zip(items, weights, strict=True):
            if weight.data_ptr() != item.weight.data_ptr():  # in channels_last it is a copy
                item.weight.copy_(weight.view(item.weight.shape))


def _taken(
    steps: Sequence[ParameterStep], sampling: Sampling, seed: int
) -> Iterator[ParameterStep]:
    """Those that are sampled; on devices all, with what tells which. Others are counted here."""
    for one in steps:
        state, device = one.state, one.param.device
        if one.backend.asynchronous:
            count = _counter(state, "step", device) + _counter(state, "skipped", device)
            yield replace(one, taken=torch.as_tensor(sampling.takes(seed, count)))
        elif sampling.takes(seed, int(state["step"]) + int(state["skipped"])):
            yield one
        else:
            state["step"] += 1


def _items(one: ParameterStep, group: dict[str, Any]) -> Iterator[_Item]:
    """The matrices of a parameter; none if a host finds that its gradient is not usable."""
    state, views = one.state, one.views
    backend = one.backend
    grad = (one.grad.float() if one.grad.dtype == torch.float64 else one.grad).resolve_neg()
    # A parameter of several matrices is skipped as a whole, so it is checked as a whole first.
    usable = is_usable(grad) if len(views) > 1 else None
    if usable is not None and not backend.asynchronous:
        if not bool(usable):
            count_skipped(state, one.param)
            return
        usable = None
    if one.taken is not None:
        usable = one.taken if usable is None else one.taken & usable
    rounds = "remainder" in state or group["stochastic_rounding"]
    counts = True
    for index, view in enumerate(views):
        if not view.shape[0] * view.shape[1]:
            continue
        weight, part = part_of(one.param, view, group), part_of(grad, view, group)
        matrix = read_matrix(state, view, one.state_format)
        rounding = _rounding(one, index, group) if rounds else None
        yield _Item(weight, part, matrix, rounding, one, counts, usable)
        counts = False
    if counts:  # nothing in it, and nothing to wait for
        state["step"] += 1


def _rounding(one: ParameterStep, index: int, group: dict[str, Any]) -> Rounding | None:
    """How a matrix's new weights are rounded, if not to the nearest."""
    if "remainder" in one.state:
        remainder = part_of(one.state["remainder"], one.views[index], group)
        return Compensation(orient(remainder.flatten(1)))
    if not (group["stochastic_rounding"] and one.param.dtype == torch.bfloat16):
        return None
    device = one.param.device
    start = rounding_seed(group["seed"], one.number, index)
    if one.backend.asynchronous:
        return seed_of_step(start, _counter(one.state, "step", device)).int()
    seed = seed_of_step(start, int(one.state["step"]))
    return torch.tensor(seed, dtype=torch.int32, device=device)


def _parts(items: list[_Item]) -> Iterator[list[_Item]]:
    """What goes into one batch, by the memory that it takes."""
    momentum, asynchronous = items[0].momentum, items[0].one.backend.asynchronous
    m, n = sorted(momentum.shape)
    # The spectral encoder holds nine m x m matrices, all else some three of m x n.
    encoder = 3 * m * m if momentum.state_format.spectral else 0
    elements = DEVICE_ELEMENTS if asynchronous else HOST_ELEMENTS
    size = max(1, elements // (m * n + encoder))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _fetched(
    batches: Sequence[list[_Item]],
) -> Iterator[tuple[list[_Item], Sequence[QuantizedMatrix]]]:
    """Each batch with its offloaded matrices, prefetched one batch ahead."""

    def fetch(items: list[_Item]) -> Fetched:
        return Fetched([item.momentum for item in items], items[0].weight.device)

    ahead = fetch(batches[0]) if batches else None
    for index, items in enumerate(batches):
        here = ahead
        assert here is not None
        ahead = fetch(batches[index + 1]) if index + 1 < len(batches) else None
        yield items, here.matrices()
        here.give_back()


def _flags(items: Sequence[_Item]) -> Tensor:
    """Which of them belong to a parameter that is to be stepped, bool [b]."""
    flags = [item.usable for item in items]
    some = next(flag for flag in flags if flag is not None)
    return torch.stack([torch.ones_like(some) if flag is None else flag for flag in flags])


def _steps(item: _Item) -> int | Tensor:
    """How many steps an item's parameter has taken; a tensor where the host does not know it."""
    if item.one.backend.asynchronous:
        return _counter(item.one.state, "step", item.weight.device)
    return int(item.one.state["step"])


def _count(items: Sequence[_Item], accepted: Tensor) -> None:
    """Count the steps of parameters, and the gradients that were skipped."""
    if not items[0].one.backend.asynchronous:
        for item, is_accepted in zip(items, accepted.tolist(), strict=True):
            if item.counts and is_accepted:
                item.one.state["step"] += 1
            elif item.counts:
                count_skipped(item.one.state, item.one.param)
        return
    taken = [item.one.taken for item in items if item.one.taken is not None]
    if taken:  # what was not sampled is no skipped gradient
        accepted = accepted | ~torch.stack(taken)
    steps = accepted.long()
    counted = [
        (_counter(item.one.state, name, accepted.device), change)
        for name, changes in (("step", steps.unbind()), ("skipped", (1 - steps).unbind()))
        for item, change in zip(items, changes, strict=True)
        if item.counts
    ]
    if counted:
        counters, numbers = zip(*counted, strict=True)
        torch._foreach_add_(counters, numbers)


def _counter(state: State, name: str, device: torch.device) -> Tensor:
    """A count in a parameter's state as an int64 tensor on the parameter's device.

    Whether a gradient was finite is known to the device alone; `host_counters` reads it.
    """
    count = state[name]
    if not isinstance(count, Tensor):
        state[name] = torch.full((), count, dtype=torch.int64, device=device)
    return state[name]


def host_counters(state: State) -> State:
    """The state with its counts as plain ints."""
    counts = {
        name: int(state[name])
        for name in ("step", "skipped")
        if isinstance(state.get(name), Tensor) and state[name].dtype == torch.int64
    }
    return {**state, **counts}
