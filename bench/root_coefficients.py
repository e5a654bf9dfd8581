"""Compute the coefficients of `lowbit_muon.linalg.root_iteration`: prints the table pasted there.

    python -m bench.root_coefficients                   the table (about 30 s on one core)
    python -m bench.root_coefficients --frontier 0.01   largest defect by number of products

For one shift c the matrix program of `root_iteration` is a function of a single eigenvalue, so it
is fitted on scalars in float64. The defect E = 1 - lambda f^3 - c f of the fitted factor f is made
small in the largest absolute value over lambda in [0, 1.1]; eigenvalues down to -floor, which
rounding of a Gram matrix produces, only have to stay bounded.

1. Start: each step of the chain is the linear factor that brings [c^3, 1] closest to one (closed
   form), the quadratic forms are P^2, PW and W^2, and the output is a linear least-squares fit.
2. Levenberg-Marquardt on all coefficients, first for the linearised defect, then for the defect.
3. Lawson's reweighting (C. L. Lawson, 1961): residuals near the largest get more weight, which
   turns the least-squares solution into nearly the minimax one.
4. The best of four starts.

A step of the chain that takes the largest eigenvalues to almost zero loses nothing on scalars, but
makes them neighbours of the smallest ones, and then rounding mixes the two: at shift 0.003 a
matrix of four singular values came back with an error of 0.7. So the fit keeps every H away from
zero (MARGIN); the same matrix then has 0.002, with the same defect.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq, least_squares
from torch import Tensor

from lowbit_muon.linalg.root_iteration import RootCoefficients

# (shift, steps of the chain, quadratic forms, floor). The floor is three times what rounding of a
# float32 Gram matrix of trace one was seen to do (-9e-8, rank one). It sets the smallest shift: at
# 0.003 it would be -11 c^3, where no bounded factor is within reach of this many products.
TABLE_PLAN = ((0.1, 3, 3, 3e-7), (0.03, 5, 3, 3e-7), (0.01, 6, 3, 3e-7), (0.005, 7, 4, 3e-7))
LARGEST_EIGENVALUE = 1.1  # a trace of one is only kept to the accuracy of the norm
# Of c^3. A fit from one start may stop at twice the defect that the best of these reaches.
START_OFFSETS = (0.05, 0.1, 0.2, 0.4)
# A factor of 1.1/c below zero counts as ideal; missing it by 1/c costs as much as a defect of 1%.
FLOOR_TARGET, FLOOR_WEIGHT = 1.1, 0.01
MARGIN, MARGIN_WEIGHT = 0.2, 0.01  # a smallest H of 0.2 costs as much as a defect of 1%
FAILED = 1e6  # stands for a residual that overflowed
RIDGE = 1e-5  # keeps the coefficients small; far below any residual that matters

Array = NDArray[np.float64]


def greedy_chain(lowest: float, steps: int) -> list[tuple[float, float]]:
    """Linear factors h = a + b x with x <- x h^3 that bring [lowest, 1.1] closest to one.

    x (1 - r x)^3 rises to one maximum, at 1/(4r). The ratio of the largest to the smallest value is
    least where both ends of the interval map to the same value, which fixes r; a makes the
    maximum one.
    """
    chain = []
    low, high = lowest, LARGEST_EIGENVALUE
    for _ in range(steps):

        def imbalance(r: float, low: float = low, high: float = high) -> float:
            return float(np.log(low / high) + 3 * np.log((1 - r * low) / (1 - r * high)))

        r = brentq(imbalance, 1e-9, (1 - 1e-13) / high)
        a = (27 / (256 * r)) ** (-1 / 3)
        chain.append((a, -a * r))
        low, high = low * (a - a * r * low) ** 3, 1.0
    return chain


def compand_singular_values(s: Tensor, shift: float) -> Tensor:
    """The real root y of y^3 + shift*y = s for s >= 0, in closed form (hyperbolic sine)."""
    k = math.sqrt(shift / 3)
    return 2 * k * torch.sinh(torch.asinh(s / (2 * k**3)) / 3)


def companding_gain(eigenvalues: Tensor, shift: float) -> Tensor:
    """f(lambda) = y(s)/s with s = sqrt(lambda), f(0) = 1/shift; rounding below 0 counts as 0."""
    s = eigenvalues.clamp_min(0).sqrt()
    # Below this size y = s/shift to float64 precision: y^3/(shift*y) < 1e-18.
    linear = s <= 1e-9 * shift**1.5
    return torch.where(linear, 1 / shift, compand_singular_values(s, shift) / s.clamp_min(1e-300))


def eigenvalue_grid(shift: float, density: int) -> Array:
    """Zero, then dense on a logarithmic scale from zero, linearly, and towards the upper end.

    The upper end needs its own points: the chain folds it onto the lower one.
    """
    top = LARGEST_EIGENVALUE
    return np.r_[
        0.0,
        np.geomspace(1e-2 * shift**3, top, 2 * density),
        np.linspace(0.01, top, density),
        top - np.geomspace(1e-5, 0.1, density // 2),
    ]


class RootFit:
    """The program of `iterate_root` on a grid of eigenvalues, as a function of its coefficients.

    The coefficients are one vector: log(offset / c^3), the chain's pairs, the quadratic forms, the
    output. Leading dimensions of the vector are carried through, and complex vectors are allowed:
    the program is analytic, so the derivative by a complex step is exact.
    """

    def __init__(self, shift: float, steps: int, forms: int, floor: float) -> None:
        self.shift, self.steps, self.forms = shift, steps, forms
        c3 = shift**3
        self.eigenvalues = eigenvalue_grid(shift, density=120)
        self.negative = -np.linspace(0.05, 1, 16) * floor
        self.target = shift * companding_gain(torch.from_numpy(self.eigenvalues), shift).numpy()
        # d(defect) / d(c f)
        self.slope = 3 * self.eigenvalues * self.target**2 / c3 + 1

    def factor(self, vector: NDArray, eigenvalues: Array) -> NDArray:
        """c*f at the eigenvalues, shape vector.shape[:-1] + eigenvalues.shape."""
        coefficients = iter(np.moveaxis(vector, -1, 0)[..., None])
        p = eigenvalues + np.exp(next(coefficients)) * self.shift**3
        w: NDArray = np.full_like(eigenvalues, self.shift)
        for _ in range(self.steps):
            h = next(coefficients) + next(coefficients) * p
            p, w = p * h**3, w * h
        terms = [p, w]
        for _ in range(self.forms):
            left = sum(next(coefficients) * term for term in terms)
            right = sum(next(coefficients) * term for term in terms)
            terms.append(left * right)
        return w * (next(coefficients) + sum(next(coefficients) * term for term in terms))

    def residuals(self, vector: NDArray, *, linear: bool) -> NDArray:
        """Defect on the grid, what the factor misses below zero, and how close each H gets to zero.

        `linear` takes the defect to first order in the distance from the exact factor.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # a trial step may go too far
            root = self.factor(vector, self.eigenvalues)
            if linear:
                defect = self.slope * (root - self.target)
            else:
                defect = 1 - self.eigenvalues * (root / self.shift) ** 3 - root
            below = FLOOR_WEIGHT * (self.factor(vector, self.negative) - FLOOR_TARGET)
            folds = MARGIN_WEIGHT * (MARGIN / self.smallest_factors(vector)) ** 2
        values = np.concatenate([defect, below, folds], axis=-1)
        return np.where(np.isfinite(values), values, FAILED)

    def smallest_factors(self, vector: NDArray) -> NDArray:
        """H of each step of the chain at its largest argument, shape [..., steps]."""
        smallest = []
        largest: float | NDArray = LARGEST_EIGENVALUE
        for step in range(self.steps):
            a, b = vector[..., 1 + 2 * step], vector[..., 2 + 2 * step]
            smallest.append(a + b * largest)
            largest = -27 * a**4 / (256 * b)  # the maximum of x (a + b x)^3
        return np.stack(smallest, axis=-1)

    def jacobian(self, vector: Array, *, linear: bool) -> Array:
        """Derivative of `residuals` by the coefficients."""
        step = 1e-30
        moved = vector + 1j * step * np.eye(len(vector))
        return (self.residuals(moved, linear=linear).imag / step).T

    def start(self, offset: float) -> Array:
        """Coefficients to start from (step 1 of the module), with this offset / c^3."""
        chain = greedy_chain(self.shift**3, self.steps)
        vector = [np.log(offset), *np.ravel(chain)]
        # P*P, P*W, W*W, then W times the earlier forms.
        factors = [(0, 0), (0, 1)] + [(1, k) for k in range(1, self.forms - 1)]
        for terms, (left, right) in enumerate(factors[: self.forms], start=2):
            vector += [*np.eye(terms)[left], *np.eye(terms)[right]]
        outputs = 3 + self.forms
        probes = np.concatenate([np.tile(vector, (outputs, 1)), np.eye(outputs)], axis=1)
        columns = self.factor(probes, self.eigenvalues) * self.slope
        fitted, *_ = np.linalg.lstsq(
            np.concatenate([columns.T, 1e-3 * np.eye(outputs)]),
            np.r_[self.target * self.slope, np.zeros(outputs)],
            rcond=None,
        )
        return np.r_[vector, fitted]

    def sizes(self, vector: Array) -> Array:
        """Residuals to equalise, in magnitude: all but the folds, which are a penalty."""
        return np.abs(self.residuals(vector, linear=False)[: -self.steps])

    def refine(self, vector: Array, rounds: int = 15) -> Array:
        """Steps 2 and 3 of the module."""
        weights = np.ones(len(self.eigenvalues) + len(self.negative) + self.steps)
        best, smallest = vector, np.inf
        for index in range(rounds + 1):
            linear = index == 0
            scale = np.sqrt(weights)
            vector = least_squares(
                lambda x, s=scale, lin=linear: np.r_[s * self.residuals(x, linear=lin), RIDGE * x],
                vector,
                jac=lambda x, s=scale, lin=linear: np.concatenate(
                    [s[:, None] * self.jacobian(x, linear=lin), RIDGE * np.eye(len(x))]
                ),
                method="lm",
                x_scale="jac",
                max_nfev=400 if linear else 30,
            ).x
            sizes = self.sizes(vector)
            if sizes.max() < smallest:
                best, smallest = vector, sizes.max()
            equalised = weights[: -self.steps]  # a view
            equalised *= sizes / sizes.max() + 0.1
            equalised /= equalised.mean()
        return best

    def unpack(self, vector: Array, floor: float) -> RootCoefficients:
        """The coefficients as `root_iteration` reads them, rounded to eight digits."""
        values = iter(float(f"{v:.8g}") for v in vector[1:])
        chain = tuple((next(values), next(values)) for _ in range(self.steps))
        forms = []
        for terms in range(2, 2 + self.forms):
            left = tuple(next(values) for _ in range(terms))
            right = tuple(next(values) for _ in range(terms))
            forms.append((left, right))
        offset = float(f"{np.exp(vector[0]) * self.shift**3:.8g}")
        return RootCoefficients(self.shift, floor, offset, chain, tuple(forms), tuple(values))


def fit_coefficients(shift: float, steps: int, forms: int, floor: float) -> RootCoefficients:
    """Coefficients for one shift with `steps` steps in the chain and `forms` quadratic forms."""
    fit = RootFit(shift, steps, forms, floor)
    found = (fit.unpack(fit.refine(fit.start(offset)), floor) for offset in START_OFFSETS)
    return min(found, key=largest_defect)


def largest_defect(coefficients: RootCoefficients) -> float:
    """max |1 - lambda f^3 - c f| over [0, 1.1] on a grid finer than the one of the fit."""
    shift = coefficients.shift
    grid = eigenvalue_grid(shift, density=4000)
    fit = RootFit(shift, len(coefficients.chain), len(coefficients.forms), coefficients.floor)
    root = fit.factor(pack(coefficients), grid)
    return float(np.abs(1 - grid * (root / shift) ** 3 - root).max())


def pack(coefficients: RootCoefficients) -> Array:
    """Inverse of `RootFit.unpack`."""
    forms = [value for pair in coefficients.forms for side in pair for value in side]
    offset = np.log(coefficients.offset / coefficients.shift**3)
    return np.r_[offset, np.ravel(coefficients.chain), forms, coefficients.output]


def format_coefficients(coefficients: RootCoefficients) -> str:
    """Source text of one table entry."""

    def row(values: Sequence[float]) -> str:
        return "(" + ", ".join(f"{v:.8g}" for v in values) + ")"

    lines = [
        "    RootCoefficients(",
        f"        shift={coefficients.shift:g}, floor={coefficients.floor:g},",
        f"        offset={coefficients.offset:.8g},",
        "        chain=(",
        *(f"            {row(pair)}," for pair in coefficients.chain),
        "        ),",
        "        forms=(",
    ]
    for left, right in coefficients.forms:
        lines += [f"            ({row(left)},", f"             {row(right)}),"]
    lines += ["        ),", "        output=(", f"            {row(coefficients.output)[1:-1]},"]
    lines += ["        ),", "    ),"]
    return "\n".join(lines)


def print_frontier(shift: float) -> None:
    """Largest defect for every program of 10 to 30 products."""
    for steps in range(2, 10):
        for forms in range(1, 6):
            if 10 <= 3 * steps + forms <= 30:
                fitted = fit_coefficients(shift, steps, forms, TABLE_PLAN[0][-1])
                largest = max(abs(v) for v in pack(fitted)[1:])
                print(
                    f"products {fitted.matrix_products:2d}: steps {steps}, forms {forms}, "
                    f"defect {largest_defect(fitted):.4f}, largest coefficient {largest:.1f}",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frontier", type=float, metavar="SHIFT")
    arguments = parser.parse_args()
    if arguments.frontier is not None:
        print_frontier(arguments.frontier)
        return
    print("ROOT_TABLE = (")
    for plan in TABLE_PLAN:
        fitted = fit_coefficients(*plan)
        print(f"    # {fitted.matrix_products} products, defect {largest_defect(fitted):.2%}")
        print(format_coefficients(fitted))
    print(")")


if __name__ == "__main__":
    main()
