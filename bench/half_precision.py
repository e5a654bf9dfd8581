"""Error of Newton-Schulz in half precision, emulated on a CPU, against the polynomial in float64.

    python -m bench.half_precision

Relative errors in the Frobenius norm of what a device's step takes (the Gram form with restarts)
and of the standard form in the same dtype, five steps, 128 x 192.
"""

from __future__ import annotations

import math

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.coefficients import (
    NS_COEFFICIENTS,
    composed_polynomial,
    resolve_coefficients,
)
from lowbit_muon.linalg.newton_schulz import orthogonalize_half, standard_form

SHAPE, STEPS = (128, 192), 5


def spectra() -> dict[str, Tensor]:
    """Singular values [m] of norm one."""
    m = SHAPE[0]
    values = {
        "1/i": 1 / torch.arange(1, m + 1, dtype=torch.float64),
        "equal": torch.ones(m, dtype=torch.float64),
        "rank 8": (torch.arange(m) < 8).double(),
    }
    return {name: s / s.norm() for name, s in values.items()}


def main() -> None:
    """Print the table."""
    table = Table(title=f"error after {STEPS} steps, {SHAPE[0]} x {SHAPE[1]}")
    for heading in ("coefficients", "dtype", "spectrum", "Gram, restarts", "standard"):
        table.add_column(heading)
    m, n = SHAPE
    unit = 1 / math.sqrt(m * n)
    generator = torch.Generator().manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(m, m, generator=generator, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, m, generator=generator, dtype=torch.float64))
    backend = Backend()
    for name in NS_COEFFICIENTS:
        coefficients = resolve_coefficients(name, STEPS)
        for dtype in (torch.float16, torch.bfloat16):
            for kind, s in spectra().items():
                exact = u * (s * composed_polynomial(s.square(), coefficients)) @ v.mT
                x = (u * s @ v.mT / unit).to(dtype)[None]
                gram = orthogonalize_half(x, torch.ones(1), coefficients, backend, unit=unit)
                standard = standard_form(x, coefficients, backend, unit=unit)
                errors = (
                    f"{float((found[0].double() - exact).norm() / exact.norm()):.1e}"
                    for found in (gram, standard)
                )
                table.add_row(name, str(dtype).removeprefix("torch."), kind, *errors)
    Console().print(table)


if __name__ == "__main__":
    main()
