"""The spectral encoder on hosts: the root as a sum of partial fractions.

For R = M M^T / ||M||_F^2 the encoder of `linalg.spectral` is Y = f(R) M, lambda f^3 + c f = 1. That
f falls smoothly from 1/c at zero, and a few fractions come as close to it as a polynomial of 18
products (`linalg.root_iteration`):

    f(lambda) = constant + linear * lambda + sum_i weight_i / (lambda + pole_i)

An inverse of a symmetric positive definite matrix takes m^3 / 2 multiply-adds (Cholesky), as many
as one symmetric product, and ours a third more; those of a shift need nothing of each other. All
poles and weights are positive, so nothing cancels, and with Cholesky's factors rounding moves R by
little more than its own: the smallest pole is 9e-6 at c = 0.03, where rounding of R in float32 is
1e-7.

    shift                        0.1    0.03
    fractions                      4       6
    largest defect             0.15%   0.09%     |1 - lambda f^3 - c f| on [0, 1.1]

Devices keep to products: a factorisation waits for one column after the other.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class RootFractions:
    """The sum for one shift, made by `bench/root_fractions.py`; poles from the smallest on.

    Eigenvalues of R lie in [0, 1.1]; rounding may take them down to minus half the smallest pole.
    """

    shift: float
    constant: float
    linear: float
    poles: tuple[float, ...]
    weights: tuple[float, ...]

    def scaled_to(self, shift: float) -> RootFractions:
        """For a larger shift: with k = self.shift/shift its f(lambda) is k g(k^3 lambda)."""
        k = self.shift / shift
        return RootFractions(
            shift,
            k * self.constant,
            k**4 * self.linear,
            tuple(pole / k**3 for pole in self.poles),
            tuple(weight / k**2 for weight in self.weights),
        )


@functools.lru_cache(maxsize=64)
def root_fractions(shift: float) -> RootFractions | None:
    """The shortest tabulated sum that can serve `shift`; None below the smallest tabulated one."""
    for entry in FRACTIONS_TABLE:
        if entry.shift <= shift:
            return entry.scaled_to(shift)
    return None


# Printed by `python -m bench.root_fractions`, largest shift first.
# fmt: off
FRACTIONS_TABLE = (
    # 4 fractions, defect 0.15%
    RootFractions(
        shift=0.1,
        constant=0.79386681, linear=-0.093382795,
        poles=(0.00037022138, 0.0026351585, 0.024149737, 0.25391749),
        weights=(0.0011145689, 0.0085178987, 0.046065524, 0.26557438),
    ),
    # 6 fractions, defect 0.09%
    RootFractions(
        shift=0.03,
        constant=0.76201142, linear=-0.079022901,
        poles=(9.4371143e-06, 5.9515413e-05, 0.00047298852, 0.0039146728, 0.033128231, 0.31311458),
        weights=(8.791976e-05, 0.00062517262, 0.0030638454, 0.013609199, 0.059433222, 0.30505611),
    ),
)
# fmt: on
