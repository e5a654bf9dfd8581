"""The spectral encoder's m x m products in the arithmetic of tensor cores, emulated on a CPU.

The plan for GPUs: each float32 factor is split in two numbers of fewer bits and three of the four
products are taken (TF32x3; float16 in two parts with the second shifted by 2**11 does as well).
One TF32 product is not enough: where a matrix has next to nothing, its error is as large as 4-bit
noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.root_coefficients import companding_gain
from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.root_iteration import iterate_root

Product = Callable[[Tensor, Tensor], Tensor]
SHIFT = 0.03


def round_to_tf32(x: Tensor) -> Tensor:
    """float32 with 10 bits after the point, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def three_products(cut: Callable[[Tensor], Tensor], shift: float = 1.0) -> Product:
    """A B from A = A1 + A2, B = B1 + B2, without A2 B2; second parts are kept times `shift`."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        a1, b1 = cut(a), cut(b)
        a2, b2 = cut((a - a1) * shift), cut((b - b1) * shift)
        return (a2 @ b1 + a1 @ b2) / shift + a1 @ b1

    return product


def fp16_product(a: Tensor, b: Tensor) -> Tensor:
    """Three products in float16, of factors scaled so that their largest entry is 64."""
    scale_a, scale_b = 64 / a.abs().amax(), 64 / b.abs().amax()
    product = three_products(lambda x: x.half().float(), 2.0**11)
    return product(a * scale_a, b * scale_b) / (scale_a * scale_b)


PRODUCTS: dict[str, Product] = {
    "float32": lambda a, b: a @ b,
    "tf32": lambda a, b: round_to_tf32(a) @ round_to_tf32(b),
    "tf32x3": three_products(round_to_tf32),
    "bf16x3": three_products(lambda x: x.bfloat16().float()),
    "fp16x3": fp16_product,
}


def momentum(kind: str, m: int, n: int) -> Tensor:
    """float32 [m, n] of Frobenius norm one."""
    if kind == "low rank":
        x = torch.randn(m, 4) @ torch.randn(4, n)
    elif kind == "decaying":
        x = torch.linalg.qr(torch.randn(m, m))[0] / torch.arange(1, m + 1) @ torch.randn(m, n)
    else:
        x = torch.randn(m, n)
    return x / x.norm()


class Emulated(Backend):
    """The reference with another arithmetic in its symmetric products."""

    def __init__(self, arithmetic: Product) -> None:
        self.arithmetic = arithmetic

    def symmetric_product(
        self,
        a: Tensor,
        b: Tensor | None = None,
        *,
        addend: Tensor | None = None,
        alpha: float = 1.0,
        beta: float = 1.0,
        other: Tensor | None = None,
        gamma: float = 1.0,
        identity: float = 0.0,
        out: Tensor | None = None,
        active: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:
        """See `Backend.symmetric_product`."""
        assert active is None
        assert not rounded
        result = self.arithmetic(a, a.mT if b is None else b) * alpha
        result = (result + result.mT) / 2
        result = result if addend is None else result + beta * addend
        result = result if other is None else result + gamma * other
        result = result + identity * torch.eye(result.shape[-1])
        return result if out is None else out.copy_(result)


def encoder_error(x: Tensor, gram: Tensor, product: Product) -> float:
    """Error of Y = C X relative to Y, with the m x m products taken by `product`."""
    wide = x.double()
    eigenvalues, vectors = torch.linalg.eigh(wide @ wide.mT)
    exact = (vectors * companding_gain(eigenvalues, SHIFT)) @ vectors.mT @ wide
    found = iterate_root(gram, SHIFT, Emulated(product)).double() @ wide
    return float((found - exact).norm() / exact.norm())


# The iteration itself is within 0.1% (its defect) times a third; 4-bit noise is 10% of Y.
@pytest.mark.parametrize(
    ("name", "bound"), [("float32", 1e-3), ("tf32x3", 1e-3), ("fp16x3", 1e-3), ("bf16x3", 4e-3)]
)
@pytest.mark.parametrize("kind", ["decaying", "low rank", "white"])
def test_split_products_are_as_good_as_float32(kind: str, name: str, bound: float) -> None:
    x = momentum(kind, 96, 160)
    assert encoder_error(x, x @ x.mT, PRODUCTS[name]) < bound


def test_one_tf32_product_is_not() -> None:
    x = momentum("low rank", 96, 160)
    assert encoder_error(x, x @ x.mT, PRODUCTS["tf32"]) > 0.03


@pytest.mark.parametrize("kind", ["decaying", "low rank", "white"])
def test_the_gram_matrix_may_come_from_float16(kind: str) -> None:
    """Rounding X to float16 is noise of 2**-12 in X, which C enlarges by 1/SHIFT at most."""
    x = momentum(kind, 96, 160)
    half = (x * math.sqrt(x.numel())).half().float()
    gram = half @ half.mT / x.numel()
    assert encoder_error(x, gram, PRODUCTS["tf32x3"]) < 2e-3
