"""torch.compile: compiled models train unchanged, and a compiled region breaks at our step."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from lowbit_muon import MuonWithAuxAdam, attach_gradient_release, muon_param_groups


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # Of torch's own, about its profiler's ranges and graph breaks.
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))


def make_optimizer(model: nn.Module) -> MuonWithAuxAdam:
    return MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")


def train(forward: Callable[[Tensor], Tensor], optimizer: MuonWithAuxAdam, steps: int = 3) -> None:
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step))
        forward(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("release", [False, True])
def test_a_compiled_model_trains_as_it_would_uncompiled(release: bool) -> None:
    plain = make_model()
    model = copy.deepcopy(plain)
    train(plain, make_optimizer(plain))
    optimizer = make_optimizer(model)
    if release:
        attach_gradient_release(model, optimizer)
    train(torch.compile(model, backend="aot_eager"), optimizer)
    assert_same(plain, model)


def test_a_step_within_a_compiled_region_breaks_the_graph_and_nothing_else() -> None:
    plain = make_model()
    model = copy.deepcopy(plain)
    train(plain, make_optimizer(plain))
    optimizer = make_optimizer(model)
    counter = CompileCounter()

    @torch.compile(backend=counter)
    def whole(x: Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    frames = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (step + 1)
        whole(torch.randn(8, 12, generator=torch.Generator().manual_seed(step)))
        frames.append(counter.frame_count)
    assert_same(plain, model)
    assert frames[0] >= 1
    assert frames[1] == frames[2], "a change of the learning rate compiled something again"
