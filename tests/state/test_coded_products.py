"""The public products of codes against the decoded matrix in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from device_reference import DeviceReference, stand_in
from torch import Tensor

from lowbit_muon import PRESETS, QuantizedMatrix, StateFormat, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.state import operands
from lowbit_muon.state.coded_products import Panel, lut_gram, lut_matmul, lut_times
from lowbit_muon.state.operands import Panels
from lowbit_muon.state.stored import StoredBatch

PLAIN = StateFormat("plain", 4)
BLOCKS = dataclasses.replace(PLAIN, name="blocks", granularity="block", block_size=16)
FORMATS = {
    **{name: PRESETS[name] for name in ("spectral4", "mulaw4", "linear8", "muonq4", "bf16")},
    "blocks": BLOCKS,
    "tensor": dataclasses.replace(PLAIN, name="tensor", granularity="tensor"),
    **{f"{bits} bits": StateFormat(f"{bits} bits", bits, clip=2.0) for bits in (2, 3)},
}
INTEGER = [name for name in FORMATS if name not in ("muonq4", "bf16")]
# Rounding a row to 1/65278 of its largest entry is white noise of that over sqrt(3), and the
# largest entry is at most ten times the mean one here.
LIMB_ERROR = 10 * 2**-16
SHAPES = [(1, 1), (1, 70), (24, 40), (40, 24), (50, 530)]


@pytest.fixture(params=[operands.SCRATCH_FLOATS, 2 * 7 * 600], ids=["one panel", "panels"])
def scratch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for the whole matrix, and for panels of a few rows."""
    monkeypatch.setattr(operands, "SCRATCH_FLOATS", request.param)


def decoded(q: QuantizedMatrix) -> Tensor:
    """The stored matrix, float64, the short side first."""
    matrix = q.dequantize().double()
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def make(name: str, shape: tuple[int, int]) -> QuantizedMatrix:
    return quantize(torch.randn(shape), FORMATS[name], backend="reference")


def close(found: Tensor, exact: Tensor, terms: int, size: Tensor) -> None:
    """Within the rounding of `terms` float32 operations on sums of `size` = |left| |right|."""
    assert found.dtype == torch.float32
    assert found.shape == exact.shape
    assert bool(((found.double() - exact).abs() <= terms * 2**-24 * size + 1e-30).all())


@pytest.mark.usefixtures("scratch")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_float_panels(name: str, shape: tuple[int, int]) -> None:
    q = make(name, shape)
    m, n = sorted(shape)
    addend = torch.randn(shape)
    g = (addend if shape[0] <= shape[1] else addend.mT).double()
    a, v = torch.randn(5, m), torch.randn(5, n).mT
    for alpha, gamma, given in ((1.0, 1.0, None), (0.9, -0.3, addend)):
        x = alpha * decoded(q) + (0 if given is None else gamma * g)
        # The entries themselves are rounded too: 8 operations, and m of a spectral decoder.
        size = alpha * decoded(q).abs() + abs(gamma) * g.abs()
        terms = n + 2 * m + 16
        arguments = {"addend": given, "alpha": alpha, "gamma": gamma}
        found = lut_gram(q, panel="f32", **arguments)
        close(found, x @ x.mT, terms, size @ size.mT)
        close(
            lut_matmul(a, q, panel="f32", **arguments),
            a.double() @ x,
            terms,
            a.double().abs() @ size,
        )
        found = lut_times(q, v, panel="f32", **arguments)
        close(found, x @ v.double(), terms, size @ v.double().abs())
        assert torch.equal(lut_times(q, v, **arguments), found)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integer_gram(name: str, shape: tuple[int, int]) -> None:
    q = make(name, shape)
    x = decoded(q)
    found = lut_gram(q, panel="s8", alpha=-0.5)
    exact = 0.25 * x @ x.mT
    if name.startswith("spectral"):
        # The decoder rounds (K + cI) to two limbs, here it is float32: see test_integer_product.
        assert float((found - exact).norm() / exact.norm()) <= 2 * LIMB_ERROR
    else:
        # Sums are exact: what rounds are scales, blocks' sums and the low-rank terms.
        close(found, exact, 3 * min(shape) + 40, (x.abs() @ x.abs().mT))
    assert torch.equal(lut_gram(q), lut_gram(q, panel="s8"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in INTEGER if name != "blocks"])
def test_integer_product(name: str, shape: tuple[int, int]) -> None:
    """Rows of A, scales of the codes included, are rounded to two limbs."""
    q = make(name, shape)
    x, a = decoded(q), torch.randn(6, min(shape))
    exact = a.double() @ x
    error = (lut_matmul(a, q, panel="s8").double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert float(error) <= LIMB_ERROR or not bool(exact.any())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in INTEGER if name != "blocks"])
def test_integer_times(name: str, shape: tuple[int, int]) -> None:
    """Columns of V are rounded to two limbs, after a rotation."""
    q = make(name, shape)
    x, v = decoded(q), torch.randn(6, max(shape)).mT
    exact = -0.5 * x @ v.double()
    found = lut_times(q, v, panel="s8", alpha=-0.5)
    assert found.dtype == torch.float32
    error = (found.double() - exact).norm() / exact.norm().clamp_min(1e-30)
    assert float(error) <= LIMB_ERROR or not bool(exact.any())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_empty_matrices(name: str, shape: tuple[int, int]) -> None:
    q = quantize(torch.zeros(shape), FORMATS[name])
    assert lut_gram(q).shape == (0, 0)
    n = max(shape)
    assert torch.equal(lut_matmul(torch.zeros(3, 0), q), torch.zeros(3, n))
    assert torch.equal(lut_times(q, torch.ones(n, 3)), torch.zeros(0, 3))
    assert torch.equal(lut_times(make(name, (3, 5)), torch.ones(5, 0)), torch.zeros(3, 0))


def test_wide_matrices_are_not_decoded_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "SCRATCH_FLOATS", 100)
    q = make("mulaw4", (70, 3000))
    source = Panels(StoredBatch([q], get_backend("auto", q.device)), Terms(1.0))
    loaded = []
    load = source._load
    monkeypatch.setattr(source, "_load", lambda rows, out: (loaded.append(rows), load(rows, out)))
    (gram,) = source.gram()
    x = decoded(q)
    close(gram, x @ x.mT, 3000 + 200, x.abs() @ x.abs().mT)
    assert len(loaded) == 3  # 64 rows, 6, and these beside the first


def test_with_an_addend_float_panels_are_chosen() -> None:
    q, addend = make("spectral4", (60, 300)), torch.zeros(60, 300)
    assert torch.equal(lut_gram(q, addend=addend), lut_gram(q, panel="f32"))
    assert not torch.equal(lut_gram(q), lut_gram(q, panel="f32"))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads: int, one_thread: None) -> None:
    q, a = make("mulaw4", (300, 500)), torch.randn(300, 300)
    torch.manual_seed(1)
    addend = torch.randn(300, 500)
    runs = []
    for count in (1, threads):
        torch.set_num_threads(count)
        runs.append(
            [
                lut_gram(q),
                lut_gram(q, addend=addend),
                lut_matmul(a, q),
                lut_matmul(a, q, panel="s8"),
                lut_matmul(a[:5], q, panel="s8"),
                lut_times(q, addend[:5].mT),
                lut_times(q, addend[:5].mT, panel="s8"),
            ]
        )
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Restores the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


GOOD = {"q": quantize(torch.ones(4, 6), "spectral4", backend="reference")}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: lut_gram(torch.ones(2, 2)), TypeError, "q: expected a QuantizedMatrix"),
        (lambda q: lut_matmul([[1.0]], q), TypeError, "a: expected a tensor"),
        (lambda q: lut_gram(q, panel="f16"), ValueError, "panel: expected one of"),
        (lambda q: lut_matmul(torch.ones(4, 4), q, panel="f16"), ValueError, "panel: expected"),
        (lambda q: lut_gram(q, alpha=float("nan")), ValueError, "alpha: expected a finite"),
        (
            lambda q: lut_gram(q, addend=torch.ones(6, 4)),
            ValueError,
            "addend: expected shape",
        ),
        (lambda q: lut_gram(q, addend=torch.ones(4, 6), panel="s8"), ValueError, "panel: 's8'"),
        (lambda q: lut_matmul(torch.ones(4, 3), q), ValueError, r"a: expected shape \(4, 4\)"),
        (
            lambda q: lut_matmul(torch.ones(4, 4).double(), q),
            TypeError,
            "a: expected torch.float32",
        ),
        (lambda q: lut_matmul(torch.ones(4, 4), q, out=torch.ones(4, 4)), ValueError, "out: "),
        (lambda q: lut_times(q, [[1.0]]), TypeError, "v: expected a tensor"),
        (lambda q: lut_times(q, torch.ones(4, 3)), ValueError, r"v: expected shape \(6, 3\)"),
        (lambda q: lut_times(q, torch.ones(6, 3).half()), TypeError, "v: expected torch.float32"),
        (lambda q: lut_times(q, torch.ones(6, 3), panel="bf16"), ValueError, "panel: expected"),
        (
            lambda q: lut_times(quantize(torch.ones(4, 6), "muonq4"), torch.ones(6, 3), panel="s8"),
            ValueError,
            "panel: 's8' cannot read q",
        ),
        (
            lambda q: lut_gram(quantize(torch.ones(4, 6), "bf16"), panel="s8"),
            ValueError,
            "panel: 's8' cannot read q",
        ),
        (
            lambda q: lut_matmul(torch.ones(4, 4), quantize(torch.ones(4, 60), BLOCKS), panel="s8"),
            ValueError,
            "one scale a row",
        ),
    ],
)
def test_bad_arguments(
    call: Callable[[QuantizedMatrix], Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call(GOOD["q"])


@pytest.mark.parametrize(("panel", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "nf4", "fp32"])
def test_half_precision_panels(
    name: str, panel: Panel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = quantize(1e-6 * torch.randn(24, 50), name)
    with pytest.raises(ValueError, match="panel: expected one of 'auto', 'f32'"):
        lut_gram(stored, panel=panel)
    stand_in(monkeypatch, DeviceReference(), "auto")
    x = stored.dequantize().double()
    # each factor rounded once to nearest; float16 also loses what is below 2**-25 of the largest
    largest = x.abs().max()
    rounded = x.abs() * torch.finfo(dtype).eps / 2 + largest * 2.0**-25
    bound = 2 * (x.abs() + rounded) @ rounded.mT
    bound = bound + bound.mT + 50 * 2.0**-23 * x.abs() @ x.abs().mT
    assert ((lut_gram(stored, panel=panel).double() - x @ x.mT).abs() <= bound).all()
