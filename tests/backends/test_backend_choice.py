"""Which backend a device gets, and what is said when it is not there."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

from lowbit_muon import Muon, backends
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu.adapter import unavailable_reason


class Marked(Backend):
    """Stands for a backend that this machine lacks."""

    def __init__(self, name: str) -> None:
        self.name = name  # type: ignore[misc]


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Makes backends available, or not for a reason."""

    def change(**reasons: str | None) -> None:
        registry = dict(backends._REGISTRY)
        for name, reason in reasons.items():
            registry[name] = dataclasses.replace(
                registry[name],
                path=name,
                unavailable_reason=lambda reason=reason: reason,
            )
        monkeypatch.setattr(backends, "_REGISTRY", registry)
        load = backends._load
        monkeypatch.setattr(
            backends, "_load", lambda path: Marked(path) if path in reasons else load(path)
        )
        get_backend.cache_clear()
        backends._create.cache_clear()

    yield change
    monkeypatch.undo()
    get_backend.cache_clear()
    backends._create.cache_clear()


@pytest.mark.parametrize(
    ("device", "triton", "cuda", "expected"),
    [
        ("cuda", None, None, "triton"),
        ("cuda", "no triton", None, "cuda"),
        ("xpu", None, None, "triton"),
        ("mps", None, None, "reference"),
        ("meta", None, None, "reference"),
    ],
)
def test_auto_goes_by_device(
    device: str, triton: str | None, cuda: str | None, expected: str, pretend: Callable[..., None]
) -> None:
    pretend(triton=triton, cuda=cuda)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_backend("auto", torch.device(device)).name == expected


@pytest.mark.skipif(unavailable_reason() is not None, reason="the C++ extension was not built")
def test_auto_on_a_cpu_is_never_a_gpu_backend(pretend: Callable[..., None]) -> None:
    pretend(triton=None, cuda=None)
    assert get_backend("auto", torch.device("cpu")).name == "cpu"


def test_falling_back_on_a_gpu_says_why_once(pretend: Callable[..., None]) -> None:
    pretend(triton="no triton here", cuda="not built")
    with pytest.warns(RuntimeWarning, match=r"triton: no triton here; cuda: not built"):
        assert get_backend("auto", torch.device("cuda")).name == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_backend("auto", torch.device("cuda"))


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_named_backend_that_is_missing_raises(name: str, pretend: Callable[..., None]) -> None:
    pretend(**{name: "install this"})
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: install this"):
        get_backend(name, torch.device("cuda"))
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: install this"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))], backend=name)


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_refuses_the_cpu(name: str, pretend: Callable[..., None]) -> None:
    pretend(**{name: None})
    with pytest.raises(ValueError, match=f"'{name}' works on devices"):
        get_backend(name, torch.device("cpu"))


def test_the_reasons_here_name_a_remedy() -> None:
    for name, available, detail in backends.describe_backends():
        if not available:
            assert any(word in detail for word in ("install", "GPU", "device")), (name, detail)


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, lowbit_muon.backends; lowbit_muon.backends.describe_backends(); "
    code += "print('triton' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
