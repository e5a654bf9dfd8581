"""Dense products against float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from comparison import GRAD_TYPES, KINDS, REFERENCE, TRITON, strided_like
from torch import Tensor

# Half of the distance of one and the next number.
HALF_STEP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP32, BF16, FP16 = GRAD_TYPES[0], GRAD_TYPES[1], GRAD_TYPES[2]


def assert_close(
    found: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    addend: Tensor | None = None,
) -> None:
    """A sum of k products is within k units of rounding of the sum of their magnitudes, whatever
    its order (Higham, section 3.1); alpha, beta and the last sum add three; then one rounding to
    the dtype of the result, absolute where that is subnormal (float16 below 2^-14)."""
    a, b = a.double(), b.double()
    exact, magnitude = alpha * (a @ b), abs(alpha) * (a.abs() @ b.abs())
    if addend is not None:
        exact = exact + beta * addend.double()
        magnitude = magnitude + (beta * addend.double()).abs()
    allowed = (a.shape[-1] + 3) * 2.0**-24 * magnitude
    allowed = allowed + HALF_STEP[found.dtype] * (exact.abs() + allowed) + 2.0**-25
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().le(allowed).all()


@pytest.mark.parametrize(
    ("m", "dtype"),
    [
        *itertools.product([1, 17, 64], GRAD_TYPES),
        (130, BF16),
        *(pytest.param(130, dtype, marks=pytest.mark.long) for dtype in (FP32, FP16)),
    ],
)
def test_symmetric_product(m: int, dtype: torch.dtype) -> None:
    """Exactly symmetric, of every layout, with addends of every dtype, also into itself."""
    for index, depth in enumerate((1, 33, 64, 100)):
        a = torch.randn(m, depth).to(dtype)
        strided = strided_like(a, KINDS[(index + m) % 5])
        found = TRITON.symmetric_product(strided)
        assert found.dtype == dtype
        assert torch.equal(found, found.mT)
        assert_close(found, a, a.mT)
        addend = torch.randn(m, m)
        addend = (addend + addend.mT).to(GRAD_TYPES[index % 3])
        out = addend.clone() if index % 2 else torch.empty(m, m, dtype=GRAD_TYPES[index % 3])
        TRITON.symmetric_product(
            strided, addend=out if index % 2 else addend, alpha=0.3, beta=-0.7, out=out
        )
        assert torch.equal(out, out.mT)
        assert_close(out, a, a.mT, alpha=0.3, beta=-0.7, addend=addend)


def test_symmetric_product_of_two_that_commute() -> None:
    """Polynomials of one matrix: symmetric, though rounding knows it not."""
    x = torch.randn(70, 70)
    x = (x + x.mT) / 20
    y = 0.5 * torch.eye(70) + x @ x
    y = (y + y.mT) / 2
    found = TRITON.symmetric_product(x, y)
    assert torch.equal(found, found.mT)
    # The reference takes the mean of both triangles, this one of them.
    assert_close(found, x, y)


@pytest.mark.parametrize("dtype", GRAD_TYPES)
def test_batches_and_what_is_not_active(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 20, 40).to(dtype), torch.randn(3, 40, 70).to(dtype)
    active = torch.tensor([True, False, True])
    for out_dtype in GRAD_TYPES:
        start = torch.randn(3, 20, 70).to(out_dtype)
        out = start.clone()
        assert TRITON.product(a, b, out=out, alpha=2.0, beta=0.5, active=active) is out
        assert torch.equal(out[1], start[1])
        kept = active.nonzero()[:, 0]
        assert_close(out[kept], a[kept], b[kept], alpha=2.0, beta=0.5, addend=start[kept])
        square = torch.randn(3, 20, 20).to(out_dtype)
        out = square.clone()
        TRITON.symmetric_product(a, out=out, active=active)
        assert torch.equal(out[1], square[1])
        assert_close(out[kept], a[kept], a[kept].mT)


@pytest.mark.parametrize("dtype", GRAD_TYPES)
def test_factors_by_matrix(dtype: torch.dtype) -> None:
    """Multiplied into the first factor, rounded to its dtype; by both kernels."""
    a, b = torch.randn(3, 20, 40).to(dtype), torch.randn(3, 40, 70).to(dtype)
    alpha = torch.tensor([0.3, 0.0, -2.0])
    scaled = (a * alpha.view(3, 1, 1)).to(dtype)
    for active in (None, torch.ones(3, dtype=torch.bool)):
        assert_close(TRITON.product(a, b, alpha=alpha, active=active), scaled, b)
    assert_close(TRITON.product(a[0], b[0], alpha=alpha[:1]), scaled[0], b[0])


def test_inactive_may_hold_anything() -> None:
    a = torch.full((2, 5, 6), float("nan"))
    out = torch.zeros(2, 5, 5)
    TRITON.symmetric_product(a, addend=a[..., :5], out=out, active=torch.tensor([False, False]))
    assert torch.equal(out, torch.zeros(2, 5, 5))
    single = torch.zeros(5, 5)
    TRITON.product(a[0], a[0].mT, out=single, active=torch.tensor([False]))
    assert torch.equal(single, torch.zeros(5, 5))


@pytest.mark.parametrize("dtype", GRAD_TYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 7), (300, 40, 2), (65, 64, 129), (3, 0, 4)])
def test_product_of_every_shape(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """By the vendor's product, and by the kernel, which `active` asks for."""
    m, depth, n = shape
    a, b = torch.randn(m, depth).to(dtype), torch.randn(depth, n).to(dtype)
    start = torch.randn(m, n).to(dtype)
    left, right = strided_like(a, KINDS[m % 5]), strided_like(b, KINDS[n % 5])
    for active in (None, torch.tensor([True])):
        poisoned = torch.full((m, n), float("nan"), dtype=dtype)
        assert_close(TRITON.product(left, right, out=poisoned, active=active), a, b)
        assert_close(TRITON.product(left, right, active=active), a, b)
        if active is not None or dtype == FP32:  # on a CPU torch rounds beta * out by itself
            out = TRITON.product(
                left, right, out=start.clone(), alpha=-1.5, beta=2.0, active=active
            )
            assert_close(out, a, b, alpha=-1.5, beta=2.0, addend=start)


def test_result_of_another_dtype() -> None:
    a, b = torch.randn(2, 20, 33), torch.randn(2, 33, 9)
    for dtype, out_dtype in ((FP32, BF16), (BF16, FP32), (FP16, FP32), (FP32, FP16)):
        out = torch.full((2, 9, 20), float("nan"), dtype=out_dtype).mT
        TRITON.product(a.to(dtype), b.to(dtype), out=out)
        assert_close(out, a.to(dtype), b.to(dtype))


def test_not_finite_stays_in_its_row() -> None:
    a, b = torch.randn(20, 33), torch.randn(33, 9)
    a[3, 4] = float("inf")
    out = TRITON.product(a, b, active=torch.tensor([True]))
    assert out.isfinite().all(dim=1).logical_not().nonzero().tolist() == [[3]]
    assert torch.equal(out.isfinite(), REFERENCE.product(a, b).isfinite())


def test_empty() -> None:
    assert TRITON.product(torch.empty(0, 3), torch.empty(3, 4)).shape == (0, 4)
    assert TRITON.symmetric_product(torch.empty(2, 0, 3)).shape == (2, 0, 0)
    addend = torch.ones(3, 3)
    found = TRITON.symmetric_product(torch.empty(3, 0), addend=addend, beta=2.0)
    assert torch.equal(found, 2 * addend)


def test_wrong_tensors_raise() -> None:
    a, square = torch.ones(4, 5), torch.ones(4, 4)
    symmetric, product = TRITON.symmetric_product, TRITON.product
    cases: list[tuple[type[Exception], str, Any]] = [
        (TypeError, "a", lambda: symmetric(a.double())),
        (ValueError, "a", lambda: symmetric(a[0])),
        (ValueError, "b", lambda: symmetric(a, a)),
        (TypeError, "b", lambda: symmetric(a, a.mT.half())),
        (ValueError, "addend", lambda: symmetric(a, addend=a)),
        (ValueError, "out", lambda: symmetric(a, out=a)),
        (TypeError, "out", lambda: symmetric(a, out=square.double())),
        (ValueError, "active", lambda: symmetric(a, active=torch.ones(2, dtype=torch.bool))),
        (TypeError, "active", lambda: symmetric(a, active=torch.ones(1))),
        (ValueError, "alpha", lambda: product(a, a.mT, alpha=torch.ones(2))),
        (TypeError, "alpha", lambda: product(a, a.mT, alpha=torch.ones(1).double())),
        (ValueError, "b", lambda: product(a, a)),
        (ValueError, "b", lambda: product(a, torch.ones(1, 5, 4))),
        (TypeError, "b", lambda: product(a, a.mT.bfloat16())),
        (ValueError, "out", lambda: product(a, a.mT, out=a)),
    ]
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()


def test_without_an_out_there_is_nothing_to_add() -> None:
    """(torch.empty is NaN in tests, see conftest.)"""
    for shape in ((5, 7), (3, 5, 7)):
        a = torch.randn(shape)
        for active in (None, torch.ones(a.shape[0] if a.ndim == 3 else 1, dtype=torch.bool)):
            found = TRITON.product(a, a.mT, beta=0.5, active=active)
            assert torch.equal(found, TRITON.product(a, a.mT, active=active))
            assert found.isfinite().all()


@pytest.mark.parametrize("dtype", GRAD_TYPES)
@pytest.mark.parametrize("m", [1, 17, 130])
def test_all_that_an_epilogue_adds(dtype: torch.dtype, m: int) -> None:
    """beta * addend + gamma * other + identity * I, of every dtype, where active."""
    for index, out_dtype in enumerate(GRAD_TYPES):
        a = torch.randn(2, m, 40).to(dtype)
        addend, other = (torch.randn(2, m, m) for _ in range(2))
        addend, other = ((x + x.mT).to(GRAD_TYPES[index - 1]) for x in (addend, other))
        start = torch.full((2, m, m), 7.0, dtype=out_dtype)
        options = {"alpha": 0.3, "beta": -0.7, "gamma": 1.7, "identity": 2.5}
        out = TRITON.symmetric_product(
            a, addend=addend, other=other.mT, out=start.clone(),
            active=torch.tensor([True, False]), **options,
        )  # fmt: skip
        assert torch.equal(out, out.mT)
        assert torch.equal(out[1], start[1])
        sums = -0.7 * addend.double() + 1.7 * other.double() + 2.5 * torch.eye(m)
        # Two more sums, each rounded once: a unit of all magnitudes each.
        more = 3 * 2.0**-24 * (addend.double().abs() + 2 * other.double().abs() + 2.5)
        exact = 0.3 * (a.double() @ a.double().mT) + sums
        allowed = 43 * 2.0**-24 * 0.3 * (a.double().abs() @ a.double().abs().mT) + more
        allowed = allowed + HALF_STEP[out_dtype] * (exact.abs() + allowed)
        assert (out.double() - exact).abs().le(allowed)[0].all()


@pytest.mark.parametrize("dtype", GRAD_TYPES)
def test_product_with_an_addend_that_is_kept(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 20, 33).to(dtype), torch.randn(2, 33, 70).to(dtype)
    addend = torch.randn(2, 20, 70).to(dtype)
    before = addend.clone()
    found = TRITON.product(a, b, addend=addend, alpha=0.5, beta=-2.0)
    assert found.dtype == dtype
    assert_close(found, a, b, alpha=0.5, beta=-2.0, addend=addend)
    assert torch.equal(addend, before)


def rounded_parts(x: Tensor, diagonal: int | None) -> tuple[Tensor, Tensor]:
    """(what is rounded to float16, what is kept), float64."""
    kept = torch.zeros_like(x)
    if diagonal is not None:
        kept.diagonal(-diagonal, -2, -1).copy_(x.diagonal(-diagonal, -2, -1))
    return (x - kept).half().double(), kept.double()


def assert_rounded(
    found: Tensor,
    a: Tensor,
    b: Tensor,
    diagonal: int | None,
    added: Tensor | float = 0.0,
    *,
    alpha: float = 1.0,
    symmetric: bool = False,
) -> None:
    """As `assert_close`, of the rounded factors and what the diagonals multiply: two terms more,
    which with `added`, of up to three terms, take six roundings."""
    left, left_kept = rounded_parts(a, diagonal)
    right, right_kept = rounded_parts(b, 0 if symmetric and diagonal == 0 else None)
    pairs = ((left, right), (left_kept, b.double()), (a.double() - left_kept, right_kept))
    exact = alpha * sum(x @ y for x, y in pairs) + added
    magnitude = abs(alpha) * sum(x.abs() @ y.abs() for x, y in pairs)
    magnitude = magnitude + torch.as_tensor(added).abs()
    allowed = (a.shape[-1] + 9) * 2.0**-24 * magnitude
    assert found.shape == exact.shape
    assert (found.double() - exact).abs().le(allowed).all()


@pytest.mark.parametrize("diagonal", [None, 0, 3, -2])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 300, 7), (130, 40, 2), (65, 64, 129), (33, 65, 33)], ids=str
)
def test_rounded_product(shape: tuple[int, int, int], diagonal: int | None) -> None:
    """Large diagonals, beside which float16 would lose the rest."""
    m, depth, n = shape
    a, b, start = torch.randn(2, m, depth), torch.randn(2, depth, n), torch.randn(2, m, n)
    if diagonal is not None:
        a.diagonal(-diagonal, 1, 2).add_(1001.0)
    left, right = strided_like(a[0], KINDS[m % 5]), strided_like(b[0], KINDS[n % 5])
    found = TRITON.product(left, right, rounded=True, diagonal=diagonal)
    assert_rounded(found, a[0], b[0], diagonal)
    factors = torch.tensor([0.5, -2.0])
    out = TRITON.product(
        a, b, out=start.clone(), alpha=factors, beta=2.0, rounded=True, diagonal=diagonal
    )
    for i in range(2):
        assert_rounded(
            out[i], a[i] * factors[i], b[i], diagonal, added=2.0 * start[i].double()
        )  # (a power of two scales exactly)


@pytest.mark.parametrize("m", [1, 17, 64, 130])
def test_rounded_symmetric_product(m: int) -> None:
    """Circulants commute, also after they were rounded."""
    distance = (torch.arange(m).view(-1, 1) - torch.arange(m)).abs()
    circulants = torch.randn(4, m)[:, torch.minimum(distance, m - distance)]
    circulants.diagonal(dim1=1, dim2=2).add_(50.0)
    a, b = circulants[:2], circulants[2:]
    addend, other = torch.randn(2, 2, m, m)
    addend, other = addend + addend.mT, other + other.mT
    added = -0.7 * addend.double() + 0.1 * other.double() + 2.0 * torch.eye(m)
    found = TRITON.symmetric_product(
        a, b, addend=addend, alpha=0.3, beta=-0.7, other=other, gamma=0.1, identity=2.0,
        rounded=True,
    )  # fmt: skip
    plain = TRITON.symmetric_product(strided_like(a[0], KINDS[m % 5]), b[0], rounded=True)
    assert torch.equal(found, found.mT)
    for i in range(2):
        assert_rounded(found[i], a[i], b[i], 0, added[i], alpha=0.3, symmetric=True)
    assert_rounded(plain, a[0], b[0], 0, symmetric=True)
    x = torch.randn(m, 40)
    assert_rounded(TRITON.symmetric_product(x, rounded=True), x, x.mT, None)


def test_rounded_products_of_nothing() -> None:
    assert TRITON.product(torch.empty(0, 3), torch.empty(3, 4), rounded=True).shape == (0, 4)
    found = TRITON.product(torch.empty(3, 0), torch.empty(0, 4), rounded=True, diagonal=0)
    assert torch.equal(found, torch.zeros(3, 4))
    found = TRITON.symmetric_product(torch.empty(2, 3, 0), rounded=True)
    assert torch.equal(found, torch.zeros(2, 3, 3))


def test_rounded_products_of_what_is_not_finite() -> None:
    a, b = torch.randn(40, 70), torch.randn(70, 33)
    for place in ((3, 4), (5, 5)):
        broken = a.clone()
        broken[place] = float("inf")
        out = TRITON.product(broken, b, rounded=True, diagonal=0)
        assert out.isfinite().all(dim=1).logical_not().nonzero().tolist() == [[place[0]]]
        assert not out[place[0]].isfinite().any()
