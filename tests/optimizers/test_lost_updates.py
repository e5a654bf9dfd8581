"""bfloat16 weights that most updates leave as they are: said once, measured."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_muon import Muon, MuonWithAuxAdam
from lowbit_muon.optimizers.lost_updates import STEPS

MESSAGE = r"of the \w+ weights of 'w' did not change in a step \(measured at lr="


@pytest.fixture(autouse=True)
def _errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def make(dtype: torch.dtype = torch.bfloat16, lr: float = 1e-4, **options: Any) -> Muon:
    """Weights of the size that layers have; an update has about AdamW's size."""
    torch.manual_seed(0)
    weight = nn.Parameter((0.02 * torch.randn(64, 96)).to(dtype))
    small = nn.Parameter(torch.randn(4, 4).to(dtype))
    named = [("small", small), ("w", weight)]
    return Muon(named, lr=lr, adjust_lr_fn="match_rms_adamw", **options)


def train(optimizer: Muon, steps: int = STEPS) -> None:
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_said_once_with_what_helps(dtype: torch.dtype) -> None:
    lr = 1e-5 if dtype == torch.bfloat16 else 1e-6
    optimizer = make(dtype, lr)
    train(optimizer, STEPS - 1)
    with pytest.warns(RuntimeWarning, match=MESSAGE) as caught:
        train(optimizer, 1)
    text = str(caught[0].message)
    assert "compensation=True" in text
    assert ("stochastic_rounding=True" in text) == (dtype == torch.bfloat16)
    train(optimizer, 2 * STEPS)


def test_the_share_is_measured() -> None:
    optimizer = make(lr=2e-5)
    weight = optimizer.param_groups[0]["params"][1]
    before = weight.detach().clone()
    train(optimizer, 1)
    share = (weight == before).float().mean()
    assert share > 0.6
    train(optimizer, STEPS - 2)
    with pytest.warns(RuntimeWarning, match=MESSAGE) as caught:
        train(optimizer, 1)
    said = int(str(caught[0].message).split("%")[0]) / 100
    # Steps are of the same size, and differ by their gradients alone. Of some 1000 of 6144 weights
    # a share has a standard deviation of at most 0.016; four of them.
    assert said == pytest.approx(float(share), abs=0.065)


@pytest.mark.parametrize(
    "options",
    [
        {"stochastic_rounding": True},
        {"compensation": True},
        {"dtype": torch.float32},
        {"lr": 1e-2},
    ],
)
def test_nothing_is_said_where_nothing_is_lost(options: dict[str, Any]) -> None:
    train(make(**{"lr": 1e-5, **options}), 2 * STEPS)


def test_steps_of_a_warm_up_do_not_count() -> None:
    optimizer = make(lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
    for _ in range(40):
        train(optimizer, 1)
        scheduler.step()


def test_steps_without_a_gradient_do_not_count() -> None:
    optimizer = make(lr=1e-5)
    for _ in range(2 * STEPS):
        optimizer.zero_grad()
        optimizer.step()
    train(optimizer, STEPS - 1)
    with pytest.warns(RuntimeWarning, match=MESSAGE):
        train(optimizer, 1)


def test_copies_train_on() -> None:
    optimizer = make(lr=1e-5)
    train(optimizer, 1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        train(other, 1)


def test_the_auxiliary_adamw_is_passed_over() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)).bfloat16()
    optimizer = MuonWithAuxAdam(model, lr=1e-1, aux_adam="adamw")
    train(optimizer, STEPS)
