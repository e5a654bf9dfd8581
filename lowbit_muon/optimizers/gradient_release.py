"""The optimizer in the backward pass: a gradient is used and freed as soon as it is there."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.optimizers.muon import Muon


class GradientRelease:
    """Steps each parameter when its gradient is ready; made by `attach_gradient_release`."""

    def __init__(self, optimizer: Muon, names: dict[Tensor, str], max_norm: float | None) -> None:
        self._optimizer = optimizer
        self._names = names
        self._max_norm = max_norm
        self._accumulating = False
        self._released: set[Tensor] = set()
        self._squares: Tensor | None = None  # of the norms of this step's gradients so far, summed
        self._last_norm: Tensor | None = None
        self._handles = [optimizer.register_step_post_hook(self._end_step)]
        for group_index, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                self._handles.append(self._watch(param, group_index, index))

    @property
    def gradient_norm(self) -> float | None:
        """Norm of this step's gradients so far, before clipping, or else of the last step's.

        Only with `max_norm`, else None; gradients with inf or nan are not counted.
        """
        norm = self._last_norm if self._squares is None else self._squares.sqrt()
        return None if norm is None else float(norm)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """For all but the last backward pass of a step: gradients are kept and add up in `.grad`.

        Accelerate says by itself which pass is the last, within `accelerator.accumulate(model)`.
        That takes the memory that release otherwise saves.
        """
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Take the hooks away: gradients stay until `optimizer.step()` again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, param: Tensor, group_index: int, index: int) -> RemovableHandle:
        # Indices, since load_state_dict puts other dicts in the place of the groups.
        def ready(param: Tensor) -> None:
            if param.grad is not None and not self._accumulating and _accelerate_synchronises():
                self._release(param, group_index, index)

        return param.register_post_accumulate_grad_hook(ready)

    @torch.no_grad()
    def _release(self, param: Tensor, group_index: int, index: int) -> None:
        if param in self._released:
            raise RuntimeError(
                f"{self._names[param]}: its gradient came twice in one step; call optimizer.step() "
                "after each backward pass, or run all but the last of a step within "
                "`with release.accumulating():`"
            )
        self._released.add(param)
        if self._max_norm is not None:
            self._clip(param, self._max_norm)
        self._optimizer.step_parameter(group_index, index)
        param.grad = None

    def _clip(self, param: Tensor, max_norm: float) -> None:
        """Scale the gradient by max_norm / norm, where that is below one."""
        grad = param.grad
        assert grad is not None
        square = torch.linalg.vector_norm(grad, dtype=torch.float32).square()
        square = torch.where(square.isfinite(), square, 0.0)
        before = torch.zeros_like(square) if self._squares is None else self._squares
        self._squares = before.to(square.device) + square
        norm = self._squares.sqrt()
        if self._last_norm is not None:
            norm = torch.maximum(norm, self._last_norm.to(norm.device))
        # The quotient of torch.nn.utils.clip_grad_norm_.
        grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0).to(grad.dtype))

    def _end_step(self, *_: object) -> None:
        self._released.clear()
        if self._squares is not None:
            self._last_norm, self._squares = self._squares.sqrt(), None


def _accelerate_synchronises() -> bool:
    """False in the passes of Accelerate's (and so of Trainer's) that are not the last of a step."""
    state = sys.modules.get("accelerate.state")
    return state is None or bool(state.GradientState().sync_gradients)


def attach_gradient_release(
    model: nn.Module, optimizer: Optimizer, *, max_norm: float | None = None
) -> GradientRelease:
    """Update every parameter of `optimizer` in the backward pass and free its gradient there.

    Gradients then take about the memory of one layer, not of the model (the method of LOMO,
    arXiv 2306.09782, section 3.1, for an optimizer with state). The training loop stays as it is:
    `optimizer.step()` finds no gradients left and only ends the step, for schedulers too. Weights
    and states are those of the loop without release, except that `nonfinite="raise"` raises in the
    middle of a backward pass, when parameters of later layers have been updated; `optimizer.step()`
    ends such a step, too.

    Args:
        model: owner of the parameters.
        optimizer: a `Muon` or `MuonWithAuxAdam`.
        max_norm: clip gradients; inf measures their norm and clips nothing. The total norm is not
            known before the last of them, so each is scaled by max_norm over the larger of the last
            step's total norm and this step's norm so far. That is `clip_grad_norm_`'s factor where
            the norm changes slowly, and no gradient ever has a norm above max_norm.
            `clip_grad_norm_` itself finds no gradients.

    Returns the hooks: `accumulating()` for gradient accumulation, `remove()`, `gradient_norm`. In a
    Trainer `release_gradients` attaches them.

    `GradScaler` looks for inf in gradients before the step and cannot be used: train in bfloat16.
    Activation checkpointing works; with `use_reentrant=True` a parameter that several segments
    share gets its gradient in parts, and the second raises RuntimeError.
    DistributedDataParallel and FSDP average gradients after the hooks ran and are refused.

    Raises:
        TypeError: for another optimizer.
        ValueError: max_norm is not positive; a parameter of the optimizer is not of the model; the
            model is wrapped for distributed training, or the optimizer shared by processes.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(
            f"optimizer: expected a Muon or MuonWithAuxAdam, got {type(optimizer).__name__}"
        )
    if optimizer.is_shared():
        raise ValueError(
            "optimizer: expected one that no other process takes part in, got one with a "
            "process_group or DTensors"
        )
    endless = max_norm == math.inf  # measures the norm and clips nothing
    if max_norm is not None and not (endless or (is_real_number(max_norm) and max_norm > 0)):
        raise ValueError(f"max_norm: expected a number > 0 or None, got {max_norm!r}")
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel") or (
        wrapper.startswith("FSDP")
    ):
        raise ValueError(
            f"model: expected a model whose gradients are complete after backward, got {wrapper}"
        )
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param not in names:
                raise ValueError(
                    f"optimizer: expected parameters of the model, got one of size "
                    f"{tuple(param.shape)} that is not"
                )
    return GradientRelease(optimizer, names, max_norm)
