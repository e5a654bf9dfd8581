"""offload=True: the same step, with codes that live on the host and two batches on the device.

A device here is the reference as one; streams are replaced by a log of what was asked of
them, in order, and matrices on the device by copies, as a device has them.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_device_step import give_gradients, on_device, parameters
from torch import Tensor, nn

from bench.gpu.roofline import Ledger, on_paper
from lowbit_muon import (
    PRESETS,
    AutoFormat,
    Muon,
    MuonWithAuxAdam,
)
from lowbit_muon.backends.base import Backend
from lowbit_muon.state import offload as host_offload
from lowbit_muon.state import parameter as parameter_module
from lowbit_muon.state.offload import Fetched
from lowbit_muon.state.parameter import MatrixView, keep_on_host, stored_keys
from lowbit_muon.step import batches
from lowbit_muon.step.update import Batch, StepOptions

__all__ = ["on_device"]  # a fixture


def train(steps: int = 4, **options: Any) -> tuple[list[nn.Parameter], Muon]:
    params = parameters()
    optimizer = Muon(params, lr=0.02, **options)
    for step in range(steps):
        give_gradients(params, step)
        if step == 2:
            params[1].grad[0, 0] = float("nan")
        optimizer.step()
    return params, optimizer


def assert_equal_states(one: Any, two: Any) -> None:
    assert one.keys() == two.keys()
    for key, state in one.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                assert torch.equal(value, two[key][name]), (key, name)
            else:
                assert value == two[key][name], (key, name)


@pytest.mark.parametrize("batch", [1, 2000, 2**24])
@pytest.mark.parametrize("name", PRESETS)
def test_codes_and_weights_are_those_of_the_step_without_it(
    name: str, batch: int, on_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device()
    monkeypatch.setattr(batches, "DEVICE_ELEMENTS", batch)
    expected, without = train(state_format=name)
    found, optimizer = train(state_format=name, offload=True)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert_equal_states(optimizer.state_dict()["state"], without.state_dict()["state"])


def test_automatic_formats_and_experts(on_device: Callable[[], None]) -> None:
    on_device()

    def final(offload: bool) -> Tensor:
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(3, 24, 40))
        auto = AutoFormat(target_error=0.25, recheck_every=2)
        optimizer = Muon([weight], batch_experts=True, state_format=auto, offload=offload)
        for _ in range(4):
            weight.grad = torch.randn(3, 24, 40)
            optimizer.step()
        return weight.detach()

    assert torch.equal(final(True), final(False))


class Stream:
    """What torch.Stream and torch.Event are asked for, as a log."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def __enter__(self) -> Stream:
        self.log.append(f"{self.name}: copy")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def record_event(self) -> int:
        event = sum("record" in line for line in self.log)
        self.log.append(f"{self.name}: record {event}")
        return event

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name}: wait for {event}")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name}: wait for {other.name}")

    def synchronize(self) -> None:
        self.log.append(f"{self.name}: finish")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch, on_device: Callable[[], None]) -> list[str]:
    """A device with streams."""
    on_device()
    lines: list[str] = []
    copies, compute = Stream("copies", lines), Stream("compute", lines)
    used: list[tuple[Tensor, Stream]] = []
    monkeypatch.setattr(host_offload, "copy_stream", lambda _: copies)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda _: compute)
    monkeypatch.setattr(Tensor, "record_stream", lambda *call: used.append(call), raising=False)
    update = batches.update

    def watched(batch: Batch, rule: StepOptions, backend: Backend) -> Tensor:
        assert {id(t) for momentum in batch.momenta for t in momentum.tensors.values()} <= {
            id(tensor) for tensor, stream in used if stream is compute
        }
        accepted = update(batch, rule, backend)
        lines.append("compute: batch")
        return accepted

    monkeypatch.setattr(batches, "update", watched)
    return lines


def test_copies_run_beside_computations_and_wait_where_they_must(
    log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "DEVICE_ELEMENTS", 1)
    params = [nn.Parameter(torch.randn(8, 12)) for _ in range(3)]
    optimizer = Muon(params, offload=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    fetch = ["copies: copy", "copies: record {}"]
    batch = ["compute: wait for {}", "compute: batch"]
    give_back = ["copies: wait for compute", "copies: copy"]
    expected = [line.format(0) for line in fetch]
    for index in range(3):
        if index < 2:
            expected += [line.format(index + 1) for line in fetch]
        expected += [line.format(index) for line in batch]
        expected += give_back
    assert log == expected


@pytest.mark.parametrize(
    "read",
    [
        lambda optimizer: optimizer.state_dict(),
        lambda optimizer: optimizer.diagnose(),
        lambda optimizer: optimizer.export_full_precision(),
        copy.deepcopy,
        pickle.dumps,
    ],
)
def test_who_reads_the_state_waits_for_the_last_copies(
    log: list[str], read: Callable[[Muon], Any]
) -> None:
    params = [nn.Parameter(torch.randn(8, 12))]
    optimizer = Muon(params, offload=True)
    params[0].grad = torch.randn(8, 12)
    optimizer.step()
    assert "copies: finish" not in log
    read(optimizer)
    assert log[-1] == "copies: finish"


def test_two_batches_are_on_the_device_at_a_time(
    on_device: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_device()
    alive: weakref.WeakSet[Fetched] = weakref.WeakSet()
    most = 0

    class Counted(Fetched):
        def __init__(self, *args: Any) -> None:
            nonlocal most
            super().__init__(*args)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(batches, "Fetched", Counted)
    monkeypatch.setattr(batches, "DEVICE_ELEMENTS", 1)
    params = [nn.Parameter(torch.randn(8, 12)) for _ in range(6)]
    optimizer = Muon(params, offload=True)
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert most == 2


def test_a_state_loads_with_and_without(on_device: Callable[[], None]) -> None:
    on_device()
    expected, first = train(5)
    params, second = train(3)
    third_params = copy.deepcopy(params)
    third = Muon(third_params, lr=0.02, offload=True)
    third.load_state_dict(second.state_dict())
    assert third.param_groups[0]["offload"]
    for step in (3, 4):
        give_gradients(third_params, step)
        third.step()
    for one, two in zip(third_params, expected, strict=True):
        assert torch.equal(one, two)
    assert first.state_bytes() == third.state_bytes()


def test_on_a_device_only_copies_see_both_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: what is stored is on the CPU, all arithmetic elsewhere."""
    given_back = []

    def to_cpu(state: dict[str, Any], views: Any) -> None:
        for key in stored_keys(state, views):
            state[key] = torch.zeros_like(state[key], device="cpu")

    def give_back(self: Fetched) -> None:
        given_back.extend(self._stored)
        for matrix in self.matrices():
            assert all(tensor.is_meta for tensor in matrix.tensors.values())

    monkeypatch.setattr(parameter_module, "keep_on_host", to_cpu)
    monkeypatch.setattr(Fetched, "give_back", give_back)
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in ((24, 40), (40, 24))]
    optimizer = Muon(params, offload=True)
    for param in params:
        param.grad = torch.empty_like(param)
    with on_paper(Ledger()):
        optimizer.step()
    assert len(given_back) == 2
    assert all(t.device.type == "cpu" for m in given_back for t in m.tensors.values())
    assert all(state["step"].is_meta for state in optimizer.state.values())  # counters stay there


@pytest.mark.filterwarnings("ignore:a gradient of a parameter")
def test_on_a_cpu_it_changes_nothing() -> None:
    expected, plain = train(3)
    found, optimizer = train(3, offload=True)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    state = optimizer.state[found[0]]
    before = state["codes"]
    keep_on_host(state, [MatrixView(slice(0, 24), (24, 40), "")])
    assert state["codes"] is before
    assert optimizer.state_bytes() == plain.state_bytes()


def test_it_is_an_option_of_groups() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    groups = [{"params": [weight], "use_muon": True, "offload": True}]
    assert MuonWithAuxAdam(groups).param_groups[0]["offload"]
    assert MuonWithAuxAdam([{"params": [weight], "use_muon": True}], offload=True)
    with pytest.raises(ValueError, match="offload: expected a bool, got 1"):
        Muon([weight], offload=1)  # type: ignore[arg-type]
