"""Where oracles bring the weights, by singular values."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_runs import SHAPES, close, draw, gradients, make, run
from oracles.maps import exact_polar, power_iteration
from torch import Tensor

# The first far above the others: 16 rounds of power iteration, which squares, leave 2^-32 or less.
VALUES = [4.0, *(1.5 - 0.1 * i for i in range(11))]


def with_values(values: list[float], shape: tuple[int, int] = (12, 16)) -> Tensor:
    """A matrix of these singular values."""
    u, _, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    return u * torch.tensor(values, dtype=torch.float64) @ vh


def test_hammer_and_spectral_decay_touch_one_singular_value() -> None:
    zero = torch.zeros(12, 16)
    w = with_values(VALUES)
    after = run(make("spectral_hammer", w, w_max=2.0), [zero])
    close(torch.linalg.svdvals(after), torch.tensor([2.0, *VALUES[1:]]).double(), 1e-7)
    after = run(make("spectral_hammer", w, w_max=5.0), [zero])
    close(torch.linalg.svdvals(after), torch.tensor([5.0, *VALUES[1:]]).double(), 1e-7)
    after = run(make("spectral_decay", w, lr=0.1, weight_decay=2.0), [zero])
    close(torch.linalg.svdvals(after), torch.tensor([3.2, *VALUES[1:]]).double(), 1e-7)


def test_spectral_ball_and_muon_ball_divide() -> None:
    zero, w = torch.zeros(12, 16), with_values(VALUES)
    close(run(make("spectral_ball", w, w_max=2.0), [zero]), w / 2, 1e-7)
    close(run(make("spectral_ball", w, w_max=5.0), [zero]), w)
    close(run(make("muon_ball", w), [zero]), w * math.sqrt(12 / 16) / 4, 1e-7)
    grad = draw(12, 16, seed=1)
    after = run(make("muon_ball", w, lr=0.1), [grad])
    close(after, math.sqrt(12 / 16) * (w / 4 - 0.1 * exact_polar(grad)), 1e-7)


def test_spectral_sphere_moves_along_it() -> None:
    w, grad = with_values(VALUES), draw(12, 16, seed=1)
    _, u, v = power_iteration(w)
    still = run(make("spectral_sphere", w), [torch.zeros(12, 16)])
    close(still, run(make("muon_ball", w), [torch.zeros(12, 16)]))
    moved = still - run(make("spectral_sphere", w, lr=0.1), [grad])
    factor = 0.1 * math.sqrt(12 / 16)
    close(torch.linalg.svdvals(moved), torch.full((12,), factor, dtype=torch.float64))
    assert abs(float(u @ moved @ v)) < 1e-9
    plain = still - run(make("muon_ball", w, lr=0.1), [grad])
    assert abs(float(u @ plain @ v)) > 1e-3
    # of all such it is the steepest: no worse than any other, say of the tangential gradient
    other = factor * exact_polar(grad - float(u @ grad @ v) * torch.outer(u, v))
    other = other - float(u @ other @ v) * torch.outer(u, v)
    other = other * (factor / float(torch.linalg.svdvals(other)[0]))
    assert float((moved * grad).sum()) > float((other * grad).sum())


@pytest.mark.parametrize("name", ["soft_cap", "hard_cap"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_caps_hold(name: str, shape: tuple[int, int]) -> None:
    weight = exact_polar(draw(*shape))
    oracle = make(name, weight, lr=0.1, w_max=1.3)
    for grad in gradients(shape, 12):
        oracle.step(grad - 100 * weight)  # outwards
        # HardCap's polynomial reaches 1.0107
        assert float(torch.linalg.svdvals(oracle.weight)[0]) <= 1.3 * 1.0108
    assert float(torch.linalg.svdvals(oracle.weight)[0]) > 1.2


def test_hard_cap_is_nearly_the_smaller() -> None:
    values = [2.99, 2.5, 1.9, 1.4, 1.2, 1.1, 0.9, 0.7, 0.5, 0.3, 0.1, 0.0]
    after = torch.linalg.svdvals(make("hard_cap", draw(12, 16)).project(with_values(values)))
    expected = torch.tensor(values).double().clamp_max(1.0)
    assert float((after - expected).abs().max()) < 0.02
    # Without `within` what is above 3.5 would be let through with another sign.
    far = torch.linalg.svdvals(make("hard_cap", draw(12, 16)).project(5 * with_values(VALUES)))
    assert float(far[0]) == pytest.approx(1, abs=0.02)
