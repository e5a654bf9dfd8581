"""Gradient release: the same steps, with one gradient at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit_muon import (
    Muon,
    MuonWithAuxAdam,
    NonFiniteGradientError,
    attach_gradient_release,
    muon_param_groups,
)


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        nn.Linear(24, 5),
    )  # fmt: skip


def make_optimizer(model: nn.Module, **options: Any) -> MuonWithAuxAdam:
    options = {"state_format": "spectral4", "aux_adam": "adamw", **options}
    return MuonWithAuxAdam(muon_param_groups(model, weight_decay=0.1), **options)


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 12, generator=generator) for _ in range(count)]


def weights(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(weights(first), weights(second), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("state_format", ["fp32", "spectral4", "muonq4"])
@pytest.mark.parametrize("aux_adam", ["adamw", "adamw8bit"])
def test_weights_and_states_are_those_of_the_usual_loop(state_format: str, aux_adam: str) -> None:
    if aux_adam == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    usual, released = make_model(), make_model()
    optimizers = [
        make_optimizer(m, state_format=state_format, aux_adam=aux_adam) for m in (usual, released)
    ]
    schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5) for o in optimizers]
    attach_gradient_release(released, optimizers[1])
    for x in batches(3):
        for model, optimizer, scheduler in zip(
            (usual, released), optimizers, schedulers, strict=True
        ):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert_same(usual, released)
    one, two = (optimizer.state_dict()["state"] for optimizer in optimizers)
    for key, state in one.items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(two[key][name]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_steps(use_reentrant: bool) -> None:
    usual, released = make_model(), make_model()
    optimizers = [make_optimizer(model) for model in (usual, released)]
    attach_gradient_release(released, optimizers[1])
    x = batches(1)[0].requires_grad_()  # reentrant checkpoints want an input with a gradient
    usual(x).square().mean().backward()
    checkpoint(released, x, use_reentrant=use_reentrant).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert_same(usual, released)


def test_gradients_are_freed_in_the_backward_pass() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    attach_gradient_release(model, optimizer)
    alive = []

    def count(_: Tensor) -> None:
        alive.append(sum(parameter.grad is not None for parameter in model.parameters()))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(count)  # runs after the release
    model(batches(1)[0]).square().mean().backward()
    assert len(alive) == len(list(model.parameters()))
    assert not any(alive)


def test_a_loaded_state_is_followed() -> None:
    """load_state_dict puts new dicts in the place of the groups."""
    usual, released = make_model(), make_model()
    optimizers = [make_optimizer(model) for model in (usual, released)]
    attach_gradient_release(released, optimizers[1])
    first, second = batches(2)
    for model, optimizer in zip((usual, released), optimizers, strict=True):
        model(first).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    saved = copy.deepcopy(optimizers[0].state_dict())
    for model, optimizer in zip((usual, released), optimizers, strict=True):
        optimizer.load_state_dict(saved)
        for group in optimizer.param_groups:
            group["lr"] *= 0.3
        model(second).square().mean().backward()
        optimizer.step()
    assert_same(usual, released)


def test_accumulation_keeps_gradients_until_the_last_pass() -> None:
    usual, released = make_model(), make_model()
    optimizers = [make_optimizer(model) for model in (usual, released)]
    release = attach_gradient_release(released, optimizers[1])
    first, second = batches(2)
    for x in (first, second):
        usual(x).square().mean().backward()
    optimizers[0].step()
    with release.accumulating():
        released(first).square().mean().backward()
    assert all(parameter.grad is not None for parameter in released.parameters())
    released(second).square().mean().backward()
    optimizers[1].step()
    assert all(parameter.grad is None for parameter in released.parameters())
    assert_same(usual, released)


def test_a_second_pass_without_a_step_is_an_error_and_changes_nothing() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    attach_gradient_release(model, optimizer)
    x = batches(1)[0]
    model(x).square().mean().backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"5\.\w+: its gradient came twice.*accumulating"):
        model(x).square().mean().backward()
    for a, b in zip(before, weights(model), strict=True):
        assert torch.equal(a, b)


def test_clipping_bounds_every_gradient_and_follows_the_running_norm() -> None:
    """fp32 momentum of the first step is (1 - momentum) times the clipped gradient."""
    model, exact = make_model(), make_model()
    optimizer = make_optimizer(model, state_format="fp32")
    release = attach_gradient_release(model, optimizer, max_norm=1e-3)
    x = batches(1)[0]
    exact(x).square().mean().backward()
    model(x).square().mean().backward()
    optimizer.step()
    norms = [parameter.grad.norm() for parameter in exact.parameters()]  # type: ignore[union-attr]
    total = torch.stack(norms).norm()
    assert total > 1e-3
    # Norms in float32, summed in another order: some roundings of 2**-24 each.
    assert release.gradient_norm == pytest.approx(float(total), rel=1e-6)
    matrices = optimizer.param_groups[0]["params"]
    for parameter in matrices:
        assert float(optimizer.state[parameter]["dense"].norm()) / 0.05 <= 1e-3 * (1 + 1e-6)
    # The second step knows the first one's norm: every gradient gets clip_grad_norm_'s factor.
    before = {p: optimizer.state[p]["dense"].clone() for p in matrices}
    exact.load_state_dict(model.state_dict())
    exact.zero_grad()
    exact(x).square().mean().backward()
    model(x).square().mean().backward()
    pairs = dict(zip(model.parameters(), exact.parameters(), strict=True))
    for parameter, momentum in before.items():
        gradient = pairs[parameter].grad
        assert gradient is not None
        fresh = (optimizer.state[parameter]["dense"] - 0.95 * momentum) / 0.05
        fresh = fresh if fresh.shape == gradient.shape else fresh.mT
        factor = 1e-3 / float(total)
        # The difference of float32 sums: 2**-24 of the momentum, over 0.05.
        torch.testing.assert_close(fresh, gradient * factor, rtol=1e-4, atol=1e-9)


def test_a_gradient_with_nan_is_skipped_and_not_counted_in_the_norm() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    release = attach_gradient_release(model, optimizer, max_norm=1.0)
    with pytest.warns(RuntimeWarning, match="held inf or nan"):
        (model(batches(1)[0]) * torch.nan).sum().backward()
    optimizer.step()
    assert release.gradient_norm == 0.0
    assert all(bool(weight.isfinite().all()) for weight in weights(model))
    model(batches(1)[0]).square().mean().backward()  # and training goes on
    assert all(bool(weight.isfinite().all()) for weight in weights(model))


def test_raise_raises_in_the_backward_pass() -> None:
    model = make_model()
    optimizer = make_optimizer(model, nonfinite="raise")
    attach_gradient_release(model, optimizer)
    before = weights(model)
    with pytest.raises(NonFiniteGradientError, match="gradient of parameter"):
        (model(batches(1)[0]) * torch.nan).sum().backward()
    for a, b in zip(before, weights(model), strict=True):
        assert torch.equal(a, b)


def test_removed_hooks_leave_gradients_alone() -> None:
    model = make_model()
    optimizer = make_optimizer(model)
    attach_gradient_release(model, optimizer).remove()
    model(batches(1)[0]).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_bad_arguments_are_named() -> None:
    model = make_model()
    with pytest.raises(TypeError, match=r"optimizer: expected a Muon.*got SGD"):
        attach_gradient_release(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match="max_norm: expected a number > 0"):
        attach_gradient_release(model, make_optimizer(model), max_norm=0.0)
    other = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(ValueError, match=r"parameters of the model, got one of size \(3, 4\)"):
        attach_gradient_release(model, Muon([other]))


def test_a_wrapper_that_averages_gradients_later_is_refused() -> None:
    class DistributedDataParallel(nn.Sequential):
        pass

    model = DistributedDataParallel(make_model())
    with pytest.raises(ValueError, match="complete after backward, got DistributedDataParallel"):
        attach_gradient_release(model, make_optimizer(model))
