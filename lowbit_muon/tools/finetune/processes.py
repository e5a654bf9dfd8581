"""The processes of a data-parallel run, as torchrun starts them, and what they do together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_muon.distributed.state_dicts import whole_state
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.llama import Llama

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among those of the run; alone, every method is the plain thing."""

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What Muon shares its momentum over; None alone."""
        return dist.group.WORLD if self.count > 1 else None

    def share(self, batch: Tensor) -> Tensor:
        """This process's sequences of a step's; as many on each process."""
        return batch.chunk(self.count)[self.rank]

    def mean(self, value: float) -> float:
        """Of the values of all processes."""
        if self.count == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64)
        dist.all_reduce(total)
        return total.item() / self.count

    def gather(self, value: T) -> list[T]:
        """The plain values of all processes, in their order."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def first(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first process, or its UserError, on all of them."""
        if self.count == 1:
            return function()
        found: list[Any] = [None, None]
        if self.is_first:
            try:
                found[0] = function()
            except UserError as error:
                found[1] = str(error)
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise UserError(found[1])
        return cast(T, found[0])

    def whole_state(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """An optimizer's state as one process would have it, on the first; {} on the others."""
        states = {}
        for key, entries in state_dict["state"].items():
            whole = whole_state(entries)  # by all, and dropped by the others before the next
            if self.is_first:
                states[key] = whole
        return {**state_dict, "state": states} if self.is_first else {}


class AveragedLoss(nn.Module):
    """A model's loss, whose gradients are averaged over the processes in the backward pass."""

    def __init__(self, model: Llama, processes: Processes) -> None:
        super().__init__()
        self._loss: nn.Module = _Loss(model)
        if processes.count > 1:
            # Gradients lie in the buckets that are reduced, or there would be two of each.
            self._loss = nn.parallel.DistributedDataParallel(
                self._loss, gradient_as_bucket_view=True
            )

    def forward(self, ids: Tensor) -> Tensor:
        """Mean next-token cross-entropy of this process's sequences; see `Llama.loss`."""
        return cast(Tensor, self._loss(ids))

    def accumulating(self, more: bool) -> AbstractContextManager[None]:
        """Within it gradients add up in this process, as long as `more` sequences are to come."""
        if more and isinstance(self._loss, nn.parallel.DistributedDataParallel):
            return self._loss.no_sync()
        return nullcontext()


class _Loss(nn.Module):
    # DistributedDataParallel prepares its reduction in the forward pass of a module.
    def __init__(self, model: Llama) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model.loss(ids)


@contextmanager
def started_processes() -> Iterator[Processes]:
    """Join the processes that torchrun started, if it did; each gets its share of the cores."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", count))
    # torchrun leaves each process one.
    torch.set_num_threads(max(1, _available_cores() // on_this_machine))
    dist.init_process_group("gloo")
    processes = Processes(dist.get_rank(), count)
    try:
        yield processes
    except UserError as error:
        if processes.is_first:
            raise
        raise UserError(f"process {processes.rank}: {error}") from None
    dist.barrier()
    dist.destroy_process_group()


def _available_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
