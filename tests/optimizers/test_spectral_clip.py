"""SPECTRA around other optimizers: against its equations, and as a drop-in for any optimizer."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from lowbit_muon import MuonWithAuxAdam, SpectralClip, clip_grad_spectral_
from lowbit_muon.optimizers import spectral_clip

SHAPES = ((24, 40), (40, 24), (16, 16), (1, 12), (12, 1))
LR, DECAY, BETAS, EPS, STEPS = 1e-2, 0.1, (0.9, 0.95), 1e-8, 20


def clipped(x: Tensor, limit: float) -> Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * (s / (1 + (s / limit) ** 2).sqrt()) @ vh


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def rate(step: int) -> float:
    """Of a schedule: up, and then down."""
    return min(1.0, (step + 1) / 5) * (1 - step / 40)


def oracle(weight: Tensor, grads: list[Tensor], limit: float, pre_limit: float | None) -> Tensor:
    """SPECTRA of AdamW (arXiv 2603.14315; 1711.05101) in float64, for one matrix."""
    w, m, v = weight.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for step, grad in enumerate(grads):
        g = grad.double() if pre_limit is None else clipped(grad, pre_limit)
        m = BETAS[0] * m + (1 - BETAS[0]) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g * g
        corrected = v / (1 - BETAS[1] ** (step + 1))
        u = m / (1 - BETAS[0] ** (step + 1)) / (corrected.sqrt() + EPS)
        lr = LR * rate(step)
        scale = math.sqrt(max(1, w.shape[0] / w.shape[1]))
        w = (1 - lr * DECAY) * w - lr * scale * clipped(u, limit)
    return w


def adamw(params: Any, **options: Any) -> AdamW:
    return AdamW(params, **{"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, **options})


def train(optimizer: Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for index, param in enumerate(params):
            param.grad = draw(*param.shape, seed=100 * step + index, dtype=param.dtype)
        optimizer.step()


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(draw(*shape)) for shape in ((6, 10), (10, 6), (8,), (2, 3, 4))]


def equal(ours: list[nn.Parameter], theirs: list[nn.Parameter]) -> bool:
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("pre_limit", [None, 3.0])
@pytest.mark.parametrize("limit", [1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adamw_s_updates_are_clipped_as_the_equations_say(
    shape: tuple[int, int], dtype: torch.dtype, limit: float, pre_limit: float | None
) -> None:
    param = nn.Parameter(0.1 * draw(*shape, dtype=dtype))
    grads = [draw(*shape, seed=1 + step, dtype=dtype) for step in range(STEPS)]
    expected = oracle(param.detach(), grads, limit, pre_limit)
    optimizer = SpectralClip(adamw([param]), limit)
    schedule = LambdaLR(optimizer, rate)
    for grad in grads:
        param.grad = grad.clone()
        if pre_limit is not None:
            clip_grad_spectral_([param], pre_limit)
        optimizer.step()
        schedule.step()
    # A step rounds each weight three times, and reads its update off with the same error, which
    # the clip does not enlarge: 20 * 4 * 2^-24 of weights, 5e-6 if all have one sign; for float64
    # 2e-14, and as much again from the squares of U / limit.
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert float((param.detach() - expected).norm()) <= bound * float(expected.norm())


def test_updates_stay_below_the_limit() -> None:
    param = nn.Parameter(draw(30, 20))
    before = param.detach().clone()
    param.grad = torch.ones(30, 20)  # AdamW's first update is ones, of norm sqrt(600)
    SpectralClip(adamw([param], weight_decay=0.0), 2.0).step()
    u = (before - param.detach()).double() / LR / math.sqrt(30 / 20)
    expected = math.sqrt(600) / math.sqrt(1 + 600 / 4)
    # weights of up to 4 are rounded to 2^-22 and divided by the rate; a norm of 600 of them
    assert float(torch.linalg.matrix_norm(u, 2)) == pytest.approx(expected, abs=6e-4)


def test_a_high_limit_changes_nothing_but_the_scale_of_tall_matrices() -> None:
    ours, theirs = parameters(), parameters()
    train(SpectralClip(adamw(ours), 1e6), ours, range(3))
    train(adamw(theirs), theirs, range(3))
    for mine, peer, start in zip(ours, theirs, parameters(), strict=True):
        if mine.ndim != 2:
            assert torch.equal(mine, peer)
        elif mine.shape[0] <= mine.shape[1]:
            # (1 + s^2/1e12)^(-1/2), and a rounding more
            torch.testing.assert_close(mine, peer, rtol=1e-6, atol=1e-6)
        else:
            # sqrt(10 / 6) times the change
            moved = (peer - start).detach().norm()
            assert float((mine - peer).detach().norm() / moved) == pytest.approx(0.29, abs=0.01)


def test_a_group_has_a_limit_of_its_own_or_none() -> None:
    ours, theirs = parameters(), parameters()
    groups = [{"params": [ours[0]], "spectral_limit": None}, {"params": ours[1:]}]
    optimizer = SpectralClip(adamw(groups), 2.0)
    train(optimizer, ours, range(2))
    train(adamw(theirs), theirs, range(2))
    assert torch.equal(ours[0], theirs[0])
    assert not torch.equal(ours[1], theirs[1])
    optimizer.param_groups[1]["spectral_limit"] = -1.0
    before = copy.deepcopy(ours)
    with pytest.raises(ValueError, match=r"spectral_limit: expected a number > 0, got -1\.0"):
        train(optimizer, ours, range(2, 3))
    assert equal(ours, before)


@pytest.mark.parametrize("make", [adamw, lambda params: SGD(params, lr=0.1, momentum=0.9)])
def test_checkpoints_are_the_optimizer_s_own(make: Callable[..., Optimizer]) -> None:
    ours = parameters()
    optimizer = SpectralClip(make(ours), 2.0)
    train(optimizer, ours, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    plain = make(copy.deepcopy(ours))
    plain.load_state_dict(saved)  # without the clip
    resumed = copy.deepcopy(ours)
    again = SpectralClip(make(resumed), 2.0)
    again.load_state_dict(saved)
    assert again.param_groups is again.optimizer.param_groups
    assert again.state is again.optimizer.state
    train(optimizer, ours, range(3, 5))
    train(again, resumed, range(3, 5))
    assert equal(ours, resumed)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(duplicate: Callable[[Any], Any]) -> None:
    ours = parameters()
    optimizer = SpectralClip(adamw(ours), 2.0)
    train(optimizer, ours, range(2))
    again = duplicate(optimizer)
    copied = [param for group in again.param_groups for param in group["params"]]
    assert again.limit == 2.0
    train(optimizer, ours, range(2, 4))
    train(again, copied, range(2, 4))
    assert equal(ours, copied)


def test_groups_can_be_added_and_rates_cycle() -> None:
    ours, theirs = parameters(), parameters()
    one, two = SpectralClip(adamw(ours[:1]), 2.0), SpectralClip(adamw(theirs), 2.0)
    one.add_param_group({"params": ours[1:]})
    assert len(one.param_groups) == len(one.optimizer.param_groups) == 2
    for optimizer, params in ((one, ours), (two, theirs)):
        schedule = OneCycleLR(optimizer, max_lr=0.1, total_steps=5)
        for step in range(3):
            train(optimizer, params, range(step, step + 1))
            schedule.step()
    assert equal(ours, theirs)
    with pytest.raises(ValueError, match="spectral_limit: expected a number > 0, got 'high'"):
        one.add_param_group({"params": [nn.Parameter(torch.ones(2))], "spectral_limit": "high"})
    assert len(one.param_groups) == 2


def test_a_closure_makes_the_gradients() -> None:
    ours, theirs = parameters(), parameters()
    one, two = SpectralClip(adamw(ours), 2.0), SpectralClip(adamw(theirs), 2.0)

    def closure() -> Tensor:
        one.zero_grad()
        loss = sum((param.square().sum() for param in ours), torch.zeros(()))
        loss.backward()
        return loss.detach()

    loss = one.step(closure)
    for param in theirs:
        param.grad = 2 * param.detach()
    assert two.step() is None
    assert equal(ours, theirs)
    assert float(loss) == pytest.approx(sum(float(p.detach().square().sum()) for p in parameters()))
    one.zero_grad()
    assert all(param.grad is None for param in ours)


def test_hooks_are_called() -> None:
    params, called = parameters(), []
    optimizer = SpectralClip(adamw(params), 2.0)
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, saved: called.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda _, saved: called.append("loaded"))
    train(optimizer, params, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    assert called == ["before", "after", "saved", "loaded"]


def test_a_grad_scaler_skips_its_steps() -> None:
    params = parameters()
    optimizer, before = SpectralClip(adamw(params), 2.0), copy.deepcopy(params)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for value in (math.inf, 1.0):
        scaler.scale(torch.ones(()))  # makes the scale
        for param in params:
            param.grad = torch.full_like(param, value)
        scaler.step(optimizer)
        scaler.update()
        assert equal(params, before) == (value == math.inf)


def test_what_has_no_update_stays() -> None:
    params = parameters()
    params[1].requires_grad_(False)
    before = copy.deepcopy(params)
    optimizer = SpectralClip(adamw(params), 2.0)
    optimizer.step()  # without gradients
    assert equal(params, before)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert equal(params, before)


def test_an_update_that_is_not_finite_is_the_optimizer_s() -> None:
    ours, theirs = parameters(), parameters()
    for params, optimizer in ((ours, SpectralClip(adamw(ours), 2.0)), (theirs, adamw(theirs))):
        params[0].grad = torch.full_like(params[0], math.nan)
        optimizer.step()
    assert bool(ours[0].isnan().all())
    assert bool(theirs[0].isnan().all())


def test_it_goes_around_our_own() -> None:
    params = [nn.Parameter(draw(6, 10)), nn.Parameter(draw(8))]
    groups = [
        {"params": params[:1], "use_muon": True},
        {"params": params[1:], "use_muon": False},
    ]
    before = params[0].detach().clone()
    optimizer = SpectralClip(MuonWithAuxAdam(groups, lr=0.1, aux_adam="adamw"), 0.5)
    train(optimizer, params, range(1))
    # Muon's singular values, of 0.7 to 1.2, become s / sqrt(1 + 4 s^2)
    values = torch.linalg.svdvals((before - params[0].detach()).double() / 0.1)
    assert 0.4 < float(values[-1]) < float(values[0]) < 0.47


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: SpectralClip(p), "optimizer: expected a torch.optim.Optimizer, got list"),
        (lambda p: SpectralClip(adamw(p), 0.0), "limit: expected a number > 0, got 0.0"),
        (lambda p: SpectralClip(adamw(p), True), "limit: expected a number > 0, got True"),
        (lambda p: clip_grad_spectral_(p, math.nan), "limit: expected a number > 0, got nan"),
    ],
)
def test_arguments_are_checked(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        make(parameters())


@pytest.mark.parametrize(
    ("make", "dtype", "message"),
    [
        (lambda p: SGD(p, lr=0.1, weight_decay=0.1), torch.float32, "got 0.1 with SGD"),
        (lambda p: Adam(p, lr=0.1, weight_decay=0.1), torch.float32, "got 0.1 with Adam"),
        (adamw, torch.bfloat16, "parameter '1': expected float32 or float64 .* got torch.bfloat16"),
    ],
)
def test_what_cannot_be_clipped_is_refused_before_anything_changes(
    make: Callable[..., Optimizer], dtype: torch.dtype, message: str
) -> None:
    params = [nn.Parameter(draw(4, 4)), nn.Parameter(draw(4, 4, dtype=dtype))]
    before = copy.deepcopy(params)
    optimizer = SpectralClip(make(params), 1.0)
    with pytest.raises(ValueError, match=message):
        train(optimizer, params, range(1))
    assert equal(params, before)
    assert not optimizer.state


def test_gradients_are_clipped_in_place() -> None:
    params = parameters()
    for index, param in enumerate(params):
        param.grad = draw(*param.shape, seed=index)
    grads = [param.grad for param in params if param.grad is not None]
    before = copy.deepcopy(grads)
    clip_grad_spectral_(params, 0.5)
    for param, grad, old in zip(params, grads, before, strict=True):
        assert param.grad is grad
        if param.ndim == 2:
            torch.testing.assert_close(grad, clipped(old, 0.5).float())
        else:
            assert torch.equal(grad, old)
    sparse = nn.Parameter(torch.zeros(4, 4))
    sparse.grad = torch.eye(4).to_sparse()
    once = copy.deepcopy(grads)
    with pytest.raises(ValueError, match="expected dense gradients in one piece, got torch"):
        clip_grad_spectral_([params[0], sparse], 0.1)
    assert all(map(torch.equal, grads, once))


def test_gradients_that_are_not_finite_stay() -> None:
    (param, *_) = parameters()
    grad = torch.ones_like(param)
    grad[0, 0] = math.inf
    param.grad = grad.clone()
    clip_grad_spectral_(param, 0.5)
    assert torch.equal(param.grad, grad)
    half = nn.Parameter(draw(6, 10, dtype=torch.bfloat16))
    half.grad = 10 * draw(6, 10, seed=1, dtype=torch.bfloat16)
    expected = clipped(half.grad, 0.5)
    clip_grad_spectral_(half, 0.5)
    # rounded once, to 2^-9 of each element
    assert float((half.grad - expected).norm()) <= 2**-9 * float(expected.norm())


def test_parts_of_matrices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    before = copy.deepcopy(params)
    monkeypatch.setattr(spectral_clip, "is_dtensor", lambda tensor: tensor.ndim == 2)
    with pytest.raises(ValueError, match=r"parameter '0': expected .* in one piece, .* a DTensor"):
        train(SpectralClip(adamw(params), 1.0), params, range(1))
    with pytest.raises(ValueError, match="expected dense gradients in one piece, got a DTensor"):
        clip_grad_spectral_(params, 1.0)
    assert equal(params, before)
