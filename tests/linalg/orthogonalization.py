"""The orthogonaliser's definition in float64, and bounds of the error of each way to it."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit_muon.linalg.coefficients import Triple, resolve_coefficients

METHODS = ("newton_schulz", "gram")
MUON = resolve_coefficients("muon", 5)


def polynomial(values: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return values


def brute_force(x: Tensor, coefficients: tuple[Triple, ...] = MUON, eps: float = 1e-7) -> Tensor:
    """The definition, in float64."""
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * polynomial(values / max(float(values.norm()), eps), coefficients) @ vh


def lift(eigenvalues: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    """p(s)/s at s^2 = eigenvalues in float64, differentiable."""
    value = torch.ones_like(eigenvalues)
    for a, b, c in coefficients:
        factor = a + b * eigenvalues + c * eigenvalues**2
        value, eigenvalues = value * factor, eigenvalues * factor**2
    return value


def unit_gram(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """X_0 [m, n] (m <= n) of unit norm in `dtype` and X_0 X_0^T by torch's own product."""
    x = x if x.shape[0] <= x.shape[1] else x.mT
    unit = (x.double() / x.double().norm()).to(dtype)
    return unit, unit @ unit.mT


def product_error(x: Tensor, dtype: torch.dtype) -> float:
    """Relative error of a product in `dtype`: eps, or what torch.mm itself shows on R = X X^T and
    R R if that is more, as it is where equal rows make all elements round alike."""
    eps = torch.finfo(dtype).eps
    if dtype == torch.float64:
        return eps
    unit, r = unit_gram(x, dtype)
    exact, exact_square = unit.double() @ unit.double().mT, r.double() @ r.double()
    return max(
        eps,
        float((r.double() - exact).norm() / exact.norm()),
        float(((r @ r).double() - exact_square).norm() / exact_square.norm()),
    )


def steepest(largest: float, coefficients: tuple[Triple, ...]) -> float:
    """The largest |p'| from 0 to `largest`, both included."""
    values = torch.linspace(0, largest, 4097, dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(polynomial(values, coefficients).sum(), values)
    return float(slopes.abs().max())


def gram_sensitivity(values: Tensor, coefficients: tuple[Triple, ...]) -> float:
    """L with ||change of h(R) X||_F <= L*||change of R||_F to first order, for an X with these
    singular values, float64, and R = X X^T: in the eigenbasis the change is f[l_i, l_j] E_ij s_j,
    f[.,.] the divided difference of f(l) = p(sqrt(l))/sqrt(l)."""
    squares = (values**2).requires_grad_()
    lifts = lift(squares, coefficients)
    (derivative,) = torch.autograd.grad(lifts.sum(), squares)
    squares, lifts = squares.detach(), lifts.detach()
    gaps = squares[:, None] - squares
    close = gaps.abs() < 1e-9
    divided = torch.where(close, derivative, (lifts[:, None] - lifts) / torch.where(close, 1, gaps))
    return float((divided.abs() * values).max())


def tolerance(
    x: Tensor, coefficients: tuple[Triple, ...], method: str, dtype: torch.dtype = torch.float32
) -> float:
    """First-order bound of ||error||_F for arithmetic in `dtype`; eps is its `product_error`.

    Standard form: step t evaluates its polynomial with relative error eps*h, h = |a|+|b|+|c|, an
    absolute error of eps*h*||X_t||_F. ||X_0||_F = 1 and its error is lifted by p' at most, which
    is prod(a) at 0 and with `cans` 46 times that at 1; later ||X_t||_F <= 2 sqrt(m) (all sets stay
    below 2) and the last errors are lifted by O(1).
    Gram form: besides, R is wrong by eps and its polynomials, at ||R||_F <= 1, by eps*h. In each
    later step H R H is rounded, by eps*g^2*||R||_F for the largest |h(l)| = g of the step before,
    and each H is wrong by eps*h, which matters where that step made a large singular value small,
    where the rest is steep.
    """
    eps = product_error(x, dtype)
    h = max(abs(a) + abs(b) + abs(c) for a, b, c in coefficients)
    values = torch.linalg.svdvals(x.double())
    values = values / values.norm()
    largest_lift = steepest(float(values.max()), coefficients)
    bound = eps * h * (largest_lift + len(coefficients) * 2 * min(x.shape) ** 0.5)
    if method == "gram":
        wrong = eps * h
        for step, (a, b, c) in enumerate(coefficients):
            bound += gram_sensitivity(values, coefficients[step:]) * wrong
            gains = a + b * values**2 + c * values**4
            most = float(gains.abs().max())
            wrong = eps * (most**2 + 2 * h * most) * float((values**2).norm())
            values = values * gains
    return bound


def assert_orthogonalized(
    result: Tensor, x: Tensor, method: str, coefficients: tuple[Triple, ...] = MUON
) -> None:
    """result is the polynomial of x, within `tolerance` and the rounding of the result."""
    assert result.shape == x.shape
    assert result.dtype == x.dtype
    if x.ndim == 3:
        for part, matrix in zip(result, x, strict=True):
            assert_orthogonalized(part, matrix, method, coefficients)
        return
    exact = brute_force(x, coefficients)
    arithmetic = torch.float64 if x.dtype == torch.float64 else torch.float32
    allowed = tolerance(x, coefficients, method, arithmetic)
    allowed += torch.finfo(x.dtype).eps * float(exact.norm())
    error = float((result.double() - exact).norm())
    assert error <= allowed, f"{error:.2e} > {allowed:.2e} of {float(exact.norm()):.2e}"


def matrix_with(values: Tensor, columns: int) -> Tensor:
    """float32 [len(values), columns] with these singular values."""
    left, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64))
    return (left * values.double() @ right.mT).float()
