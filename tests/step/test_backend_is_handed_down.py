"""A step takes the backend that its group names, and nothing below it looks for another."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from torch import nn

from lowbit_muon import PRESETS, AutoFormat, Muon, orthogonalize
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu.adapter import unavailable_reason

if unavailable_reason() is not None:
    pytest.skip(str(unavailable_reason()), allow_module_level=True)

from lowbit_muon.backends import _cpu

AUTO = AutoFormat(target_error=0.25, recheck_every=1)
FORMATS = pytest.mark.parametrize(
    "state_format", [*PRESETS, AUTO], ids=lambda f: f if isinstance(f, str) else "auto"
)
OPTIMIZER = "lowbit_muon.optimizers.muon"


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the C++ functions that were called."""
    calls: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*arguments, **options)

        return call

    for name, function in vars(_cpu).items():
        if callable(function) and not name.startswith("_"):
            monkeypatch.setattr(_cpu, name, watched(name, function))
    return calls


def train(backend: str, state_format: str | AutoFormat, **options: Any) -> None:
    """Two steps, and everything else that decodes or stores a momentum."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((12, 20), (20, 12), (12, 20))]
    options.setdefault("nesterov", state_format != "muonq4")
    optimizer = Muon(params, state_format=state_format, backend=backend, **options)
    for _ in range(2):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    optimizer.diagnose()
    optimizer.load_state_dict(optimizer.state_dict())
    if state_format != "muonq4":  # whose momentum has no size
        optimizer.export_full_precision()
        other = Muon(params, state_format="mulaw8", backend=backend)
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("options", [{}, {"ns_input": "stored"}], ids=str)
@FORMATS
def test_the_reference_calls_no_kernel(
    state_format: str | AutoFormat, options: dict[str, Any], kernel_calls: list[str]
) -> None:
    train("reference", state_format, **options)
    assert kernel_calls == []


@FORMATS
def test_the_watch_sees_kernels(state_format: str | AutoFormat, kernel_calls: list[str]) -> None:
    train("cpu", state_format)
    assert {"accumulate", "symmetric_product"} <= set(kernel_calls)


def watch_look_ups(monkeypatch: pytest.MonkeyPatch, answer: Backend | None = None) -> list[str]:
    """The modules that have looked a backend up since; `answer` is what the optimizer gets."""
    found: list[str] = []

    def watched(module: str, get_backend: Callable[..., Backend]) -> Callable[..., Backend]:
        def call(name: str, device: torch.device) -> Backend:
            found.append(module)
            return answer if answer and module == OPTIMIZER else get_backend(name, device)

        return call

    for name, module in list(sys.modules.items()):
        if name.startswith("lowbit_muon.") and hasattr(module, "get_backend"):
            monkeypatch.setattr(module, "get_backend", watched(name, module.get_backend))
    return found


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ns_input": "stored"},
        {"batch_experts": True, "offload": True},
        {"compensation": True},
        {"stochastic_rounding": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", PRESETS)
def test_only_the_optimizer_looks_a_backend_up(
    name: str, options: dict[str, Any], device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = watch_look_ups(monkeypatch, DeviceReference() if device else None)
    params = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in ((2, 12, 20), (20, 12))]
    optimizer = Muon(params, state_format=name, nesterov=name != "muonq4", **options)
    for _ in range(2):  # the first makes the states
        found.clear()
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    assert set(found) == {OPTIMIZER}
    # and the watch sees others
    orthogonalize(torch.randn(3, 4))
    assert found[-1] == "lowbit_muon.linalg.newton_schulz"
