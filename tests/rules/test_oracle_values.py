"""Oracles against numbers that are computed by hand, of matrices of a few elements."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle_runs import close, draw, gradients, make, matrix, move, run
from oracles.maps import exact_polar
from torch import Tensor, nn


def test_momentum_by_hand() -> None:
    g = gradients((3, 4), 3)
    mu = 0.8
    total = g[2] + mu * (g[1] + mu * g[0])

    def u(**parameters: Any) -> Tensor:
        oracle = make("muon", torch.zeros(3, 4), momentum=mu, polar=lambda x: x, **parameters)
        before = run(oracle, g[:2])
        return (before - run(oracle, g[2:])) / oracle.lr

    close(u(form="sum", nesterov=False), total)
    close(u(form="sum"), g[2] + mu * total)
    close(u(nesterov=False), (1 - mu) * total)
    close(u(), (1 - mu) * (g[2] + mu * total))


def test_lion_by_hand() -> None:
    """M is 0.2 after 1, and u = 0.6 * 0.2 - 0.4 * 0.4 = -0.04; betas exchanged it would be 0.24."""
    oracle = make("lion", matrix([1]), lr=0.1, weight_decay=0.3, momentum=0.6, beta2=0.8)
    after = run(oracle, [matrix([1]), matrix([-0.4])])
    close(after, matrix([(1 * 0.97 - 0.1) * 0.97 + 0.1]))


def test_cautious_muon_by_hand() -> None:
    """M is (0.75, 0.125): of the second element it and the gradient differ in sign."""
    grads = [matrix([1, 1]), matrix([1, -0.25])]
    step = move("cautious_muon", matrix([0, 0]), grads, momentum=0.5, lr=0.1)
    close(step, matrix([0.1, 0]))
    without = [make(name, draw(4, 6), momentum=0.0) for name in ("cautious_muon", "muon")]
    close(*(run(oracle, gradients((4, 6), 2)) for oracle in without))


def test_decays_by_hand() -> None:
    """Steps 0.1 * (0.6, 0.8), of which the second goes against the sign of its weight."""
    expected = {
        "decoupled": matrix([0.97 - 0.06, -0.97 - 0.08]),
        "per_column": matrix([0.97 - 0.06, -0.97 - 0.08]),
        "cautious": matrix([0.97 - 0.06, -1 - 0.08]),
        "cautious_lr2": matrix([0.997 - 0.06, -1 - 0.08]),
        "frank_wolfe": matrix([0.9 - 0.06, -0.9 - 0.08]),
    }
    for decay, after in expected.items():
        oracle = make("muon", matrix([1, -1]), lr=0.1, weight_decay=0.3, decay=decay)
        close(run(oracle, [matrix([3, 4])]), after)
    with pytest.raises(ValueError, match="unknown decay"):
        run(make("muon", matrix([1, -1]), decay="none"), [matrix([3, 4])])


@pytest.mark.parametrize(
    ("name", "rate"), [("nanochat", 0.1 * 2), ("normuon_speedrun", 0.1 * 0.1 * 2)]
)
def test_decay_takes_the_shape_scale(name: str, rate: float) -> None:
    weight, grad = draw(16, 4), draw(16, 4, seed=1)
    step = move(name, weight, [grad], lr=0.1)
    decayed = run(make(name, weight, lr=0.1, weight_decay=0.5), [grad]) + step
    close(decayed, torch.where(step * weight > 0, weight * (1 - rate * 0.5), weight))


# Of gradients (3, 4) and (4, 3), with beta2 = 0.6: V = 0.24 (9, 16) + 0.4 (16, 9) = (8.56, 7.44),
# and (4, 3) / sqrt(V) brought to a norm of one. Polar factors are a fifth of these gradients, which
# changes nothing, and NorMuon's v has one of their elements a row.
DIVIDED = nn.functional.normalize(matrix([4 / math.sqrt(8.56), 3 / math.sqrt(7.44)]))


def test_second_moments_by_hand() -> None:
    grads, weight = [matrix([3, 4]), matrix([4, 3])], matrix([0, 0])
    options = {"lr": 0.1, "momentum": 0.0, "beta2": 0.6, "scale": "none"}
    tall = move("normuon", weight.mT, [grad.mT for grad in grads], **options)
    close(tall, 0.1 * DIVIDED.mT, 1e-6)
    step = move("adamuon", weight, grads, sign=False, **options)
    close(step, 0.1 * 0.2 * math.sqrt(2) * DIVIDED, 1e-6)
    close(move("muon2", weight, grads, **options), 0.1 * DIVIDED, 1e-6)
    # V is of gradients also where M is (0.75 + 2, 1 + 1.5).
    step = move("muon2", weight, grads, **{**options, "momentum": 0.5, "nesterov": False})
    divided = matrix([2.75 / math.sqrt(8.56), 2.5 / math.sqrt(7.44)])
    close(step, 0.1 * nn.functional.normalize(divided), 1e-6)


def test_a_first_second_moment_leaves_signs() -> None:
    """O / sqrt((1 - beta) O^2), and G / sqrt((1 - beta2) G^2)."""
    weight, grad = draw(5, 8), draw(5, 8, seed=100)
    o = exact_polar(grad.sign())
    close(move("adamuon", weight, [grad], lr=0.1), 0.1 * 0.2 * o.sign(), 1e-6)
    close(move("muon2", weight, [grad], lr=0.1), 0.1 * o, 1e-6)


def test_mars_m_by_hand() -> None:
    """gamma mu / (1 - mu) is 0.475: C is (0.295, 0), then (0, 0.2) + 0.475 (-0.2, 0.2)."""
    grads, weight = [matrix([0.2, 0]), matrix([0, 0.2])], matrix([0, 0])
    unit = 0.1 * 0.2 * math.sqrt(2)  # eta s
    m = matrix([0.95 * 0.295 - 0.095, 0.295])
    close(move("mars_m", weight, grads, lr=0.1), unit * m / m.norm())
    # A hundred times those are divided by their norms, but not what is remembered.
    m = matrix([0.95 - 0.095 / 0.30992, 0.295 / 0.30992])
    close(move("mars_m", weight, [100 * g for g in grads], lr=0.1), unit * m / m.norm(), 1e-5)


def test_dion2_by_hand() -> None:
    rows = [torch.zeros(8, 10, dtype=torch.float64) for _ in range(2)]
    rows[0][[1, 6]], rows[1][3], rows[1][6] = 3 * draw(2, 10), draw(10), draw(10, seed=1)
    expected = torch.zeros(8, 10, dtype=torch.float64)
    expected[[1, 6]] = exact_polar(rows[0][[1, 6]])
    factor = 0.1 * math.sqrt(8 / 10)
    close(move("dion2", draw(8, 10), rows[:1], lr=0.1), factor * expected)
    second = 0.5 * rows[0] + rows[1]
    expected[[1, 6]] = exact_polar(second[[1, 6]])
    close(move("dion2", draw(8, 10), rows, lr=0.1, momentum=0.5), factor * expected)
    # columns of a tall one
    tall = [each.mT for each in rows]
    expected = expected.mT * 0.1 * math.sqrt(10 / 8)
    close(move("dion2", draw(10, 8), tall, lr=0.1, momentum=0.5), expected)
    # of all rows it is Muon with a momentum that is a sum, whose G is not yet forgotten
    grads = gradients((5, 8))
    sum_of = move("muon", draw(5, 8), grads, form="sum", nesterov=False, scale="spectral_unclamped")
    close(move("dion2", draw(5, 8), grads, fraction=1.0, lr=0.02), sum_of)


def test_adago_by_hand() -> None:
    """Norms 3 and 10, which gamma makes 4: v is 5."""
    options = {"lr": 0.1, "gamma": 4.0, "initial": 0.0}
    grads = [matrix([3]), matrix([10])]
    close(move("adago", matrix([0]), grads, **options), matrix([0.1 * 4 / 5]))
    close(move("adago", matrix([0]), grads, eps=0.3, **options), matrix([0.3]))


def test_polargrad_by_hand() -> None:
    """Gradients of nuclear norms 4 and 2: M is (0.17, 0.19), or of polar factors (-0.01, 0.19)."""
    grads = [torch.diag(torch.tensor(d).double()) for d in ([3.0, 1.0], [-1.0, 1.0])]
    weight = torch.zeros(2, 2)
    step = move("polargrad", weight, grads, lr=0.1, momentum=0.9)
    close(step, matrix([0.1 * 0.36, 0], [0, 0.1 * 0.36]))
    step = move("polargrad_polar_first", weight, grads, lr=0.1, momentum=0.9)
    close(step, matrix([0.1 * 2 * -0.01, 0], [0, 0.1 * 2 * 0.19]))


def test_auon_by_hand() -> None:
    grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    r = math.sqrt((math.cosh(1.5 * 0.6) ** 2 + math.cosh(1.5 * 0.8) ** 2) / 2)
    weight = torch.zeros(1, 2)
    step = move("auon", weight, [grad], lr=0.1, momentum=0.0)
    close(step, 0.1 * grad / r, 1e-6)
    step = move("auon_hybrid", weight, [grad], lr=0.1, momentum=0.0)
    close(step, 0.1 * grad / 5 / r, 1e-6)


def test_namo_of_a_constant_gradient() -> None:
    """||u|| is (1 - mu^(t+1)) ||G||, v is (1 - mu2^t) ||G||^2, which its correction undoes."""
    weight, grad, lr, lam, mu = draw(6, 9), draw(6, 9, seed=1), 0.01, 0.3, 0.9
    oracle = make("namo", weight, lr=lr, weight_decay=lam, momentum=mu)
    expected = weight
    for t in (1, 2, 3):
        oracle.step(grad)
        alpha = lr * (1 - mu ** (t + 1)) / (1 - mu**t)
        expected = (1 - lam * alpha) * expected - alpha * 0.2 * 3 * exact_polar(grad)
        close(oracle.weight, expected, 1e-7)
