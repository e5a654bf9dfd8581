"""A step on a device never makes the host wait, and copies nothing to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_device_step import SHAPES, give_gradients, on_device, parameters
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.gpu.roofline import Ledger, on_paper
from lowbit_muon import PRESETS, RULES, AutoFormat, Muon

__all__ = ["on_device"]  # a fixture


class NoLists(TorchFunctionMode):
    """Raises where a tensor would be read by the host as a whole, which no dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.tolist, Tensor.numpy):
            raise AssertionError(f"{func.__name__} makes the host wait")
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Raises where a tensor's value would be read by the host, or its shape depend on it."""

    WAITS = (
        "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique",
        "bincount", "repeat_interleave.Tensor", "_linalg_check_errors", "_linalg_eigh",
        "_linalg_svd",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.lists = NoLists()

    def __enter__(self) -> NoWaiting:
        self.lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.lists.__exit__(*raised)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        if name.split(".")[0] in self.WAITS or name in self.WAITS:
            raise AssertionError(f"{name} makes the host wait")
        if name.startswith("index.") and any(
            isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1]
        ):
            raise AssertionError("a boolean index makes the host wait")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("ns_dtype", ["float16", "float32"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_never_waits_for_the_device(
    name: str, ns_dtype: str, on_device: Callable[[], None]
) -> None:
    on_device()
    params = parameters(torch.bfloat16)
    optimizer = Muon(
        params, torch.tensor(0.01), state_format=name, ns_dtype=ns_dtype, stochastic_rounding=True
    )
    give_gradients(params, 0)
    optimizer.step()  # creates the state
    give_gradients(params, 1)
    with NoWaiting(), torch.no_grad():
        optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))


# Decompositions whose host waits, as their docstrings say.
DECOMPOSING = {
    "eigenbasis_adam", "eigenbasis_moment", "exact_polar", "kronecker_whitened", "low_rank_polar",
    "momentum_basis_adam", "polar_factor", "soft_clip",
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rules_never_wait_for_the_device(name: str, on_device: Callable[[], None]) -> None:
    """Unless a stage of theirs says so, which is then seen here."""
    on_device()
    params = parameters(torch.bfloat16)
    optimizer = Muon(params, torch.tensor(0.01), rule=name, stochastic_rounding=True)
    give_gradients(params, 0)
    optimizer.step()
    give_gradients(params, 1)
    waits = {stage.kind for stage in RULES[name].stages()} & DECOMPOSING
    with NoWaiting(), torch.no_grad():
        if waits:
            with pytest.raises(AssertionError, match="wait"):
                optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))
        else:
            optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))


def test_an_automatic_format_waits_only_where_it_is_due(on_device: Callable[[], None]) -> None:
    on_device()
    params = parameters()
    optimizer = Muon(params, torch.tensor(0.01), state_format=AutoFormat(recheck_every=5))
    for step in range(6):
        give_gradients(params, step)
        if step == 3:  # 0, 1, 2 and 4 are powers of two or zero, 5 is the period
            with NoWaiting(), torch.no_grad():
                optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))
        elif step == 5:
            with NoWaiting(), torch.no_grad(), pytest.raises(AssertionError, match="wait"):
                optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))
        else:
            optimizer.step()


def test_the_watch_sees_waiting() -> None:
    for wait in (
        lambda: float(torch.ones(1)),
        lambda: torch.ones(2)[torch.ones(2) > 0],
        lambda: torch.ones(2).tolist(),
    ):
        with NoWaiting(), pytest.raises(AssertionError, match="wait"):
            wait()


COPYING = [
    *({"state_format": name, "ns_input": each} for name in PRESETS for each in ("exact", "stored")),
    *({"rule": name} for name in RULES),
]


@pytest.mark.parametrize("options", COPYING, ids=lambda each: " ".join(each.values()))
def test_a_step_copies_nothing_to_the_device(options: dict[str, Any]) -> None:
    """On tensors without data: constants from the host would be a mix of devices or a copy."""

    class OneDevice(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            assert len({x.device for x in tensors}) <= 1, func
            return result

    ledger = Ledger()
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES]
    optimizer = Muon(params, torch.empty((), device="cpu").fill_(0.01), **options)
    for param in params:
        param.grad = torch.empty_like(param)
    with on_paper(ledger), torch.no_grad():
        optimizer.step()
        with OneDevice():
            optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))
    assert ledger.work
