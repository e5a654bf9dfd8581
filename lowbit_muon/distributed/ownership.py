"""Who computes which matrix, and in which order; the same answer on every process."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

# Products of m x m matrices against those of m x n in a step: five steps of Newton-Schulz in their
# Gram form make 15 of symmetric ones, half of m^3 each, and its input and output 1.5 m^2 n; the
# spectral formats add 19 and 3 m^2 n (`root_iteration`). So 5 and 3.8; between them:
SQUARE_WEIGHT = 4


def cost(shape: tuple[int, int]) -> int:
    """What a step of a matrix [rows, columns] takes, relatively: m^2 (n + 4 m), for m <= n."""
    m, n = sorted(shape)
    return max(1, m * m * (n + SQUARE_WEIGHT * m))


def assign_owners(
    costs: Sequence[int],
    world_size: int,
    fixed: Sequence[int | None] | None = None,
    load: list[int] | None = None,
) -> list[int]:
    """The rank of each matrix's owner.

    Longest processing time first (Graham, 1969): matrices by falling cost, each to the process with
    the least so far. That is within a third of the best balance.
    fixed: owners that are given, for matrices that one process holds anyway. load: what ranks
    own already, to which this is added.
    """
    fixed = fixed or [None] * len(costs)
    owners = [-1] * len(costs)
    load = [0] * world_size if load is None else load
    for index, owner in enumerate(fixed):
        if owner is not None:
            owners[index] = owner
            load[owner] += costs[index]
    queue = [(so_far, rank) for rank, so_far in enumerate(load)]
    heapq.heapify(queue)
    for index in _falling(costs):
        if owners[index] < 0:
            so_far, owner = queue[0]
            owners[index], load[owner] = owner, so_far + costs[index]
            heapq.heapreplace(queue, (load[owner], owner))
    return owners


def rounds(
    costs: Sequence[int], sizes: Sequence[int], owners: Sequence[int], elements: int
) -> list[list[int]]:
    """Matrices in rounds: in each, every process has about `elements` of its own to compute.

    One matrix at least. sizes: elements of each. Every process goes through its matrices by falling
    cost, so that those of one round, and the work of its processes, are alike.
    """
    current: dict[int, int] = {}  # of each owner: the round that it is at, and the room left there
    room: dict[int, int] = {}
    members: list[list[int]] = []
    for index in _falling(costs):
        owner, size = owners[index], sizes[index]
        if owner not in current:
            current[owner], room[owner] = 0, elements
        elif size > room[owner]:
            current[owner], room[owner] = current[owner] + 1, elements
        room[owner] -= size
        if len(members) == current[owner]:
            members.append([])
        members[current[owner]].append(index)
    return [sorted(indices) for indices in members]


def _falling(costs: Sequence[int]) -> list[int]:
    return sorted(range(len(costs)), key=lambda index: (-costs[index], index))
