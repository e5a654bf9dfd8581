"""The oracles against closed forms, invariances and torch.optim.Muon."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracles import (
    MUON,
    ORACLES,
    PROMOTE,
    SUPPRESS,
    Oracle,
    Triple,
    col_norm,
    equilibrate,
    exact_polar,
    newton_schulz,
    power_iteration,
    row_norm,
    shape_scale,
    sinkhorn,
    soft_cap_coupling,
    soft_clip,
)
from torch import Tensor

SHAPES = [(12, 5), (5, 12), (6, 6), (1, 7), (7, 1)]
REQUIRED: dict[str, dict[str, Any]] = {"pion": {"k": 2}}
# Gradients times 7 change nothing, but for epsilons of up to 1e-7.
SCALE_FREE = [
    "muon",
    "turbo_muon",
    "moonlight",
    "muonclip",
    "dion_muon",
    "normuon",
    "normuon_paper",
    "normuon_speedrun",
    "nanochat",
    "adamuon",
    "namo",
    "namo_d",
    "rmnp",
    "scion",
    "scion_sign",
    "scion_col",
    "lion",
    "signum",
    "muoneq",
    "muon_plus",
    "muonh",
    "pion",
    "cautious_muon",
    "muon2",
    "dion2",
    "nordion2",
    "soft_cap",
    "hard_cap",
    "spectral_hammer",
    "spectral_ball",
    "spectral_decay",
    "muon_ball",
    "spectral_sphere",
]
# Weights are brought somewhere, whatever the gradient.
CONSTRAINED = [
    "soft_cap",
    "hard_cap",
    "spectral_hammer",
    "spectral_ball",
    "muon_ball",
    "spectral_sphere",
]
# Not so, but here: by its shape or norm, and above a norm of one (as gradients here are).
SCALE_FREE_HERE = ["auon_hybrid", "mars_m"]
# Q W R with Q G R moves like W with G.
ROTATION_FREE = [
    "muon",
    "moonlight",
    "muonclip",
    "dion_muon",
    "namo",
    "adago",
    "polargrad",
    "polargrad_polar_first",
    "scion",
    "muon_plus",
    "muonh",
    "pion",
    "spectra",
    "mars_m",
]
# EMA and sum are one rule; Lion has its own momentum, NAMO compares u with the gradients.
EMA_IS_SUM = [name for name in SCALE_FREE if not name.startswith("namo") and name != "lion"]

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name: str, weight: Tensor, **parameters: Any) -> Oracle:
    return ORACLES[name](weight, **{**REQUIRED.get(name, {}), **parameters})


def gradients(shape: tuple[int, int], steps: int = 4) -> list[Tensor]:
    return [(1 + seed) * draw(*shape, seed=100 + seed) for seed in range(steps)]


def run(oracle: Oracle, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        oracle.step(grad)
    return oracle.weight


def move(name: str, weight: Tensor, grads: list[Tensor], **parameters: Any) -> Tensor:
    """What the last of the steps took off the weight, without weight decay."""
    oracle = make(name, weight, **{"weight_decay": 0.0, **parameters})
    before = run(oracle, grads[:-1])
    return before - run(oracle, grads[-1:])


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert float((actual - expected).norm()) <= tolerance * float(expected.norm())


# Maps.


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
    both = x * x.norm() ** 2 / math.sqrt(24) / x.norm(dim=0) / x.norm(dim=1, keepdim=True)
    close(equilibrate(x, "both"), both)


def test_soft_clip() -> None:
    u, _, vh = torch.linalg.svd(draw(3, 5), full_matrices=False)
    x = u * torch.tensor([30.0, 3.0, 0.3], dtype=torch.float64) @ vh
    values = torch.linalg.svdvals(soft_clip(x, 3.0)).tolist()
    assert values == pytest.approx([30 / math.sqrt(101), 3 / math.sqrt(2), 0.3 / math.sqrt(1.01)])
    clipped = soft_clip(x, 3.0)
    inverse = torch.linalg.inv(torch.eye(3, dtype=torch.float64) + x @ x.mT / 9)
    close(clipped @ clipped.mT, inverse @ x @ x.mT)


def test_shape_scales() -> None:
    tall, wide = torch.Size((16, 4)), torch.Size((4, 16))
    assert [shape_scale("original", s) for s in (tall, wide)] == [2, 1]
    assert [shape_scale("spectral_unclamped", s) for s in (tall, wide)] == [2, 0.5]
    assert [shape_scale("match_rms_adamw", s) for s in (tall, wide)] == [0.8, 0.8]
    assert [shape_scale("megatron", s) for s in (tall, wide)] == [4, 4]
    assert [shape_scale("none", s) for s in (tall, wide)] == [1, 1]


# What every rule has.


@pytest.mark.parametrize("name", ORACLES)
@shapes
def test_zero_gradients_leave_the_weight_finite(name: str, shape: tuple[int, int]) -> None:
    zeros = torch.zeros(shape)
    for weight in (draw(*shape), zeros):
        for grads in ([zeros] * 3, [zeros, draw(*shape, seed=1), zeros]):
            assert run(make(name, weight), grads).isfinite().all()


@pytest.mark.parametrize("name", [name for name in ORACLES if name not in CONSTRAINED])
def test_zero_gradients_leave_the_direction_zero(name: str) -> None:
    weight = draw(4, 6)
    after = run(make(name, weight, weight_decay=0.0, decay="decoupled"), [torch.zeros(4, 6)] * 2)
    close(after, weight)


@pytest.mark.parametrize("name", ORACLES)
def test_the_arguments_stay_as_they_are(name: str) -> None:
    weight, grad = draw(4, 6).float(), draw(4, 6, seed=1).float()
    kept = weight.clone(), grad.clone()
    oracle = make(name, weight)
    oracle.step(grad)
    assert oracle.weight.dtype == torch.float64
    assert not torch.equal(oracle.weight, weight.double())
    assert torch.equal(weight, kept[0])
    assert torch.equal(grad, kept[1])


@pytest.mark.parametrize("name", SCALE_FREE)
@shapes
def test_scale_free(name: str, shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    expected = run(make(name, weight), grads)
    actual = run(make(name, weight), [7 * grad for grad in grads])
    close(actual - weight, expected - weight, 1e-6)


@pytest.mark.parametrize("name", sorted(set(ORACLES) - set(SCALE_FREE)))
def test_not_scale_free(name: str) -> None:
    weight, grads = draw(6, 4), gradients((6, 4))
    moved = run(make(name, weight), grads) - weight
    again = run(make(name, weight), [7 * grad for grad in grads]) - weight
    same = float((moved - again).norm()) < 1e-6 * float(moved.norm())
    assert same == (name in SCALE_FREE_HERE)


@pytest.mark.parametrize("name", ["polargrad", "polargrad_polar_first", "auon"])
@shapes
def test_homogeneous(name: str, shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    moved = run(make(name, weight), grads) - weight
    close(run(make(name, weight), [7 * grad for grad in grads]) - weight, 7 * moved, 1e-6)


@pytest.mark.parametrize("name", EMA_IS_SUM)
@pytest.mark.parametrize("nesterov", [False, True])
def test_ema_and_sum_are_one(name: str, nesterov: bool) -> None:
    weight, grads = draw(5, 8), gradients((5, 8))
    results = [
        run(make(name, weight, form=form, nesterov=nesterov), grads) for form in ("ema", "sum")
    ]
    close(results[0] - weight, results[1] - weight, 1e-6)


@pytest.mark.parametrize("name", ["polargrad", "auon", "namo", "spectra"])
def test_ema_and_sum_differ(name: str) -> None:
    weight, grads = draw(5, 8), gradients((5, 8))
    ema, total = (run(make(name, weight, form=form), grads) for form in ("ema", "sum"))
    assert float((ema - total).norm()) > 0.1 * float((ema - weight).norm())


@pytest.mark.parametrize("name", ROTATION_FREE)
@shapes
def test_rotation_free(name: str, shape: tuple[int, int]) -> None:
    q, r = exact_polar(draw(shape[0], shape[0])), exact_polar(draw(shape[1], shape[1]))
    weight, grads = draw(*shape), gradients(shape)
    close(
        run(make(name, q @ weight @ r), [q @ grad @ r for grad in grads]),
        q @ run(make(name, weight), grads) @ r,
    )


# Momentum.


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
    weight, (first, second) = draw(3, 4), gradients((3, 4), 2)
    oracle = make("lion", weight, lr=0.1, weight_decay=0.3, momentum=0.6, beta2=0.8)
    m = 0.2 * first
    expected = weight * 0.97 - 0.1 * first.sign()
    expected = expected * 0.97 - 0.1 * (0.6 * m + 0.4 * second).sign()
    close(run(oracle, [first, second]), expected)


def test_lion_of_equal_betas_is_signum() -> None:
    weight, grads = draw(6, 4), gradients((6, 4))
    lion = make("lion", weight, lr=0.01, momentum=0.7, beta2=0.7)
    close(run(lion, grads), run(make("signum", weight, lr=0.01, momentum=0.7), grads))


def test_cautious_muon() -> None:
    weight, (first, second) = draw(4, 6), gradients((4, 6), 2)
    without = [make(name, weight, momentum=0.0) for name in ("cautious_muon", "muon")]
    close(run(without[0], [first, second]), run(without[1], [first, second]))
    m = 0.5 * 0.5 * first + 0.5 * second
    u = 0.5 * second + 0.5 * m
    masked = torch.where((m > 0) == (second > 0), u, 0)
    assert 0 < int((masked == 0).sum()) < 24
    close(
        move("cautious_muon", weight, [first, second], momentum=0.5, lr=0.1),
        0.1 * exact_polar(masked),
        1e-11,
    )


# Decay.


def test_decays() -> None:
    weight, grad = draw(9, 4), draw(9, 4, seed=1)
    eta, lam, s = 0.1, 0.3, 1.5
    step = eta * s * exact_polar(grad)
    agrees = (weight > 0) == (step > 0)
    assert 0 < int(agrees.sum()) < 36
    expected = {
        "decoupled": weight * (1 - eta * lam),
        "per_column": weight * (1 - eta * lam),
        "cautious": torch.where(agrees, weight * (1 - eta * lam), weight),
        "cautious_lr2": torch.where(agrees, weight * (1 - eta * eta * lam), weight),
        "frank_wolfe": weight * (1 - eta),
    }
    for decay, decayed in expected.items():
        oracle = make("muon", weight, lr=eta, weight_decay=lam, decay=decay)
        close(run(oracle, [grad]), decayed - step)
    with pytest.raises(ValueError, match="unknown decay"):
        run(make("muon", weight, decay="none"), [grad])


@pytest.mark.parametrize(
    ("name", "rate"), [("nanochat", 0.1 * 2), ("normuon_speedrun", 0.1 * 0.1 * 2)]
)
def test_decay_takes_the_shape_scale(name: str, rate: float) -> None:
    weight, grad = draw(16, 4), draw(16, 4, seed=1)
    step = move(name, weight, [grad], lr=0.1)
    decayed = run(make(name, weight, lr=0.1, weight_decay=0.5), [grad]) + step
    close(decayed, torch.where(step * weight > 0, weight * (1 - rate * 0.5), weight))


def test_cautious_decay_never_passes_a_zero_against_the_step() -> None:
    """Where weight and step differ in sign nothing decays: |W'| is |W| + |step| there."""
    weight, grad = draw(6, 6), draw(6, 6, seed=1)
    after = run(make("muon", weight, lr=0.5, weight_decay=1.0, decay="cautious"), [grad])
    step = 0.5 * exact_polar(grad)
    against = step * weight < 0
    close(after.abs()[against], (weight.abs() + step.abs())[against])


# Norms of the step and of the weight.


@shapes
def test_norms_of_steps(shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape)
    rows, cols = shape
    original = math.sqrt(max(1, rows / cols))
    short = math.sqrt(min(shape))
    expected = {
        "muon": original * short,
        "moonlight": 0.2 * math.sqrt(rows * cols),
        "muonclip": 0.2 * math.sqrt(rows * cols),
        "dion_muon": math.sqrt(rows / cols) * short,
        "normuon": original * short,
        "normuon_paper": 0.2 * math.sqrt(rows * cols),
        "normuon_speedrun": original * short,
        "nanochat": original * short,
        "adamuon": 0.2 * math.sqrt(rows * cols),
        "rmnp": original * math.sqrt(rows),
        "scion": 50 * math.sqrt(rows / cols) * short,
        "scion_sign": 3000 * math.sqrt(rows / cols),
        "scion_col": math.sqrt(rows * cols),
        "lion": math.sqrt(rows * cols),
        "signum": math.sqrt(rows * cols),
        "muoneq": 0.2 * math.sqrt(rows * cols),
        "muon_plus": original * short,
    }
    for name, norm in expected.items():
        step = move(name, weight, grads, lr=0.1, decay="decoupled")
        assert float(step.norm()) == pytest.approx(0.1 * norm, rel=1e-6), name


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
    weight, grads = 3 * draw(*shape), gradients(shape)
    oracle = make("muonh", weight, lr=0.1)
    after = run(oracle, grads[:1])
    assert float(after.norm()) == pytest.approx(float(weight.norm()))
    o = exact_polar(grads[0])
    moved = weight - 0.1 * weight.norm() / o.norm() * o
    close(after, moved * (weight.norm() / moved.norm()))
    assert float(run(oracle, grads[1:]).norm()) == pytest.approx(float(weight.norm()))
    with pytest.raises(ValueError, match="no weight decay"):
        make("muonh", weight, weight_decay=0.1)


def with_values(values: list[float], shape: tuple[int, int] = (12, 16)) -> Tensor:
    """A matrix of these singular values."""
    u, _, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    return u * torch.tensor(values, dtype=torch.float64) @ vh


# The first far above the others: 16 rounds of power iteration, which squares, leave 2^-32 or less.
VALUES = [4.0, *(1.5 - 0.1 * i for i in range(11))]


@shapes
def test_power_iteration_finds_the_largest_singular_value(shape: tuple[int, int]) -> None:
    x = draw(*shape)
    s, u, v = power_iteration(x, rounds=500)
    assert float(s) == pytest.approx(float(torch.linalg.svdvals(x)[0]))
    assert float(u @ x @ v) == pytest.approx(float(s))
    assert float(u.norm()) == pytest.approx(1)
    assert float(v.norm()) == pytest.approx(1)
    assert float(power_iteration(x, rounds=2)[0]) <= float(s)


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


def test_soft_cap_coupling() -> None:
    for k in (1.001, 1.05, 1.5, 4.0, 30.0):
        a = soft_cap_coupling(2 * k, 2.0)
        once = 2 * k - a * (2 * k) ** 3
        assert once + a * once**3 == pytest.approx(2.0, rel=1e-9)
    assert soft_cap_coupling(0.9, 1.0) == soft_cap_coupling(1.0, 1.0) == 0


@pytest.mark.parametrize("name", ["soft_cap", "hard_cap"])
@shapes
def test_caps_hold(name: str, shape: tuple[int, int]) -> None:
    weight = exact_polar(draw(*shape))
    oracle = make(name, weight, lr=0.1, w_max=1.3)
    for grad in gradients(shape, 30):
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


# Second moments.


def test_normuon_by_hand() -> None:
    weight, grads = draw(9, 4), gradients((9, 4), 2)
    o = [exact_polar(grad) for grad in grads]
    v = 0.6 * 0.4 * o[0].square().mean(dim=1) + 0.4 * o[1].square().mean(dim=1)
    scaled = o[1] / v.sqrt()[:, None]
    expected = 0.1 * 1.5 * scaled * (o[1].norm() / scaled.norm())
    step = move("normuon", weight, grads, lr=0.1, momentum=0.0, beta2=0.6)
    close(step, expected, 1e-8)


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


def test_adamuon_by_hand() -> None:
    weight, grads = draw(5, 8), gradients((5, 8), 2)
    o = [exact_polar(grad.sign()) for grad in grads]
    scaled = o[1] / (0.6 * 0.4 * o[0].square() + 0.4 * o[1].square()).sqrt()
    expected = 0.1 * 0.2 * math.sqrt(40) * scaled / scaled.norm()
    # Without momentum in u beta2 has to be given on its own.
    close(move("adamuon", weight, grads, lr=0.1, momentum=0.0, beta2=0.6), expected, 1e-6)
    # The first step is all signs: O / sqrt((1 - beta) O^2).
    first = move("adamuon", weight, grads[:1], lr=0.1)
    close(first, 0.1 * 0.2 * o[0].sign(), 1e-6)


def test_muon2_by_hand() -> None:
    weight, grads = draw(5, 8), gradients((5, 8), 2)
    # The first step is all signs: G / sqrt((1 - beta2) G^2).
    close(move("muon2", weight, grads[:1], lr=0.1), 0.1 * exact_polar(grads[0].sign()), 1e-6)
    v = 0.6 * 0.4 * grads[0].square() + 0.4 * grads[1].square()
    expected = 0.1 * exact_polar(grads[1] / v.sqrt())
    close(move("muon2", weight, grads, lr=0.1, momentum=0.0, beta2=0.6), expected, 1e-6)


def test_mars_m_by_hand() -> None:
    weight, grads = draw(5, 8), [0.01 * grad for grad in gradients((5, 8), 2)]
    c = [(1 + 0.025 * 19) * grads[0], grads[1] + 0.025 * 19 * (grads[1] - grads[0])]
    assert max(float(each.norm()) for each in c) < 1
    expected = 0.1 * 0.2 * math.sqrt(8) * exact_polar(0.95 * c[0] + c[1])
    close(move("mars_m", weight, grads, lr=0.1), expected, 1e-9)
    # a hundred times those are divided by their norms, but not what is remembered
    c = [each / each.norm() for each in c]
    expected = 0.1 * 0.2 * math.sqrt(8) * exact_polar(0.95 * c[0] + c[1])
    close(move("mars_m", weight, [100 * grad for grad in grads], lr=0.1), expected, 1e-9)


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


def test_namo_d_decays_by_columns() -> None:
    weight, grads = draw(6, 4), gradients((6, 4), 3)
    plain = make("namo_d", weight, weight_decay=0.0)
    before = run(plain, grads[:-1])
    step = before - run(plain, grads[-1:])
    # The same state on other weights: only the decay differs.
    decaying = make("namo_d", weight, weight_decay=0.0)
    run(decaying, grads[:-1])
    decaying.weight_decay = 0.5
    kept = (run(decaying, grads[-1:]) + step) / before
    close(kept, kept[:1].expand(6, 4))
    u = make("muon", weight, polar=lambda x: x, lr=1.0, scale="none")
    start = run(u, grads[:-1])
    o = exact_polar(start - run(u, grads[-1:]))
    alpha = step.norm(dim=0) / o.norm(dim=0) / (0.2 * math.sqrt(6))
    close(kept[0], 1 - 0.5 * alpha)


def test_adago_by_hand() -> None:
    weight, grads = draw(4, 6), gradients((4, 6), 3)
    sizes = [min(float(grad.norm()), 8.0) for grad in grads]
    assert sizes[0] < 8 == sizes[2]
    expected = 0.1 * 8.0 / math.sqrt(0.5 + sum(size**2 for size in sizes))
    options = {"lr": 0.1, "gamma": 8.0, "initial": 0.5, "momentum": 0.0}
    close(move("adago", weight, grads, **options), expected * exact_polar(grads[2]))
    floored = move("adago", weight, grads, eps=0.3, **options)
    close(floored, 0.3 * exact_polar(grads[2]))


# Other rules.


@shapes
def test_polargrad(shape: tuple[int, int]) -> None:
    weight, grads = draw(*shape), gradients(shape, 2)
    nuclear = [float(torch.linalg.svdvals(grad).sum()) for grad in grads]
    u = [exact_polar(grad) for grad in grads]
    for name in ("polargrad", "polargrad_polar_first"):
        close(move(name, weight, grads, lr=0.1, momentum=0.0), 0.1 * nuclear[1] * u[1])
    first = move("polargrad_polar_first", weight, grads, lr=0.1, momentum=0.9)
    close(first, 0.1 * nuclear[1] * (0.09 * u[0] + 0.1 * u[1]))
    m = 0.09 * grads[0] + 0.1 * grads[1]
    close(
        move("polargrad", weight, grads, lr=0.1, momentum=0.9),
        0.1 * float(torch.linalg.svdvals(m).sum()) * exact_polar(m),
    )


def test_auon_by_hand() -> None:
    grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    r = math.sqrt((math.cosh(1.5 * 0.6) ** 2 + math.cosh(1.5 * 0.8) ** 2) / 2)
    weight = torch.zeros(1, 2)
    step = move("auon", weight, [grad], lr=0.1, momentum=0.0)
    close(step, 0.1 * grad / r, 1e-6)
    step = move("auon_hybrid", weight, [grad], lr=0.1, momentum=0.0)
    close(step, 0.1 * grad / 5 / r, 1e-6)


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
    for a, b, c in [PROMOTE] * k + [SUPPRESS] * (5 - k):
        values = a * values + b * values**3 + c * values**5
    close(passed, values)


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


def test_what_differs_by_parameters_only() -> None:
    weight, grads = draw(9, 4), gradients((9, 4))
    expected = run(make("moonlight", weight, nesterov=False), grads)
    close(run(make("muonclip", weight), grads), expected)
    muon = make("muon", weight, lr=0.01, weight_decay=0.01, nesterov=False, scale="original")
    close(run(make("dion_muon", weight), grads), run(muon, grads))  # tall: no clamp


# torch.optim.Muon.


def torch_muon(weight: Tensor, grads: list[Tensor], **parameters: Any) -> Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([parameter], **parameters)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@shapes
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torch_s_but_for_rounding(
    shape: tuple[int, int], nesterov: bool, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's Newton-Schulz iteration in float64."""

    def iterate(grad: Tensor, triple: Triple, steps: int, eps: float) -> Tensor:
        return newton_schulz([triple], steps, eps)(grad)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iterate)
    weight, grads = draw(*shape), gradients(shape, 20)
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "nesterov": nesterov}
    oracle = make("muon", weight, scale=scale, polar=newton_schulz([MUON], 5), **options)
    close(run(oracle, grads), torch_muon(weight, grads, adjust_lr_fn=scale, **options))


def bfloat16_error(u: Tensor) -> float:
    """Bound of the Frobenius error of one Newton-Schulz step of u in bfloat16.

    The start, with three roundings (u's, its norm's and the division's), is off by e = 3 r of its
    norm 1, r = 2^-8. The step takes that to at most L e, with L the greatest of |p'(s)| and p(s)/s,
    p the step's polynomial, over singular values s from the least less e to the greatest plus e:
    the factors of the derivative are p's divided differences, which are means of these. Its own
    roundings, to first order and in Frobenius norms but for ||.||_2:
      S = XX^T       |dS| <= r |S|, as sums are in float32;
      B = bS + cS^2  |dB| <= r (2 |bS| + 3 |cS^2|) + (|b| + 2 |c| ||S||_2) |dS|;
      aX + BX        r (2 |aX| + 3 |BX|) + |dB| ||X||_2.
    A tenth for the orders above the first.
    """
    a, b, c = MUON
    r = 2.0**-8
    s = torch.linalg.svdvals(u)
    s = s / s.norm()
    top = float(s.max()) + 3 * r
    grid = torch.linspace(max(float(s.min()) - 3 * r, 0.0), top, 1001, dtype=torch.float64)
    slope = (a + 3 * b * grid**2 + 5 * c * grid**4).abs().maximum(a + b * grid**2 + c * grid**4)
    of_s = r * float(s.square().norm())
    of_b = r * float(2 * abs(b) * s.pow(2).norm() + 3 * abs(c) * s.pow(4).norm())
    of_b += (abs(b) + 2 * abs(c) * top**2) * of_s
    own = r * float(2 * abs(a) * s.norm() + 3 * (b * s**3 + c * s**5).norm()) + of_b * top
    return 1.1 * (float(slope.max()) * 3 * r + own)


@pytest.mark.parametrize("shape", [(64, 4), (4, 64), (16, 128), (24, 24)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torch_s_within_bfloat16(shape: tuple[int, int], nesterov: bool) -> None:
    """Of one Newton-Schulz step: the worst case of five is longer than the result."""
    weight, grads = draw(*shape), gradients(shape, 20)
    exact = newton_schulz([MUON], 1)
    errors: list[float] = []

    def iterate(u: Tensor) -> Tensor:
        step = exact(u)
        errors.append(bfloat16_error(u))
        assert errors[-1] < 0.06 * float(step.norm())  # the bound says something
        return step

    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "nesterov": nesterov}
    oracle = make("muon", weight, polar=iterate, **options)
    difference = run(oracle, grads) - torch_muon(weight, grads, ns_steps=1, **options)
    assert 1e-6 < float(difference.norm()) < 0.03 * oracle.factor * sum(errors)
