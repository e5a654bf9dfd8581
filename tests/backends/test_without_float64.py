"""Devices without float64 (Metal): nothing creates any, and results stay near the others'.

A CPU stands in for such a device: it is declared to have no float64, and all operations are
watched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_muon import PRESETS, Muon, orthogonalize, quantize
from lowbit_muon.backends import tensors as checks
from lowbit_muon.state.coded_products import lut_gram
from lowbit_muon.state.stored import QuantizedMatrix


class NoFloat64(TorchDispatchMode):
    """Raises as Metal does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            # (torch itself makes 0-dimensional ones of Python's numbers, on the host)
            there = isinstance(leaf, Tensor) and not leaf.is_meta and leaf.ndim
            if there and leaf.dtype == torch.float64:
                raise TypeError(f"{func}: this device has no float64")
        return result


@pytest.fixture
def without_float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(checks, "DEVICES_WITHOUT_FLOAT64", {"cpu"})
    with NoFloat64():
        yield


def train(name: str, state_dict: Any = None, steps: int = 3) -> tuple[Tensor, Muon]:
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(20, 33, generator=generator))
    optimizer = Muon([weight], lr=0.02, state_format=name, backend="reference")
    if state_dict is not None:
        optimizer.load_state_dict(state_dict)
    for _ in range(steps):
        weight.grad = torch.randn(20, 33, generator=generator)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("name", PRESETS)
def test_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, before = train(name)
    saved = before.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(checks, "DEVICES_WITHOUT_FLOAT64", {"cpu"})
        with NoFloat64():
            found, optimizer = train(name)
        start, _ = train(name, steps=0)
        # rounding of statistics flips a code here and there
        assert (found - expected).norm() < 0.04 * (expected - start).norm()
        there = copy.deepcopy(optimizer.state_dict())
        train(name, saved, steps=0)  # a checkpoint from a device with float64
    train(name, there)  # and back


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("name", PRESETS)
def test_quantising(name: str) -> None:
    x = torch.randn(24, 70)
    stored = quantize(x, name, backend="reference")
    assert stored.dequantize("reference").isfinite().all()
    gram = lut_gram(stored, backend="reference")
    dense = stored.dequantize("reference")
    # A spectral format's Gram matrix, about 70, rounds Y Y^T + cI to 2**-15 and multiplies it
    # twice; other formats only sum in float32.
    torch.testing.assert_close(gram, dense @ dense.mT, rtol=1e-3, atol=70 * 4 * 2.0**-15)
    QuantizedMatrix.from_tensors(stored.shape, stored.state_format, stored.tensors)


@pytest.mark.usefixtures("without_float64")
@pytest.mark.parametrize("method", ["newton_schulz", "gram"])
def test_orthogonalising(method: str) -> None:
    assert orthogonalize(torch.randn(10, 20), method=method).isfinite().all()


def test_the_watch_sees_float64() -> None:
    with NoFloat64(), pytest.raises(TypeError, match="no float64"):
        torch.zeros(2).double()
