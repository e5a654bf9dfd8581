"""What holds of many oracles: invariances, norms of steps, arguments that stay as they are."""

from __future__ import annotations

import math

import pytest
import torch
from oracle_runs import SHAPES, close, draw, gradients, make, move, run
from oracles import ORACLES
from oracles.maps import exact_polar

# Gradients times 7 change nothing, but for epsilons of up to 1e-7.
SCALE_FREE = [
    "muon", "turbo_muon", "moonlight", "muonclip", "dion_muon", "normuon", "normuon_paper",
    "normuon_speedrun", "nanochat", "adamuon", "namo", "namo_d", "rmnp", "scion", "scion_sign",
    "scion_col", "lion", "signum", "muoneq", "muon_plus", "muonh", "pion", "cautious_muon", "muon2",
    "dion2", "nordion2", "soft_cap", "hard_cap", "spectral_hammer", "spectral_ball",
    "spectral_decay", "muon_ball", "spectral_sphere", "muown", "angular_muown", "md_rows",
    "md_columns", "md_decoupling", "drop_muon", "cosmos", "aro", "conda", "mousse", "newton_muon",
]  # fmt: skip
# Weights are brought somewhere, whatever the gradient.
CONSTRAINED = [
    "soft_cap", "hard_cap", "spectral_hammer", "spectral_ball", "muon_ball", "spectral_sphere",
]  # fmt: skip
# Not so, but here: by its shape or norm, and above a norm of one (as gradients here are).
SCALE_FREE_HERE = ["auon_hybrid", "mars_m"]
# Q W R with Q G R moves like W with G.
ROTATION_FREE = [
    "muon", "moonlight", "muonclip", "dion_muon", "namo", "adago", "polargrad",
    "polargrad_polar_first", "scion", "muon_plus", "muonh", "pion", "spectra", "mars_m",
]  # fmt: skip

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.mark.parametrize("name", ORACLES)
def test_zero_gradients(name: str) -> None:
    """Nothing divides by zero, and only what is brought somewhere moves."""
    zeros = torch.zeros(4, 6)
    for weight in (draw(4, 6), zeros):
        for grads in ([zeros] * 3, [zeros, draw(4, 6, seed=1), zeros]):
            assert run(make(name, weight), grads).isfinite().all()
    if name not in CONSTRAINED:
        weight = draw(4, 6)
        close(run(make(name, weight, weight_decay=0.0, decay="decoupled"), [zeros] * 2), weight)


@pytest.mark.parametrize("name", ORACLES)
def test_the_arguments_stay_as_they_are(name: str) -> None:
    weight, grad = draw(4, 6).float(), draw(4, 6, seed=1).float()
    kept = weight.clone(), grad.clone()
    oracle = make(name, weight)
    for _ in range(8):  # Drop-Muon leaves some out
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


@pytest.mark.parametrize("name", ROTATION_FREE)
@shapes
def test_rotation_free(name: str, shape: tuple[int, int]) -> None:
    q, r = exact_polar(draw(shape[0], shape[0])), exact_polar(draw(shape[1], shape[1]))
    weight, grads = draw(*shape), gradients(shape)
    close(
        run(make(name, q @ weight @ r), [q @ grad @ r for grad in grads]),
        q @ run(make(name, weight), grads) @ r,
    )


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
