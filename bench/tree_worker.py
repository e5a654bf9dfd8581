"""What `bench.compare_trees` runs in each tree: training, timing and memory of its optimizers.

A process of its own, started by this file's path with a tree first in PYTHONPATH. Only the public
API of `lowbit_muon` is used, since the trees may have different modules. Requests and replies are
pickles of plain values and tensors, over standard input and output.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

# A parent that binds its threads to cores (OMP_PROC_BIND) leaves its own core to its children,
# whose runtime looks when torch is imported.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count() or 1))

import torch
from torch import Tensor, nn

import lowbit_muon
from lowbit_muon import PRESETS, Muon, MuonWithAuxAdam

TORCH_MUON = "torch.optim.Muon"
# In training with spoiled gradients each parameter gets one of them in every third step. The last
# is finite, but beyond what a momentum may grow to (a norm of 1e15).
SPOILED = (float("nan"), float("inf"), 1e36)
# Where the C++ products' workspace is counted, in the layouts that there have been.
WORKSPACE_MODULES = ("lowbit_muon.backends.cpu.adapter", "lowbit_muon.backends.cpu")

Shape = Sequence[int]


def look(threads: int | None) -> dict[str, Any]:
    """Set the threads of torch, unless None, and say what this process runs.

    Raises RuntimeError unless the C++ extension is there.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    Muon([nn.Parameter(torch.zeros(2, 2))], backend="cpu")
    return {
        "package": lowbit_muon.__file__,
        "presets": list(PRESETS),
        "rules": list(getattr(lowbit_muon, "RULES", ())),  # which older trees lack
        "threads": torch.get_num_threads(),
    }


def gradient(shape: Shape, seed: int) -> Tensor:
    """float32; like momentum, a few directions with most of the norm and noise in all others."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    left = torch.randn(rows, 3, generator=generator)
    right = torch.randn(3, columns, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return (left @ right + 0.1 * noise).reshape(tuple(shape))


def train(
    *,
    shapes: Sequence[Shape],
    steps: int,
    options: dict[str, Any],
    dtype: torch.dtype,
    aux_shapes: Sequence[Shape],
    spoil: bool,
) -> dict[str, Any]:
    """Final weights and state of some steps, and how far each parameter has moved in all.

    aux_shapes: of parameters for AdamW; any make the optimizer a MuonWithAuxAdam.
    """
    generator = torch.Generator().manual_seed(0)
    params = [
        nn.Parameter(torch.randn(tuple(shape), generator=generator).to(dtype))
        for shape in (*shapes, *aux_shapes)
    ]
    start = [param.detach().clone() for param in params]
    optimizer: torch.optim.Optimizer
    if aux_shapes:
        groups = [
            {"params": params[: len(shapes)], "use_muon": True},
            {"params": params[len(shapes) :], "use_muon": False},
        ]
        optimizer = MuonWithAuxAdam(groups, **options)
    else:
        optimizer = Muon(params, **{"lr": 0.02, **options})
    for step in range(steps):
        for index, param in enumerate(params):
            grad = gradient(param.shape, 1000 * step + index)
            if spoil and (step + index) % 3 == 1 and grad.numel():
                grad.view(-1)[-1] = SPOILED[step % len(SPOILED)]
            param.grad = grad.to(dtype)
        optimizer.step()
    state = optimizer.state_dict()["state"]
    moved = [
        float(torch.linalg.vector_norm(param.detach().double() - before.double()))
        for param, before in zip(params, start, strict=True)
    ]
    return {
        "weights": [param.detach() for param in params],
        "moved": moved,
        "state": [dict(state.get(index, {})) for index in range(len(params))],
    }


_steps: dict[str, Callable[[], object]] = {}


def prepare(optimizer: str, shapes: Sequence[Shape]) -> None:
    """Make a preset's Muon, or torch's, over new matrices, and take two steps.

    It replaces what was prepared under its name before.
    """
    _steps.pop(optimizer, None)
    params = []
    for index, shape in enumerate(shapes):
        param = nn.Parameter(0.02 * gradient(shape, 1000 + index))
        param.grad = gradient(shape, index)
        params.append(param)
    if optimizer == TORCH_MUON:
        step: Callable[[], object] = torch.optim.Muon(params, lr=0.02).step
    else:
        step = Muon(params, lr=0.02, state_format=optimizer).step
    step()
    step()
    _steps[optimizer] = step


def run(optimizer: str) -> None:
    """One step of what was prepared."""
    _steps[optimizer]()


def forget() -> None:
    """Let go of all that was prepared."""
    _steps.clear()


def peak(optimizer: str) -> int:
    """Most bytes that a step of what was prepared holds at once above those at its start.

    Both torch's allocations and the C++ products' workspace.
    """
    take_most_workspace = _workspace_counter()
    take_most_workspace()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        run(optimizer)
    live = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most + take_most_workspace()


def _workspace_counter() -> Callable[[], int]:
    for name in WORKSPACE_MODULES:
        try:
            found: Callable[[], int] = importlib.import_module(name).take_most_workspace
        except (ImportError, AttributeError):
            continue
        return found
    raise RuntimeError(
        f"take_most_workspace: expected in one of {WORKSPACE_MODULES}, found nowhere"
    )


REQUESTS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (look, train, prepare, run, forget, peak)
}


def serve() -> None:
    """Answer requests (name, arguments) with (reply, None) or (None, traceback) until the end."""
    # Whatever else is printed must not come between replies.
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    # Both trees would say the same, among the rows of a table.
    warnings.simplefilter("ignore")
    while True:
        try:
            name, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reply: tuple[Any, str | None]
        try:
            reply = REQUESTS[name](**arguments), None
        except Exception:
            reply = None, traceback.format_exc()
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    serve()
