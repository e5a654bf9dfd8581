"""Gradients to the owners of their matrices, updates back: all-to-all of the parts that are held.

Every process sends each part it holds of a gradient once, to the owner, and gets that part of the
update: for a matrix of N elements (P - 1)/P * N elements go in and as many out, where gathering
gradients everywhere would send P times as many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_muon.distributed.agreement import exchange_context
from lowbit_muon.state.placement import MatrixShard
from lowbit_muon.step.options import UpdateDtype

_INT8_MAX = 127


@dataclass(frozen=True)
class Unit:
    """One matrix, and what each process holds of it.

    parameter, matrix: numbers of its parameter among the shared ones and of the matrix in it.
    shape: [rows, columns]. owner: rank of the process that keeps its momentum. shards: by rank, in
    the coordinates of the matrix. dtype: of its gradient on the way.
    """

    name: str
    parameter: int
    matrix: int
    shape: tuple[int, int]
    owner: int
    shards: tuple[MatrixShard, ...]
    dtype: torch.dtype


# A unit, its gradient and, where the owner needs them, its weights, float32; all of it.
Arrived = tuple[Unit, Tensor, Tensor | None]


class Exchange:
    """The communication of one process group. `bytes_sent` counts what left this process."""

    def __init__(
        self, process_group: dist.ProcessGroup, device: torch.device, update_dtype: UpdateDtype
    ) -> None:
        self.process_group = process_group
        self.device = device
        self.update_dtype = update_dtype
        self.rank: int = dist.get_rank(process_group)
        self.world_size: int = process_group.size()
        self.bytes_sent = 0

    def send_to_owners(
        self,
        units: Sequence[Unit],
        part: Callable[[Unit], Tensor],
        dtype: torch.dtype | None = None,
    ) -> Callable[[], list[tuple[Unit, Tensor]]]:
        """Start to bring gradients, or weights, to their owners; the result waits for its own.

        part: this process's part of a unit's gradient, 2-D; dtype: on the way, None for that of the
        gradients. Returns (unit, gradient [rows, columns]) for each unit that this process owns.
        """
        dtypes = {unit.dtype for unit in units}
        if dtype is None:
            dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        mine = [unit for unit in units if unit.owner == self.rank]
        outgoing = [
            [part(unit).to(dtype).reshape(-1) for unit in units if unit.owner == rank]
            for rank in range(self.world_size)
        ]
        incoming = [sum(unit.shards[p].numel for unit in mine) for p in range(self.world_size)]
        wait = self._all_to_all(units, outgoing, incoming, dtype)

        def received() -> list[tuple[Unit, Tensor]]:
            buffers = wait()
            full = [torch.empty(unit.shape, dtype=dtype, device=self.device) for unit in mine]
            for rank, buffer in enumerate(buffers):
                sizes = [unit.shards[rank].numel for unit in mine]
                for unit, matrix, values in zip(mine, full, buffer.split(sizes), strict=True):
                    shard = unit.shards[rank]
                    shard.of(matrix).copy_(values.view(shard.shape))
            return list(zip(mine, full, strict=True))

        return received

    def send_updates(
        self, units: Sequence[Unit], updates: Iterable[tuple[Unit, Tensor]]
    ) -> Callable[[], list[tuple[Unit, Tensor]]]:
        """Start to send updates [rows, columns] from their owners; see `send_to_owners`.

        Returns (unit, this process's part of the update, float32) for each of the units.
        """
        outgoing: list[list[Tensor]] = [[] for _ in range(self.world_size)]
        for unit, update in updates:
            for rank, shard in enumerate(unit.shards):
                outgoing[rank].append(pack(shard.of(update), self.update_dtype))
        sizes = [
            [packed_bytes(unit.shards[self.rank], self.update_dtype)
             for unit in units if unit.owner == rank]
            for rank in range(self.world_size)
        ]  # fmt: skip
        wait = self._all_to_all(units, outgoing, [sum(each) for each in sizes], torch.uint8)

        def received() -> list[tuple[Unit, Tensor]]:
            updates_here = []
            for rank, buffer in enumerate(wait()):
                owned = (unit for unit in units if unit.owner == rank)
                for unit, values in zip(owned, buffer.split(sizes[rank]), strict=True):
                    shape = unit.shards[self.rank].shape
                    updates_here.append((unit, unpack(values, shape, self.update_dtype)))
            return updates_here

        return received

    def _all_to_all(
        self,
        units: Sequence[Unit],
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[int],
        dtype: torch.dtype,
    ) -> Callable[[], list[Tensor]]:
        """Start it; the result waits, and returns one flat tensor from each process."""
        names = [unit.name for unit in units]
        sizes = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        empty = torch.empty(0, dtype=dtype, device=self.device)
        sent = torch.cat([empty, *(tensor for tensors in outgoing for tensor in tensors)])
        received = torch.empty(sum(incoming), dtype=dtype, device=self.device)
        self.bytes_sent += (sum(sizes) - sizes[self.rank]) * dtype.itemsize
        with exchange_context(names):
            work = dist.all_to_all_single(
                received, sent, list(incoming), sizes, group=self.process_group, async_op=True
            )

        def wait() -> list[Tensor]:
            with exchange_context(names):
                work.wait()
            _ = sent  # held until here
            return list(received.split(list(incoming)))

        return wait


def pack(part: Tensor, dtype: UpdateDtype) -> Tensor:
    """A part of an update, float32 [rows, columns], as bytes on the way; uint8, flat.

    int8: a float32 scale for each row, the largest magnitude over 127, then the codes.
    """
    if dtype != "int8":
        return part.to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8)
    largest = part.abs().amax(dim=1) if part.numel() else part.new_zeros(part.shape[0])
    scales = largest / _INT8_MAX
    codes = (part / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round_()
    return torch.cat([scales.view(torch.uint8), codes.to(torch.int8).view(-1).view(torch.uint8)])


def unpack(values: Tensor, shape: tuple[int, int], dtype: UpdateDtype) -> Tensor:
    """The inverse of `pack`, float32."""
    if dtype != "int8":
        # (a copy, since a slice of bytes need not lie where numbers of this size may)
        return values.clone().view(getattr(torch, dtype)).view(shape).float()
    scales = values[: 4 * shape[0]].clone().view(torch.float32)
    return values[4 * shape[0] :].view(torch.int8).view(shape) * scales[:, None]


def packed_bytes(shard: MatrixShard, dtype: UpdateDtype) -> int:
    """Bytes of a part of an update on the way."""
    if dtype == "int8":
        return 4 * shard.shape[0] + shard.numel
    return shard.numel * getattr(torch, dtype).itemsize


def bytes_of_step(units: Sequence[Unit], rank: int, dtype: UpdateDtype) -> int:
    """What one process sends in a step: parts of gradients to owners, and of its own updates."""
    gradients = sum(
        unit.shards[rank].numel * unit.dtype.itemsize for unit in units if unit.owner != rank
    )
    updates = sum(
        packed_bytes(shard, dtype)
        for unit in units
        if unit.owner == rank
        for other, shard in enumerate(unit.shards)
        if other != rank
    )
    return gradients + updates


def step_in_rounds(
    exchange: Exchange,
    rounds: Sequence[Sequence[Unit]],
    *,
    part: Callable[[Unit], Tensor],
    weight: Callable[[Unit], Tensor] | None,
    compute: Callable[[list[Arrived]], list[tuple[Unit, Tensor]]],
    apply: Callable[[Unit, Tensor], None],
) -> None:
    """Every round's gradients in, updates computed by their owners and sent back, weights updated.

    The next round's gradients and the last one's updates are on their way during a computation.
    part: this process's part of a gradient; weight: of the weights, float32, if owners need them;
    compute: updates of this process's own units; apply: use its part of an update.
    """

    def send(units: Sequence[Unit]) -> Callable[[], list[Arrived]]:
        grads = exchange.send_to_owners(units, part)
        weights = None if weight is None else exchange.send_to_owners(units, weight, torch.float32)

        def received() -> list[Arrived]:
            found = grads()
            whole = [None] * len(found) if weights is None else [value for _, value in weights()]
            return [(unit, grad, value) for (unit, grad), value in zip(found, whole, strict=True)]

        return received

    if not rounds:
        return
    ahead = send(rounds[0])
    behind: Callable[[], list[tuple[Unit, Tensor]]] = list
    for index, units in enumerate(rounds):
        here = ahead
        if index + 1 < len(rounds):
            ahead = send(rounds[index + 1])
        sent = exchange.send_updates(units, compute(here()))
        for unit, update in behind():
            apply(unit, update)
        behind = sent
    for unit, update in behind():
        apply(unit, update)
