"""Hooks before a step that want its gradients, with a closure or without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
