"""Second moments in logarithmic codes of eight bits: how far they are from what they stand for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit_muon.step.rules.moments import (
    OCTAVES,
    STEP,
    averaged,
    decoded,
    encoded,
    moment_state,
    phase,
)
from lowbit_muon.step.rules.stage import Matrices

# Half a step, in the logarithm; float32's share is 2^-24 of some 2^8 codes, that is 2^-16 steps.
HALF = 0.5 * STEP * math.log(2) * (1 + 1e-3)
SHAPE = (16, 64)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step_number(step: int) -> Tensor:
    return torch.full((1, 1, 1), float(step))


class Moment:
    """V of `averaged`, and the same in float64."""

    def __init__(self, shape: tuple[int, int], beta: float) -> None:
        self.beta, self.steps = beta, 0
        kept = moment_state("v", shape, 8)
        self.state = {n: torch.zeros(1, *k.shape, dtype=k.dtype) for n, k in kept.items()}
        self.exact = torch.zeros(1, *shape, dtype=torch.float64)

    def step(self, squares: Tensor) -> Tensor:
        """log(V / exact V) of what a stage is given."""
        self.steps += 1
        zeros = torch.zeros(1, 1, 1)
        shape = (squares.shape[1], squares.shape[2])
        number = step_number(self.steps)
        matrices = Matrices(shape, lambda: squares, zeros, number, 0.0, 0.0, 0.0, dict(self.state))
        v = averaged(matrices, "v", squares, self.beta, 8)
        self.state = matrices.state
        self.exact = self.beta * self.exact + (1 - self.beta) * squares.double()
        return (v.double() / self.exact).log()

    @property
    def stored(self) -> Tensor:
        return decoded(*self.state.values())


@pytest.mark.parametrize("step", [1, 2, 7, 1000, 2**20 + 3])
def test_a_rounding_is_half_a_step_at_most(step: int) -> None:
    # (the last step of the 16 octaves is left to the phase)
    v = torch.exp2(-15.9 * torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(step)))
    v *= torch.tensor([1e-20, 1e20]).view(2, 1, 1)
    codes, rows, columns = encoded(v, step_number(step))
    assert codes.dtype == torch.uint8
    assert (codes.shape, rows.shape, columns.shape) == (v.shape, (2, 16, 1), (2, 1, 64))
    error = (decoded(codes, rows, columns).double() / v.double()).log().abs()
    assert float(error.max()) <= HALF
    assert float(error.max()) > 0.9 * HALF


def test_what_is_positive_stays_positive() -> None:
    largest = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    v = torch.tensor([[[1.0, 1e-3, 1e-12, 1e-38, 1e-44, 0.0], largest], [[1e-38] * 6, [0] * 6]])
    back = decoded(*encoded(v, step_number(3)))
    assert torch.equal(back > 0, v > 0)
    # what is below the smallest code is that, 2^-16 of the largest but for the phase
    floor = back[0, 0, 2:5]
    assert bool((floor == floor[0]).all())
    assert 2.0**-OCTAVES * (1 - 1e-3) <= float(floor[0]) <= 2.0 ** (STEP - OCTAVES) * (1 + 1e-3)


def test_zeros_are_zeros() -> None:
    kept = moment_state("v", SHAPE, 8)
    assert not decoded(*(torch.zeros(1, *k.shape, dtype=k.dtype) for k in kept.values())).any()
    assert not any(each.any() for each in encoded(torch.zeros(1, *SHAPE), step_number(5)))


def test_a_column_of_small_averages_has_its_own_scale() -> None:
    """As columns of inputs that are mostly zero have, and dead rows."""
    v = draw(1, *SHAPE).square() + 0.01
    v[:, :, 5] *= 1e-9
    v[:, 3] *= 1e-12
    error = (decoded(*encoded(v, step_number(9))) / v).log().abs()
    error[:, 3, 5] = 0  # which is 1e-9 of the larger of the two
    assert float(error.max()) <= HALF


def test_phases_and_their_differences_are_even() -> None:
    """Of n of them each of 20 parts of [0, 1) has n / 20 but for a few, as no random numbers do."""
    phases = phase(torch.arange(1, 2001).view(-1, 1, 1).float()).flatten().double()
    assert 0 <= float(phases.min()) < float(phases.max()) <= 1
    differences = (phases[1:] - phases[:-1]) % 1
    counts = torch.histc(differences, 20, 0, 1)
    # a golden rotation's discrepancy is below log(n) / n: 8 of 2000, here at both ends
    assert float((counts - 1999 / 20).abs().max()) <= 8
    late = phase(torch.arange(2**24 - 100, 2**24).view(-1, 1, 1).float()).flatten()
    assert len(late.unique()) == 100


@pytest.mark.parametrize("beta", [0.95, 0.99])
def test_errors_of_an_average_are_those_of_its_last_roundings(beta: float) -> None:
    moment = Moment(SHAPE, beta)
    errors = []
    for step in range(600):
        squares = draw(1, *SHAPE, seed=step).square() * torch.linspace(0.1, 1, SHAPE[1]) ** 2
        errors.append(moment.step(squares))
    found = torch.stack(errors[300:])
    # a rounding is uniform within half a step, and weighs beta^k after k steps (see the module);
    # 5 %: where a large square comes in, the average forgets at once
    expected = STEP * math.log(2) / math.sqrt(12 * (1 - beta**2))
    assert 0.5 * expected <= float(found.square().mean().sqrt()) <= 1.05 * expected
    # and there is no bias: 300 steps hold 300 (1 - beta) independent errors of each element
    independent = found[0].numel() * 300 * (1 - beta)
    assert abs(float(found.mean())) <= 5 * expected / math.sqrt(independent)


@pytest.mark.parametrize("beta", [0.95, 0.99, 0.999])
def test_an_average_falls_beside_one_that_stays(beta: float) -> None:
    """Without phases it would stay for ever from beta = 0.979 on."""
    moment = Moment((6, 6), beta)
    squares = torch.ones(1, 6, 6)
    for _ in range(3):
        moment.step(squares)
    squares = moment.exact.float() * torch.eye(6)  # one of each row and column stays
    steps = round(math.log(2**8) / -math.log(beta))  # to 2^-8 of what it was
    for _ in range(steps):
        error = moment.step(squares)
    # Roundings of a steady change are those of turns by the golden ratio; sums of n of them are
    # below 0.5 log(n) + 1 steps.
    assert float(error.abs().max()) <= (0.5 * math.log(steps) + 1) * 2 * HALF


@pytest.mark.parametrize("beta", [0.95, 0.99])
def test_an_average_rises_by_less_than_half_a_code_a_step(beta: float) -> None:
    moment, stays = Moment((6, 6), beta), torch.eye(6, dtype=torch.bool)
    moment.step(torch.ones(1, 6, 6))
    for _ in range(400):  # squares that are always 30 % above the average
        squares = (1.3 * moment.exact).float().masked_fill(stays, 10.0)
        error = moment.step(squares)
    rise = (1 + 0.3 * (1 - beta)) ** 400
    assert rise > 3
    assert float(moment.exact[0, 0, 1]) == pytest.approx((1 - beta) * rise, rel=1e-3)
    assert float(error.abs().max()) <= (0.5 * math.log(400) + 1) * 2 * HALF


def test_zero_squares_shrink_all_alike() -> None:
    moment = Moment(SHAPE, 0.95)
    moment.step(draw(1, *SHAPE).square())
    before = moment.stored.clone()
    for _ in range(20):
        moment.step(torch.zeros(1, *SHAPE))
    assert torch.equal(moment.stored > 0, before > 0)
    assert bool((moment.stored < before).all())
