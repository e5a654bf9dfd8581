"""Scaling and the update of weights, against the reference without tolerance."""

from __future__ import annotations

import math

import pytest
import torch
from comparison import GRAD_TYPES, KINDS, REFERENCE, TRITON, assert_same, strided_like
from torch import Tensor


@pytest.mark.parametrize("dtype", GRAD_TYPES)
def test_scaled(dtype: torch.dtype) -> None:
    """Zero wins over what is not finite."""
    x = torch.randn(4, 33, 70)
    x[1, 2, 3], x[3, 0, 0] = math.nan, math.inf
    factor = torch.tensor([0.3, 0.0, -2.0, 1e-30])
    for layout in (x, x.mT.contiguous().mT):
        out = torch.empty(4, 33, 70, dtype=dtype)
        assert TRITON.scaled(layout, factor, out=out) is out
        expected = REFERENCE.scaled(x, factor, out=torch.empty_like(out))
        assert_same(out, expected)
        assert_same(TRITON.scaled(layout, factor.double(), out=out), expected)
    TRITON.scaled(torch.empty(0, 3, 4), torch.empty(0), out=torch.empty(0, 3, 4))


@pytest.mark.parametrize("terms", range(1, 7))
@pytest.mark.parametrize("shape", [(1, 1), (2, 33, 33), (0, 4), (3, 1500)])
def test_combined(terms: int, shape: tuple[int, ...]) -> None:
    """One to four sums, of all numbers of terms, also into the first of them.

    Torch may fuse a product with its sum: a rounding each of what has been added up so far.
    """
    given = [torch.randn(shape) for _ in range(terms)]
    numbers = [[1.0, *torch.randn(terms - 1).tolist()] for _ in range(4)]
    for rows in (numbers[:1], numbers[:2], numbers[:3], numbers):
        expected = REFERENCE.combined(rows, given)
        sizes = [sum(abs(c) * x.abs() for c, x in zip(row, given, strict=True)) for row in rows]
        copies = [term.clone() for term in given]
        out = [torch.empty(shape) for _ in rows[1:]] + copies[:1]
        for results in (TRITON.combined(rows, given), TRITON.combined(rows, copies, out=out)):
            for found, wanted, size in zip(results, expected, sizes, strict=True):
                assert ((found - wanted).abs() <= 2 * terms * 2.0**-24 * size).all()


def test_combined_refuses() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(
        ValueError, match=r"^coefficients: expected 1 numbers, the first of them on"
    ):
        TRITON.combined([[2.0]], [x])
    with pytest.raises(ValueError, match=r"^terms: expected .* got "):
        TRITON.combined([[1.0, 1.0]], [x, x.T])
    with pytest.raises(ValueError, match=r"^out: expected 1 tensors, got 2"):
        TRITON.combined([[1.0]], [x], out=[x, x.clone()])


def element(value: float) -> Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("dtype", GRAD_TYPES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (33, 70)])
def test_update_weight(dtype: torch.dtype, shape: tuple[int, int], cautious: bool) -> None:
    """In every layout, with updates of every dtype."""
    for index, kind in enumerate(KINDS):
        start = torch.randn(shape).to(dtype)
        update = torch.randn(shape).to(GRAD_TYPES[index % 3])
        weight, expected = strided_like(start.clone(), kind), start.clone()
        update[0, 0] = 0.0  # has no sign that a weight could be against
        factors = {"decay": element(0.97), "step_size": torch.tensor(0.13), "cautious": cautious}
        TRITON.update_weight(weight, strided_like(update, KINDS[index - 1]), **factors)
        REFERENCE.update_weight(expected, update, **factors)
        assert_same(weight, expected)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31 - 1, -(2**31)])
def test_stochastic_rounding(seed: int) -> None:
    """Of every bfloat16, with updates that are not finite among them."""
    start = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).view(64, 1024)
    update = torch.randn(64, 1024)
    update[3, 5], update[7, 9] = math.inf, math.nan
    factors = {"decay": element(0.9), "step_size": element(0.3), "cautious": seed == 1}
    seeds = torch.tensor([seed], dtype=torch.int32)
    weight, expected = start[:, :500].clone(), start[:, :500].clone()
    TRITON.update_weight(weight, update[:, :500], seed=seeds, **factors)
    REFERENCE.update_weight(expected, update[:, :500], seed=seeds, **factors)
    assert_same(weight, expected)


def test_no_step_changes_nothing() -> None:
    start = torch.randn(5, 9).bfloat16()
    factors = {"decay": element(1.0), "step_size": element(0.0)}
    for seed, cautious in ((None, False), (torch.tensor([7], dtype=torch.int32), True)):
        weight = start.clone()
        update = torch.full((5, 9), math.nan)
        TRITON.update_weight(weight, update, seed=seed, cautious=cautious, **factors)
        assert torch.equal(weight, start)


def test_wrong_tensors_raise() -> None:
    x, one = torch.ones(3, 4), element(1.0)
    batch, seed = torch.ones(2, 3, 4), torch.ones(1, dtype=torch.int32)

    def update(weight: Tensor = x, update: Tensor = x, **others: Tensor) -> None:
        TRITON.update_weight(weight, update, **{"decay": one, "step_size": one, **others})

    cases = [
        (TypeError, "weight", lambda: update(x.double())),
        (TypeError, "weight", lambda: update(x, seed=seed)),
        (ValueError, "update", lambda: update(update=x.T)),
        (TypeError, "decay", lambda: update(decay=one.double())),
        (ValueError, "step_size", lambda: update(step_size=torch.ones(2))),
        (TypeError, "seed", lambda: update(x.bfloat16(), seed=one)),
        (ValueError, "x", lambda: TRITON.scaled(x, one, out=x)),
        (ValueError, "factor", lambda: TRITON.scaled(batch, one, out=batch)),
        (ValueError, "out", lambda: TRITON.scaled(batch, torch.ones(2), out=x)),
    ]
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()
