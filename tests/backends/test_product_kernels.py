"""Products of float32 matrices: every ISA level against float64, within the derived bound."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_cpu_backend import KINDS, strided_like
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend

# Around strips of 16, groups of 48 columns, steps and streamed blocks of 192.
SIZES = (1, 2, 15, 16, 17, 47, 48, 49, 191, 193, 385)
FEW_SIZES = (1, 17, 47, 49, 193)
LEVELS = cpu.supported_isas()
# What the surroundings of an output hold; read by mistake, it spoils any bound.
SENTINEL = 1e30
OUT_KINDS = ("rows", "columns", "wide", "neither")
# Enough multiply-adds that two threads are used (kWorkPerThread in csrc/cpu/workspace.hpp).
WORK_OF_TWO_THREADS = 2 * 2**19


@pytest.fixture(params=LEVELS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield request.param
    cpu.set_isa(before)


@pytest.fixture
def backend(isa: str) -> CpuBackend:
    """At each level."""
    return CpuBackend()


def exact(weight: float) -> float:
    """The float32 that stands for a weight."""
    return float(torch.tensor(weight))


def assert_product(
    found: Tensor,
    a: Tensor,
    b: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    addend: Tensor | None = None,
) -> None:
    """|found - exact| <= gamma_{k+3} (|alpha| |a| |b| + |beta| |addend|), gamma_n = nu / (1 - nu).

    A term passes one rounding of its product and fewer than k of sums within a step of 192, one of
    alpha and one for each of the k/192 steps, fewer than k + 3 in all; a term of the addend one of
    beta and the same for the steps (Higham, Accuracy and Stability, section 3.1).
    """
    wide_a, wide_b = a.double(), b.double()
    expected = alpha * (wide_a @ wide_b)
    size = abs(alpha) * (wide_a.abs() @ wide_b.abs())
    if beta != 0 and addend is not None:
        expected += beta * addend.double()
        size += abs(beta) * addend.double().abs()
    roundings = (a.shape[1] + 3) * 2.0**-24
    bound = roundings / (1 - roundings) * size
    error = (found.double() - expected).abs()
    assert (error <= bound).all(), (a.shape, b.shape, alpha, beta, (error - bound).max())


def canvas(rows: int, columns: int, kind: str) -> tuple[Tensor, Tensor]:
    """A view [rows, columns] of NaN in the middle of a matrix of SENTINEL, and that matrix."""
    if kind == "columns":
        view, whole = canvas(columns, rows, "rows")
        return view.mT, whole
    row_step, column_step = (2, 3) if kind == "neither" else (1, 1)
    padding = 100 if kind == "wide" else 3
    whole = torch.full((row_step * rows + 3, column_step * columns + padding), SENTINEL)
    view = whole[1 : 1 + row_step * rows : row_step, 2 : 2 + column_step * columns : column_step]
    assert view.shape == (rows, columns)
    return view.fill_(math.nan), whole


def assert_surroundings_intact(view: Tensor, whole: Tensor) -> None:
    """Spoils the view."""
    view.fill_(SENTINEL)
    assert (whole == SENTINEL).all()


def on_each_thread_count(
    function: Callable[..., Tensor],
    *factors: Tensor | None,
    out: Tensor,
    start: Tensor | float,
    multiply_adds: int,
    **options: Tensor | float,
) -> Tensor:
    """`function` into `out` that holds `start` before: the same bits on one thread and on two."""
    results = []
    for threads in (1, 2) if multiply_adds >= WORK_OF_TWO_THREADS else (1,):
        torch.set_num_threads(threads)
        out.copy_(torch.as_tensor(start))
        assert function(*factors, out=out, **options) is out
        results.append(out.clone())
    torch.set_num_threads(1)
    assert torch.equal(results[0].view(torch.int32), results[-1].view(torch.int32))
    return results[0]


@pytest.mark.parametrize("rows", SIZES)
def test_product_of_every_size(backend: CpuBackend, isa: str, rows: int) -> None:
    sizes = SIZES if isa == LEVELS[-1] else FEW_SIZES
    layouts = itertools.cycle(itertools.product(KINDS, KINDS[::-1], OUT_KINDS))
    for columns, depth in itertools.product(sizes, sizes):
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        a_kind, b_kind, out_kind = next(layouts)
        left, right = strided_like(a, a_kind), strided_like(b, b_kind)
        out, whole = canvas(rows, columns, out_kind)
        assert backend.product(left, right, out=out) is out
        assert_product(out, a, b)
        assert_surroundings_intact(out, whole)


@pytest.mark.parametrize("shape", [(5, 7, 3), (66, 50, 97)], ids=str)
def test_product_in_every_layout(backend: CpuBackend, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    a, b, start = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns)
    beta = exact(-0.3)
    for a_kind, b_kind, out_kind in itertools.product(KINDS, KINDS, OUT_KINDS):
        factors = strided_like(a, a_kind), strided_like(b, b_kind)
        out, whole = canvas(rows, columns, out_kind)
        assert backend.product(*factors, out=out.copy_(start), beta=beta) is out
        assert_product(out, a, b, 1.0, beta, start)
        assert_product(backend.product(*factors, out=out.fill_(math.nan)), a, b)
        assert_surroundings_intact(out, whole)


@pytest.mark.parametrize(
    "shape",
    [
        (385, 200, 193),
        (1, 1500, 900),
        (900, 1500, 1),
        (1000, 3, 400),
        (64, 1030, 64),
        (16, 9, 9000),
    ],
    ids=str,
)
def test_two_threads_change_nothing(backend: CpuBackend, shape: tuple[int, int, int]) -> None:
    """Tall, wide and deep: the left operand is packed whole, or the right one."""
    rows, depth, columns = shape
    a, b, start = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns)
    work = rows * depth * columns
    assert work >= WORK_OF_TWO_THREADS
    for kind, out_kind, beta in zip(KINDS, OUT_KINDS, (0.0, 0.75, 1.0, 0.0), strict=False):
        factors = strided_like(a, kind), strided_like(b, kind)
        out, whole = canvas(rows, columns, out_kind)
        found = on_each_thread_count(
            backend.product, *factors, out=out, start=start, beta=beta, multiply_adds=work
        )
        assert_product(found, a, b, 1.0, beta, start)
        assert_surroundings_intact(out, whole)


@pytest.mark.parametrize("alpha", [1.0, 0.0, -2.5, exact(0.1)])
@pytest.mark.parametrize("beta", [0.0, 1.0, exact(-0.7)])
def test_weights(backend: CpuBackend, alpha: float, beta: float) -> None:
    for rows, depth, columns in [(3, 5, 2), (49, 192, 17), (20, 400, 65)]:
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        start = torch.randn(rows, columns) if beta else torch.full((rows, columns), math.nan)
        found = backend.product(a, b, out=start.clone(), alpha=alpha, beta=beta)
        assert_product(found, a, b, alpha, beta, start)
        if beta == 0:
            assert torch.equal(found, backend.product(a, b, alpha=alpha))

        square = torch.randn(rows, rows)
        square += square.mT.clone()
        if beta == 0:
            square.fill_(math.nan)
        found = backend.symmetric_product(a, addend=square, alpha=alpha, beta=beta)
        assert_product(found, a, a.mT, alpha, beta, square)
        assert torch.equal(found, found.mT)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.75])
def test_empty(backend: CpuBackend, beta: float) -> None:
    for rows, depth, columns in itertools.product((0, 1, 50), (0, 3), (0, 1, 50)):
        if rows and depth and columns:
            continue
        for out_kind in OUT_KINDS:
            out, whole = canvas(rows, columns, out_kind)
            start = torch.randn(rows, columns) if beta else out.clone()
            out.copy_(start)
            backend.product(torch.ones(rows, depth), torch.ones(depth, columns), out=out, beta=beta)
            assert torch.equal(out, beta * start if beta else torch.zeros(rows, columns))
            assert_surroundings_intact(out, whole)
    for size in (0, 1, 50):
        assert torch.equal(backend.symmetric_product(torch.ones(size, 0)), torch.zeros(size, size))
        addend = torch.randn(size, size)
        addend += addend.mT.clone()
        for b in (None, torch.ones(0, size)):
            found = backend.symmetric_product(torch.ones(size, 0), b, addend=addend, beta=beta)
            assert torch.equal(found, beta * addend)


def commuting_factors(size: int, depth: int) -> tuple[Tensor, Tensor]:
    """[size, depth] and [depth, size] whose exact product is symmetric: a and D a^T with the
    diagonal of D signed powers of two, or circulants if the two are square."""
    if size == depth:
        distance = (torch.arange(size).view(-1, 1) - torch.arange(size)).abs()
        distance = torch.minimum(distance, size - distance)
        return torch.randn(size)[distance], torch.randn(size)[distance]
    a = torch.randn(size, depth)
    powers = 2.0 ** torch.randint(-2, 3, (depth, 1)) * (1 - 2 * torch.randint(0, 2, (depth, 1)))
    return a, powers * a.mT


@pytest.mark.parametrize("size", SIZES)
def test_symmetric_product_of_every_size(backend: CpuBackend, isa: str, size: int) -> None:
    depths = SIZES if isa == LEVELS[-1] else FEW_SIZES
    layouts = itertools.cycle(itertools.product(KINDS, KINDS[::-1], OUT_KINDS[:3]))
    for depth in depths:
        factors = commuting_factors(size, depth)
        for a, b in ((factors[0], None), factors):
            a_kind, b_kind, out_kind = next(layouts)
            left = strided_like(a, a_kind)
            right = None if b is None else strided_like(b, b_kind)
            out, whole = canvas(size, size, out_kind)
            found = on_each_thread_count(
                backend.symmetric_product,
                left,
                right,
                out=out,
                start=math.nan,
                multiply_adds=size * size * depth // 2,
            )
            assert_product(found, a, a.mT if b is None else b)
            assert torch.equal(found, found.mT)
            assert_surroundings_intact(out, whole)


ADDENDS = (*KINDS, "out", "out transposed")


@pytest.mark.parametrize("size", [1, 4, 49, 130])
@pytest.mark.parametrize("given", [False, True], ids=["gram", "commuting"])
def test_symmetric_product_with_addend(backend: CpuBackend, size: int, given: bool) -> None:
    alpha, beta = exact(0.3), exact(-1.7)
    layouts = itertools.cycle(itertools.product(KINDS, OUT_KINDS[:3]))
    for depth in (size, 200):  # more than one step in the second
        a, b = commuting_factors(size, depth)
        start = torch.randn(size, size)
        start += start.mT.clone()
        for kind in ADDENDS + ADDENDS[-2:]:
            a_kind, out_kind = next(layouts)
            out, whole = canvas(size, size, out_kind)
            if kind.startswith("out"):
                addend = out if kind == "out" else out.mT
            else:
                addend = strided_like(start, kind)
            found = on_each_thread_count(
                backend.symmetric_product,
                strided_like(a, a_kind),
                strided_like(b, a_kind) if given else None,
                out=out,
                start=start if kind.startswith("out") else math.nan,
                multiply_adds=size * size * depth // 2,
                addend=addend,
                alpha=alpha,
                beta=beta,
            )
            assert_product(found, a, b if given else a.mT, alpha, beta, start)
            assert torch.equal(found, found.mT), (kind, a_kind, out_kind)
            assert torch.equal(addend, found if kind.startswith("out") else start)
            assert_surroundings_intact(out, whole)


@pytest.mark.parametrize("size", [1, 49, 130])
def test_all_that_a_symmetric_product_adds(backend: CpuBackend, size: int) -> None:
    a = torch.randn(2, size, 60)
    addend, other = (x + x.mT for x in torch.randn(2, 2, size, size))
    options = {"alpha": 0.5, "beta": -2.0, "gamma": 4.0, "identity": 8.0}
    found = backend.symmetric_product(a, addend=addend, other=other, **options)
    assert torch.equal(found, found.mT)
    exact = 0.5 * (a.double() @ a.double().mT) - 2 * addend.double() + 4 * other.double()
    exact += 8 * torch.eye(size)
    size_of_terms = a.double().abs() @ a.double().abs().mT
    size_of_terms += 2 * addend.abs() + 4 * other.abs() + 8
    assert ((found - exact).abs() <= 63 * 2.0**-24 * size_of_terms).all()
    other_way = Backend().symmetric_product(a, addend=addend, other=other, **options)
    assert ((other_way - exact).abs() <= 63 * 2.0**-24 * size_of_terms).all()


def test_product_with_an_addend_that_is_kept(backend: CpuBackend) -> None:
    a, b, addend = torch.randn(5, 7), torch.randn(7, 9), torch.randn(5, 9)
    before = addend.clone()
    assert_product(backend.product(a, b, addend=addend, beta=0.5), a, b, 1.0, 0.5, before)
    assert torch.equal(addend, before)


def assert_same_non_finite(found: Tensor, expected: Tensor, clean: Tensor) -> None:
    """NaN and infinities where float64 has them, and not a bit changed elsewhere."""
    assert torch.equal(found.isnan(), expected.isnan())
    infinite = expected.isinf()
    assert infinite.any() or expected.isnan().any()
    assert torch.equal(found[infinite].double(), expected[infinite])
    finite = expected.isfinite()
    assert torch.equal(found[finite], clean[finite])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (16, 191), (48, 192), (30, 399)])
def test_non_finite_elements_spread_as_they_should(
    backend: CpuBackend, bad: float, place: tuple[int, int]
) -> None:
    a, b = torch.randn(49, 400), torch.randn(400, 97)
    b[:, 5] = 0  # and 0 * inf
    clean, gram = backend.product(a, b), backend.symmetric_product(a)
    spoiled = a.clone()
    spoiled[place] = bad
    exact = spoiled.double() @ b.double()
    assert_same_non_finite(backend.product(spoiled, b), exact, clean)
    transposed = backend.product(b.mT, spoiled.mT)
    assert_same_non_finite(transposed, exact.mT, backend.product(b.mT, a.mT))
    expected = spoiled.double() @ spoiled.double().mT
    assert_same_non_finite(backend.symmetric_product(spoiled), expected, gram)
    # A non-finite addend shows where it is.
    start = torch.zeros(49, 97)
    start[48, 96] = bad
    found = backend.product(a, b, out=start.clone(), beta=1.0)
    assert_same_non_finite(found, start.double(), clean)


def test_reference_keeps_the_same_bound() -> None:
    backend = Backend()
    alpha, beta = exact(0.3), exact(-1.7)
    for rows, depth, columns in itertools.product((1, 17, 193), (0, 1, 49, 385), (1, 47)):
        a, b, start = (
            torch.randn(rows, depth),
            torch.randn(depth, columns),
            torch.randn(rows, columns),
        )
        assert_product(backend.product(a, b), a, b)
        unread = torch.full((rows, columns), math.nan)
        assert_product(backend.product(a, b, out=unread, alpha=alpha), a, b, alpha)
        out = start.clone()
        assert backend.product(a, b, out=out, alpha=alpha, beta=beta) is out
        assert_product(out, a, b, alpha, beta, start)
        left, right = commuting_factors(rows, depth)
        square = torch.randn(rows, rows)
        square += square.mT.clone()
        for other in (None, right):
            wanted = left.mT if other is None else right
            assert_product(backend.symmetric_product(left, other), left, wanted)
            out = square.clone()
            backend.symmetric_product(left, other, addend=out, alpha=alpha, beta=beta, out=out)
            assert_product(out, left, wanted, alpha, beta, square)
            assert torch.equal(out, out.mT)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "a", {"a": [[1.0]]}),
        (TypeError, "a", {"a": torch.ones(4, 3).int()}),
        (TypeError, "b", {"a": torch.ones(4, 3).double()}),
        (ValueError, "a", {"a": torch.ones(3)}),
        (ValueError, "a", {"a": torch.ones(1, 1, 4, 3)}),
        (ValueError, "b", {"a": torch.ones(2, 4, 3)}),
        (ValueError, "a", {"a": torch.ones(4, 3, device="meta")}),
        (ValueError, "a", {"a": torch.eye(4).to_sparse()}),
        (TypeError, "b", {"b": [[1.0]]}),
        (TypeError, "b", {"b": torch.ones(3, 4).half()}),
        (ValueError, "b", {"b": torch.ones(4, 4)}),
        (ValueError, "b", {"b": torch.ones(3)}),
        (ValueError, "b", {"b": torch.ones(3, 4, 1)}),
        (ValueError, "b", {"b": torch.ones(3, 4, device="meta")}),
        (TypeError, "out", {"out": torch.ones(4, 4).int()}),
        (TypeError, "active", {"active": torch.ones(1)}),
        (ValueError, "active", {"active": torch.ones(2, dtype=torch.bool)}),
        (ValueError, "out", {"out": torch.ones(4, 5)}),
        (ValueError, "out", {"out": torch.ones(4)}),
        (ValueError, "out", {"out": torch.ones(4, 4, device="meta")}),
    ],
)
@pytest.mark.parametrize("method", ["product", "symmetric_product"])
def test_wrong_tensors_raise(
    method: str,
    error: type[Exception],
    name: str,
    arguments: dict[str, object],
) -> None:
    good = {"a": torch.ones(4, 3), "b": torch.ones(3, 4)}
    with pytest.raises(error, match=f"^{name}: expected .* got ") as raised:
        getattr(CpuBackend(), method)(**{**good, **arguments})
    expected, got = str(raised.value).split(": expected ", 1)[1].split(", got ", 1)
    assert expected != got  # or the message would tell nothing


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "addend", {"addend": torch.ones(4, 4).int()}),
        (ValueError, "addend", {"addend": torch.ones(4, 5)}),
        (ValueError, "addend", {"addend": torch.ones(4)}),
        (ValueError, "addend", {"addend": torch.ones(4, 4, device="meta")}),
        (ValueError, "out", {"out": torch.ones(8, 8)[::2, ::2]}),
        (ValueError, "out", {"out": torch.ones(1, 1).expand(4, 4)}),
        (ValueError, "out", {"out": torch.ones(1, 4).expand(4, 4)}),
    ],
)
def test_wrong_arguments_of_symmetric_product_raise(
    error: type[Exception], name: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        CpuBackend().symmetric_product(torch.ones(4, 3), **arguments)
