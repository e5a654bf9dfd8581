"""The maps of the oracles against closed forms and singular values."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_runs import SHAPES, close, draw, matrix
from oracles.base import shape_scale
from oracles.maps import (
    MUON,
    PROMOTE,
    col_norm,
    equilibrate,
    exact_polar,
    newton_schulz,
    power_iteration,
    row_norm,
    sinkhorn,
    soft_cap_coupling,
    soft_clip,
)
from torch import Tensor

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@shapes
def test_exact_polar(shape: tuple[int, int]) -> None:
    x = draw(*shape)
    u = exact_polar(x)
    gram = u @ u.mT if shape[0] <= shape[1] else u.mT @ u
    close(gram, torch.eye(min(shape), dtype=torch.float64))
    assert float((x * u).sum()) == pytest.approx(float(torch.linalg.svdvals(x).sum()))


def test_exact_polar_leaves_out_what_is_zero() -> None:
    assert not exact_polar(torch.zeros(3, 4)).any()
    low_rank = draw(8, 3) @ draw(3, 6, seed=1)
    values = torch.linalg.svdvals(exact_polar(low_rank))
    close(values, torch.tensor([1.0, 1, 1, 0, 0, 0], dtype=torch.float64))


@shapes
def test_newton_schulz_is_its_polynomial(shape: tuple[int, int]) -> None:
    def polynomial(s: Tensor) -> Tensor:
        s = s / s.norm()
        for a, b, c in (PROMOTE, MUON, MUON):
            s = a * s + b * s**3 + c * s**5
        return s

    u, s, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    close(newton_schulz([PROMOTE, MUON], 3)(u * s @ vh), u * polynomial(s) @ vh)


@shapes
def test_newton_schulz_converges_to_the_polar_factor(shape: tuple[int, int]) -> None:
    x = draw(*shape)
    close(newton_schulz([PROMOTE], 40)(x), exact_polar(x))
    assert not newton_schulz([MUON], 5)(torch.zeros(shape)).any()


def test_normalising_maps() -> None:
    x = draw(5, 8)
    x[2] = 0
    assert row_norm(x).norm(dim=1).tolist() == pytest.approx([1, 1, 0, 1, 1])
    x = draw(5, 8)
    assert col_norm(x).norm(dim=0).tolist() == pytest.approx([1] * 8)
    balanced = sinkhorn(x, rounds=60)
    assert balanced.norm(dim=0).tolist() == pytest.approx([math.sqrt(5)] * 8)
    assert balanced.norm(dim=1).tolist() == pytest.approx([math.sqrt(8)] * 5)
    # Diagonal factors around x go by the first round or fade.
    rows, cols = draw(5, 1, seed=1).exp(), draw(1, 8, seed=2).exp()
    close(sinkhorn(rows * x * cols, rounds=60), balanced, 1e-9)
    close(sinkhorn(rows * x), sinkhorn(x))
    assert torch.equal(sinkhorn(x), sinkhorn(sinkhorn(x, rounds=2), rounds=3))
    assert not sinkhorn(torch.zeros(3, 4)).any()


def test_equilibrate() -> None:
    x = draw(4, 6) * torch.tensor([[1.0], [10], [100], [0.1]])
    close(equilibrate(x, "row").norm(dim=1), (x.norm() / 2).expand(4))
    close(equilibrate(x, "column").norm(dim=0), (x.norm() / math.sqrt(6)).expand(6))
    # Rows are equal already (5), columns are sqrt(18) and sqrt(32), and should be 5.
    x = matrix([3, 4], [3, -4])
    close(equilibrate(x, "both"), 5 / math.sqrt(2) * matrix([1, 1], [1, -1]))


def test_soft_clip() -> None:
    u, _, vh = torch.linalg.svd(draw(3, 5), full_matrices=False)
    x = u * torch.tensor([30.0, 3.0, 0.3], dtype=torch.float64) @ vh
    values = torch.linalg.svdvals(soft_clip(x, 3.0)).tolist()
    assert values == pytest.approx([30 / math.sqrt(101), 3 / math.sqrt(2), 0.3 / math.sqrt(1.01)])
    close(soft_clip(x, 1e6), x, 1e-9)  # (30 / 1e6)^2 / 2


def test_shape_scales() -> None:
    tall, wide = torch.Size((16, 4)), torch.Size((4, 16))
    assert [shape_scale("original", s) for s in (tall, wide)] == [2, 1]
    assert [shape_scale("spectral_unclamped", s) for s in (tall, wide)] == [2, 0.5]
    assert [shape_scale("match_rms_adamw", s) for s in (tall, wide)] == [0.8, 0.8]
    assert [shape_scale("megatron", s) for s in (tall, wide)] == [4, 4]
    assert [shape_scale("none", s) for s in (tall, wide)] == [1, 1]


@shapes
def test_power_iteration_finds_the_largest_singular_value(shape: tuple[int, int]) -> None:
    x = draw(*shape)
    s, u, v = power_iteration(x, rounds=500)
    assert float(s) == pytest.approx(float(torch.linalg.svdvals(x)[0]))
    assert float(u @ x @ v) == pytest.approx(float(s))
    assert float(u.norm()) == pytest.approx(1)
    assert float(v.norm()) == pytest.approx(1)
    assert float(power_iteration(x, rounds=2)[0]) <= float(s)


def test_soft_cap_coupling() -> None:
    for k in (1.001, 1.05, 1.5, 4.0, 30.0):
        a = soft_cap_coupling(2 * k, 2.0)
        once = 2 * k - a * (2 * k) ** 3
        assert once + a * once**3 == pytest.approx(2.0, rel=1e-9)
    assert soft_cap_coupling(0.9, 1.0) == soft_cap_coupling(1.0, 1.0) == 0
