"""Weights as gains times directions: the chain rule, both variables' steps, and their product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles.gains import GAINS, Adam
from torch import Tensor, nn

from lowbit_muon import RULES, Muon, UpdateRule
from lowbit_muon.state.stored import RULE_PREFIX
from lowbit_muon.step.rules.direction import ExactPolar
from lowbit_muon.step.rules.gains import AxisGains, GainRates, Gains, RowGains
from lowbit_muon.step.rules.gradient import VarianceReduction
from lowbit_muon.step.rules.step_size import Fading
from lowbit_muon.step.rules.weight_decay import OfGains

SHAPES = ((24, 40), (40, 24), (32, 32), (1, 12))
LR, STEPS = 0.02, 20


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(shape: tuple[int, int]) -> list[Tensor]:
    """With a common part; the seventh is zero."""
    common = draw(shape[0], 3, seed=1) @ draw(3, shape[1], seed=2)
    grads = [common + draw(*shape, seed=10 + step) for step in range(STEPS)]
    grads[6].zero_()
    return grads


def stepped(weight: Tensor, grads: list[Tensor], **options: Any) -> tuple[Tensor, dict[str, Any]]:
    """The weight after some steps, and its state without the prefix of rules."""
    param = nn.Parameter(weight.clone())
    optimizer = Muon([param], **{"lr": LR, "state_format": "fp32", **options})
    for grad in grads:
        param.grad = grad.to(param.dtype)
        optimizer.step()
    state = optimizer.state[param].items()
    return param.detach(), {name.removeprefix(RULE_PREFIX): value for name, value in state}


def exact(name: str) -> UpdateRule:
    return replace(RULES[name], direction=ExactPolar())


def assert_close(found: Tensor, expected: Tensor) -> None:
    """1e-4 of the weights: see `test_recipes.assert_close`."""
    assert float((found.double() - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", GAINS)
def test_weight_decay_is_that_of_gains(name: str, shape: tuple[int, int]) -> None:
    weight, grads = 0.1 * draw(*shape), gradients(shape)
    oracle = GAINS[name](weight, lr=LR, weight_decay=0.7)
    for grad in grads:
        oracle.step(grad)
    found, _ = stepped(weight, grads, rule=exact(name), weight_decay=0.7)
    assert_close(found, oracle.weight)
    undecayed, _ = stepped(weight, grads, rule=exact(name))
    assert float((undecayed - found).norm()) > 0.05 * float(found.norm())


@pytest.mark.parametrize("name", ["muown", "angular_muown"])
def test_rows_of_zeros_start_to_move(name: str) -> None:
    weight, grads = 0.1 * draw(24, 40), gradients((24, 40))
    weight[[3, 7]] = 0
    oracle = GAINS[name](weight, lr=LR)
    for grad in grads:
        oracle.step(grad)
    found, _ = stepped(weight, grads, rule=exact(name))
    assert_close(found, oracle.weight)
    assert bool((found[[3, 7]].norm(dim=1) > 0.1).all())
    # without a gradient they stay (Newton-Schulz keeps zeros; a decomposition rounds them)
    for grad in grads:
        grad[3] = 0
    found, state = stepped(weight, grads, rule=name)
    assert not found[3].any()
    assert all(bool(value.isfinite().all()) for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("name", ["md_rows", "md_columns", "md_decoupling"])
def test_weights_of_zeros_stay_where_the_norm_of_directions_does(name: str) -> None:
    found, state = stepped(torch.zeros(8, 12), gradients((8, 12)), rule=name)
    assert not found.any()
    assert all(bool(value.isfinite().all()) for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("name", ["muown", "angular_muown"])
def test_gains_may_change_their_sign(name: str) -> None:
    """Directions stay where they are then, so that momentum goes on."""
    weight = 0.02 * draw(6, 40)
    grads = [draw(6, 1, seed=9).abs() * weight.sign() + 0.1 * draw(6, 40, seed=s) for s in range(9)]
    oracle = GAINS[name](weight, lr=LR)
    for grad in grads:
        oracle.step(grad)
    found, state = stepped(weight, grads, rule=exact(name))
    assert int((state["row_gain"] < 0).sum()) >= 3
    assert_close(found, oracle.weight)


# --- the chain rule ---


def state_of(stage: Gains, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Of one matrix, before any step."""
    return {name: torch.zeros(1, *kept.shape) for name, kept in stage.state(shape).items()}


STAGES = [
    RowGains(),
    RowGains(keeps_sizes=False),
    *(AxisGains(axis=axis) for axis in ("row", "column", "both")),
]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)], ids=str)
@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_gradients_are_those_of_the_product(stage: Gains, shape: tuple[int, int]) -> None:
    """Against autograd, of gains that are neither where they started nor all positive."""
    generator = torch.Generator().manual_seed(0)
    state, made = state_of(stage, shape), {}
    for name, value in state.items():
        if name.endswith(("gain", "size")):
            made[name] = 0.5 + torch.rand(value.shape, generator=generator).double()
            state[name] = made[name].float()
    name = next(iter(made))
    made[name].view(-1)[0] *= -1
    state[name] = made[name].float()
    v = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    if isinstance(stage, RowGains):
        v *= made.get("row_size", 1.0) / v.norm(dim=2, keepdim=True)

    variables = {n: x.clone().requires_grad_() for n, x in {**made, "v": v}.items()}
    direction = variables["v"]
    if isinstance(stage, RowGains):
        direction = direction / direction.norm(dim=2, keepdim=True)
    one = torch.ones(())
    weight = variables.get("row_gain", one) * direction * variables.get("column_gain", one)
    grad = torch.randn(1, *shape, generator=generator, dtype=torch.float64)
    (weight * grad).sum().backward()

    rates = GainRates(0.1, 0.0, torch.ones(1, 1, 1))
    found, factors = stage.split(weight.detach().float(), grad.float(), state, rates)
    torch.testing.assert_close(found.double(), variables["v"].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        factors.directions(weight.detach().float()).double(), v, rtol=1e-4, atol=1e-5
    )
    for name in made.keys() - {"row_size"}:
        # the first average of gradients is 1 - beta1 of the first
        mean = state[f"{name}_mean"].double() / (1 - stage.beta1)
        torch.testing.assert_close(mean, variables[name].grad, rtol=1e-4, atol=1e-5)


def test_the_oracle_s_adam_is_torch_s() -> None:
    param = nn.Parameter(draw(7).double())
    theirs = torch.optim.AdamW([param], lr=0.1, betas=(0.9, 0.95), weight_decay=0.3)
    ours, adam = param.detach().clone(), Adam(0.9, 0.95, 1e-8)
    for seed in range(5):
        param.grad = draw(7, seed=seed).double()
        theirs.step()
        ours = adam.step(ours, param.grad, 0.1, 0.3)
    torch.testing.assert_close(ours, param.detach())


def test_the_oracles_rows_turn_less_where_v_is_long() -> None:
    """By eta / ||V|| in the first step, which AngularMuown does not look at."""
    grad, turned = draw(8, 20), {}
    for name in ("muown", "angular_muown"):
        for size in (1.0, 10.0):
            start = size * draw(8, 20, seed=1)
            oracle = GAINS[name](start, lr=1e-5)
            oracle.step(grad)
            ends = [
                x.double() / x.double().norm(dim=1, keepdim=True) for x in (oracle.weight, start)
            ]
            turned[name, size] = float((ends[0] - ends[1]).norm())
    assert turned["muown", 1.0] / turned["muown", 10.0] == pytest.approx(10, rel=1e-3)
    assert turned["angular_muown", 1.0] == pytest.approx(turned["angular_muown", 10.0], rel=1e-3)


# --- what is kept, and what the weight is ---


@pytest.mark.parametrize("name", ["muown", "angular_muown"])
def test_rows_of_weights_have_the_norms_of_gains(name: str) -> None:
    weight, state = stepped(0.1 * draw(24, 40), gradients((24, 40)), rule=name)
    norms = weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(norms, state["row_gain"].abs())
    assert state["row_gain"].dtype == torch.float32
    assert ("row_size" in state) == (name == "muown")


@pytest.mark.parametrize("name", GAINS)
def test_experts_and_heads_have_gains_of_their_own(name: str) -> None:
    whole = nn.Parameter(draw(3, 8, 12))
    fused = nn.Parameter(whole.detach().flatten(0, 1).clone())
    parts = [nn.Parameter(part.clone()) for part in whole.detach()]
    optimizers = [
        Muon([{"params": [whole], "batch_experts": True}], lr=0.01, rule=name),
        Muon([{"params": [fused], "row_splits": (8, 8, 8)}], lr=0.01, rule=name),
        Muon(parts, lr=0.01, rule=name),
    ]
    for step in range(3):
        whole.grad = draw(3, 8, 12, seed=step)
        fused.grad = whole.grad.flatten(0, 1).clone()
        for part, grad in zip(parts, whole.grad, strict=True):
            part.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for index, part in enumerate(parts):
        # one batch of three, or three of one: sums in another order
        for ours in (whole.detach()[index], fused.detach()[8 * index : 8 * index + 8]):
            torch.testing.assert_close(ours, part.detach(), rtol=1e-5, atol=1e-6)


def test_directions_keep_their_norm() -> None:
    start = 0.1 * draw(24, 40)
    weight, state = stepped(start, gradients((24, 40)), rule="md_decoupling")
    directions = weight / state["row_gain"] / state["column_gain"]
    torch.testing.assert_close(directions.norm(), start.norm())


@pytest.mark.parametrize("name", GAINS)
def test_gains_move_by_less_than_a_half_precision_weight_s_last_bit(name: str) -> None:
    """In bfloat16 a step of 1e-4 is lost in a weight's size; gains are kept apart from it."""
    start = draw(24, 40).bfloat16()
    # along the weights: gains feel it alone, and directions have no gradient but for roundings
    grads = [start.float()] * 30
    _, state = stepped(start, grads, rule=exact(name), lr=1e-4)
    first = start.float().norm(dim=1, keepdim=True)
    if not name.endswith("muown"):
        first = torch.ones(())
    for axis in ("row_gain", "column_gain"):
        if axis in state:
            # Adam's steps of a constant gradient are lr each. Gains below 8 are rounded by 2^-22
            # at most, 30 times: 0.24 % of what they moved by. Directions of fixed norm move by
            # 30 lr of themselves, 0.3 %, and gradients of gains with them.
            moved = (first - state[axis]) / (30 * 1e-4)
            assert float((moved - 1).abs().max()) < 0.006


def test_angular_steps_fade() -> None:
    grads = [draw(6, 9, seed=seed) for seed in range(3)]
    plain = replace(exact("angular_muown"), step_size=Fading(decay=0.0))
    faded = replace(exact("angular_muown"), step_size=Fading(decay=1.0, degree=2.0, warmup=1))
    start = draw(6, 9)
    for steps, factor in ((1, 1.0), (2, 1.0), (3, 0.25)):
        # the last step alone is taken with its own learning rate
        ends = []
        for rule, last in ((plain, factor), (faded, 1.0)):
            param = nn.Parameter(start.clone())
            optimizer = Muon([param], rule=rule, lr=0.1, state_format="fp32")
            for step in range(steps):
                param.grad = grads[step].clone()
                if step == steps - 1:
                    optimizer.param_groups[0]["lr"] = 0.1 * last
                optimizer.step()
            ends.append(param.detach() / param.detach().norm(dim=1, keepdim=True))
        torch.testing.assert_close(*ends)


def test_a_rule_with_gains_starts_from_the_weights_in_mid_run() -> None:
    param = nn.Parameter(draw(8, 12))
    plain = Muon([param], lr=0.01)
    param.grad = draw(8, 12, seed=1)
    plain.step()
    gained = Muon([param], lr=0.0, rule="muown")
    gained.load_state_dict(plain.state_dict())
    gained.param_groups[0]["lr"] = 0.0
    before = param.detach().clone()
    param.grad = draw(8, 12, seed=2)
    gained.step()
    torch.testing.assert_close(param.detach(), before)
    norms = before.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gained.state[param][f"{RULE_PREFIX}row_gain"], norms)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RowGains(beta1=1.0), r"row_gains: beta1: expected a number in \[0, 1\)"),
        (lambda: AxisGains(axis="flat"), "axis_gains: axis: expected one of"),
        (lambda: RowGains(keeps_sizes=1), "row_gains: keeps_sizes: expected a bool"),
        (lambda: AxisGains(rate=-1.0), "axis_gains: rate: expected a number >= 0"),
        (lambda: Fading(warmup=0.5), "fading: warmup: expected a whole number"),
        (lambda: UpdateRule("x", gains=RowGains()), "weight_decay: expected OfGains"),
        (lambda: UpdateRule("x", weight_decay=OfGains()), "gains: expected a Gains"),
        (
            lambda: replace(RULES["muown"], gradient=VarianceReduction()),
            "gradient: expected None with gains",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
