"""Whatever modes are on around a call, it does the same, and leaves them as they were."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_muon import Muon, MuonWithAuxAdam, muon_param_groups


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Any:
    torch.set_default_device("meta")
    try:
        yield
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Any:
    """Uninitialised memory is nan, so that reading any shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: torch.device("meta"),
    "default_device": default_device,
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 40), nn.Linear(40, 16, dtype=torch.bfloat16), nn.Conv2d(4, 6, 3)
    )


def give_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in net.parameters():
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def run(
    mode: Callable[[], AbstractContextManager[Any]], state_format: str, backend: str, kind: str
) -> dict[str, Any]:
    """Weights and state after everything was called within a mode."""
    net = model()
    with mode():
        optimizer = MuonWithAuxAdam(
            muon_param_groups(net, aux_patterns=["bias"]),
            state_format=state_format, backend=backend, aux_adam=kind, stochastic_rounding=True,
        )  # fmt: skip
    for step in range(2):
        give_gradients(net, step)
        with mode():
            optimizer.step()
            saved = optimizer.state_dict()
            optimizer.load_state_dict(saved)
    with mode():
        optimizer.diagnose()
        if kind == "adamw":
            optimizer.export_full_precision()
    # Tensors made in the mode are ordinary ones: they may be changed outside of it.
    give_gradients(net, 2)
    optimizer.step()
    assert not any(
        value.is_inference()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return {"weights": dict(net.state_dict()), "states": optimizer.state_dict()["state"]}


@functools.cache
def run_without(state_format: str, backend: str, kind: str) -> dict[str, Any]:
    return run(torch.no_grad, state_format, backend, kind)


def assert_same(some: Any, others: Any) -> None:
    assert type(some) is type(others)
    if isinstance(some, dict):
        assert some.keys() == others.keys()
        for key in some:
            assert_same(some[key], others[key])
    elif isinstance(some, torch.Tensor):
        assert some.dtype == others.dtype
        assert torch.equal(some, others)
    else:
        assert some == others


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize(
    ("state_format", "backend", "kind"),
    [
        ("spectral4", "auto", "adamw"),
        ("spectral4", "reference", "adamw"),
        ("mulaw4", "reference", "adamw"),
        ("linear8", "auto", "auto"),
        ("auto", "auto", "adamw"),
    ],
)
def test_a_mode_changes_nothing(name: str, state_format: str, backend: str, kind: str) -> None:
    found = run(MODES[name], state_format, backend, kind)
    assert_same(found, run_without(state_format, backend, kind))


def test_modes_are_left_as_they_were() -> None:
    param = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([param])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16), torch.device("meta"):
        param.grad = torch.ones(8, 8, device="cpu")
        optimizer.step()
        assert torch.is_inference_mode_enabled()
        assert torch.is_autocast_enabled("cpu")
        assert torch.empty(1).is_meta
    assert not torch.is_inference_mode_enabled()


def test_a_closure_runs_in_the_modes_of_its_caller() -> None:
    param = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([param])
    seen = []

    def closure() -> float:
        seen.append((torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
        param.grad = torch.ones_like(param)
        return 1.5

    with torch.autocast("cpu", dtype=torch.bfloat16), default_dtype(torch.float64):
        assert optimizer.step(closure) == 1.5
    assert seen == [(True, torch.float64)]


def test_weights_cast_before_a_step_inside_autocast_are_cast_again() -> None:
    torch.manual_seed(0)
    net, x = nn.Linear(16, 16, bias=False), torch.randn(4, 16)
    optimizer = Muon(net.parameters(), lr=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(x).square().mean().backward()
        optimizer.step()
        inside = net(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(net(x), inside)


def test_optimizers_in_threads_leave_the_switches_of_the_process() -> None:
    switches = torch.backends.mkldnn.matmul, torch.backends.cuda.matmul
    before = [switch.fp32_precision for switch in switches]
    single = [steps(seed, "reference") for seed in range(3)]
    results: dict[int, torch.Tensor] = {}
    try:
        for switch, value in zip(switches, ("bf16", "tf32"), strict=True):
            switch.fp32_precision = value
        torch.set_default_dtype(torch.float64)
        threads = [
            threading.Thread(target=lambda s=seed: results.update({s: steps(s, "reference")}))
            for seed in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [switch.fp32_precision for switch in switches] == ["bf16", "tf32"]
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
    for seed, weights in enumerate(single):
        assert torch.equal(results[seed], weights)


def steps(seed: int, backend: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(48, 64, generator=generator, dtype=torch.float32))
    optimizer = Muon([weight], lr=0.02, backend=backend)
    for _ in range(10):
        weight.grad = torch.randn(48, 64, generator=generator, dtype=torch.float32)
        optimizer.step()
    return weight.detach()


def test_step_parameter_and_copies_in_inference_mode() -> None:
    param = nn.Parameter(torch.randn(8, 8))
    optimizer = Muon([param])
    with torch.inference_mode():
        param.grad = torch.ones(8, 8)
        optimizer.step_parameter(0, 0)
    again = copy.deepcopy(optimizer)
    again.param_groups[0]["params"][0].grad = torch.ones(8, 8)
    again.step()
