"""Bytes and operations of `lowbit-muon bench`: the formulas against what the code really does."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lowbit_muon import PRESETS
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes
from lowbit_muon.linalg.spectral import encoding_operator
from lowbit_muon.tools.benchmark import peaks
from lowbit_muon.tools.benchmark.cases import (
    DTYPES,
    TORCH_MUON,
    Case,
    Prepared,
    Problem,
    UnavailableError,
    make_cases,
)
from lowbit_muon.tools.benchmark.counts import (
    BF16_PRODUCT,
    FP32_PRODUCT,
    FROM_MEMORY,
    IN_L2,
    L2_BYTES,
    encode_operations,
    is_copy,
    nearest_copy,
    product_operations,
    step_operations,
    symmetric_operations,
)
from lowbit_muon.tools.benchmark.measure import measure_cases

CPU = torch.device("cpu")
SHAPES = [(16, 40), (40, 16), (24, 24)]


def prepared(problem: Problem, formats: list[str]) -> dict[str, Prepared]:
    """What can be prepared, by key."""
    found = {}
    for case in make_cases(problem, formats):
        # A peer that is not installed, and formats without integers.
        may_lack = case.peer or case.name == "lut_gram"
        with contextlib.suppress(UnavailableError) if may_lack else contextlib.nullcontext():
            found[case.key] = case.prepare()
    return found


def operations(call: Prepared) -> float:
    return sum(amount for roof, amount in call.work.items() if not is_copy(roof))


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The operations of each product and inverse that a backend of ours is asked for."""
    found: list[float] = []

    def count(name: str, of: Any) -> None:
        method = getattr(Backend, name)

        def counted(self: Backend, *args: Any, **options: Any) -> Any:
            found.append(of(*args))
            return method(self, *args, **options)

        monkeypatch.setattr(Backend, name, counted)

    def product(a: Tensor, b: Tensor) -> float:
        return math.prod(a.shape[:-2]) * product_operations(*a.shape[-2:], b.shape[-1])

    def symmetric(a: Tensor, b: Tensor | None = None) -> float:
        return math.prod(a.shape[:-2]) * symmetric_operations(*a.shape[-2:])

    def fractions(x: Tensor, constant: float, linear: float, poles: Any, weights: Any) -> float:
        # Of LAPACK's potrf m^3/3, of potri 2 m^3/3, beside squares.
        return math.prod(x.shape[:-2]) * len(poles) * (x.shape[-1] ** 3 / 3 * (1 + 2))

    count("product", product)
    count("symmetric_product", symmetric)
    count("partial_fractions", fractions)

    def code_gram(codes: PackedCodes) -> float:
        *batch, rows, _ = codes.packed.shape
        return math.prod(batch) * symmetric_operations(rows, codes.columns)

    def code_product(a: Tensor, codes: PackedCodes) -> float:
        return math.prod(a.shape[:-2]) * product_operations(*a.shape[-2:], codes.columns)

    count("code_gram", code_gram)
    count("code_product", code_product)
    return found


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_operations_are_those_of_the_products_that_are_called(
    shape: tuple[int, int], backend: str, done: list[float]
) -> None:
    calls = prepared(Problem(shape, "fp32", CPU, backend), list(PRESETS))
    ours = {key for key in calls if key.split()[0] in
            ("step", "orthogonalize", "quantize", "dequantize", "lut_gram")}  # fmt: skip
    assert len(ours) > 3 * len(PRESETS)
    for key in ours:
        done.clear()
        calls[key].call()
        name = key.partition(" ")[2]
        if name and PRESETS[name].rank(*shape):
            assert operations(calls[key]) == 0, "not counted"
        else:
            assert operations(calls[key]) == pytest.approx(sum(done), rel=1e-12), key


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_operations_of_torch_are_those_that_it_counts(dtype: str, shape: tuple[int, int]) -> None:
    calls = prepared(Problem(shape, dtype, CPU), ["fp32"])
    peers = [f"torch.mm Gram {dtype}", "Newton-Schulz fp32", "Newton-Schulz bf16", TORCH_MUON,
             "torch.optim.AdamW", "torch copy"]  # fmt: skip
    for key in peers:
        with FlopCounterMode(display=False) as counter:
            calls[key].call()
        assert operations(calls[key]) == counter.get_total_flops(), key
    assert operations(calls[TORCH_MUON]) > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bytes_are_those_of_the_tensors_that_are_read_and_written(
    dtype: str, shape: tuple[int, int]
) -> None:
    problem = Problem(shape, dtype, CPU)
    calls = prepared(problem, ["spectral4", "fp32"])
    moved = {key: call.work[IN_L2] for key, call in calls.items()}
    x = problem.matrix
    for name in ("spectral4", "fp32"):
        stored = sum(tensor.nbytes for tensor in problem.quantized(name).tensors.values())
        assert moved[f"quantize {name}"] == moved[f"dequantize {name}"] == x.nbytes + stored
    gram = calls["lut_gram spectral4"].call()
    assert isinstance(gram, Tensor)
    packed = sum(tensor.nbytes for tensor in problem.quantized("spectral4").tensors.values())
    assert moved["lut_gram spectral4"] == packed + gram.nbytes
    result = calls["orthogonalize"].call()
    assert isinstance(result, Tensor)
    assert moved["orthogonalize"] == moved["torch copy"] == x.nbytes + result.nbytes
    for key in ("step spectral4", "step fp32", TORCH_MUON, "torch.optim.AdamW"):
        optimizer = getattr(calls[key].call, "__self__")  # noqa: B009
        (state,) = optimizer.state.values()
        (param,) = optimizer.param_groups[0]["params"]
        kept = sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        # Weight and state read and written, and the gradient read.
        assert moved[key] == 2 * param.nbytes + param.grad.nbytes + 2 * kept


def test_a_devices_root_is_counted_in_products_and_its_step_is_not(done: list[float]) -> None:
    f, m, n = PRESETS["spectral4"], 16, 40
    device = DeviceReference()
    assert step_operations(f, m, n, device) is None
    encoding_operator(torch.eye(m)[None] / m, f.shift(m), device)
    two_more = symmetric_operations(m, n) + product_operations(m, m, n)
    assert encode_operations(f, m, n, device) == sum(done) + two_more


def test_bytes_are_limited_by_the_cache_that_holds_them() -> None:
    torch.set_num_threads(1)
    assert nearest_copy(2 * L2_BYTES, CPU) == IN_L2
    assert nearest_copy(2 * L2_BYTES + 1, CPU) == FROM_MEMORY
    assert nearest_copy(1, torch.device("cuda")) == FROM_MEMORY


def test_a_share_is_of_what_limits_most(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of made-up peaks: work in a second, of the row and of the machine."""
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(peaks, "PRODUCT_SIZES", {"cpu": 32})
    seconds = {FROM_MEMORY: [1.0], FP32_PRODUCT: [2.0], BF16_PRODUCT: [1.0]}
    wide = {key: seconds.get(key, [4.0]) for key in ("a", "b", *seconds)}
    monkeypatch.setattr("lowbit_muon.tools.benchmark.measure.interleaved", lambda *_, **__: wide)
    # The copy: 2 * 2^16 bytes in a second; the product: 2^16 operations, in 2 s and in 1 s.
    amounts = {
        "a": {FROM_MEMORY: 2.0**18, FP32_PRODUCT: 2.0**16},  # 1/2 of the copy, 1/2 of products
        "b": {FROM_MEMORY: 2.0**17, BF16_PRODUCT: 2.0**18},  # 1/4, 1
    }
    cases = [Case(key, lambda key=key: Prepared(lambda: None, work=amounts[key])) for key in "ab"]  # type: ignore[misc]
    rows = {row.name: row for row in measure_cases([*cases, *peaks.peaks(seconds)], (8, 8), 1)}
    assert rows["a"].fraction == 0.5
    assert (rows["b"].fraction, rows["b"].roof, rows["b"].work) == (1.0, BF16_PRODUCT, 2.0**18)
    assert (rows["b"].bytes, rows["b"].flops) == (2.0**17, 2.0**18)
    assert {rows[name].fraction for name in seconds} == {1.0}
