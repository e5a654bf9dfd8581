"""Compute the poles and weights of `lowbit_muon.linalg.root_fractions`: prints its table.

    python -m bench.root_fractions                   the table (a second)
    python -m bench.root_fractions --frontier 0.03   largest defect by number of fractions

For given poles the sum is linear in its weights, so only the poles are searched for (variable
projection), to make the defect 1 - lambda f^3 - c f small in the largest absolute value on
[0, 1.1]. Lawson's reweighting (C. L. Lawson, 1961) turns the least-squares solution into nearly the
minimax one.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import least_squares

from bench.root_coefficients import companding_gain, eigenvalue_grid
from lowbit_muon.linalg.root_fractions import RootFractions

TABLE_PLAN = ((0.1, 4), (0.03, 6))  # shift, fractions
ROUNDS = 40

Array = NDArray[np.float64]


class FractionsFit:
    """The sum on a grid of eigenvalues, as a function of its poles."""

    def __init__(self, shift: float, density: int = 120) -> None:
        self.shift = shift
        self.eigenvalues = eigenvalue_grid(shift, density)
        self.target = companding_gain(torch.from_numpy(self.eigenvalues), shift).numpy()
        # d(defect) / d(log f)
        self.slope = 3 * self.eigenvalues * self.target**3 + shift * self.target

    def solve(self, poles: Array, weights: Array) -> tuple[Array, Array]:
        """(constant, linear and the fractions' weights; defect to first order)."""
        terms = np.stack(
            [
                np.ones_like(self.eigenvalues),
                self.eigenvalues,
                # of the same size as the others
                *(pole ** (2 / 3) / (self.eigenvalues + pole) for pole in poles),
            ],
            axis=1,
        )
        relative = terms * (self.slope / self.target)[:, None]
        found, *_ = np.linalg.lstsq(relative * weights[:, None], self.slope * weights, rcond=1e-13)
        defect = self.slope - relative @ found
        found[2:] *= poles ** (2 / 3)
        return found, defect

    def fit(self, count: int) -> RootFractions:
        """The sum of `count` fractions."""
        weights = np.ones_like(self.eigenvalues)
        # the root's own singularity is at -4/27 c^3
        logarithms = np.log(np.geomspace(self.shift**3 / 3, 0.8, count))
        best, smallest = None, np.inf
        for _ in range(ROUNDS):
            logarithms = least_squares(
                lambda x, w=weights: w * self.solve(np.exp(x), w)[1], logarithms, max_nfev=12
            ).x
            poles = np.sort(np.exp(logarithms))
            (constant, linear, *parts), _ = self.solve(poles, weights)
            fitted = RootFractions(
                self.shift,
                rounded(constant),
                rounded(linear),
                tuple(map(rounded, poles)),
                tuple(map(rounded, parts)),
            )
            sizes = np.abs(defect(fitted, self.eigenvalues))
            if sizes.max() < smallest:
                best, smallest = fitted, sizes.max()
            weights *= (sizes / sizes.max() + 0.2) ** 0.8
            weights /= weights.mean()
        assert best is not None
        return best


def rounded(value: float) -> float:
    return float(f"{value:.8g}")


def defect(fractions: RootFractions, eigenvalues: Array) -> Array:
    """1 - lambda f^3 - c f."""
    f = fractions.constant + fractions.linear * eigenvalues
    for pole, weight in zip(fractions.poles, fractions.weights, strict=True):
        f = f + weight / (eigenvalues + pole)
    return 1 - eigenvalues * f**3 - fractions.shift * f


def largest_defect(fractions: RootFractions) -> float:
    """Its largest magnitude on a grid finer than the one of the fit."""
    return float(np.abs(defect(fractions, eigenvalue_grid(fractions.shift, 4000))).max())


def format_fractions(fractions: RootFractions) -> str:
    """Source text of one table entry."""

    def row(values: tuple[float, ...]) -> str:
        return "(" + ", ".join(f"{v:.8g}" for v in values) + ")"

    return "\n".join(
        [
            f"    # {len(fractions.poles)} fractions, defect {largest_defect(fractions):.2%}",
            "    RootFractions(",
            f"        shift={fractions.shift:g},",
            f"        constant={fractions.constant:.8g}, linear={fractions.linear:.8g},",
            f"        poles={row(fractions.poles)},",
            f"        weights={row(fractions.weights)},",
            "    ),",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frontier", type=float, metavar="SHIFT")
    arguments = parser.parse_args()
    if arguments.frontier is not None:
        for count in range(2, 9):
            found = FractionsFit(arguments.frontier).fit(count)
            print(f"fractions {count}: defect {largest_defect(found):.2e}, poles {found.poles}")
        return
    print("FRACTIONS_TABLE = (")
    for shift, count in TABLE_PLAN:
        print(format_fractions(FractionsFit(shift).fit(count)))
    print(")")


if __name__ == "__main__":
    main()
