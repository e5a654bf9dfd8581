"""The root as a sum of fractions: against the cubic that it solves, on scalars and matrices."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from companding import BACKEND, cubic, spectrum_matrix
from test_root_iteration import SPECTRA, decoding_error, gram
from torch import Tensor

from bench.root_coefficients import LARGEST_EIGENVALUE
from bench.root_fractions import TABLE_PLAN, FractionsFit, defect, largest_defect
from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.root_fractions import FRACTIONS_TABLE, RootFractions, root_fractions
from lowbit_muon.linalg.spectral import encoding_operator

# Of the table, as the module's docstring has it.
DEFECT = 0.0016
SHIFTS = (0.03, 0.05, 0.1, 0.5)


def fractions_for(shift: float) -> RootFractions:
    found = root_fractions(shift)
    assert found is not None
    return found


def sum_root(matrix: Tensor, f: RootFractions, kernels: Backend) -> Tensor:
    return kernels.partial_fractions(matrix, f.constant, f.linear, f.poles, f.weights)


def rounding(fractions: RootFractions) -> float:
    """What rounding may move a decoded matrix of norm one by, in any direction.

    Cholesky's factor is that of a matrix which differs from R + p I by a few units of float32; so
    a direction with an eigenvalue of about zero is divided by p + e instead of p, and its root is
    off by the share e/p of the first fraction's part. What is decoded is at most 2 c times that.
    """
    e = 8 * 2.0**-24
    pole, weight = fractions.poles[0], fractions.weights[0]
    return 2 * fractions.shift * weight / pole * e / pole


@pytest.mark.parametrize("shift", SHIFTS)
def test_defect_on_the_whole_spectrum(shift: float) -> None:
    logarithmic = np.r_[0, np.logspace(-14, 0, 20_000)]
    eigenvalues = np.r_[logarithmic, np.linspace(0, LARGEST_EIGENVALUE, 20_000)]
    errors = defect(fractions_for(shift), eigenvalues)
    assert np.abs(errors).max() <= DEFECT
    # Amplification and loss balance over the decades above the shift's own scale.
    assert errors[: len(logarithmic)][logarithmic >= shift**3].mean() >= -0.1 * DEFECT


@pytest.mark.parametrize("entry", FRACTIONS_TABLE, ids=lambda e: str(e.shift))
def test_nothing_cancels_and_rounding_is_small_beside_the_poles(entry: RootFractions) -> None:
    assert min(entry.weights) > 0
    assert list(entry.poles) == sorted(entry.poles)
    # of a Gram matrix of trace one, as `bench.root_coefficients` has it
    assert entry.poles[0] > 30 * 3e-7


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows", [1, 2, 64, 65, 400])
def test_decoding_inverts_encoding(spectrum: str, shift: float, rows: int) -> None:
    matrix = spectrum_matrix(SPECTRA[spectrum](rows), rows + rows // 2 + 1)
    fractions = fractions_for(shift)
    s, errors = decoding_error(matrix, sum_root(gram(matrix), fractions, BACKEND), shift)
    assert bool((errors <= 2 * DEFECT * s + rounding(fractions)).all())


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "ones": lambda m: torch.ones(m, m + 9),
    "equal rows": lambda m: torch.randn(1, m + 9) + 1e-3 * torch.randn(m, m + 9),
    "rows in pairs": lambda m: torch.randn(-(-m // 2), m).repeat(2, 1)[:m],
    "rows of all sizes": lambda m: torch.randn(m, m + 9) * torch.logspace(0, -6, m).unsqueeze(1),
    "columns of all sizes": lambda m: torch.randn(m, m + 9) * torch.logspace(0, -6, m + 9),
    "one row": lambda m: torch.cat([torch.ones(1, m), torch.zeros(m - 1, m)]),
    "zeros": lambda m: torch.zeros(m, m),
}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("rows", [5, 130, 300])
def test_the_root_is_positive_and_amplifies_nothing(kind: str, shift: float, rows: int) -> None:
    """c f is one at most, also where rounding is all that a direction has."""
    x = MATRICES[kind](rows)
    x /= x.norm().clamp_min(1)
    root = sum_root(gram(x), fractions_for(shift), BACKEND)
    assert torch.equal(root, root.mT)
    eigenvalues = shift * torch.linalg.eigvalsh(root.double())
    assert float(eigenvalues.min()) > 0
    # Rounding of R may take an eigenvalue to -3e-7, where the root is 1 + 3e-7/(c^3) at most.
    assert float(eigenvalues.max()) < 1 + DEFECT + 3e-7 / shift**3
    decoded = cubic(root @ x, shift)
    assert float((decoded - x).norm()) <= 2 * DEFECT + rounding(fractions_for(shift))


def test_in_float64_and_by_the_reference() -> None:
    matrix = gram(spectrum_matrix(SPECTRA["power law"](70), 90))
    fractions = fractions_for(0.03)
    wide = sum_root(matrix.double(), fractions, BACKEND)
    assert wide.dtype == torch.float64
    values, vectors = torch.linalg.eigh(matrix.double())
    f = fractions.constant + fractions.linear * values
    for pole, weight in zip(fractions.poles, fractions.weights, strict=True):
        f = f + weight / (values + pole)
    exact = (vectors * f) @ vectors.mT
    # eigenvectors and inverses of float64, condition 1e5
    torch.testing.assert_close(wide, exact, rtol=1e-8, atol=1e-8)
    for kernels in (BACKEND, Backend()):
        found = sum_root(matrix, fractions, kernels)
        assert float((found - exact).norm() / exact.norm()) < rounding(fractions) / 0.03


def test_hosts_sum_and_devices_multiply() -> None:
    """Below the smallest shift of the table hosts multiply, too."""
    matrix = gram(spectrum_matrix(SPECTRA["power law"](40), 60)).unsqueeze(0)
    before = matrix.clone()
    found = encoding_operator(matrix, 0.03, BACKEND)
    assert torch.equal(found, sum_root(before, fractions_for(0.03), BACKEND))
    assert root_fractions(0.0299) is None
    iterated = encoding_operator(before.clone(), 0.02, BACKEND)
    assert bool(iterated.isfinite().all())


def test_scaling_to_a_larger_shift() -> None:
    eigenvalues = np.logspace(-9, 0, 50)
    entry = FRACTIONS_TABLE[-1]
    assert root_fractions(entry.shift) == entry.scaled_to(entry.shift) == entry
    errors = defect(entry.scaled_to(0.06), eigenvalues)
    np.testing.assert_allclose(errors, defect(entry, eigenvalues / 8), atol=1e-12)


@pytest.mark.parametrize("plan", TABLE_PLAN, ids=str)
def test_script_reproduces_the_table(plan: tuple[float, int]) -> None:
    """The poles differ with the BLAS in the third digit: the fit stops in a flat valley."""
    shift, count = plan
    entry = next(entry for entry in FRACTIONS_TABLE if entry.shift == shift)
    assert len(entry.poles) == count
    fitted = FractionsFit(shift).fit(count)
    assert 1 / 1.2 < largest_defect(fitted) / largest_defect(entry) < 1.2
