"""Shared test set-up."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch loads OpenMP. Threads that wait must not spin: two processes of tests with two
# threads each, or anything else on the machine, take the cores that they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from lowbit_muon.backends import get_backend


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked `long`, but in `make fuzz`, which sets FUZZ."""
    if os.environ.get("FUZZ"):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("long")]


@pytest.fixture(autouse=True)
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill what torch.empty returns with NaN (or the largest integer), so that a read shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices are no faster on two threads, and far slower while something else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registered_backends() -> Iterator[None]:
    """No test finds a backend that another has registered."""
    yield
    get_backend.cache_clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
