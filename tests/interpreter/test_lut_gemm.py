"""The public products over the Triton kernels, against the decoded matrix and other backends."""

from __future__ import annotations

import pytest
import torch

from lowbit_muon import quantize
from lowbit_muon.state.coded_products import lut_gram, lut_matmul, lut_times


@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "linear8", "nf4", "fp32"])
def test_stored_matrices_and_their_products(name: str) -> None:
    matrix = torch.randn(12, 70)
    stored = quantize(matrix, name, backend="reference")
    expected = stored.dequantize("reference")
    # the spectral decoder's norms are sums in another order
    torch.testing.assert_close(stored.dequantize("triton"), expected, rtol=1e-5, atol=1e-5)
    a, addend = torch.randn(12, 12), torch.randn(12, 70)
    x = 0.9 * expected + 0.1 * addend
    options = {"addend": addend, "alpha": 0.9, "gamma": 0.1, "backend": "triton"}
    close = {"rtol": 1e-4, "atol": 1e-3}  # float32 sums of 70 terms of size up to 10
    torch.testing.assert_close(lut_gram(stored, **options), x @ x.mT, **close)
    torch.testing.assert_close(lut_matmul(a, stored, **options), a @ x, **close)
    v = torch.randn(70, 3)
    torch.testing.assert_close(lut_times(stored, v, **options), x @ v, **close)
    half = lut_gram(stored, panel="f16", backend="triton")
    bound = 2.0**-10 * (expected.abs() @ expected.abs().mT) + 1e-3
    assert ((half - expected @ expected.mT).abs() <= bound).all()


@pytest.mark.parametrize("name", ["spectral4", "spectral3", "linear8"])
def test_integer_panels_have_the_bits_of_other_backends(name: str) -> None:
    stored, a = quantize(torch.randn(9, 130), name), torch.randn(5, 9)
    grams = [lut_gram(stored, panel="s8", backend=b) for b in ("triton", "auto")]
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-6, atol=1e-6)
    products = [lut_matmul(a, stored, panel="s8", backend=b) for b in ("triton", "auto")]
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)
    v = torch.randn(130, 3)
    products = [lut_times(stored, v, panel="s8", backend=b) for b in ("triton", "auto")]
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)


TALL = (70, 9)  # turned before the backend sees it


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, (9, 70)) for name in ("spectral4", "mulaw4", "linear8", "nf4")),
        ("spectral4", TALL),
        ("muonq4", TALL),
        *(
            pytest.param(name, TALL, marks=pytest.mark.long)
            for name in ("mulaw4", "linear8", "nf4")
        ),
    ],
)
def test_quantising_one_matrix(name: str, shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape)
    ours = quantize(matrix, name, backend="triton")
    theirs = quantize(matrix, name, backend="reference")
    for role, value in theirs.tensors.items():
        if value.dtype == torch.uint8:  # rounding may flip a code here and there
            assert int((ours.tensors[role] != value).sum()) <= value.numel() // 50, role
    error = (ours.dequantize() - theirs.dequantize()).norm()
    assert error <= 0.02 * theirs.dequantize().norm()
