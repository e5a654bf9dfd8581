"""Spectral companding: the encoder is the inverse of the decoder, on every part of the spectrum."""

from __future__ import annotations

import pytest
import torch
from companding import BACKEND, compand, cubic, expand, spectrum_matrix

from bench.root_coefficients import compand_singular_values, companding_gain
from lowbit_muon.linalg.spectral import decoding_operator

SHIFTS = [0.03, 0.1]
# Every direction is to come back to 2% of its own size, and to this share of the largest: the
# encoder is two products of 64 terms (V f V^T, C M), the decoder two more (Y Y^T, K Y), float32
# eigenvectors are orthogonal to 64 * 2^-24, and each leaks that much of a large direction into the
# small ones (the encoder's gain 1/shift on them is undone by the decoder's shift). It is a
# thousandth of what 4-bit codes add to every direction.
ROUNDING = 4 * 64 * 2**-24


SPECTRA = {
    "flat": torch.ones(64, dtype=torch.float64),
    "steep": torch.logspace(0, -8, 64, dtype=torch.float64),
    "power law": torch.arange(1, 65, dtype=torch.float64) ** -1.0,
    "rank 5": torch.cat([torch.ones(5), torch.zeros(59)]).double(),
    "one dominant": torch.cat([torch.ones(1), torch.full((63,), 1e-4)]).double(),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_companding_solves_the_cubic(shift: float) -> None:
    s = torch.cat([torch.zeros(1), torch.logspace(-12, 0, 200)]).double()
    y = compand_singular_values(s, shift)
    # sinh and asinh lose a few ulps of float64 on arguments up to ln(1/shift^1.5).
    torch.testing.assert_close(y**3 + shift * y, s, rtol=1e-12, atol=1e-25)


@pytest.mark.parametrize("shift", SHIFTS)
def test_gain_is_finite_and_monotone(shift: float) -> None:
    eigenvalues = torch.cat([torch.tensor([-3e-7, -1e-30, 0.0]), torch.logspace(-30, 0, 400)])
    gain = companding_gain(eigenvalues.double(), shift)
    assert bool(gain.isfinite().all())
    assert gain[:3].tolist() == pytest.approx([1 / shift] * 3)
    assert bool((gain.diff() <= 1e-12 / shift).all())


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e12])
def test_decoding_inverts_encoding_on_the_whole_spectrum(
    spectrum: str, shift: float, size: float
) -> None:
    matrix = spectrum_matrix(SPECTRA[spectrum], 100) * size
    norm = float(matrix.norm())
    decoded = cubic(compand(matrix, norm, shift, exact=True), shift).double()
    exact = matrix.double() / norm
    u, s, _ = torch.linalg.svd(exact, full_matrices=False)
    difference = (u.mT @ (decoded - exact)).norm(dim=1)
    assert bool((difference <= 0.02 * s + ROUNDING).all())


@pytest.mark.parametrize("shift", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_encoding_by_products_alone(spectrum: str, shift: float) -> None:
    """As the codec encodes; direction by direction in test_root_iteration."""
    matrix = spectrum_matrix(SPECTRA[spectrum], 100)
    decoded = cubic(compand(matrix, 1.0, shift), shift)
    # The largest defect of the three programs is 0.4%; rounding is far below it.
    assert (decoded - matrix).norm() <= 0.005


@pytest.mark.parametrize("shift", SHIFTS)
def test_decoding_operator(shift: float) -> None:
    """A positive multiple of Y Y^T + c I, c without the bias of noise, that gives M its norm."""
    columns = 100
    y = torch.stack([spectrum_matrix(values, columns) for values in SPECTRA.values()])
    y *= torch.tensor([1.0, 0.5, 1e-3, 2.0, 1.0]).view(-1, 1, 1)
    norm = torch.tensor([1.0, 1e-8, 1e12, 3.0, 0.0], dtype=torch.float64)
    noise = torch.tensor([0.0, 0.01, 0.1, 0.0, 0.0], dtype=torch.float64)
    gram = BACKEND.symmetric_product(y)
    before = gram.clone()
    operators = decoding_operator(gram, norm, noise, shift, columns, BACKEND)
    assert torch.equal(gram, before)
    # Float32 terms: the Gram matrix sums `columns` of them, A R sums 64, and a few roundings more.
    allowed = (columns + 64 + 8) * 2**-24
    for i, operator in enumerate(operators.double()):
        wide = y[i].double()
        c = shift - float(noise[i]) * (1 / 64 + 1 / columns)
        exact = wide @ wide.mT + c * torch.eye(64, dtype=torch.float64)
        exact *= norm[i] / (exact @ wide).norm()
        assert (operator - exact).norm() <= allowed * exact.norm()
        assert ((operator @ wide).norm() - norm[i]).abs() <= allowed * norm[i]


def test_zero_matrix_stays_zero() -> None:
    for norm in (0.0, 1.0):
        assert not expand(torch.zeros(4, 9), norm, 0.01).any()


def test_noise_is_taken_out_of_the_shift() -> None:
    """Averaged over white noise on Y, decoding gives back M in every direction."""
    exact = spectrum_matrix(SPECTRA["power law"], 100)
    companded = compand(exact, 1.0, 0.03)
    deviation = 0.1 * companded.square().mean().sqrt()
    biased, unbiased = torch.zeros_like(exact), torch.zeros_like(exact)
    repeats = 400
    for _ in range(repeats):
        error = deviation * torch.randn_like(companded)
        noise = error.square().sum(dtype=torch.float64)
        noisy = companded + error
        biased += cubic(noisy, 0.03) / repeats
        # as `decoding_operator` has it, but without its norm
        unbiased += cubic(noisy, 0.03 - float(noise) * (1 / 64 + 1 / 100)) / repeats
    u, s, v = torch.linalg.svd(exact.double(), full_matrices=False)
    sizes = [((u.mT @ mean.double()) * v).sum(dim=1) / s for mean in (biased, unbiased)]
    # The effect to remove: (m + n) v y relative to s, in the smallest direction.
    effect = float(deviation**2 * (64 + 100) * compand_singular_values(s[-1], 0.03) / s[-1])
    assert sizes[0][-1] > 1 + 0.5 * effect
    # What is left is the scatter of the mean, 1/sqrt(400) of one draw's.
    assert (sizes[1] - 1).abs().mean() < 0.2 * effect


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_a_thousand_feedback_steps_keep_the_spectrum(spectrum: str) -> None:
    """M <- 0.95*decode(encode(M)) + 0.05*G with G = M stays where it is, in every direction."""
    shift, decay = 0.03, 0.95
    grad = spectrum_matrix(SPECTRA[spectrum], 80)
    u, s, _ = torch.linalg.svd(grad.double(), full_matrices=False)
    current = grad
    for _ in range(1000):
        norm = float(current.norm())
        current = expand(compand(current, norm, shift), norm, shift)
        current.mul_(decay).add_(grad, alpha=1 - decay)
    difference = (u.mT @ (current.double() - grad.double())).norm(dim=1)
    # An error of one step is forgotten as the momentum is: it adds up to 1/(1 - decay) of them.
    assert bool((difference <= 0.02 * s + ROUNDING / (1 - decay)).all())
