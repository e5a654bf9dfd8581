"""SPECTRA around another optimizer: the singular values of its updates are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.state.parameter import parameter_names
from lowbit_muon.state.placement import is_dtensor
from lowbit_muon.step.rules.direction import soft_clip

LIMIT_KEY = "spectral_limit"
# What of an optimizer is the wrapped one's own, and looked at by torch's schedulers and utilities.
_SHARED = (
    "defaults", "state", "param_groups", "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)  # fmt: skip
# Their weight decay is a part of the gradient, unless a group says otherwise.
_COUPLED = (ASGD, SGD, Adadelta, Adagrad, Adam, Adamax, NAdam, RAdam, RMSprop)
_DTYPES = (torch.float32, torch.float64)
_SMALLEST = 1e-30


class SpectralClip(Optimizer):
    """SPECTRA (arXiv 2603.14315) around another optimizer, such as AdamW, Signum or AdEMAMix.

    Where the optimizer's step is W <- (1 - lr * weight_decay) * W - lr * U, it becomes
    W <- (1 - lr * weight_decay) * W - lr * sqrt(max(1, rows/columns)) * H(U), where H takes each
    singular value s of U to s / sqrt(1 + s^2 / limit^2), which is below `limit`. For parameters of
    two dimensions; all others are the optimizer's alone. As in mlolab/llm-spectral-clipping, U is
    read off what the step did to the weights; clipping of gradients (the paper's pre-clipping) is
    `clip_grad_spectral_`.

    State, groups and state dicts are the optimizer's own, so that checkpoints of it load with the
    clip and without. Schedulers, GradScaler and hooks take this object; copies and pickles hold
    both. A step keeps a copy of the matrices, and takes an eigendecomposition in float64 for each,
    for which the host of a GPU waits. An update that is not finite stays as the optimizer made it.

    Args:
        optimizer: one whose weight decay, if any, is decoupled, as AdamW's, and called
            "weight_decay" in its groups.
        limit: of singular values of U, whose elements have a size of about one with AdamW.
            A group may have its own, which may change between steps, under "spectral_limit"; None
            leaves its parameters alone. (The paper keeps limit * lr constant in the warm-up:
            group["spectral_limit"] = limit * peak_lr / group["lr"].)

    Raises:
        TypeError: `optimizer` is none. ValueError: a limit that is no number > 0; in a step, before
            anything changes: weight decay that is not decoupled, or matrices that are not float32
            or float64 (half precision rounds off what the update is read from), or are sharded.
    """

    def __init__(self, optimizer: Optimizer, limit: float = 10.0) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}"
            )
        _check_limit("limit", limit)
        self.optimizer, self.limit = optimizer, limit
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share()
        super().__setstate__({})

    def _share(self) -> None:
        """Loading a state dict gives the optimizer new groups and a new state."""
        shared = (name for name in _SHARED if hasattr(self.optimizer, name))
        self.__dict__.update({name: getattr(self.optimizer, name) for name in shared})

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's own."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of the optimizer's, with or without a clip around it."""
        self.optimizer.load_state_dict(state_dict)
        self._share()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the optimizer; it may have a "spectral_limit"."""
        if param_group.get(LIMIT_KEY) is not None:
            _check_limit(LIMIT_KEY, param_group[LIMIT_KEY])
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The optimizer's own."""
        self.optimizer.zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the optimizer, whose updates of matrices are then clipped.

        closure: reevaluates the model and returns the loss, which is returned.
        """
        self._share()
        before = [
            (group, param, param.clone())
            for group in self.param_groups
            for param in self._matrices(group)
        ]
        loss: float | None
        if closure is None:
            loss = self.optimizer.step()
        else:
            loss = self.optimizer.step(torch.enable_grad()(closure))
        for group, param, weight in before:
            if param.grad is not None:
                _clip(group, param, weight, group.get(LIMIT_KEY, self.limit))
        return loss

    def _matrices(self, group: dict[str, Any]) -> list[Tensor]:
        """What is clipped of a group. Raises ValueError for what cannot be."""
        limit = group.get(LIMIT_KEY, self.limit)
        if limit is None:
            return []
        _check_limit(LIMIT_KEY if LIMIT_KEY in group else "limit", limit)
        coupled = isinstance(self.optimizer, _COUPLED) and not isinstance(self.optimizer, AdamW)
        if group.get("weight_decay") and coupled and not group.get("decoupled_weight_decay"):
            raise ValueError(
                f"weight_decay: expected 0, or an optimizer that decouples it, such as AdamW, got "
                f"{group['weight_decay']!r} with {type(self.optimizer).__name__}"
            )
        chosen = []
        for name, param in zip(parameter_names(group), group["params"], strict=True):
            if param.ndim != 2 or not param.requires_grad or not param.numel():
                continue
            if param.dtype not in _DTYPES or is_dtensor(param):
                got = "a DTensor" if is_dtensor(param) else param.dtype
                raise ValueError(
                    f"parameter {name!r}: expected float32 or float64 weights in one piece, or "
                    f"{LIMIT_KEY}=None in its group, got {got}"
                )
            chosen.append(param)
        return chosen


def clip_grad_spectral_(parameters: Iterable[Tensor] | Tensor, limit: float) -> None:
    """Clip the singular values of gradients of matrices in place: SPECTRA's pre-clipping.

    Each singular value s becomes s / sqrt(1 + s^2 / limit^2) (arXiv 2603.14315). Like
    `torch.nn.utils.clip_grad_norm_`, it comes between the backward pass and the step; the authors'
    code (mlolab/llm-spectral-clipping) clips by the norm after it. Parameters of other than two
    dimensions, and gradients that are not finite, stay as they are. A GPU's host waits.

    Raises ValueError for a limit that is no number > 0, or sharded or sparse gradients, with
    nothing changed.
    """
    _check_limit("limit", limit)
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    grads = [each.grad for each in given if each.grad is not None and each.grad.ndim == 2]
    for grad in grads:
        if is_dtensor(grad) or grad.layout != torch.strided:
            got = "a DTensor" if is_dtensor(grad) else grad.layout
            raise ValueError(f"parameters: expected dense gradients in one piece, got {got}")
    with torch.no_grad():
        for grad in grads:
            if grad.numel() and bool(grad.isfinite().all()):
                wide = grad if grad.dtype in _DTYPES else grad.float()
                grad.copy_(soft_clip(wide, limit))


def _clip(group: dict[str, Any], param: Tensor, weight: Tensor, limit: float) -> None:
    """Step again from `weight`, by the clipped update; param: where the optimizer's step led."""
    lr = group["lr"]
    decayed = weight.mul_(1 - lr * group.get("weight_decay", 0.0))
    # lr * U, whose clip at limit * lr is lr times that of U: nothing is divided by a small rate
    update = decayed - param
    if not bool(update.isfinite().all()):
        return
    size = limit * lr
    size = size.clamp_min(_SMALLEST) if isinstance(size, Tensor) else max(size, _SMALLEST)
    rows, columns = param.shape
    scale = math.sqrt(max(1.0, rows / columns))
    param.copy_(decayed.sub_(soft_clip(update, size), alpha=scale))


def _check_limit(name: str, limit: object) -> None:
    if not (is_real_number(limit) and 0 < float(limit) < math.inf):
        raise ValueError(f"{name}: expected a number > 0, got {limit!r}")
