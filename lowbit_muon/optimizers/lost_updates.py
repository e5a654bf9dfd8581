"""Says once when the weights of a model are too coarse for the updates they get.

A bfloat16 weight keeps 8 significant bits: an update of less than 1/512 of it rounds to nothing.
At rates of fine-tuning that is most of them, and no loss shows it at once.
"""

from __future__ import annotations

import statistics
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_muon.state.parameter import parameter_names
from lowbit_muon.state.placement import local_part
from lowbit_muon.state.rounding import Compensation

STEPS = 3  # that are measured
SHARE = 0.5  # of weights without any change, from which on it is said
_SAMPLE = 1024  # elements, about: a share is off by 0.016 (one standard deviation)


def watch_lost_updates(optimizer: Optimizer) -> None:
    """Measure the first steps of the largest matrix whose updates are rounded to nearest, if any.

    Steps of a warm-up are not counted (below half of the group's `initial_lr`, as schedulers leave
    it there), nor those without a gradient. On a GPU nothing waits for the result.
    """
    coarse = [
        (param.numel(), index, number)
        for index, group in enumerate(optimizer.param_groups)
        if group.get("use_muon", True)
        and not (group["stochastic_rounding"] or group["compensation"])
        for number, param in enumerate(group["params"])
        if Compensation.applies_to(param) and param.numel()
    ]
    if coarse:
        _, index, number = max(coarse)
        _Watch(optimizer, index, number)


class _Watch:
    """Compares a sample of a weight's elements before and after its steps."""

    def __init__(self, optimizer: Optimizer, group: int, number: int) -> None:
        self._place = group, number
        self._shares: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None
        self._rate = 0.0
        self._before: Tensor | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._look_before),
            optimizer.register_step_post_hook(self._look_after),
        ]

    def _group(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.param_groups[self._place[0]]

    def _param(self, optimizer: Optimizer) -> Tensor:
        param: Tensor = self._group(optimizer)["params"][self._place[1]]
        return param

    def _sample(self, optimizer: Optimizer) -> Tensor:
        """Some of its rows."""
        weight = local_part(self._param(optimizer).detach())
        rows = max(1, _SAMPLE * weight.shape[0] // max(1, weight.numel()))
        return weight[:: max(1, weight.shape[0] // rows)].clone()

    def _look_before(self, optimizer: Optimizer, *_: Any) -> None:
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if len(self._shares) < STEPS and not captured:
            self._before = self._sample(optimizer)

    def _look_after(self, optimizer: Optimizer, *_: Any) -> None:
        before, self._before = self._before, None
        group = self._group(optimizer)
        if before is not None and self._counts(optimizer):
            share = (self._sample(optimizer) == before).count_nonzero() / before.numel()
            if share.is_cuda:
                share = torch.empty((), pin_memory=True).copy_(share, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record()
            self._shares.append(share)
            if not isinstance(group["lr"], Tensor) or group["lr"].is_cpu:
                self._rate = float(group["lr"])
        if len(self._shares) == STEPS and (self._copied is None or self._copied.query()):
            for hook in self._hooks:
                hook.remove()
            self._say(optimizer)

    def _counts(self, optimizer: Optimizer) -> bool:
        """Whether the step that was taken tells anything."""
        group, param = self._group(optimizer), self._param(optimizer)
        if param.grad is None or not local_part(param).numel():
            return False
        lr, full = group["lr"], group.get("initial_lr")
        if full is None or any(isinstance(rate, Tensor) for rate in (lr, full)):
            return True
        return bool(lr >= full / 2)

    def _say(self, optimizer: Optimizer) -> None:
        share = statistics.median(float(share) for share in self._shares)
        if share < SHARE:
            return
        group, param = self._group(optimizer), self._param(optimizer)
        dtype = str(param.dtype).removeprefix("torch.")
        remedy = "compensation=True keeps them, for one byte of state a weight"
        if param.dtype == torch.bfloat16:
            remedy = (
                "stochastic_rounding=True keeps them on average and takes no memory, "
                "compensation=True exactly, for one byte of state a weight"
            )
        warnings.warn(
            f"{share:.0%} of the {dtype} weights of {parameter_names(group)[self._place[1]]!r} did "
            f"not change in a step (measured at lr={self._rate:.3g}): updates below their last bit "
            f"are lost. {remedy}.",
            RuntimeWarning,
            stacklevel=2,
        )
