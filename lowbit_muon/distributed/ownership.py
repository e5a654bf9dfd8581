"""Who computes which matrix, and in which order; the same answer on every process."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign_owners(
    shapes: Sequence[tuple[int, int]], processes: int, fixed: Sequence[int | None] | None = None
) -> list[int]:
    """The process that owns each matrix [rows, columns].

    Longest processing time first (Graham, 1969): matrices by falling cost m^2 n, the short side
    first, each to the process with the least so far. That is within a third of the best balance.
    fixed: owners that are given, for matrices that one process holds anyway.
    """
    fixed = fixed or [None] * len(shapes)
    owners = [-1] * len(shapes)
    load = [0] * processes
    for index, owner in enumerate(fixed):
        if owner is not None:
            owners[index] = owner
            load[owner] += cost(shapes[index])
    queue = [(cost_so_far, process) for process, cost_so_far in enumerate(load)]
    heapq.heapify(queue)
    for index in sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i)):
        if owners[index] < 0:
            so_far, owners[index] = queue[0]
            heapq.heapreplace(queue, (so_far + cost(shapes[index]), owners[index]))
    return owners


def cost(shape: tuple[int, int]) -> int:
    """Multiplications of a product of the matrix with its transpose, and one at least."""
    m, n = sorted(shape)
    return max(1, m * m * n)


def rounds(
    shapes: Sequence[tuple[int, int]], owners: Sequence[int], processes: int, elements: int
) -> list[list[int]]:
    """Matrices in rounds: in each, every process has about `elements` of its own to compute.

    One at least. Every process goes through its matrices by falling cost, so that those of one
    round, and the work of its processes, are alike.
    """
    order = sorted(range(len(shapes)), key=lambda i: (-cost(shapes[i]), i))
    found: list[list[int]] = []
    for process in range(processes):
        place, room = 0, elements
        first = True
        for index in order:
            if owners[index] != process:
                continue
            size = shapes[index][0] * shapes[index][1]
            if not first and size > room:
                place, room = place + 1, elements
            first, room = False, room - size
            while len(found) <= place:
                found.append([])
            found[place].append(index)
    return [sorted(members) for members in found]
