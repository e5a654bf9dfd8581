"""The spectral encoder on devices: a fixed number of matrix products.

For R = M M^T / ||M||_F^2 the encoder of `linalg.spectral` is Y = C M with C = f(R), where f(lambda)
is the positive root of lambda f^3 + c f = 1 and c the format's shift. `iterate_root` computes C
from products of symmetric, commuting m x m matrices alone: no eigenvectors, no solves and no
decision on values, so the host never waits for the device. Hosts, which are quick at inverses, have
`root_fractions`, and come here below its smallest shift.

How. The chain multiplies W = c*I by factors H that are linear in P, and keeps P equal to
(W/c)^3 (R + offset*I): three products for a factor of about 9 in the smallest eigenvalue. P is
never recomputed from R: coupled like this, rounding stays what it already was in R, while Newton's
iteration on C^3 R + c C = I, which looks back at R, converges for scalars and diverges for matrices
in float32. The chain ends with P about one where lambda >> c^3 and W about one where
lambda << c^3; a small polynomial in both makes the root of it. All coefficients are fitted together
to the largest defect E = 1 - lambda f^3 - c f. A direction comes back from decoding times 1 - E,
which in every step changes its size in a momentum of decay beta by the share E*beta/(1 - beta).

    shift                                          0.1    0.03    0.01   0.005
    m x m products                                  12      18      21      25
    largest defect                               0.11%   0.10%   0.38%   0.68%
    fewest products within 2%: defect         10: 0.7%  15: 1.5%  19: 1.5%  23: 1.7%

At 0.03, the default of narrow matrices, a momentum of decay 0.95 keeps every direction to 2% under
a thousand steps of feedback beside a constant gradient. With 4-bit codes in the loop the iteration
and the exact f(R), by eigendecomposition, have the same error after Newton-Schulz.

Where products of half precision are quick the later ones take them
(`RootCoefficients.exact_stages`), with the diagonals, where the multiples of I are, kept in
float32: in closed loop the error stays within 3% of that of float32
(tests/linalg/test_rounded_root.py). Newton-Schulz on GPUs has a guard (`linalg.newton_schulz`);
here none is needed: of equal rows, and of one to four singular values, where rounding errors agree,
the largest eigenvalue of c C is within 0.2% of what it is in float32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.tensors import is_real_number


@dataclass(frozen=True)
class RootCoefficients:
    """The program for one shift c, made by `bench/root_coefficients.py`.

    Start with P = R + offset*I and W = c*I. Then
      chain: pairs (a, b); H = aI + bP, W <- W H, P <- P H^3
      forms: pairs of rows; Q_k = (row . terms)(row . terms) with terms P, W, Q_1 .. Q_k-1
      output: o; C = W (o_0 I + o_1 P + o_2 W + o_3 Q_1 + ...) / c

    shift: the smallest c the program is for; a larger one is met by scaling R.
    floor: f stays below 3/c for eigenvalues of R down to -floor and means nothing below that.
    """

    shift: float
    floor: float
    offset: float
    chain: tuple[tuple[float, float], ...]
    forms: tuple[tuple[tuple[float, ...], tuple[float, ...]], ...]
    output: tuple[float, ...]

    @property
    def matrix_products(self) -> int:
        """m x m products that `iterate_root` takes."""
        return 3 * len(self.chain) + len(self.forms)

    def exact_stages(self, dtype: torch.dtype) -> int:
        """How many first stages of the chain rounding to `dtype` would spoil.

        The root exists for eigenvalues of R down to -4/27 c^3, and a stage multiplies those near
        zero by a^3. An element of P beside its diagonal, at most a half, is rounded by up to an
        eighth of `eps` and so moves an eigenvalue as far where rows of P have one such element
        each: that must be small, a sixteenth, against what P may be off by.
        """
        margin, stages = 4 / 27 * self.shift**3, 0
        for a, _ in self.chain:
            if margin >= 2 * torch.finfo(dtype).eps:
                break
            margin, stages = margin * a**3, stages + 1
        return stages


@functools.lru_cache(maxsize=64)
def root_coefficients(shift: float) -> RootCoefficients:
    """The cheapest tabulated program that can serve `shift`.

    Raises ValueError below the smallest tabulated shift.
    """
    smallest = ROOT_TABLE[-1].shift
    if not is_real_number(shift) or shift < smallest:
        raise ValueError(f"shift: expected a number >= {smallest}, got {shift!r}")
    return next(entry for entry in ROOT_TABLE if entry.shift <= shift)


@torch.no_grad()
def iterate_root(
    gram_matrix: Tensor,
    shift: float,
    backend: Backend,
    *,
    overwrite: bool = False,
    rounded: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """C with C (C R C + shift*I) = I to 1%, for R = gram_matrix [m, m] or [b, m, m].

    float32 (or float64) in and, unless `dtype` is another, out. R must be symmetric with
    eigenvalues in [0, 1.1], as M M^T of a matrix scaled to Frobenius norm one has; rounding may
    take them down to -root_coefficients(shift).floor. R is not changed, unless `overwrite` lets
    its memory be used.
    rounded: products may round to the backend's `rounded_dtype` where that is precise enough.
    dtype: of the result, no wider than R's, which is the default.
    Takes five or six matrices of R's size beside it.
    Raises ValueError for another shape, dtype or a shift below the smallest tabulated one.
    """
    if gram_matrix.ndim not in (2, 3) or gram_matrix.shape[-1] != gram_matrix.shape[-2]:
        raise ValueError(
            f"gram_matrix: expected [m, m] or [b, m, m], got shape {tuple(gram_matrix.shape)}"
        )
    if gram_matrix.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram_matrix: expected float32 or float64, got {gram_matrix.dtype}")
    program = root_coefficients(shift)
    low_dtype = backend.rounded_dtype if rounded else None
    rounded = low_dtype is not None
    exact = len(program.chain) if low_dtype is None else program.exact_stages(low_dtype)
    # With c_0 the program's shift and k = c_0/shift, f(lambda) = k g(k^3 lambda) if
    # lambda g^3 + c_0 g = 1; so W = c_0 g = shift*f comes out unscaled.
    p = gram_matrix if overwrite else gram_matrix.clone()
    if program.shift != shift:
        p.mul_((program.shift / shift) ** 3)
    p.diagonal(dim1=-2, dim2=-1).add_(program.offset)
    # New memory costs a host about as much as a product, so results go where nothing is read again.
    # Most are held for the last form: W, the other forms and its two factors.
    spare = [torch.empty_like(p) for _ in range(len(program.forms) + 2)]
    before, w = p, p  # the P of the stage before; W, from the second stage on
    for stage, (a, b) in enumerate(program.chain):  # H = aI + bP
        low = stage >= exact
        if stage == 1:  # the first two: W = c H_0 H_1 with H_0 = a_0 I + b_0 P_0
            a0, b0 = (program.shift * number for number in program.chain[0])
            w = backend.symmetric_product(
                before, p, alpha=b0 * b, addend=before, beta=b0 * a, other=p, gamma=a0 * b,
                identity=a0 * a, out=spare.pop(), rounded=low,
            )  # fmt: skip
            spare.append(before)
        elif stage > 1:
            old, w = w, before
            backend.symmetric_product(old, p, addend=old, beta=a, alpha=b, out=w, rounded=low)
            spare.append(old)
        # U = P H
        u = backend.symmetric_product(p, p, addend=p, beta=a, alpha=b, out=spare.pop(), rounded=low)
        # P H^3 = U H^2 with H^2 = a^2 I + b (aP + U)
        (h2,) = backend.combined([[1.0, a]], [u, p], out=[spare.pop()])
        new = spare.pop()
        backend.symmetric_product(u, h2, addend=u, beta=a * a, alpha=b, out=new, rounded=low)
        before, p = p, new
        spare += [u, h2]
    spare.append(before)
    constant, *linear = program.output
    terms = [p, w]
    for index, (left, right) in enumerate(program.forms):
        rows, scale = [left] if left == right else [left, right], left[0] * right[0]
        factors = out = [spare.pop() for _ in rows]
        if index + 1 == len(program.forms):
            # The last form is the output's last term: all others, in the place of P, are added to
            # it, with the output's first coefficient for a unit.
            rows.append(program.output[1:-1])
            out = [*factors, p]
            spare += terms[2:]
            scale *= linear[-1] / linear[0]
        # (divided by the first number: a pass less, and a product's factor makes up for it)
        rows = [tuple(c / row[0] for c in row) for row in rows]
        backend.combined(rows, terms, out=out)
        form = backend.symmetric_product(
            factors[0],
            factors[-1],
            addend=None if out is factors else p,
            alpha=scale,
            out=spare.pop(),
            rounded=rounded,
        )
        spare += factors
        terms.append(form)
    result = spare.pop()
    if dtype is not None:  # in the same memory, of which it takes a part
        result = result.view(-1).view(dtype)[: w.numel()].view(w.shape)
    return backend.symmetric_product(
        w,
        terms[-1],
        addend=w,
        beta=constant / shift,
        alpha=linear[0] / shift,
        out=result,
        rounded=rounded,
    )


# Printed by `python -m bench.root_coefficients`, largest shift first. The defect is the largest
# |1 - lambda f^3 - c f| over eigenvalues in [0, 1.1].
# fmt: off
ROOT_TABLE = (
    # 12 products, defect 0.11%
    RootCoefficients(
        shift=0.1, floor=3e-07,
        offset=0.00013805832,
        chain=(
            (4.8091953, -4.0589672),
            (2.3045808, -0.14102807),
            (1.1776056, -0.039498183),
        ),
        forms=(
            ((1.0752284, 0.16444232),
             (1.07523, 0.16410421)),
            ((1.399536, 0.32842647, -0.074662495),
             (0.0056146669, 0.64501446, -0.38173256)),
            ((-0.26232963, -0.35507408, 0.42058001, 0.19385874),
             (-1.3841481, -0.49378403, 0.33398216, 0.088543468)),
        ),
        output=(
            1.7292866, -1.4043897, -0.82758296, 0.78454845, 0.30642227, 0.4630432,
        ),
    ),
    # 18 products, defect 0.10%
    RootCoefficients(
        shift=0.03, floor=3e-07,
        offset=3.9674041e-06,
        chain=(
            (3.5342636, -2.9058079),
            (3.8437075, -0.61906838),
            (2.4946065, -0.057996209),
            (1.3085217, -0.013781722),
            (0.73246368, -0.017584492),
        ),
        forms=(
            ((1.4394449, 0.3119936),
             (1.4394449, 0.3119936)),
            ((1.313728, -0.34062255, -0.48946017),
             (-0.21260727, -0.014085821, 0.0225639)),
            ((-1.1829823, 0.48355759, 0.76726174, -6.4533351),
             (-1.5733555, 0.069831546, 0.3582343, -3.094432)),
        ),
        output=(
            1.4735177, -1.3235061, -0.37087589, 0.67934659, -2.0458334, 1.3376625,
        ),
    ),
    # 21 products, defect 0.38%
    RootCoefficients(
        shift=0.01, floor=3e-07,
        offset=1.5598452e-07,
        chain=(
            (3.3026738, -2.8279445),
            (2.3623763, -0.48009649),
            (2.6448084, -0.35603483),
            (3.5866522, -0.23140327),
            (1.7655885, -0.020378161),
            (0.88725125, -0.013101501),
        ),
        forms=(
            ((0.86620006, 0.26973546),
             (0.86620028, 0.33558836)),
            ((1.191102, 0.3131342, -0.42658645),
             (-0.13066704, -0.036590307, 0.011211454)),
            ((-1.1734896, -0.45916528, 0.14019988, -1.0318831),
             (-1.0252911, -0.43087332, 0.53645378, -2.2631945)),
        ),
        output=(
            1.8271048, -1.7063935, -0.91271665, 0.81995974, -0.23122083, 0.6547155,
        ),
    ),
    # 25 products, defect 0.68%
    RootCoefficients(
        shift=0.005, floor=3e-07,
        offset=2.1700597e-08,
        chain=(
            (3.698941, -3.0822837),
            (2.5778558, -0.3513844),
            (2.3320331, -0.14983064),
            (2.1752161, -0.088298165),
            (2.0184891, -0.062614541),
            (1.575884, -0.045363447),
            (0.84428471, -0.037075394),
        ),
        forms=(
            ((0.91315146, 0.099654544),
             (0.86144589, 0.53373598)),
            ((3.4226414, 1.0031232, -2.2831125),
             (0.47631252, 0.4552807, -0.53803181)),
            ((2.134151, 2.1642722, -2.2921319, -3.4979707),
             (1.9464821, 1.8352156, -2.2003355, -2.6598612)),
            ((1.1472562, 0.51853649, -0.59254433, 1.6413308, 11.04973),
             (1.1235062, 0.095411142, -0.45733583, 0.58972463, 1.0877575)),
        ),
        output=(
            1.9390855, -1.5293454, -0.52333607, 0.46277201, -1.2622098, -3.6816033, 0.49775496,
        ),
    ),
)
# fmt: on
