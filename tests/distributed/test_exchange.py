"""Owners, rounds and packed updates, without other processes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lowbit_muon import orthogonalize
from lowbit_muon.distributed.exchange import pack, packed_bytes, unpack
from lowbit_muon.distributed.ownership import assign_owners, cost, rounds
from lowbit_muon.state.placement import MatrixShard
from lowbit_muon.step.options import UpdateDtype

# --- owners and rounds, without processes ---

SHAPES = [(576, 576), (192, 576), (1536, 576), (576, 1536)] * 7


@pytest.mark.parametrize("processes", [1, 2, 3, 4, 7])
def test_work_and_state_are_balanced(processes: int) -> None:
    owners = assign_owners([cost(shape) for shape in SHAPES], processes)
    load = [sum(cost(s) for s, o in zip(SHAPES, owners, strict=True) if o == p)
            for p in range(processes)]  # fmt: skip
    # Graham (1969): at most (4 - 1/p)/3 of the best, which is no less than the mean.
    assert max(load) <= (4 - 1 / processes) / 3 * sum(load) / processes
    state = [sum(math.prod(s) for s, o in zip(SHAPES, owners, strict=True) if o == p)
             for p in range(processes)]  # fmt: skip
    assert max(state) <= sum(state) / processes + max(map(math.prod, SHAPES))


def test_longest_first_against_every_assignment() -> None:
    shapes = [(3, 3), (3, 4), (4, 4), (2, 9), (5, 5), (4, 6)]
    costs = [cost(shape) for shape in shapes]
    best = min(
        max(sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(3))
        for owners in itertools.product(range(3), repeat=len(shapes))
    )
    owners = assign_owners(costs, 3)
    found = max(sum(c for c, o in zip(costs, owners, strict=True) if o == p) for p in range(3))
    assert best <= found <= (4 - 1 / 3) / 3 * best


def test_given_owners_stay_and_count() -> None:
    assert assign_owners([64] * 4, 2, [1, 1, None, None]) == [1, 1, 0, 0]
    assert assign_owners([], 3) == []
    assert assign_owners([cost((0, 4)), cost((1, 1))], 4) == [1, 0]


@pytest.mark.parametrize("elements", [1, 600_000, 10**9])
def test_rounds_hold_every_matrix_once_and_no_more_than_they_may(elements: int) -> None:
    costs, sizes = [cost(shape) for shape in SHAPES], [math.prod(shape) for shape in SHAPES]
    owners = assign_owners(costs, 3)
    found = rounds(costs, sizes, owners, elements)
    assert sorted(itertools.chain.from_iterable(found)) == list(range(len(SHAPES)))
    for members, process in itertools.product(found, range(3)):
        own = [math.prod(SHAPES[i]) for i in members if owners[i] == process]
        assert len(own) <= 1 or sum(own) <= elements
    assert len(found) == 1 if elements == 10**9 else len(found) > 1


# --- updates on their way ---


def part(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("shape", [(5, 8), (1, 1), (0, 4), (4, 0)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_packed_updates_have_the_bytes_they_say(shape: tuple[int, int], dtype: UpdateDtype) -> None:
    update = part(*shape)
    packed = pack(update, dtype)
    assert packed.numel() == packed_bytes(MatrixShard(0, shape[0], 0, shape[1]), dtype)
    found = unpack(torch.cat([torch.zeros(1, dtype=torch.uint8), packed])[1:], shape, dtype)
    if dtype == "float32":
        assert torch.equal(found, update)
    elif dtype == "bfloat16":
        assert torch.equal(found, update.bfloat16().float())
    elif update.numel():
        step = update.abs().amax(dim=1, keepdim=True) / 127
        # Half a step, and the rounding of the quotient.
        assert ((found - update).abs() <= step * (0.5 + 127 * 2.0**-22)).all()


def test_rows_of_zeros_and_of_one_size_are_exact_as_int8() -> None:
    update = torch.tensor([[0.0, 0.0], [0.3, -0.3]])
    assert torch.equal(unpack(pack(update, "int8"), (2, 2), "int8")[0], update[0])
    torch.testing.assert_close(unpack(pack(update, "int8"), (2, 2), "int8"), update)


def test_int8_updates_have_the_error_that_the_documentation_says() -> None:
    """Steps of row maxima over 127 have an error of a step over sqrt(12)."""
    update = orthogonalize(part(256, 1024))
    error = (unpack(pack(update, "int8"), (256, 1024), "int8") - update).norm() / update.norm()
    largest = update.abs().amax(dim=1) / update.square().mean(dim=1).sqrt()
    expected = float(largest.square().mean().sqrt()) / 127 / 12**0.5
    # The mean of 262,144 squared errors varies by less than 1%.
    assert float(error) == pytest.approx(expected, rel=0.01)
    assert 0.006 < float(error) < 0.01
