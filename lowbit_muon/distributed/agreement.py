"""What all processes have to agree on before matrices are exchanged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_muon.state.gradients import is_usable
from lowbit_muon.state.placement import is_dtensor, local_part


class ExchangeError(RuntimeError):
    """An exchange with other processes that failed; names the parameters that it was for."""


@contextmanager
def exchange_context(names: Sequence[str]) -> Iterator[None]:
    """Name the parameters in errors of the communication within: timeouts, processes that died."""
    try:
        yield
    except RuntimeError as error:
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise ExchangeError(f"{shown}: exchange with other processes failed: {error}") from error


def gather_objects(value: Any, process_group: dist.ProcessGroup, names: Sequence[str]) -> list[Any]:
    """The plain values of all processes, by rank."""
    values: list[Any] = [None] * process_group.size()
    with exchange_context(names):
        dist.all_gather_object(values, value, group=process_group)
    return values


def check_agreement(descriptions: Sequence[list[dict[str, Any]]]) -> None:
    """Raise ValueError, on every process alike, unless all have the same parameters and options.

    descriptions: of each process, a dict for each parameter, with its "name".
    """
    first = descriptions[0]
    for rank, other in enumerate(descriptions[1:], start=1):
        if len(first) != len(other):
            raise ValueError(
                f"params: expected the same number on all processes, got {len(first)} on process 0 "
                f"and {len(other)} on process {rank}"
            )
        for ours, theirs in zip(first, other, strict=True):
            for key in ours:
                if ours[key] != theirs.get(key):
                    raise ValueError(
                        f"{ours['name']}: expected the same {key} on all processes, got "
                        f"{ours[key]!r} on process 0 and {theirs.get(key)!r} on process {rank}"
                    )


def redistribute_gradients(params: Iterable[Tensor]) -> None:
    """Give gradients that are DTensors the placements of their parameters.

    Collective where they differ: a gradient may come as the terms of a sum.
    """
    for param in params:
        grad = param.grad
        if is_dtensor(grad) and is_dtensor(param) and grad.placements != param.placements:
            param.grad = grad.redistribute(placements=param.placements)


def is_usable_everywhere(grad: Tensor) -> bool:
    """`is_usable` of a whole gradient; collective for a DTensor, and alike on all processes."""
    parts = grad.device_mesh.size() if is_dtensor(grad) else 1
    return bool(on_every_part(grad, is_usable(local_part(grad), parts=parts)))


def on_every_part(tensor: Tensor, holds: Tensor) -> Tensor:
    """Whether something holds, bool, for the parts of a tensor on all processes.

    Collective for a DTensor. Counts are summed: of values with nan, gloo's largest may be any.
    """
    if not is_dtensor(tensor):
        return holds
    from torch.distributed.tensor import DTensor, Partial

    mesh = tensor.device_mesh
    misses = DTensor.from_local((~holds).float(), mesh, [Partial()] * mesh.ndim, run_check=False)
    return misses.full_tensor() == 0


def usable_gradients(
    grads: Sequence[Tensor | None],
    names: Sequence[str],
    device: torch.device,
    process_group: dist.ProcessGroup,
) -> list[bool | None]:
    """For each parameter: None without a gradient, else whether it is finite on every process.

    grads: the local parts. Raises ValueError, on every process alike, where only some have one.
    """
    there = torch.tensor([grad is not None for grad in grads], dtype=torch.int32, device=device)
    bad = [
        torch.zeros((), dtype=torch.bool, device=device) if grad is None
        else ~is_usable(grad, parts=process_group.size())
        for grad in grads
    ]  # fmt: skip
    flags = torch.stack([there, 1 - there, torch.stack(bad).int()]) if grads else there
    with exchange_context(names):
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=process_group)
    usable: list[bool | None] = []
    for name, (some, missing, not_finite) in zip(names, flags.mT.tolist(), strict=True):
        if some and missing:
            raise ValueError(f"{name}: expected a gradient on all processes or none, got some")
        usable.append(not not_finite if some else None)
    return usable
