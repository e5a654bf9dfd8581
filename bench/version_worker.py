"""What `bench.versions` runs in each environment: an import, steps, a checkpoint there and back.

    python bench/version_worker.py write FILE    trains, and saves the optimizers and what they did
    python bench/version_worker.py read FILE     loads that, of whatever torch, and goes on

A process of its own with the tree first in PYTHONPATH. Only torch and the public API are used.
"""

from __future__ import annotations

import inspect
import json
import sys
from typing import Any

import torch
from torch import Tensor, nn

import lowbit_muon
from lowbit_muon import PRESETS, Muon

SHAPES = ((24, 40), (40, 24), (6, 4, 3))
STEPS = 3  # the last of them is repeated by who reads
LR = 0.02
# Other torches multiply in another order: float32 products of 40 terms, through five steps that
# enlarge what they are given up to 3.4445^5 times: 500 * 40 * 2^-24 of an update of size one.
TOLERANCE = LR * 2e-3


def gradient(shape: tuple[int, ...], step: int) -> Tensor:
    """Not from a generator, whose numbers a torch may change."""
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float64).mul(0.7 + step).sin().float().view(shape)


def optimizer_of(params: list[nn.Parameter], name: str) -> Muon:
    return Muon(params, lr=LR, state_format=name)


def stepped(optimizer: Muon, params: list[nn.Parameter], step: int) -> None:
    for param in params:
        param.grad = gradient(tuple(param.shape), step).to(param.dtype)
    optimizer.step()


def write(path: str) -> None:
    saved: dict[str, Any] = {}
    for name in PRESETS:
        params = [nn.Parameter(gradient(shape, 9)) for shape in SHAPES]
        optimizer = optimizer_of(params, name)
        for step in range(STEPS):
            if step == STEPS - 1:
                before = [param.detach().clone() for param in params]
                state = json_free(optimizer.state_dict())
            stepped(optimizer, params, step)
        after = [param.detach().clone() for param in params]
        saved[name] = {"before": before, "state": state, "after": after}
    torch.save(saved, path)


def json_free(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that later steps do not change."""
    copy = {
        index: {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": copy}


def read(path: str) -> None:
    saved = torch.load(path, weights_only=True)
    assert saved.keys() == PRESETS.keys()
    for name, run in saved.items():
        params = [nn.Parameter(weight.clone()) for weight in run["before"]]
        optimizer = optimizer_of(params, name)
        optimizer.load_state_dict(run["state"])
        for index, values in optimizer.state_dict()["state"].items():
            for key, value in values.items():
                if isinstance(value, Tensor):
                    assert torch.equal(value, run["state"]["state"][index][key]), (name, key)
        stepped(optimizer, params, STEPS - 1)
        for param, expected in zip(params, run["after"], strict=True):
            error = float((param.detach() - expected).abs().max())
            assert error <= TOLERANCE, (name, error)


def main() -> None:
    action, path = sys.argv[1:]
    {"write": write, "read": read}[action](path)
    theirs = getattr(torch.optim, "Muon", None)
    print(json.dumps({
        "torch": torch.__version__,
        "package": lowbit_muon.__file__,
        "torch_muon": None if theirs is None else str(inspect.signature(theirs)),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
