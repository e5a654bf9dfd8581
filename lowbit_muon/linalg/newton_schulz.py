"""Orthogonalisation: a composition of odd quintic polynomials applied to singular values.

For X_0 = X / max(||X||_F, eps) = U S V^T and steps p_t(x) = a x + b x^3 + c x^5 the result is
U p_T(...p_1(S)) V^T, close to the polar factor U V^T. Two ways to the same polynomial:

newton_schulz
    X <- a X + (b A + c A^2) X, A = X X^T (https://kellerjordan.github.io/posts/muon/).
gram
    With p(x) = x h(x^2), h(s) = a + b s + c s^2, only R = X X^T and Q with X_t = Q X_0 are
    followed: H = h(R), Q <- H Q, R <- H R H, and the result is Q X_0. X_0 is read twice; all else
    is m x m, symmetric and commuting.

The second sees squared singular values, so rounding of R (relative to its norm, about the
dtype's eps) limits it: a direction far below sqrt(eps) of the largest is lifted by the right
factor only while the lift is below about 1/sqrt(eps). `gram_is_precise` is that condition.

In half precision the Gram form restarts: its steps are split into runs that `gram_is_precise`
allows, and X and R are computed anew after each::

    R = X X^T; Z = b R + c R^2; W <- a W + w Z + Z W, w <- a w; R <- a^2 R + 2 a R Z + R Z Z
    X <- w X + W X

Neither a I + Z nor w I + W is ever stored: a and w would take the bits of Z and W, which nearly
cancel them for large singular values. Products sum in float32 and round once. A guard then looks at
each result's norm. A matrix that has left the range a correct result can have, or is not finite, is
orthogonalised again in the standard form; the kernels of all others return at once (`active`), so
that nobody has to ask the device which they are.

On CPUs with products of bfloat16 matrices of 256 rows and more, less than twice as wide (four times
with AMX: `Backend.gram_aspect`), take the standard form, with all factors rounded and everything
else in float32: the diagonal of b A + c A^2 + a I, which would take the bits of the rest, stays
apart. Wider ones take the Gram form, in part: R stays in float32, and so do its updates R H and H R
H, because an error of R in directions where X has next to nothing would be lifted as they are.
Rounded are the factors of X X^T, Q X, H Q and R R, but for the third- and second-last R R; the
diagonals of H and Q stay apart.
tests/linalg/test_rounded_iteration.py holds the error to that of torch.optim.Muon, on steep, flat,
graded and rank-deficient matrices. Where the Gram form is rounded it is several times as large for
columns that differ in size by factors of a hundred and more (3e-2, where torch has 6e-3).

`python -m bench.half_precision` emulates the products on a CPU. Five of Muon's steps, 128 x 192,
error against float64 relative to the result, float16 (bfloat16): 5e-3 (4e-2) for singular values
falling as 1/i and 1.1e-2 for equal ones, where the standard form in the same dtype has 3e-3
(2e-2) and 3e-3; of rank 8, where rounding of X gives it small singular values, both 3e-2 (3e-1).
Polar Express is harder on bfloat16: 8e-2 against 2e-2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.tensors import accumulation_dtype, is_real_number
from lowbit_muon.linalg.coefficients import (
    Coefficients,
    Triple,
    gain_bounds,
    gram_is_precise,
    resolve_coefficients,
    restart_lengths,
)

METHODS = ("auto", "newton_schulz", "gram")
# Beyond what rounding does to a norm (a few percent), far below what a divergent iteration does.
_GUARD_MARGIN = 1.25
# Where the Gram form with products of bfloat16 keeps its error below that of torch.optim.Muon's
# iteration, to which tests/linalg/test_rounded_iteration.py holds it. Muon's five steps lift by
# 485, with 3.44 each; six steps, and Polar Express, whose first factor is 8.3, were worse.
_ROUNDED_LIFT = 500.0
_ROUNDED_FACTOR = 3.5
# With fewer rows rounding averages out less, and there is less to save.
ROUNDED_ROWS = 256


def takes_gram_form(
    shape: Sequence[int],
    coefficients: Sequence[Triple],
    dtype: torch.dtype,
    backend: Backend,
    *,
    rounded: bool = False,
) -> bool:
    """Whether the Gram form is precise, and the faster, for matrices of this shape, [.., m, n].

    It saves products once n > 1.5 m, for any number of steps: 4T-3 of m^3 and two of m^2 n against
    T of m^3 and 2T of m^2 n. All but the last are symmetric, and the CPU kernels compute a
    triangle: for them it is 5 to 15% behind for square matrices and ahead for others
    (bench/results/orthogonalize.json), with half the memory. rounded: the products may take
    bfloat16, which all of the standard form's do and few of the Gram form's.
    """
    if not gram_is_precise(coefficients, dtype):
        return False
    rows, columns = sorted(shape[-2:])
    if rounded:
        return columns >= backend.gram_aspect * rows
    triangles = not backend.asynchronous and dtype == torch.float32
    return triangles or columns > 1.5 * rows


def gram_form_rounds(coefficients: Sequence[Triple]) -> bool:
    """Whether bfloat16 is precise enough for the Gram form's products."""
    lifts = [a for a, _, _ in coefficients]
    return math.prod(lifts) <= _ROUNDED_LIFT and max(lifts) <= _ROUNDED_FACTOR


def gram_operator(
    gram: Tensor, coefficients: Sequence[Triple], backend: Backend, *, rounded: bool = False
) -> Tensor:
    """Q [.., m, m] with orthogonalize(X) = Q X_0, from R = X_0 X_0^T [.., m, m] by products only.

    rounded: products in bfloat16 where that is precise enough (see the module's docstring).

    Takes four m x m buffers, R, which is overwritten, and the result among them. In m^3
    multiply-adds: 2 for each of T symmetric products H, T-1 of Q, 2T-2 of R, times the 56 to 100%
    that backends compute of a symmetric product. Raises ValueError where the Gram form would not be
    stable in R's dtype (`gram_is_precise`).
    """
    if not gram_is_precise(coefficients, gram.dtype):
        raise ValueError(
            f"coefficients: {len(coefficients)} steps of these are not precise in the Gram form in "
            f"{gram.dtype}; use method 'newton_schulz' or fewer steps"
        )
    r, q, h, spare = gram, None, torch.empty_like(gram), torch.empty_like(gram)
    for step, (a, b, c) in enumerate(coefficients):
        left = len(coefficients) - step
        backend.symmetric_product(
            r,
            r,
            addend=r,
            beta=b,
            alpha=c,
            identity=a,
            out=h,
            rounded=rounded and left not in (2, 3),
        )
        if step + 1 < len(coefficients):
            backend.symmetric_product(h, r, out=spare)
            backend.symmetric_product(spare, h, out=r)
        if q is None:
            q, h = h, torch.empty_like(r)
        else:
            backend.symmetric_product(h, q, out=spare, rounded=rounded)
            q, spare = spare, q
    assert q is not None
    return q


def standard_form(
    x: Tensor,
    coefficients: Sequence[Triple],
    backend: Backend,
    *,
    unit: float = 1.0,
    out: Tensor | None = None,
    active: Tensor | None = None,
    rounded: bool = False,
) -> Tensor:
    """X <- (a I + b A + c A^2) X, A = X X^T, from unit * x [.., m, n], m <= n, of norm one.

    out: where the result goes, of x's shape, for the matrices that are active (bool [b]); x is then
    kept. Without it x is used as a buffer. rounded: the products' factors, but for the diagonals of
    m x m ones, to bfloat16.
    """
    diagonal = 0 if rounded else None
    spare = torch.empty_like(x) if out is None or len(coefficients) > 1 else out
    # In turn, so that the last result lies in `out`, and no step reads what it writes.
    targets = [spare, x if out is None else out]
    if out is not None and len(coefficients) % 2:
        targets.reverse()
    gram = x.new_empty(*x.shape[:-1], x.shape[-2])
    polynomial = torch.empty_like(gram)
    for step, (a, b, c) in enumerate(coefficients):
        scale = unit if step == 0 else 1.0
        backend.symmetric_product(x, alpha=scale * scale, out=gram, active=active, rounded=rounded)
        backend.symmetric_product(
            gram,
            gram,
            addend=gram,
            beta=b,
            alpha=c,
            identity=a,
            out=polynomial,
            active=active,
            rounded=rounded,
        )
        x = backend.product(
            polynomial,
            x,
            out=targets[step % 2],
            alpha=scale,
            active=active,
            rounded=rounded,
            diagonal=diagonal,
        )
    return x


def orthogonalize_half(
    x: Tensor,  # float16 or bfloat16 [b, m, n], m <= n, contiguous
    norm: Tensor,  # float32 or float64 [b]
    coefficients: Sequence[Triple],
    backend: Backend,
    *,
    unit: float,
) -> Tensor:
    """U p(S) V^T of unit * x = U S V^T for each matrix, in x's dtype [b, m, n]; x is kept.

    norm: Frobenius norms of unit * x, at most one. unit lets entries of x be about one, where half
    precision is at its best.
    """
    result, scale = x, unit
    start = 0
    for length in restart_lengths(tuple(coefficients), x.dtype):
        result = _run_of_steps(result, coefficients[start : start + length], backend, scale)
        start, scale = start + length, 1.0
    low, high = gain_bounds(tuple(coefficients))
    found = torch.linalg.vector_norm(result, dim=(1, 2), dtype=torch.float32)
    within = found.clamp_max(_GUARD_MARGIN * high * x.shape[1] ** 0.5)
    within = torch.maximum(within, norm * (low / _GUARD_MARGIN))
    # (NaN differs from itself)
    standard_form(x, coefficients, backend, unit=unit, out=result, active=found != within)
    return result


def _run_of_steps(
    x: Tensor, coefficients: Sequence[Triple], backend: Backend, scale: float
) -> Tensor:
    """The steps of one run on scale * x."""
    r = backend.symmetric_product(x, alpha=scale * scale)
    w, w_diagonal = r, 1.0
    for step, (a, b, c) in enumerate(coefficients):
        z = backend.symmetric_product(r, r, addend=r, beta=b, alpha=c)
        if step + 1 < len(coefficients):
            rz = backend.symmetric_product(r, z)
            r = backend.symmetric_product(rz, z, addend=rz, beta=2 * a, other=r, gamma=a * a)
        if step == 0:
            w, w_diagonal = z, a
        else:
            w = backend.symmetric_product(z, w, addend=w, beta=a, other=z, gamma=w_diagonal)
            w_diagonal *= a
    # the factor of x is rounded with the sum, once
    return backend.product(w, x, addend=x, alpha=scale, beta=scale * w_diagonal)


@torch.no_grad()
def orthogonalize(
    x: Tensor,
    steps: int = 5,
    coefficients: Coefficients = "muon",
    method: str = "auto",
    *,
    eps: float = 1e-7,
    backend: str = "auto",
) -> Tensor:
    """U p(S) V^T of x / max(||x||_F, eps) = U S V^T: x with all singular values brought near one.

    Args:
        x: [m, n] or a batch [b, m, n], each matrix by itself; any floating point dtype, strides and
            magnitude; not modified.
        steps: 1 to 99 steps.
        coefficients: (a, b, c) for every step; a sequence of such triples, one for each step, of
            which the last repeats if there are fewer; or a name in NS_COEFFICIENTS.
        method: "newton_schulz" or "gram" (one polynomial, `lowbit_muon.linalg.newton_schulz`), or
            "auto" for the faster that is precise.
        eps: as torch.optim.Muon's, a floor for the norm; 0 is allowed.
        backend: "auto", or a backend's name; raises if it is unavailable.

    Returns x's shape and dtype, contiguous. Computed in float64 for float64 input and else in
    float32, normalised before anything is multiplied. A zero matrix gives zeros. A non-finite
    element makes its whole matrix NaN.

    Floats of memory above x, k = min(m, n): 2 m n + 2 k^2 for newton_schulz, max(4 k^2,
    m n + k^2) for gram; m n more if x is of half precision, has no unit stride, or has entries
    whose squares leave the dtype's range.

    Raises TypeError or ValueError naming the parameter.
    """
    triples = _checked(x, steps, coefficients, method, eps)
    kernels = get_backend(backend, x.device)
    tall = x.shape[-2] > x.shape[-1]
    work = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    work = work.mT if tall else work
    if 1 not in work.stride()[-2:]:  # it would be copied for every product
        work = work.contiguous()
    if method == "auto":
        gram = takes_gram_form(work.shape, triples, work.dtype, kernels)
        method = "gram" if gram else "newton_schulz"
    scaled, inverse = _scaled_into_range(work, eps)
    factor = inverse.to(scaled.dtype)
    if method == "newton_schulz":
        result = standard_form(scaled * factor, triples, kernels)
    else:
        r = kernels.symmetric_product(scaled).mul_(inverse.square().to(scaled.dtype))
        operator = gram_operator(r, triples, kernels)
        del r  # the result takes its place
        # in x's orientation: a transposed output costs nothing here and a copy later
        result = torch.empty(x.shape, dtype=scaled.dtype, device=x.device)
        result = result.mT if tall else result
        kernels.product(operator.mul_(factor), scaled, out=result)
    return (result.mT if tall else result).to(x.dtype).contiguous()


def _checked(
    x: Tensor, steps: int, coefficients: Coefficients, method: str, eps: float
) -> tuple[Triple, ...]:
    """The steps, after checks of all arguments."""
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
    return resolve_coefficients(coefficients, steps)


def _scaled_into_range(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(scaled, inverse): scaled is a multiple of x, inverse * scaled = x / max(norm, eps).

    scaled is x itself where squares of its entries stay well inside the dtype's range, else a copy
    divided by each matrix's largest magnitude. inverse is float64 [.., 1, 1].
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
    denominator = torch.maximum(norm, eps / divisor.to(accumulation_dtype(x.device)))
    return x, torch.where(denominator == 0, 0, 1 / denominator)


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
