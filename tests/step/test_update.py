"""The step by panels, without a float32 copy of the momentum, and from stored codes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from stored_direction import steps_left, stored_direction
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lowbit_muon import PRESETS, Muon, StateFormat, orthogonalize
from lowbit_muon.state import operands
from lowbit_muon.state.parameter import matrix_views, read_matrix, resolve_group_format
from lowbit_muon.state.stored import QuantizedMatrix

BY_PANELS = ("mulaw4", "muonq4", "linear8", "nf4", "bf16", "fp32")


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for about ten rows of the matrices here."""
    monkeypatch.setattr(operands, "SCRATCH_FLOATS", 10 * 90)


def grads(shape: tuple[int, int], steps: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients with a falling spectrum and a common part, as training has."""
    torch.manual_seed(5)
    left, right = torch.randn(shape[0], 6), torch.randn(6, shape[1])
    return [
        ((left / torch.arange(1, 7)) @ right + 0.3 * torch.randn(shape)).to(dtype)
        for _ in range(steps)
    ]


def run(shape: tuple[int, int], dtype: torch.dtype = torch.float32, **options: Any) -> Muon:
    """Three steps from the same weight and gradients."""
    torch.manual_seed(0)
    param = torch.nn.Parameter((0.1 * torch.randn(shape)).to(dtype))
    optimizer = Muon([param], lr=0.02, **options)
    for grad in grads(shape, 3, dtype):
        param.grad = grad
        optimizer.step()
    return optimizer


def momentum_of(optimizer: Muon) -> QuantizedMatrix:
    (group,) = optimizer.param_groups
    (param,) = group["params"]
    (view,) = matrix_views(param, group)
    return read_matrix(optimizer.state[param], view, resolve_group_format(group))


def weight_of(optimizer: Muon) -> Tensor:
    return optimizer.param_groups[0]["params"][0].detach().float()


def difference(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


# Two limbs of A: see test_coded_products.py; five steps lift rounding of the Gram matrix.
STORED_ERROR = 2e-3


def stored_step(
    shape: tuple[int, int], state_format: StateFormat
) -> tuple[QuantizedMatrix, Tensor, Tensor]:
    """The fourth step with ns_input="stored": (momentum, what W moved by, what it should)."""
    optimizer = run(shape, state_format=state_format, ns_input="stored")
    param = optimizer.param_groups[0]["params"][0]
    before = param.detach().clone()
    param.grad = grads(shape, 4, torch.float32)[-1]
    optimizer.step()
    stored = momentum_of(optimizer)
    ratio = max(1.0, shape[0] / shape[1]) ** 0.5
    expected = -0.02 * 0.1 * before - 0.02 * ratio * stored_direction(stored)
    return stored, param.detach() - before, expected


# The scale is replaced before the last rows are decoded.
ONE_SCALE = StateFormat("one scale", 8, codebook="linear", granularity="tensor", snap_levels=False)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(40, 90), (90, 40)], ids=str)
@pytest.mark.parametrize("name", [*BY_PANELS, ONE_SCALE], ids=str)
def test_panels_change_nothing(
    name: str | StateFormat, shape: tuple[int, int], nesterov: bool, request: pytest.FixtureRequest
) -> None:
    options = {"state_format": name, "nesterov": nesterov}
    whole = run(shape, **options)
    request.getfixturevalue("panels")
    parts = run(shape, **options)
    # Sums in another order differ by 1e-6, which moves one code in ten thousand to its neighbour.
    assert difference(momentum_of(parts).dequantize(), momentum_of(whole).dequantize()) < 5e-3
    assert difference(weight_of(parts), weight_of(whole)) < 5e-3


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_rounded_like_whole_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = run((40, 90), dtype, state_format="mulaw4")
    monkeypatch.undo()
    whole = run((40, 90), dtype, state_format="mulaw4")
    # Three steps, each of two roundings that may fall on the other side.
    bound = 6 * torch.finfo(dtype).eps * (weight_of(whole).abs() + 0.1)
    assert bool(((weight_of(parts) - weight_of(whole)).abs() <= bound).all())


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("name", BY_PANELS)
def test_non_finite_gradient_leaves_all_as_it_was(name: str) -> None:
    optimizer = run((40, 90), state_format=name)
    param = optimizer.param_groups[0]["params"][0]
    before = [param.detach().clone(), momentum_of(optimizer).dequantize()]
    param.grad = grads((40, 90), 1, torch.float32)[0]
    param.grad[39, 89] = torch.nan
    with pytest.warns(RuntimeWarning, match="inf or nan"):
        optimizer.step()
    assert torch.equal(param.detach(), before[0])
    assert torch.equal(momentum_of(optimizer).dequantize(), before[1])


@pytest.mark.usefixtures("panels")
@pytest.mark.parametrize("size", [1e-25, 1e13])
@pytest.mark.parametrize("from_stored", ["exact", "stored"])
def test_extreme_gradients_by_panels(size: float, from_stored: str) -> None:
    updates = []
    for scale in (1.0, size):
        param = torch.nn.Parameter(torch.zeros(40, 90))
        optimizer = Muon([param], lr=1.0, state_format="mulaw4", ns_input=from_stored, eps=1e-30)
        param.grad = grads((40, 90), 1, torch.float32)[0] * scale
        optimizer.step()
        updates.append(param.detach())
    assert difference(updates[1], updates[0]) < 1e-3


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)], ids=str)
@pytest.mark.parametrize("name", ["spectral4", "spectral2", "mulaw4", "fp32"])
def test_stored_input_is_what_the_codes_hold(name: str, shape: tuple[int, int]) -> None:
    """W moves by the orthogonalised stored matrix, without a look-ahead."""
    stored, moved, expected = stored_step(shape, PRESETS[name])
    assert stored.state_format == PRESETS[name]
    assert difference(moved, expected) < STORED_ERROR


# (1/(c m^(1/3)) is 1, 3.4, 3.5, 12 and 100 here; each step multiplies by 3.4445.)
@pytest.mark.parametrize(
    ("shift", "steps"), [(0.5, 5), (1 / 6.8, 5), (1 / 7, 4), (1 / 24, 3), (0.005, 2)]
)
def test_stored_input_saves_steps_by_shape_and_shift(shift: float, steps: int) -> None:
    state_format = dataclasses.replace(PRESETS["spectral4"], spectral_shift=shift)
    stored, moved, expected = stored_step((8, 30), state_format)
    assert steps_left(stored) == steps
    assert difference(moved, expected) < STORED_ERROR


def test_stored_input_takes_one_step_at_least() -> None:
    """A shift of 0.005 has done three steps' work for eight rows."""
    state_format = dataclasses.replace(PRESETS["spectral4"], spectral_shift=0.005)
    options: dict[str, Any] = {"state_format": state_format, "ns_input": "stored"}
    one, three = (weight_of(run((8, 30), **options, ns_steps=steps)) for steps in (1, 3))
    assert torch.equal(one, three)


def test_stored_spectrum_takes_the_direction_of_the_momentum() -> None:
    """Fewer steps on Y come as close to the exact update as all steps on the decoded momentum."""
    stored = momentum_of(run((64, 200), state_format="spectral4"))
    exact, few = orthogonalize(stored.dequantize()), stored_direction(stored)
    assert steps_left(stored) < 5
    cosine = float((exact * few).sum() / (exact.norm() * few.norm()))
    assert cosine > 0.95


def test_stored_spectrum_respects_eps() -> None:
    """A gradient far below eps moves the weight by about norm / eps, as in torch.optim.Muon."""
    moves = []
    for ns_input in ("exact", "stored"):
        param = torch.nn.Parameter(torch.zeros(40, 90))
        optimizer = Muon([param], lr=1.0, weight_decay=0.0, ns_input=ns_input)
        param.grad = grads((40, 90), 1, torch.float32)[0] * 1e-14
        optimizer.step()
        moves.append(float(param.detach().norm()))
    assert moves[0] < 1e-3
    # (the small directions of Y are lifted: as many times as the first steps would)
    assert moves[1] < 20 * moves[0]


@pytest.mark.parametrize("name", ["mulaw4", "muonq4", "spectral4"])
@pytest.mark.parametrize("shape", [(1100, 400), (300, 700)], ids=str)
def test_threads_do_not_change_the_state(name: str, shape: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    states = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            states.append(momentum_of(run(shape, state_format=name)).tensors)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(states[0][role], states[1][role]) for role in states[0])


@pytest.mark.parametrize("ns_input", ["exact", "stored"])
@pytest.mark.parametrize("name", [*BY_PANELS, "spectral4"])
def test_default_dtype_of_torch_does_not_matter(name: str, ns_input: str) -> None:
    expected = weight_of(run((40, 90), state_format=name, ns_input=ns_input))
    inputs = grads((40, 90), 3, torch.float32)
    torch.manual_seed(0)
    param = torch.nn.Parameter(0.1 * torch.randn(40, 90))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = Muon([param], lr=0.02, state_format=name, ns_input=ns_input)
        for grad in inputs:
            param.grad = grad
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(param.detach(), expected)


@pytest.mark.parametrize("name", ["fp32", "mulaw4", "spectral4"])
def test_autograd_sees_that_a_weight_changed(name: str) -> None:
    """A graph made before the step must not be used after it, as with torch.optim.Muon."""
    param = torch.nn.Parameter(torch.randn(20, 30))
    optimizer = Muon([param], state_format=name)
    loss = (torch.randn(5, 20, requires_grad=True) @ param).sum()
    param.grad = torch.randn(20, 30)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_gradients_with_muonq4(dtype: torch.dtype) -> None:
    updates = []
    for scale in (1.0, 1e25):
        param = torch.nn.Parameter(torch.zeros(40, 90))
        optimizer = Muon([param], lr=1.0, state_format="muonq4", nesterov=False)
        param.grad = grads((40, 90), 1, torch.float32)[0] * scale
        optimizer.step()
        updates.append(param.detach())
    assert difference(updates[1], updates[0]) < 1e-3


def peak_bytes(optimizer: Muon, trace: Path) -> float:
    """The most tensor memory alive at once during a step, above what was before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        optimizer.step()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return max(event["Total Allocated"] for event in memory) - before


@pytest.mark.parametrize(("name", "buffers"), [("mulaw4", 0), ("spectral4", 1)])
def test_no_float32_copy_of_the_momentum(name: str, buffers: int, tmp_path: Path) -> None:
    m, n = 256, 12000
    param = torch.nn.Parameter(torch.randn(n, m))
    optimizer = Muon([param], state_format=name)
    param.grad = torch.randn(n, m)
    optimizer.step()
    # Thin factors of rank m/16 in both orientations, decoded and being replaced, are under m n / 2.
    allowed = 4 * (buffers * m * n + 5 * m * m + operands.SCRATCH_FLOATS + m * n // 2)
    assert allowed < 4 * (buffers + 1.5) * m * n
    assert peak_bytes(optimizer, tmp_path / "trace.json") <= allowed
