"""What one process sends, keeps and computes in a Muon step, for several designs; all on paper.

Counted is Muon's part: embeddings, heads and norms go to AdamW in every design, and what FSDP2
sends for a forward pass is the same. Weights and gradients are bfloat16, one per element on each
process in parts (FSDP2: rows, in as many equal shards as torch.chunk makes) or as a whole (DDP).

    ours              an owner for each matrix: parts of gradients in, parts of updates out
    ours, DDP         the same of whole gradients; weights out (`process_group`)
    replicated        everyone keeps and computes everything (torch.optim.Muon under DDP)
    ZeRO-1            as "ours, DDP", with float32 momentum
    all-gather        momentum in parts; every matrix gathered by everyone (DTensor.full_tensor)
    muon-fsdp2        momentum in parts, matrix i gathered by process i mod P, which scatters its
                      update (github.com/samsja/muon_fsdp_2)
    Dion's Muon       momentum in parts; matrices of one shape, filled up with zeros to a multiple
                      of P, to their computing processes by all-to-all and back, in bfloat16
                      (github.com/microsoft/dion, dion/megabatch_base.py)

A bandwidth has no latency here: real exchanges are slower, the more so the smaller their messages.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bench.gpu.roofline import PAPER_SHAPES, step_on_paper, torch_step_on_paper
from bench.scaling.models import Model, Stack
from lowbit_muon import PRESETS, QuantizedMatrix
from lowbit_muon.distributed.exchange import Unit, bytes_of_step, packed_bytes
from lowbit_muon.distributed.ownership import assign_owners, cost
from lowbit_muon.distributed.sharing import _only_holder
from lowbit_muon.state.placement import MatrixShard
from lowbit_muon.step.options import UpdateDtype

Shape = tuple[int, int]
Counts = Any  # numpy, int64 [processes]

DTYPE = torch.bfloat16  # of weights and gradients
FORMAT = "spectral4"
# Bytes a second, one direction, of one GPU. NVIDIA H100 SXM5, data sheet
# (https://www.nvidia.com/en-us/data-center/h100/): NVLink 900 GB/s both ways. DGX H100, user guide
# (https://docs.nvidia.com/dgx/dgxh100-user-guide/): eight GPUs, a ConnectX-7 of 400 Gb/s for each.
NVLINK, NETWORK, NODE = 450e9, 50e9, 8
_NS_STEPS = 5
RULES_ON_PAPER = ("muon", "normuon", "cautious_decay")


@dataclass(frozen=True)
class Estimate:
    """One design: the largest figure of any process, for one step.

    averaging_bytes: sent to average gradients before the step; step_bytes: sent by the step itself.
    newton_schulz: operations of five steps in the standard form. balance: what all processes have
    to do at least, each matrix once, over processes times the largest: 1 is perfect; of those
    operations, and of the least seconds of whole steps on an H100 (bench.gpu.roofline).
    extra_averaging_seconds: what averaging takes beyond leaving gradients in parts, as FSDP2 does.
    peer_bytes: of the step to each other process on average, where it sends different ones.
    """

    design: str
    processes: int
    state_bytes: int
    averaging_bytes: int
    step_bytes: int
    newton_schulz: int
    balance: float
    compute_seconds: float
    compute_balance: float
    communication_seconds: float
    extra_averaging_seconds: float
    peer_bytes: float


# One matrix -------------------------------------------------------------------------------------


def newton_schulz_operations(shape: Shape) -> int:
    """X Xᵀ, A A and B X five times, all entries, a multiply-add as two."""
    m, n = sorted(shape)
    return _NS_STEPS * (4 * m * m * n + 2 * m**3)


@functools.lru_cache(maxsize=1024)
def stored_bytes(shape: Shape) -> int:
    """Of the momentum in our format."""
    meta = torch.device("meta")
    return QuantizedMatrix.zeros(shape, PRESETS[FORMAT], seed=0, device=meta).nbytes


@functools.lru_cache(maxsize=1024)
def our_seconds(shape: Shape) -> float:
    """The least time of our step on an H100."""
    return step_on_paper(shape, FORMAT, dtype=DTYPE).seconds


@functools.lru_cache(maxsize=1024)
def torch_seconds(shape: Shape) -> float:
    """The least time of torch.optim.Muon's step, which stands for every other Muon."""
    return torch_step_on_paper(shape, DTYPE).seconds


def rules_on_paper() -> list[dict[str, Any]]:
    """The least time of a step by other update rules, on an H100: the calls that a step makes.

    relative: to Muon's own step of the same shape and format.
    """
    rows = []
    for shape in PAPER_SHAPES:
        for name in (FORMAT, "fp32"):
            seconds = [
                step_on_paper(shape, name, dtype=DTYPE, rule=rule).seconds
                for rule in RULES_ON_PAPER
            ]
            rows += [
                {"shape": list(shape), "format": name, "rule": rule, "seconds": each,
                 "relative": each / seconds[0]}
                for rule, each in zip(RULES_ON_PAPER, seconds, strict=True)
            ]  # fmt: skip
    return rows


# Who has what -------------------------------------------------------------------------------------


def chunk(size: int, processes: int) -> list[tuple[int, int]]:
    """[start, stop) of each process's part of a dimension; later ones may be empty."""
    each = -(-size // processes)
    return [(min(i * each, size), min((i + 1) * each, size)) for i in range(processes)]


def parts(stack: Stack, processes: int) -> list[tuple[MatrixShard, ...]]:
    """The shards of each matrix of a parameter under FSDP2's Shard(0)."""
    rows, columns = stack.shape
    if stack.matrices == 1:
        return [tuple(MatrixShard(top, stop, 0, columns) for top, stop in chunk(rows, processes))]
    found = []
    whole, empty = MatrixShard(0, rows, 0, columns), MatrixShard(0, 0, 0, columns)
    for holder, (start, stop) in enumerate(chunk(stack.matrices, processes)):
        shards = (*[empty] * holder, whole, *[empty] * (processes - holder - 1))
        found += [shards] * (stop - start)
    return found


def sharded_units(stacks: Sequence[Stack], processes: int) -> list[Unit]:
    """Every matrix as `ShardedParameters` makes it, with its owner."""
    pieces_of = {stack: parts(stack, processes) for stack in set(stacks)}
    units = [
        Unit("", parameter, matrix, stack.shape, -1, shards, DTYPE)
        for parameter, stack in enumerate(stacks)
        for matrix, shards in enumerate(pieces_of[stack])
    ]
    holders = {id(unit.shards): _only_holder(unit) for unit in _one_of_each(units)}
    costs = [cost(unit.shape) for unit in units]
    owners = assign_owners(costs, processes, [holders[id(unit.shards)] for unit in units])
    return _with_owners(units, owners)


def _with_owners(units: Sequence[Unit], owners: Sequence[int]) -> list[Unit]:
    return [dataclasses.replace(u, owner=o) for u, o in zip(units, owners, strict=True)]


def _one_of_each(units: Sequence[Unit]) -> list[Unit]:
    """Units that differ in their shards; those alike share one tuple."""
    return list({id(unit.shards): unit for unit in units}.values())


@dataclass(frozen=True)
class Traffic:
    """Bytes of each process."""

    sent: Counts
    received: Counts


def traffic(units: Sequence[Unit], processes: int, dtype: UpdateDtype) -> Traffic:
    """`bytes_of_step` of every process, and what it receives.

    That is a sum over units, and one unit's share depends on the shard that a process has of it,
    so it is asked once for each kind of unit and shard.
    """
    sent = np.zeros(processes, dtype=np.int64)
    received = np.zeros(processes, dtype=np.int64)
    owners: dict[int, list[int]] = {}
    for unit in units:
        owners.setdefault(id(unit.shards), []).append(unit.owner)
    for unit in _one_of_each(units):
        count = len(owners[id(unit.shards)])
        owned = np.bincount(owners[id(unit.shards)], minlength=processes)
        by_piece: dict[tuple[int, int, bool], tuple[int, int, int, int]] = {}
        for process, shard in enumerate(unit.shards):
            if not shard.numel and not owned[process]:
                continue
            # (the costly question, so only where a process owns such a unit)
            key = (*shard.shape, bool(owned[process]))
            if key not in by_piece:
                by_piece[key] = _of_piece(unit, process, dtype, bool(owned[process]))
            own_out, own_in, other_out, other_in = by_piece[key]
            own, other = int(owned[process]), count - int(owned[process])
            sent[process] += own * own_out + other * other_out
            received[process] += own * own_in + other * other_in
    return Traffic(sent, received)


def _of_piece(
    unit: Unit, process: int, dtype: UpdateDtype, owns: bool
) -> tuple[int, int, int, int]:
    """Bytes (out, in) of a process for a unit of its own, then for one of another's."""
    shard = unit.shards[process]
    rows, columns = unit.shape
    own_out = 0
    if owns:
        own_out = bytes_of_step([dataclasses.replace(unit, owner=process)], process, dtype)
    other_out = bytes_of_step([dataclasses.replace(unit, owner=-1)], process, dtype)
    own_in = (rows * columns - shard.numel) * unit.dtype.itemsize
    return own_out, own_in, other_out, packed_bytes(shard, dtype)


# Designs ------------------------------------------------------------------------------------------


def all_to_all_seconds(moved: Counts, processes: int) -> float:
    """Of the busiest process: to those on its node by NVLink, to others by its network card."""
    if processes == 1:
        return 0.0
    node = min(NODE, processes)
    most = int(moved.max())
    near, far = (node - 1) / (processes - 1), (processes - node) / (processes - 1)
    return max(most * near / NVLINK, most * far / NETWORK)


def ring_seconds(sent: float, processes: int) -> float:
    """Of a collective in which every process passes on what it gets: a node has NODE cards."""
    return sent / (NVLINK if processes <= NODE else min(NVLINK, NODE * NETWORK))


def of_ring(numel: int, processes: int) -> int:
    """Bytes that a process sends so that everyone has all of that many elements, on average."""
    return -(-(processes - 1) * numel * DTYPE.itemsize // processes)


class Step:
    """One model over a number of processes, under every design."""

    def __init__(self, model: Model, processes: int) -> None:
        self.model, self.processes = model, processes
        self.shapes = model.shapes
        self.counts = Counter(self.shapes)
        self.least_operations = self._all(newton_schulz_operations)
        self.units = sharded_units(model.stacks, processes)

    def _all(self, cost: Callable[[Shape], Any]) -> Any:
        """A sum over all matrices."""
        return sum(count * cost(shape) for shape, count in self.counts.items())

    def _by_owner(self, cost: Callable[[Shape], Any], owners: Sequence[int]) -> Any:
        """The largest sum of any process."""
        costs = {shape: cost(shape) for shape in self.counts}
        loads = [type(next(iter(costs.values())))()] * self.processes
        for shape, owner in zip(self.shapes, owners, strict=True):
            loads[owner] += costs[shape]
        return max(loads)

    def _estimate(
        self, design: str, *, state: int, averaging: int, sent: int, operations: int,
        seconds: float, least_seconds: float, communication: float, peers: bool,
    ) -> Estimate:  # fmt: skip
        P = self.processes
        return Estimate(
            design, P, state, averaging, sent, operations, self.least_operations / (P * operations),
            seconds, least_seconds / (P * seconds), communication,
            ring_seconds(averaging - self._scattered, P),
            sent / (P - 1) if peers and P > 1 else 0.0,
        )  # fmt: skip

    @property
    def _scattered(self) -> int:
        """Sent to average gradients that stay in parts."""
        return of_ring(self.model.muon_elements, self.processes)

    def ours(self, dtype: UpdateDtype) -> Estimate:
        """Owners over parts (FSDP2)."""
        owners = [unit.owner for unit in self.units]
        moved = traffic(self.units, self.processes, dtype)
        return self._estimate(
            f"ours, {dtype}",
            state=self._by_owner(stored_bytes, owners),
            averaging=self._scattered,
            sent=int(moved.sent.max()),
            operations=self._by_owner(newton_schulz_operations, owners),
            seconds=self._by_owner(our_seconds, owners),
            least_seconds=self._all(our_seconds),
            communication=all_to_all_seconds(
                np.maximum(moved.sent, moved.received), self.processes
            ),
            peers=True,
        )

    def owners_of_copies(
        self, design: str, state: Callable[[Shape], int], seconds: Callable[[Shape], float]
    ) -> Estimate:
        """Owners over copies (DDP); weights go round as one pipelined broadcast after another."""
        owners = assign_owners([cost(shape) for shape in self.shapes], self.processes)
        sent = self._scattered
        return self._estimate(
            design,
            state=self._by_owner(state, owners),
            averaging=2 * self._scattered,
            sent=sent,
            operations=self._by_owner(newton_schulz_operations, owners),
            seconds=self._by_owner(seconds, owners),
            least_seconds=self._all(seconds),
            communication=ring_seconds(sent, self.processes),
            peers=False,
        )

    def replicated(self) -> Estimate:
        """Everyone everything."""
        return self._redundant("replicated, fp32", 4 * self.model.muon_elements, 2, 0)

    def all_gather(self) -> Estimate:
        """Momentum in parts, gathered by everyone, in parts of one size."""
        padded = sum(
            count * self._rows_of_part(rows) * columns
            for (rows, columns), count in self.counts.items()
        )
        sent = (self.processes - 1) * padded * DTYPE.itemsize
        return self._redundant("all-gather", self._state_in_parts(), 1, sent)

    def _redundant(self, design: str, state: int, averagings: int, sent: int) -> Estimate:
        seconds = self._all(torch_seconds)
        return self._estimate(
            design, state=state, averaging=averagings * self._scattered, sent=sent,
            operations=self.least_operations, seconds=seconds, least_seconds=seconds,
            communication=ring_seconds(sent, self.processes), peers=False,
        )  # fmt: skip

    def _rows_of_part(self, rows: int) -> int:
        return -(-rows // self.processes)

    def _state_in_parts(self) -> int:
        """Of process 0, which has the largest parts; like the parameters, as `zeros_like` makes."""
        return sum(unit.shards[0].numel for unit in self.units) * DTYPE.itemsize

    def muon_fsdp2(self) -> Estimate:
        """Matrix i to process i mod P and back."""
        owners = [index % self.processes for index in range(len(self.units))]
        moved = traffic(_with_owners(self.units, owners), self.processes, "bfloat16")
        return self._estimate(
            "muon-fsdp2",
            state=self._state_in_parts(),
            averaging=self._scattered,
            sent=int(moved.sent.max()),
            operations=self._by_owner(newton_schulz_operations, owners),
            seconds=self._by_owner(torch_seconds, owners),
            least_seconds=self._all(torch_seconds),
            communication=all_to_all_seconds(
                np.maximum(moved.sent, moved.received), self.processes
            ),
            peers=True,
        )

    def dion(self) -> Estimate:
        """Matrices of one shape in batches of P, in parts of one size; zeros fill up both."""
        P = self.processes
        each = {shape: -(-count // P) for shape, count in self.counts.items()}
        if any(stack.matrices > 1 for stack in self.model.stacks):
            raise ValueError("stacks: expected matrices that are parameters of their own")
        moved = sum(
            count * self._rows_of_part(shape[0]) * shape[1] for shape, count in each.items()
        )
        sent = 2 * (P - 1) * moved * DTYPE.itemsize
        seconds = sum(count * torch_seconds(shape) for shape, count in each.items())
        return self._estimate(
            "Dion's Muon",
            state=self._state_in_parts(),
            averaging=self._scattered,
            sent=sent,
            operations=sum(
                count * newton_schulz_operations(shape) for shape, count in each.items()
            ),
            seconds=seconds,
            least_seconds=self._all(torch_seconds),
            communication=all_to_all_seconds(np.array([sent]), P),
            peers=True,
        )

    def all_designs(self) -> list[Estimate]:
        """Those that take the model's parameters as they are."""
        ours = [self.ours(dtype) for dtype in ("float32", "bfloat16", "int8")]
        if any(stack.matrices > 1 for stack in self.model.stacks):
            return ours
        return [
            *ours,
            self.owners_of_copies("ours, DDP", stored_bytes, our_seconds),
            self.owners_of_copies("ZeRO-1, fp32", lambda s: 4 * math.prod(s), torch_seconds),
            self.replicated(),
            self.all_gather(),
            self.muon_fsdp2(),
            self.dion(),
        ]


def limits(model: Model) -> dict[str, Any]:
    """Why owners stop scaling: there are only so many matrices, and one cannot be divided."""
    operations = {shape: newton_schulz_operations(shape) for shape in set(model.shapes)}
    seconds = {shape: our_seconds(shape) for shape in operations}
    largest = max(operations, key=lambda shape: operations[shape])
    counts = Counter(model.shapes)
    total = sum(count * operations[shape] for shape, count in counts.items())
    total_seconds = sum(count * seconds[shape] for shape, count in counts.items())
    return {
        "matrices": sum(counts.values()),
        "largest": list(largest),
        "useful_processes": total / operations[largest],
        "useful_processes_seconds": total_seconds / max(seconds.values()),
        "least_state_bytes": max(stored_bytes(shape) for shape in operations),
        "least_compute_seconds": max(seconds.values()),
    }
