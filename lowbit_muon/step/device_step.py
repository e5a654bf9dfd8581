"""A group's step on a device: matrices in batches of one shape, counters that stay there."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import DeviceBackend
from lowbit_muon.state.momentum_state import is_usable
from lowbit_muon.state.offload import Fetched
from lowbit_muon.state.parameter import ParameterStep, flatten, momentum_format, read_matrix
from lowbit_muon.step.batched_update import BATCH_ELEMENTS, BatchStep, MatrixUpdate
from lowbit_muon.step.group_step import (
    GroupStep,
    compensation,
    rounding_seed,
    seed_of_step,
    update_scale,
)

State = dict[str, Any]


@dataclass
class _Bucket:
    """Matrices that can go into one batch, in the order of their parameters."""

    backend: DeviceBackend
    updates: list[MatrixUpdate] = field(default_factory=list)
    # Of each matrix: where its rounding's seeds start, its parameter's state, whether it is what
    # its parameter is counted by, and, for a parameter of several matrices, whether its whole
    # gradient is finite.
    seeds: list[int] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    counted: list[bool] = field(default_factory=list)
    finite: list[Tensor | None] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.updates[0].weight.device


@dataclass(frozen=True)
class _Batch:
    """A part of a bucket that is updated at once."""

    bucket: _Bucket
    part: slice
    seeds: list[Tensor] | None

    @property
    def updates(self) -> list[MatrixUpdate]:
        return self.bucket.updates[self.part]

    def fetch(self) -> Fetched:
        return Fetched([update.momentum for update in self.updates], self.bucket.device)


def _parts(bucket: _Bucket) -> Iterator[slice]:
    """What goes into one batch, by the memory that it takes."""
    momentum = bucket.updates[0].momentum
    m, n = sorted(momentum.shape)
    # The spectral encoder holds nine m x m matrices, all else some three of m x n.
    encoder = 3 * m * m if momentum.state_format.spectral else 0
    size = max(1, BATCH_ELEMENTS // (m * n + encoder))
    for start in range(0, len(bucket.updates), size):
        yield slice(start, start + size)


class DeviceStep:
    """Collects a group's parameters and updates them in batches, without waiting for the device."""

    def __init__(self, step: GroupStep, group: dict[str, Any]) -> None:
        self._step, self._group = step, group
        self._buckets: dict[Hashable, _Bucket] = {}

    def add(self, one: ParameterStep, backend: DeviceBackend) -> None:
        """Take a parameter with its gradient."""
        state, views = one.state, one.views
        grad = one.grad.float() if one.grad.dtype == torch.float64 else one.grad
        finite = is_usable(grad) if len(views) > 1 else None
        grad, weights = flatten(grad, self._group), flatten(one.param, self._group)
        counted = False
        state_format = momentum_format(self._group, state)
        for index, view in enumerate(views):
            if not view.shape[0] * view.shape[1]:
                continue
            key = (view.shape, state_format, weights.dtype, grad.dtype, weights.device)
            bucket = self._buckets.setdefault(key, _Bucket(backend))
            momentum = read_matrix(state, view, state_format)
            kept = compensation(state, view, self._group)
            bucket.updates.append(MatrixUpdate(weights[view.rows], grad[view.rows], momentum, kept))
            bucket.seeds.append(rounding_seed(self._group["seed"], one.number, index))
            bucket.states.append(state)
            bucket.counted.append(not counted)
            bucket.finite.append(finite)
            counted = True
        if not counted:  # nothing in it, and nothing to wait for
            state["step"] += 1

    def run(self) -> None:
        """Update all that was added."""
        # before any batch counts its step
        seeds = [self._seeds(bucket) for bucket in self._buckets.values()]
        batches = [
            _Batch(bucket, part, some and some[part])
            for bucket, some in zip(self._buckets.values(), seeds, strict=True)
            for part in _parts(bucket)
        ]
        for batch, updates in self._fetched(batches):
            self._run_batch(batch, updates)

    def _fetched(self, batches: Sequence[_Batch]) -> Iterator[tuple[_Batch, list[MatrixUpdate]]]:
        """Each batch with its matrices on the device, while the next one's are on their way."""
        if not self._group["offload"]:
            yield from ((batch, batch.updates) for batch in batches)
            return
        ahead = None
        for index, batch in enumerate(batches):
            here = ahead or batch.fetch()
            ahead = batches[index + 1].fetch() if index + 1 < len(batches) else None
            yield (
                batch,
                [
                    dataclasses.replace(update, momentum=matrix)
                    for update, matrix in zip(batch.updates, here.matrices(), strict=True)
                ],
            )
            here.give_back()

    def _seeds(self, bucket: _Bucket) -> list[Tensor] | None:
        """Of stochastic rounding in this step: int32, one element each."""
        if not (
            self._step.stochastic_rounding and bucket.updates[0].weight.dtype == torch.bfloat16
        ):
            return None
        return [
            seed_of_step(start, device_counter(state, "step", bucket.device)).int()
            for start, state in zip(bucket.seeds, bucket.states, strict=True)
        ]

    def _run_batch(self, batch: _Batch, updates: list[MatrixUpdate]) -> None:
        step, bucket, part = self._step, batch.bucket, batch.part
        shape = updates[0].weight.shape
        run = BatchStep(
            lr=step.lr,
            weight_decay=step.weight_decay,
            momentum=step.momentum,
            nesterov=step.nesterov,
            coefficients=step.coefficients,
            eps=step.eps,
            update_scale=update_scale(step.adjust_lr_fn, shape),
            ns_dtype="float16" if step.ns_dtype == "auto" else step.ns_dtype,
            from_stored=step.ns_input == "stored",
            backend=bucket.backend,
        )
        accepted = run(updates, batch.seeds, _stacked_flags(bucket.finite[part]))
        self._count(bucket, part, accepted)

    def _count(self, bucket: _Bucket, part: slice, accepted: Tensor) -> None:
        changes: dict[str, list[Tensor]] = defaultdict(list)
        counters: dict[str, list[Tensor]] = defaultdict(list)
        for name, flags in (("step", accepted), ("skipped", ~accepted)):
            for state, counted, change in zip(
                bucket.states[part], bucket.counted[part], flags.long().unbind(), strict=True
            ):
                if counted:
                    counters[name].append(device_counter(state, name, bucket.device))
                    changes[name].append(change)
            if counters[name]:
                torch._foreach_add_(counters[name], changes[name])


def _stacked_flags(flags: Sequence[Tensor | None]) -> Tensor | None:
    """bool [b], True where there is none; None if there are none at all."""
    some = next((flag for flag in flags if flag is not None), None)
    if some is None:
        return None
    true = torch.ones_like(some)
    return torch.stack([true if flag is None else flag for flag in flags])


def device_counter(state: State, name: str, device: torch.device) -> Tensor:
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
