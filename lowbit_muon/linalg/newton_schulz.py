"""Orthogonalisation: a composition of odd quintic polynomials applied to singular values.

For X_0 = X / max(||X||_F, eps) = U S V^T and steps p_t(x) = a x + b x^3 + c x^5 the result is
U p_T(...p_1(S)) V^T, close to the polar factor U V^T. Three ways to the same polynomial:

newton_schulz
    X <- a X + (b A + c A^2) X, A = X X^T (https://kellerjordan.github.io/posts/muon/).
gram
    With p(x) = x h(x^2), h(s) = a + b s + c s^2, only R = X X^T and Q with X_t = Q X_0 are
    followed: H = h(R), Q <- H Q, R <- H R H, and the result is Q X_0. X_0 is read twice; all else
    is m x m, symmetric and commuting.
eigh
    Q = V h(lambda) V^T from an eigendecomposition R = V diag(lambda) V^T.

The last two see squared singular values, so rounding of R (relative to its norm, about the
dtype's eps) limits them: a direction far below sqrt(eps) of the largest is lifted by the right
factor only while the lift is below about 1/sqrt(eps). `gram_is_precise` is that condition.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype, is_real_number
from lowbit_muon.linalg.products import gram, multiply, symmetric_addmm, symmetric_from_spectrum

Triple = tuple[float, float, float]
Coefficients = str | Sequence[float] | Sequence[Sequence[float]]
METHODS = ("auto", "newton_schulz", "gram", "eigh")

# Table 1 of arXiv 2505.16932 (minimax for singular values in [1e-3, 1]); the last line is the
# Newton-Schulz limit, which all further steps equal.
_POLAR_EXPRESS_EXACT: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
# The paper evaluates every polynomial but the last at x/1.01, so that rounding that pushes a
# singular value above one does not make it grow.
_SAFETY = 1.01

NS_COEFFICIENTS: dict[str, tuple[Triple, ...]] = {
    # https://github.com/KellerJordan/Muon, the default of torch.optim.Muon
    "muon": ((3.4445, -4.7750, 2.0315),),
    "polar_express": (
        *((a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5) for a, b, c in _POLAR_EXPRESS_EXACT[:-1]),
        _POLAR_EXPRESS_EXACT[-1],
    ),
}


def resolve_coefficients(coefficients: Coefficients, steps: int) -> tuple[Triple, ...]:
    """The (a, b, c) of each of `steps` steps.

    coefficients: a name in NS_COEFFICIENTS, one triple for every step, or a sequence of triples,
    of which the first `steps` are taken and the last repeats if there are fewer.
    Raises TypeError or ValueError naming the parameter.
    """
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise TypeError(f"steps: expected an int, got {type(steps).__name__}")
    if not 1 <= steps < 100:
        raise ValueError(f"steps: expected 1 to 99, got {steps}")
    triples = _triples(coefficients)[:steps]
    return triples + triples[-1:] * (steps - len(triples))


def _triples(coefficients: Coefficients) -> tuple[Triple, ...]:
    if isinstance(coefficients, str):
        if coefficients not in NS_COEFFICIENTS:
            raise ValueError(
                f"coefficients: expected one of {sorted(NS_COEFFICIENTS)} or (a, b, c) or a "
                f"sequence of those, got {coefficients!r}"
            )
        return NS_COEFFICIENTS[coefficients]
    rows: Any = [coefficients] if _is_triple(coefficients) else coefficients
    if not isinstance(rows, Sequence) or not rows or not all(_is_triple(row) for row in rows):
        raise ValueError(
            "coefficients: expected (a, b, c) of finite numbers or a non-empty sequence of "
            f"those, got {coefficients!r}"
        )
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)


def _is_triple(value: object) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) == 3
        and all(is_real_number(element) for element in value)
    )


def gram_is_precise(coefficients: Sequence[Triple], dtype: torch.dtype) -> bool:
    """Whether the Gram form in `dtype` is safe for these steps without a restart.

    Rounding gives R spurious eigenvalues of up to -eps where X has no direction at all. Each step
    multiplies them by a^2, and the iteration runs away once they near -1; R is not updated in the
    last step, so the growth is that of the others. Below 1/8 are six steps of either set in
    float32; the worst relative error found on steep and rank-deficient matrices of 64 to 512 rows
    is 1e-2 there, and 0.3 two steps later.
    """
    growth = math.prod(a * a for a, _, _ in coefficients[:-1])
    return growth * torch.finfo(dtype).eps <= 1 / 8


def composed_polynomial(eigenvalues: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """p_T(...p_1(s))/s with s = sqrt(eigenvalue), elementwise; finite at 0, where it is prod(a_t).

    eigenvalues: any shape and floating point dtype; those rounded below 0 count as 0. Computed in
    float64, returned in the dtype given.
    """
    square = eigenvalues.to(accumulation_dtype(eigenvalues.device)).clamp_min(0)
    value = torch.ones_like(square)
    for a, b, c in coefficients:
        factor = a + square * (b + square * c)
        value *= factor
        square = square * factor.square()
    return value.to(eigenvalues.dtype)


def spectrum_operator(
    eigenvalues: Tensor, eigenvectors: Tensor, coefficients: Sequence[Triple]
) -> Tensor:
    """Q [.., m, m] with orthogonalize(X) = Q X_0, from torch.linalg.eigh(X_0 X_0^T).

    eigenvalues [.., m], eigenvectors [.., m, m] (columns); coefficients from
    `resolve_coefficients`.
    """
    return symmetric_from_spectrum(eigenvectors, composed_polynomial(eigenvalues, coefficients))


def gram_operator(
    gram_matrix: Tensor, coefficients: Sequence[Triple], *, overwrite: bool = False
) -> Tensor:
    """Q [.., m, m] with orthogonalize(X) = Q X_0, from R = X_0 X_0^T [.., m, m] by products only.

    Takes four m x m buffers, the result among them; three if `overwrite` lets it use the fourth
    for R. In m^3 multiply-adds: 2 for each of T symmetric products H, T-1 of Q, 2T-2 of R, times
    the 56 to 100% that `symmetric_addmm` computes. Raises ValueError where the Gram form would not
    be stable in R's dtype (`gram_is_precise`).
    """
    if not gram_is_precise(coefficients, gram_matrix.dtype):
        raise ValueError(
            f"coefficients: {len(coefficients)} steps lift small singular values too far for the "
            f"Gram form in {gram_matrix.dtype}; use method 'newton_schulz' or 'eigh', or fewer "
            "steps"
        )
    r = gram_matrix
    next_r = r if overwrite else torch.empty_like(r)
    q, h, spare = None, torch.empty_like(r), torch.empty_like(r)
    for step, (a, b, c) in enumerate(coefficients):
        symmetric_addmm(r, r, r, beta=b, alpha=c, out=h)
        h.diagonal(dim1=-2, dim2=-1).add_(a)
        if step + 1 < len(coefficients):
            symmetric_addmm(None, h, r, out=spare)
            r = symmetric_addmm(None, spare, h, out=next_r)
        if q is None:
            q, h = h, torch.empty_like(r)
        else:
            symmetric_addmm(None, h, q, out=spare)
            q, spare = spare, q
    assert q is not None
    return q


@torch.no_grad()
def operator_of_gram(
    gram_matrix: Tensor, norm: float, coefficients: Sequence[Triple], *, eps: float
) -> tuple[Tensor, float]:
    """(Q, inverse_norm) with orthogonalize(X) = inverse_norm * Q @ X.

    gram_matrix: X X^T [m, m], float32 and finite; overwritten. norm: ||X||_F. coefficients: from
    `resolve_coefficients`. inverse_norm = 1 / max(norm, eps), or 0 if both are. Raises ValueError
    where the Gram form is not precise.
    """
    divisor = max(norm, eps)
    inverse = 1 / divisor if divisor > 0 else 0.0
    r = gram_matrix.mul_(inverse).mul_(inverse)
    return gram_operator(r, coefficients, overwrite=True), inverse


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: Coefficients = "muon",
    method: str = "auto",
    *,
    eps: float = 1e-7,
) -> Tensor:
    """U p(S) V^T of x / max(||x||_F, eps) = U S V^T: x with all singular values brought near one.

    x: [m, n] or a batch [b, m, n], each matrix by itself; any floating point dtype, strides and
    magnitude; not modified. Returns the same shape and dtype, contiguous.
    steps, coefficients: see `resolve_coefficients`.
    method: "newton_schulz", "gram" or "eigh" (one polynomial, see the module's docstring), or
    "auto" for the fastest that is precise.
    eps: as torch.optim.Muon's, a floor for the norm; 0 is allowed.

    Computed in float64 for float64 input and else in float32, normalised before anything is
    multiplied. A zero matrix gives zeros. A non-finite element makes its whole matrix NaN.
    Floats of memory above x, k = min(m, n): 2 m n + 2 k^2 for newton_schulz, max(4 k^2,
    m n + k^2) for gram and eigh; m n more if x is of half precision, has no unit stride, or has
    entries whose squares leave the dtype's range.
    Raises TypeError or ValueError naming the parameter.
    """
    work, method, triples = _prepare(x, steps, coefficients, method, eps)
    scaled, inverse, _ = _scaled_into_range(work, eps)
    if method == "newton_schulz":
        result = _newton_schulz(scaled * inverse.to(scaled.dtype), triples)
    else:
        operator = _operator(scaled, inverse, triples, method).mul_(inverse.to(scaled.dtype))
        # in x's orientation: a transposed output costs nothing here and a copy later
        result = torch.empty(x.shape, dtype=scaled.dtype, device=x.device)
        result = result.mT if _is_tall(x) else result
        multiply(operator, scaled, out=result)
    return (result.mT if _is_tall(x) else result).to(x.dtype).contiguous()


@torch.no_grad()
def orthogonalize_normalized(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """`orthogonalize` of float32 x [b, m, n], m <= n, whose norms are at most one; overwrites x.

    Asks the device for nothing: neither for norms nor whether they are finite.
    """
    if choose_method(x.shape, coefficients, x.dtype, x.device) == "newton_schulz":
        return _newton_schulz(x, coefficients)
    return multiply(gram_operator(gram(x), coefficients, overwrite=True), x)


def choose_method(
    shape: Sequence[int],
    coefficients: Sequence[Triple],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> str:
    """What "auto" takes for a matrix of this shape, [.., m, n].

    The Gram form saves products once n > 1.5 m, for any number of steps: 4T-3 of m^3 and two of
    m^2 n against T of m^3 and 2T of m^2 n. All but the last are symmetric, and the CPU kernels
    compute a triangle: for them it is 5 to 15% behind for square matrices and ahead for others
    (bench/results/orthogonalize.json), with half the memory.
    """
    if not gram_is_precise(coefficients, dtype):
        return "newton_schulz"
    rows, columns = sorted(shape[-2:])
    triangles = len(shape) == 2 and torch.device(device).type == "cpu" and dtype == torch.float32
    return "gram" if triangles or columns > 1.5 * rows else "newton_schulz"


def _is_tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _prepare(
    x: Tensor, steps: int, coefficients: Coefficients, method: str, eps: float
) -> tuple[Tensor, str, tuple[Triple, ...]]:
    """x in the dtype of the arithmetic with the short side first, the method, the steps."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating point dtype, got {x.dtype}")
    if x.ndim not in (2, 3):
        raise ValueError(f"x: expected [m, n] or [b, m, n], got shape {tuple(x.shape)}")
    if not is_real_number(eps) or eps < 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    triples = resolve_coefficients(coefficients, steps)
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    work = work.mT if _is_tall(work) else work
    if 1 not in work.stride()[-2:]:  # torch would copy it for every product
        work = work.contiguous()
    if method == "auto":
        method = choose_method(work.shape, triples, work.dtype, work.device)
    return work, method, triples


def _scaled_into_range(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(scaled, inverse, divisor): scaled = x / divisor, inverse * scaled = x / max(norm, eps).

    scaled is x itself where squares of its entries stay well inside the dtype's range, else a copy
    divided by each matrix's largest magnitude. inverse and divisor are float64 [.., 1, 1].
    """
    limits = torch.finfo(x.dtype)
    low, high = math.sqrt(limits.tiny) / limits.eps, math.sqrt(limits.max) * limits.eps
    norm = _frobenius_norm(x)
    divisor = torch.ones_like(norm)
    if x.numel() and not bool(((norm > low) & (norm < high)).all()):
        divisor = torch.linalg.vector_norm(x, math.inf, dim=(-2, -1), keepdim=True)
        divisor = torch.where(divisor == 0, 1, divisor)
        x = x / divisor
        norm = _frobenius_norm(x)
    divisor = divisor.to(accumulation_dtype(x.device))
    denominator = torch.maximum(norm, eps / divisor)
    return x, torch.where(denominator == 0, 0, 1 / denominator), divisor


def _frobenius_norm(x: Tensor) -> Tensor:
    """||x||_F of each matrix, float64 [.., 1, 1].

    Along the contiguous dimension in x's dtype, then in float64: within 1e-7, where a float32 sum
    over everything is off by up to 1e-4 at 4M elements. It matters: polynomials that overshoot at
    1, as Polar Express does, multiply an error of the norm by up to 1e3 where the rank is one.
    """
    inner, outer = (-1, -2) if x.stride(-1) == 1 else (-2, -1)
    wide = accumulation_dtype(x.device)
    partial = torch.linalg.vector_norm(x, dim=inner, keepdim=True)
    return torch.linalg.vector_norm(partial, dim=outer, keepdim=True, dtype=wide)


def _operator(x: Tensor, inverse: Tensor, coefficients: Sequence[Triple], method: str) -> Tensor:
    """Q of inverse * x, x [.., m, n] with m <= n; method "gram" or "eigh"."""
    r = gram(x).mul_(inverse.square().to(x.dtype))
    if method == "gram":
        return gram_operator(r, coefficients, overwrite=True)
    finite = inverse.isfinite()  # eigh raises on NaN
    eigenvalues, eigenvectors = torch.linalg.eigh(r.masked_fill_(~finite, 0))
    del r  # two more m x m buffers follow
    return spectrum_operator(eigenvalues, eigenvectors, coefficients).masked_fill_(
        ~finite, math.nan
    )


def _newton_schulz(x: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """The standard form on normalised x [.., m, n], m <= n; x is used as a buffer."""
    spare = torch.empty_like(x)  # keeps the strides of a transposed x
    a_matrix = x.new_empty(*x.shape[:-1], x.shape[-2])
    polynomial = torch.empty_like(a_matrix)
    for a, b, c in coefficients:
        symmetric_addmm(None, x, x.mT, out=a_matrix)
        symmetric_addmm(a_matrix, a_matrix, a_matrix, beta=b, alpha=c, out=polynomial)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        multiply(polynomial, x, out=spare)
        x, spare = spare, x
    return x
