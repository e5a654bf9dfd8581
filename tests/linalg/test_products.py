"""Products against the full product in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lowbit_muon.linalg.products import gram, symmetric_addmm, symmetric_from_spectrum, symmetric_mm

SIZES = (1, 2, 47, 48, 49, 193, 385)  # around whole tiles of 16 and 48, and steps of 192


def assert_product(result: Tensor, left: Tensor, right: Tensor) -> None:
    """Within the error of a dot product of length k, gamma_k |left| |right| with gamma_k = k*u,
    and a single float32 matrix exactly symmetric."""
    exact = left.double() @ right.double()
    bound = left.shape[-1] * 2**-24 * (left.abs().double() @ right.abs().double())
    # One more u for the mean of the two halves of a diagonal block.
    assert ((result.double() - exact).abs() <= bound + 2**-24 * exact.abs()).all()
    if result.ndim == 2 and result.dtype == torch.float32:
        assert torch.equal(result, result.mT)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("columns", [1, 70])
def test_gram(rows: int, columns: int) -> None:
    x = torch.randn(rows, columns)
    assert_product(gram(x), x, x.mT)
    assert_product(gram(x.mT.contiguous().mT), x, x.mT)
    strided = torch.randn(rows, 3 * columns)[:, ::3]
    assert_product(gram(strided), strided, strided.mT)


@pytest.mark.parametrize("rows", SIZES)
def test_commuting_product_and_addend(rows: int) -> None:
    a = gram(torch.randn(rows, rows)).div_(rows)
    b = a @ a
    b = (b + b.mT) / 2
    assert_product(symmetric_mm(a, b), a, b)
    fused = symmetric_addmm(a, a, b, beta=-2.0, alpha=0.5)
    # (scaling by powers of two is exact; the sum adds one rounding, of a result and of a term)
    exact = -2 * a.double() + 0.5 * (a.double() @ b.double())
    bound = (rows + 2) * 2**-24 * (2 * a.abs().double() + 0.5 * (a.abs() @ b.abs()).double())
    assert ((fused.double() - exact).abs() <= bound).all()
    in_place = a.clone()
    assert symmetric_addmm(in_place, a, b, beta=-2.0, alpha=0.5, out=in_place) is in_place
    assert torch.equal(in_place, fused)


@pytest.mark.parametrize("rows", [5, 500])
def test_out_is_written_and_never_read(rows: int) -> None:
    x = torch.randn(rows, 20)
    canvas = torch.full((rows + 2, rows + 3), math.nan)
    inner = canvas[1:-1, 1:-2]
    assert gram(x, out=inner) is inner
    assert_product(inner, x, x.mT)
    inner.fill_(math.nan)
    assert canvas.isnan().all()  # nothing was written around it


def test_batch() -> None:
    x = torch.randn(3, 5, 7)
    out = torch.full((3, 5, 5), math.nan)
    assert gram(x, out=out) is out
    assert_product(out, x, x.mT)
    identity = torch.eye(5).expand(3, 5, 5)
    assert torch.equal(symmetric_mm(out, identity), out)


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6), (400, 400)], ids=str)
def test_function_of_a_matrix(shape: tuple[int, ...]) -> None:
    eigenvalues, vectors = torch.linalg.eigh(torch.randn(shape).add_(torch.randn(shape).mT))
    values = eigenvalues.exp().clamp(max=1e3)
    assert_product(
        symmetric_from_spectrum(vectors, values), vectors * values.unsqueeze(-2), vectors.mT
    )


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (gram, {"x": torch.ones(3)}, r"x: expected \[m, n\].*\(3,\)"),
        (gram, {"x": torch.ones(2, 3), "out": torch.ones(3, 3)}, r"out: .*\(2, 2\), got.*\(3, 3\)"),
        (gram, {"x": torch.ones(2, 3), "out": torch.ones(2, 2).double()}, "out: .*torch.float64"),
        (symmetric_mm, {"a": torch.ones(2, 2), "b": torch.ones(3, 3)}, r"\(2, 2\) and \(3, 3\)"),
        (symmetric_mm, {"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, "square"),
        (
            symmetric_from_spectrum,
            {"vectors": torch.ones(2, 2), "values": torch.ones(3)},
            r"vectors, values: .*\(3,\)",
        ),
    ],
)
def test_errors(function: Any, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**arguments)
