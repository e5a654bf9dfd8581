"""Products of float32 factors that are rounded to bfloat16: every ISA level, and the reference."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from test_cpu_backend import KINDS, strided_like
from test_product_kernels import (
    FEW_SIZES,
    LEVELS,
    OUT_KINDS,
    SIZES,
    assert_surroundings_intact,
    canvas,
    commuting_factors,
    exact,
    on_each_thread_count,
)
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend

DIAGONALS = (None, 0, 3, -2)


@pytest.fixture(params=["reference", *LEVELS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The reference, and the kernels at each level; without products of bfloat16 they inherit."""
    before = cpu.isa()
    if request.param != "reference":
        cpu.set_isa(request.param)
    yield Backend() if request.param == "reference" else CpuBackend()
    cpu.set_isa(before)


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def split(x: Tensor, diagonal: int | None) -> tuple[Tensor, Tensor]:
    """(what is rounded, what is kept), float64: element by element, as the contract says."""
    kept = torch.zeros(x.shape, dtype=torch.float64)
    for k in range(x.shape[1]):
        if diagonal is not None and 0 <= k + diagonal < x.shape[0]:
            kept[k + diagonal, k] = x[k + diagonal, k]
    return rounded(torch.where(kept != 0, 0, x)), kept


def expected_product(
    a: Tensor, b: Tensor, a_diagonal: int | None, b_diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """The product and the sum of the magnitudes of its terms, float64."""
    left, left_kept = split(a, a_diagonal)
    right, right_kept = split(b.mT, b_diagonal)
    right, right_kept = right.mT, right_kept.mT
    pairs = (
        (left, right),
        (left_kept, b.double()),
        (a.double() - left_kept, right_kept),
    )
    return sum(x @ y for x, y in pairs), sum(x.abs() @ y.abs() for x, y in pairs)  # type: ignore[return-value]


def assert_close(
    found: Tensor,
    a: Tensor,
    b: Tensor,
    diagonal: int | None,
    alpha: float = 1.0,
    beta: float = 0.0,
    addend: Tensor | None = None,
    *,
    symmetric: bool = False,
) -> None:
    """|found - exact| <= gamma_{k+6} (sizes of all terms), gamma_n = nu / (1 - nu).

    exact is the product of the rounded factors and what the kept diagonals multiply. Products of
    two bfloat16 are exact in float32. A term passes fewer than k sums within a step of 384, one for
    each of the k/384 steps, one rounding of alpha and two sums with what the diagonals multiply,
    fewer than k + 4 in all; a diagonal's term two roundings of its factors and three sums; a term
    of the addend one of beta and the same sums (Higham, Accuracy and Stability, section 3.1). The
    reference halves the sum of a symmetric product and its transpose, one more.
    """
    expected, size = expected_product(a, b, diagonal, 0 if symmetric and diagonal == 0 else None)
    expected, size = alpha * expected, abs(alpha) * size
    if beta != 0 and addend is not None:
        expected += beta * addend.double()
        size += abs(beta) * addend.double().abs()
    roundings = (a.shape[1] + 6) * 2.0**-24
    error = (found.double() - expected).abs()
    bound = roundings / (1 - roundings) * size
    assert (error <= bound).all(), (a.shape, b.shape, diagonal, (error - bound).max())


def test_which_levels_round() -> None:
    before = cpu.isa()
    for level in LEVELS:
        cpu.set_isa(level)
        expected = torch.bfloat16 if level in ("avx512bf16", "amx") else None
        assert CpuBackend().rounded_dtype == expected
    cpu.set_isa(before)
    assert Backend().rounded_dtype is None


@pytest.mark.parametrize("rows", SIZES)
def test_product_of_every_size(backend: Backend, rows: int) -> None:
    sizes = SIZES if backend.rounded_dtype else FEW_SIZES
    cases = itertools.cycle(itertools.product(KINDS, KINDS[::-1], OUT_KINDS))
    diagonals = itertools.cycle(DIAGONALS)
    for columns, depth in itertools.product(sizes, sizes):
        a, b = torch.randn(rows, depth), torch.randn(depth, columns)
        a_kind, b_kind, out_kind = next(cases)
        diagonal = next(diagonals)
        out, whole = canvas(rows, columns, out_kind)
        left, right = strided_like(a, a_kind), strided_like(b, b_kind)
        assert backend.product(left, right, out=out, rounded=True, diagonal=diagonal) is out
        assert_close(out, a, b, diagonal)
        assert_surroundings_intact(out, whole)


@pytest.mark.parametrize("diagonal", DIAGONALS)
def test_product_in_every_layout(backend: Backend, diagonal: int | None) -> None:
    rows, depth, columns = 66, 81, 97
    a, b, start = torch.randn(rows, depth), torch.randn(depth, columns), torch.randn(rows, columns)
    alpha, beta = exact(1.7), exact(-0.3)
    for a_kind, b_kind, out_kind in itertools.product(KINDS, KINDS, OUT_KINDS):
        factors = strided_like(a, a_kind), strided_like(b, b_kind)
        out, whole = canvas(rows, columns, out_kind)
        backend.product(
            *factors,
            out=out.copy_(start),
            alpha=alpha,
            beta=beta,
            rounded=True,
            diagonal=diagonal,
        )
        assert_close(out, a, b, diagonal, alpha, beta, start)
        assert_surroundings_intact(out, whole)


@pytest.mark.parametrize(
    "shape",
    [(385, 200, 193), (1, 1500, 900), (900, 1500, 1), (64, 1030, 64), (16, 9, 9000)],
    ids=str,
)
def test_threads_change_nothing(backend: Backend, shape: tuple[int, int, int]) -> None:
    rows, depth, columns = shape
    a, b = torch.randn(rows, depth), torch.randn(depth, columns)
    if type(backend) is Backend or not backend.rounded_dtype:
        pytest.skip("torch's products depend on the threads")
    for out_kind, diagonal in zip(OUT_KINDS[:2], (0, 1), strict=True):
        out, _ = canvas(rows, columns, out_kind)
        found = on_each_thread_count(
            backend.product,
            a,
            b,
            out=out,
            start=math.nan,
            multiply_adds=rows * depth * columns,
            rounded=True,
            diagonal=diagonal,
        )
        assert_close(found, a, b, diagonal)
        torch.set_num_threads(5)
        again = backend.product(a, b, rounded=True, diagonal=diagonal)
        torch.set_num_threads(1)
        assert torch.equal(again, found)


@pytest.mark.parametrize("size", SIZES)
def test_symmetric_product_of_every_size(backend: Backend, size: int) -> None:
    """Circulants commute, also after they were rounded; a D a^T is symmetric term by term."""
    depths = {size, *(SIZES if backend.rounded_dtype else FEW_SIZES)}
    layouts = itertools.cycle(itertools.product(KINDS, KINDS[::-1], OUT_KINDS[:3]))
    alpha, beta = exact(0.3), exact(-1.7)
    start = torch.randn(size, size)
    start += start.mT.clone()
    for depth in sorted(depths):
        factors = commuting_factors(size, depth)
        for a, b in ((factors[0], None), factors):
            a_kind, b_kind, out_kind = next(layouts)
            out, whole = canvas(size, size, out_kind)
            found = backend.symmetric_product(
                strided_like(a, a_kind),
                None if b is None else strided_like(b, b_kind),
                addend=start,
                alpha=alpha,
                beta=beta,
                out=out,
                rounded=True,
            )
            diagonal = 0 if b is not None and size == depth else None
            other = a.mT if b is None else b
            assert_close(found, a, other, diagonal, alpha, beta, start, symmetric=True)
            assert torch.equal(found, found.mT)
            assert_surroundings_intact(out, whole)


def test_batches_are_their_matrices(backend: Backend) -> None:
    a, b, square = torch.randn(3, 40, 40), torch.randn(3, 40, 70), torch.randn(3, 40)
    distance = (torch.arange(40).view(-1, 1) - torch.arange(40)).abs()
    circulants = square[:, torch.minimum(distance, 40 - distance)]
    alphas = torch.randn(3)
    found = backend.product(a, b, alpha=alphas, rounded=True, diagonal=0)
    squares = backend.symmetric_product(circulants, circulants, rounded=True)
    for i in range(3):
        assert_close(found[i], a[i], b[i], 0, float(alphas[i]))
        assert_close(squares[i], circulants[i], circulants[i], 0, symmetric=True)


def test_a_large_diagonal_is_not_rounded(backend: Backend) -> None:
    """Beside it the rest would be lost: 1001 I + W has W to three bits in bfloat16."""
    w, x = torch.randn(50, 50), torch.randn(50, 80)
    found = backend.product(1001 * torch.eye(50) + w, x, rounded=True, diagonal=0)
    part = backend.product(w, x, rounded=True, diagonal=0)
    # what is left differs by the rounding of the sums alone: two of 1001 |x|, and of the diagonal
    assert float((found - 1001 * x - part).abs().max()) <= 6 * 2**-24 * 1004 * float(x.abs().max())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 1), (16, 191), (30, 30), (48, 399)])
def test_non_finite_elements_are_not_lost(
    backend: Backend, bad: float, place: tuple[int, int]
) -> None:
    a, b = torch.randn(49, 400), torch.randn(400, 97)
    a[place] = bad
    found = backend.product(a, b, rounded=True, diagonal=0)
    assert not found[place[0]].isfinite().any()
    others = torch.arange(49) != place[0]
    assert found[others].isfinite().all()


def test_empty(backend: Backend) -> None:
    for rows, depth, columns in itertools.product((0, 1, 50), (0, 3), (0, 1, 50)):
        if rows and depth and columns:
            continue
        a, b = torch.ones(rows, depth), torch.ones(depth, columns)
        found = backend.product(a, b, rounded=True, diagonal=0)
        assert torch.equal(found, torch.zeros(rows, columns))
    for size in (0, 1, 50):
        found = backend.symmetric_product(torch.ones(size, 0), rounded=True)
        assert torch.equal(found, torch.zeros(size, size))


def test_wrong_arguments_raise(backend: Backend) -> None:
    half = torch.ones(3, 3).bfloat16()
    with pytest.raises(TypeError, match="a: expected float32 with rounded=True"):
        backend.product(half, half, rounded=True)
    with pytest.raises(TypeError, match="a: expected float32 with rounded=True"):
        backend.symmetric_product(half, rounded=True)
    with pytest.raises(ValueError, match="diagonal: expected None without rounded=True, got 0"):
        backend.product(torch.ones(3, 3), torch.ones(3, 3), diagonal=0)
