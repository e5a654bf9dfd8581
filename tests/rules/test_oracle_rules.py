"""Published properties of single rules."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_runs import SHAPES, close, draw, gradients, make, matrix, move, run
from oracles import ORACLES
from oracles.maps import MUON, exact_polar, newton_schulz
from torch import Tensor

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def test_lion_of_equal_betas_is_signum() -> None:
    weight, grads = draw(6, 4), gradients((6, 4))
    lion = make("lion", weight, lr=0.01, momentum=0.7, beta2=0.7)
    close(run(lion, grads), run(make("signum", weight, lr=0.01, momentum=0.7), grads))


@shapes
def test_muon_plus_has_the_norm_whatever_the_map(shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    crude = newton_schulz([MUON], 2)
    step = move("muon_plus", weight, grads, lr=0.1, scale="none", polar=crude)
    assert float(step.norm()) == pytest.approx(0.1 * math.sqrt(min(shape)))
    plain = move("muon", weight, grads, lr=0.1, scale="none", polar=crude)
    close(step / step.norm(), plain / plain.norm())
    assert float(plain.norm()) != pytest.approx(float(step.norm()), rel=0.01)


def test_muon_plus_of_rows_and_columns() -> None:
    weight, grads = draw(8, 5), gradients((8, 5))
    for renorm, dim in (("row", 1), ("column_row", 1), ("column", 0), ("row_column", 0)):
        step = move("muon_plus", weight, grads, lr=0.1, scale="none", renorm=renorm)
        norms = step.norm(dim=dim)
        close(norms, torch.full_like(norms, 0.1), 1e-5)


@shapes
def test_muonh_stays_on_the_sphere(shape: tuple[int, int]) -> None:
    weight = 3 * draw(*shape)
    after = run(make("muonh", weight, lr=0.1), gradients(shape))
    assert float(after.norm()) == pytest.approx(float(weight.norm()))


def test_muonh_moves_by_its_share_of_the_weight() -> None:
    """(3, 0) - 0.5 * 3 (0, 1) is (3, -1.5), which is brought back to a norm of 3."""
    after = run(make("muonh", matrix([3, 0]), lr=0.5), [matrix([0, 7])])
    close(after, matrix([3, -1.5]) * (2 / math.sqrt(5)))
    with pytest.raises(ValueError, match="no weight decay"):
        make("muonh", matrix([3, 0]), weight_decay=0.1)


@shapes
def test_turbo_muon_s_matrix_has_no_singular_value_above_one(shape: tuple[int, int]) -> None:
    """AOL's bound (Prach and Lampert, arXiv 2208.03160), reached by orthogonal rows."""
    step = move("turbo_muon", draw(*shape), gradients(shape), lr=1.0, scale="none", polar=_same)
    assert float(torch.linalg.svdvals(step)[0]) <= 1 + 1e-12
    short = exact_polar(draw(*shape))
    sizes = torch.arange(1.0, min(shape) + 1).double()
    grad = sizes[:, None] * short if shape[0] <= shape[1] else short * sizes
    close(move("turbo_muon", draw(*shape), [grad], lr=1.0, scale="none", polar=_same), short)


def _same(x: Tensor) -> Tensor:
    return x


def test_normuon_axes() -> None:
    """The exact polar factor's rows are equal on the short side, so that only the long one acts."""
    for shape in ((9, 4), (4, 9)):
        weight, grads = draw(*shape), gradients(shape)
        steps = {
            axis: move("normuon", weight, grads, axis=axis)
            for axis in ("row", "column", "long", "short")
        }
        tall = shape[0] > shape[1]
        assert torch.equal(steps["long"], steps["row" if tall else "column"])
        assert torch.equal(steps["short"], steps["column" if tall else "row"])
        plain = move("muon", weight, grads)
        close(steps["short"], plain, 1e-8)
        assert float((steps["long"] - plain).norm()) > 0.05 * float(plain.norm())
        # A constant gradient makes the v of all steps the same: equal norms on the long side.
        same = move("normuon", weight, [grads[0]] * 3, axis="long")
        norms = same.norm(dim=1 if tall else 0)
        close(norms, norms.mean().expand(9), 1e-8)


@shapes
def test_the_speedrun_s_rule_is_normuon_but_for_its_floor(shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    expected = move("normuon", weight, grads, lr=0.1, axis="long", beta2=0.9)
    close(move("normuon_speedrun", weight, grads, lr=0.1), expected, 1e-8)


@shapes
def test_nanochat_has_muon_plus_s_norm(shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    step = move("nanochat", weight, grads, lr=0.1, scale="none", polar=newton_schulz([MUON], 2))
    assert float(step.norm()) == pytest.approx(0.1 * math.sqrt(min(shape)))


def test_nanochat_is_blind_to_the_size_of_rows() -> None:
    weight, grads = draw(6, 9), gradients((6, 9), 3)
    sizes = draw(6, 1, seed=3).exp()
    expected = run(make("nanochat", weight, momentum=0.0), grads)
    close(run(make("nanochat", weight, momentum=0.0), [sizes * grad for grad in grads]), expected)
    # Unlike the speedrun's rule, which is nanochat's without it.
    sized = run(make("normuon_speedrun", weight, momentum=0.0), [sizes * grad for grad in grads])
    other = run(make("normuon_speedrun", weight, momentum=0.0), grads)
    assert float((sized - other).norm()) > 0.1 * float((other - weight).norm())


def test_nordion2_of_all_rows_is_normuon() -> None:
    grads = gradients((8, 5))
    told = {"scale": "spectral_unclamped", "form": "sum", "nesterov": False, "lr": 0.02}
    expected = move("normuon", draw(8, 5), grads, **told)
    close(move("nordion2", draw(8, 5), grads, fraction=1.0, lr=0.02), expected, 1e-6)


def test_nordion2_leaves_what_is_not_chosen() -> None:
    grad = draw(8, 5)
    grad[[0, 3]] *= 10
    oracle = make("nordion2", draw(8, 5), lr=0.1, weight_decay=0.0)
    moved = oracle.weight - run(oracle, [grad])
    assert moved.any(dim=1).nonzero().flatten().tolist() == [0, 3]
    assert oracle.v.flatten().nonzero().flatten().tolist() == [0, 3]


@pytest.mark.parametrize("name", ["namo", "namo_d"])
def test_namo_caps(name: str) -> None:
    weight, grad = draw(6, 9), draw(6, 9, seed=1)
    close(
        run(make(name, weight, lr=1e3, weight_decay=0.3), [grad]), 0.7 * weight - exact_polar(grad)
    )


def test_namo_d_s_decay_stops_at_zero() -> None:
    weight, grad = draw(6, 9), draw(6, 9, seed=1)
    close(run(make("namo_d", weight, lr=1e3, weight_decay=3.0), [grad]), -exact_polar(grad))
    expected = -2 * weight - exact_polar(grad)
    close(run(make("namo", weight, lr=1e3, weight_decay=3.0), [grad]), expected)


def test_namo_d_of_one_column_is_namo() -> None:
    weight, grads = draw(7, 1), gradients((7, 1))
    close(run(make("namo_d", weight), grads), run(make("namo", weight), grads))


def test_namo_d_clamps_around_the_mean() -> None:
    """Columns of noise about zero have small s, constant columns large ones."""
    weight, base, lr = draw(6, 4), draw(6, 4, seed=1), 1e-3
    signs = torch.tensor([[1.0, 1.0, -1.0, 1.0]], dtype=torch.float64)
    grads = [base * signs ** (t % 2) for t in range(20)]

    def columns(c: float) -> Tensor:
        u = make("muon", weight, polar=lambda x: x, lr=1.0, scale="none")
        before = run(u, grads[:-1])
        o = exact_polar(before - run(u, grads[-1:]))
        return move("namo_d", weight, grads, lr=lr, c=c).norm(dim=0) / o.norm(dim=0)

    free, clamped = columns(1e-9), columns(0.75)
    assert float(free[2]) < 0.2 * float(free[0])
    mean = float(free.mean())
    close(clamped, free.clamp(0.75 * mean, mean / 0.75))
    assert float(clamped[2]) == pytest.approx(0.75 * mean)
    close(columns(1.0), free.mean().expand(4))


def test_rmnp_rows() -> None:
    step = move("rmnp", draw(9, 4), gradients((9, 4)), lr=0.1)
    close(step.norm(dim=1), torch.full((9,), 0.15, dtype=torch.float64))


@pytest.mark.parametrize("axes", ["row", "column", "both"])
def test_muoneq_is_blind_to_its_axes(axes: str) -> None:
    weight, grad = draw(6, 6), draw(6, 6, seed=1)
    expected = move("muoneq", weight, [grad], axes=axes)
    for axis, shape in (("row", (6, 1)), ("column", (1, 6))):
        scaled = move("muoneq", weight, [draw(*shape, seed=2).exp() * grad], axes=axes)
        same = float((scaled - expected).norm()) < 1e-9
        assert same == (axis == axes)


def test_scion_converges_to_its_ball() -> None:
    """Of a constant gradient Frank-Wolfe ends in -rho s polar(G)."""
    grad = draw(8, 4, seed=1)
    after = run(make("scion", draw(8, 4), lr=0.5, radius=3.0), [grad] * 60)
    close(after, -3 * math.sqrt(2) * exact_polar(grad))


def test_scion_columns_and_signs() -> None:
    weight, grads = draw(8, 5), gradients((8, 5), 1)
    step = move("scion_col", weight, grads, lr=0.1, decay="decoupled")
    close(step.norm(dim=0), torch.full((5,), 0.1 * math.sqrt(8), dtype=torch.float64), 1e-6)
    step = move("scion_sign", weight, grads, lr=0.1, decay="decoupled")
    close(step, 0.1 * 3000 / 5 * grads[0].sign())


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pion_passes_what_is_large(k: int) -> None:
    """Past the cut-off, about .5, .25, .13 and .06 of the norm for k of 1 to 4, values go to 1."""
    cut = [0.5, 0.25, 0.13, 0.06][k - 1]
    large, small = 1.6 * cut, 0.4 * cut
    values = torch.tensor([large, small, 0.0, 0.0], dtype=torch.float64)
    values[2] = math.sqrt(1 - large**2 - small**2)
    u, v = exact_polar(draw(4, 4)), exact_polar(draw(4, 9, seed=1))
    step = move("pion", torch.zeros(4, 9), [u * values @ v], k=k, lr=1.0)
    passed = (u.mT @ step @ v.mT).diagonal()
    assert float(passed[0]) > 0.7
    assert abs(float(passed[1])) < (0.05 if k < 4 else 0.3)


def test_pion_s_k_must_be_given() -> None:
    with pytest.raises(TypeError, match="'k'"):
        ORACLES["pion"](draw(4, 9))


def test_spectra() -> None:
    weight, grads = draw(9, 4), gradients((9, 4), 2)
    m = 0.09 * grads[0] + 0.1 * grads[1]
    options = {"lr": 0.1, "momentum": 0.9}
    close(move("spectra", weight, grads, c=1e9, **options), 0.1 * 1.5 * m)
    small = move("spectra", torch.zeros(9, 4), grads, c=1e-9, **options)
    close(small, 1e-10 * 1.5 * exact_polar(m))
    step = move("spectra", weight, [7 * grad for grad in grads], c=7.0, **options)
    close(step, 7 * move("spectra", weight, grads, c=1.0, **options))
