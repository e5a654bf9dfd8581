"""What is attached to an optimizer's steps: hooks that want gradients, and their processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_muon.state.placement import is_dtensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def when_gradients_are_there(
    args: tuple[Any, ...], kwargs: dict[str, Any], action: Callable[[], None]
) -> Arguments | None:
    """For a pre-hook of `Optimizer.step`: call `action` when the gradients of the step are there.

    That is now, unless `step` got a closure, which makes them: then behind it (Lightning's
    automatic optimisation passes one). `args` are step's, the optimizer first. Returns what the
    hook has to return: None, or step's new arguments.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        action()
        return None

    def closure_and_action() -> Any:
        loss = closure()
        action()
        return loss

    return args[:1], {**kwargs, "closure": closure_and_action}


def check_process_group(
    model: nn.Module,
    optimizer: Optimizer,
    params: Iterable[Tensor],
    process_group: object,
    reason: str,
) -> None:
    """Raise for a missing process group where processes train together, or one of another type.

    params: what is looked at; parts of such on several processes need a group, too.
    """
    shared = getattr(optimizer, "is_shared", lambda: False)()
    distributed = shared or type(model).__name__ == "DistributedDataParallel"
    if process_group is None and (distributed or any(map(is_dtensor, params))):
        raise ValueError(
            "process_group: expected the processes that train the model together, since "
            f"{reason}, got None; torch.distributed.group.WORLD is all of them"
        )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected one of torch.distributed or None, "
            f"got {type(process_group).__name__}"
        )
