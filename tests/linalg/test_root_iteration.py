"""The matmul-only encoder: against the exact one on scalars and matrices, and under feedback."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from companding import BACKEND, compand, cubic, exact_operator, expand, spectrum_matrix
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.root_coefficients import (
    LARGEST_EIGENVALUE,
    TABLE_PLAN,
    RootFit,
    fit_coefficients,
    largest_defect,
    pack,
)
from lowbit_muon import PRESETS, orthogonalize, quantize
from lowbit_muon.backends.base import Backend
from lowbit_muon.formats.state_format import SMALLEST_SHIFT
from lowbit_muon.linalg.root_iteration import (
    ROOT_TABLE,
    RootCoefficients,
    iterate_root,
    root_coefficients,
)
from lowbit_muon.state.codecs import spectral

# What the docstring of `iterate_root` promises; the encoder needs 2%.
DEFECT = 0.01
TABULATED = [entry.shift for entry in ROOT_TABLE]
SHIFTS = [*TABULATED, 0.007, 0.02, 0.05, 0.5]


def test_formats_take_the_shifts_that_have_a_program() -> None:
    assert min(TABULATED) == SMALLEST_SHIFT


def scalars(eigenvalues: Tensor, shift: float) -> Tensor:
    """f at the eigenvalues: the encoder of a batch of 1 x 1 matrices."""
    return iterate_root(eigenvalues.reshape(-1, 1, 1), shift, BACKEND).flatten()


def defect(eigenvalues: Tensor, shift: float) -> Tensor:
    f = scalars(eigenvalues, shift)
    return 1 - eigenvalues * f**3 - shift * f


def gram(matrix: Tensor) -> Tensor:
    return BACKEND.symmetric_product(matrix)


def padded(values: list[float], count: int) -> Tensor:
    return torch.tensor((values + [0.0] * count)[:count], dtype=torch.float64)


SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda m: torch.ones(m, dtype=torch.float64),
    "steep": lambda m: torch.logspace(0, -8, m, dtype=torch.float64),
    "four decades": lambda m: torch.logspace(0, -4, m, dtype=torch.float64),
    "power law": lambda m: torch.arange(1, m + 1, dtype=torch.float64) ** -1.0,
    "rank 20": lambda m: padded([1.0] * 20, m),
    "rank one": lambda m: padded([1.0], m),
    "four values": lambda m: padded([0.6**0.5, 0.25**0.5, 0.1**0.5, 0.05**0.5], m),
    "one dominant": lambda m: torch.cat([torch.ones(1), torch.full((m - 1,), 1e-4)]).double(),
}


def rounding(shift: float) -> float:
    """What rounding may move a decoded matrix of norm one by, in any direction.

    Each product leaves about one unit of float32 in W = c C, whose norm is about one, and first
    order perturbation theory turns an error of C between the largest direction and any other into
    the same error of the decoded matrix. Four units for each product; up to 2.8 were measured, over
    40 seeds, 7 sizes and all spectra.
    """
    return 4 * root_coefficients(shift).matrix_products * 2**-24 / shift


def decoding_error(matrix: Tensor, operator: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """(singular values, norm of the decoded matrix's error in each left singular direction)."""
    decoded = cubic(operator @ matrix, shift).double()
    u, s, _ = torch.linalg.svd(matrix.double(), full_matrices=False)
    return s, (u.mT @ (decoded - matrix.double())).norm(dim=1)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_root_within_a_hundredth_on_the_whole_spectrum(shift: float, dtype: torch.dtype) -> None:
    logarithmic = torch.logspace(-14, 0, 20_000, dtype=torch.float64)
    linear = torch.linspace(0, LARGEST_EIGENVALUE, 20_000, dtype=torch.float64)
    eigenvalues = torch.cat([logarithmic, linear]).to(dtype)
    f = scalars(eigenvalues, shift).double()
    errors = 1 - eigenvalues.double() * f**3 - shift * f
    assert float(errors.abs().max()) <= DEFECT
    # Amplification and loss balance over the decades above the shift's own scale.
    resolved = (logarithmic >= shift**3).nonzero().flatten()
    if len(resolved):
        assert float(errors[resolved].mean()) >= -0.1 * DEFECT


@pytest.mark.parametrize("entry", ROOT_TABLE, ids=lambda e: str(e.shift))
def test_eigenvalues_below_zero_stay_bounded(entry: RootCoefficients) -> None:
    """The bound that `RootCoefficients.floor` states."""
    eigenvalues = -torch.linspace(0, 1, 1001, dtype=torch.float64) * entry.floor
    root = entry.shift * scalars(eigenvalues, entry.shift)
    assert float(root.min()) > 0
    assert float(root.max()) < 3


@pytest.mark.parametrize("shift", TABULATED)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows", [1, 2, 64, 400])
def test_decoding_inverts_encoding(spectrum: str, shift: float, rows: int) -> None:
    matrix = spectrum_matrix(SPECTRA[spectrum](rows), rows + rows // 2 + 1)
    s, errors = decoding_error(matrix, iterate_root(gram(matrix), shift, BACKEND), shift)
    # Where the rounding of the Gram matrix is not small beside the eigenvalue, the root is that of
    # another eigenvalue, and only the absolute bound says something.
    assert bool((errors <= DEFECT * s + rounding(shift)).all())


def test_large_matrix() -> None:
    matrix = spectrum_matrix(SPECTRA["four decades"](1024), 1024)
    s, errors = decoding_error(matrix, iterate_root(gram(matrix), 0.03, BACKEND), 0.03)
    assert bool((errors <= DEFECT * s + rounding(0.03)).all())


@pytest.mark.parametrize("shift", TABULATED)
def test_zero_matrix_and_empty_ones(shift: float) -> None:
    root = iterate_root(torch.zeros(5, 5), shift, BACKEND)
    # Products of diagonal matrices stay diagonal exactly.
    assert not (root - root.diagonal().diag()).any()
    assert bool(((shift * root.diagonal() - 1).abs() <= DEFECT).all())
    assert iterate_root(torch.zeros(0, 0), shift, BACKEND).shape == (0, 0)
    assert iterate_root(torch.zeros(0, 3, 3), shift, BACKEND).shape == (0, 3, 3)


def test_batch_is_the_matrices_one_by_one() -> None:
    matrices = [spectrum_matrix(make(24), 40) for make in SPECTRA.values()]
    batch = gram(torch.stack(matrices))
    together = iterate_root(batch, 0.03, BACKEND)
    for matrix, root in zip(matrices, together, strict=True):
        s, errors = decoding_error(matrix, root, 0.03)
        assert bool((errors <= DEFECT * s + rounding(0.03)).all())


def test_result_is_symmetric_and_the_input_unchanged() -> None:
    gram_matrix = gram(spectrum_matrix(SPECTRA["steep"](50), 60)).requires_grad_()
    before = gram_matrix.detach().clone()
    root = iterate_root(gram_matrix, 0.01, BACKEND)
    assert torch.equal(root, root.mT)
    assert torch.equal(gram_matrix, before)
    assert not root.requires_grad


class CountOperations(TorchDispatchMode):
    """Counts m x m products and whatever would wait for the device; notes the precision."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.precisions: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "item", "nonzero", "is_nonzero"), name
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.products += 1
            self.precisions.add(torch.backends.cuda.matmul.fp32_precision)
            self.precisions.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entry", ROOT_TABLE, ids=lambda e: str(e.shift))
def test_number_of_products_and_no_synchronisation(entry: RootCoefficients) -> None:
    gram_matrix = gram(spectrum_matrix(SPECTRA["flat"](8), 8))
    with CountOperations() as count:
        iterate_root(gram_matrix, entry.shift, Backend())
    assert count.products == entry.matrix_products


PRECISION_SETTINGS = (
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "pass",
)


def test_products_are_taken_in_full_precision() -> None:
    """Whatever the process allows and however it says so; each in a child of a process of its own,
    which torch's switches outlive."""
    program = f"""
import os, sys; sys.path.insert(0, "tests/linalg")
import torch
import torch._dynamo  # which every child would import for its optimizer
from lowbit_muon import Muon
from lowbit_muon.backends.modes import float32_products
from test_root_iteration import *
torch.set_num_threads(1)
def allowed():
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
def check():
    before = allowed()
    with CountOperations() as count:
        iterate_root(torch.eye(8) / 8, 0.03, Backend())
    assert count.precisions == {{"ieee"}}, count.precisions
    assert allowed() == before, allowed()
    try:
        with float32_products():
            raise RuntimeError("inside")
    except RuntimeError as error:
        assert str(error) == "inside"
    assert allowed() == before, allowed()
    for backend in ("auto", "reference"):
        weight = torch.nn.Parameter(torch.randn(4, 6))
        weight.grad = torch.randn(4, 6)
        Muon([weight], backend=backend).step()
for setting in {PRECISION_SETTINGS}:
    if os.fork() == 0:
        exec(setting)
        check()
        os._exit(0)
    assert os.wait()[1] == 0, setting
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_table_serves_every_shift_with_the_cheapest_program() -> None:
    assert sorted(TABULATED, reverse=True) == TABULATED
    products = [entry.matrix_products for entry in ROOT_TABLE]
    assert products == sorted(products)
    assert root_coefficients(0.03).shift == 0.03
    assert root_coefficients(0.0299).shift == 0.01
    assert root_coefficients(7).shift == TABULATED[0]


@pytest.mark.parametrize("shift", [0.0049, 0.0, -1.0, float("nan"), float("inf"), "0.1"])
def test_bad_shift(shift: object) -> None:
    with pytest.raises(ValueError, match=r"shift: expected a number >= 0.005"):
        iterate_root(torch.eye(2) / 2, shift, BACKEND)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (1, 2, 3, 3)])
def test_bad_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="gram_matrix: expected"):
        iterate_root(torch.zeros(shape), 0.03, BACKEND)


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="gram_matrix: expected float32 or float64"):
        iterate_root(torch.zeros(3, 3, dtype=torch.bfloat16), 0.03, BACKEND)


@pytest.mark.parametrize("entry", ROOT_TABLE, ids=lambda e: str(e.shift))
def test_scalar_program_of_the_fit_is_the_matrix_program(entry: RootCoefficients) -> None:
    fit = RootFit(entry.shift, len(entry.chain), len(entry.forms), entry.floor)
    root = fit.factor(pack(entry), fit.eigenvalues)
    by_matrix = entry.shift * scalars(torch.from_numpy(fit.eigenvalues), entry.shift).numpy()
    # Different order of operations in float64; the chain's cancellations (H >= 0.18 from terms of
    # about 2) and coefficients up to 8 leave far more than this.
    np.testing.assert_allclose(by_matrix, root, rtol=1e-11)


@pytest.mark.long
@pytest.mark.parametrize("shift", [0.1, 0.01])
def test_script_reproduces_the_table(shift: float) -> None:
    """A fit from scratch is as good as the table; of other shifts it takes minutes.

    The coefficients themselves differ with the BLAS: the fit stops in a flat valley. The defects
    it reached with three instruction sets of OpenBLAS were within a fifth of each other.
    """
    entry = root_coefficients(shift)
    plan = next(plan for plan in TABLE_PLAN if plan[0] == shift)
    fitted = fit_coefficients(*plan)
    assert (fitted.shift, fitted.floor) == (entry.shift, entry.floor)
    assert fitted.matrix_products == entry.matrix_products
    assert 1 / 1.5 < largest_defect(fitted) / largest_defect(entry) < 1.5


def test_table_follows_the_plan() -> None:
    found = [(e.shift, len(e.chain), len(e.forms), e.floor) for e in ROOT_TABLE]
    assert found == list(TABLE_PLAN)


# Of the others, `make fuzz`.
FEEDBACK = ("flat", "four decades", "rank one")


@pytest.mark.parametrize(
    ("spectrum", "shift"),
    [
        *(
            pytest.param(name, 0.03, marks=[] if name in FEEDBACK else [pytest.mark.long])
            for name in SPECTRA
        ),
        ("steep", 0.01),
    ],
)
def test_a_thousand_feedback_steps(spectrum: str, shift: float) -> None:
    """M <- 0.95*decode(encode(M)) + 0.05*G with G = M keeps every direction.

    With a gain of 1 - E a step, a direction settles where (1 - 0.95 (1 - E)) M = 0.05 G, so its
    size is off by at most E*19/(1 - E*19). Rounding is forgotten as the momentum is.
    """
    decay = 0.95
    grad = spectrum_matrix(SPECTRA[spectrum](48), 60)
    u, s, _ = torch.linalg.svd(grad.double(), full_matrices=False)
    current = grad
    for _ in range(1000):
        norm = float(current.norm())
        current = expand(compand(current, norm, shift), norm, shift)
        current.mul_(decay).add_(grad, alpha=1 - decay)
    difference = (u.mT @ (current.double() - grad.double())).norm(dim=1)
    # Keeping the norm divides by the gain of the large directions, which doubles the error.
    gain_error = 2 * largest_defect(root_coefficients(shift)) * decay / (1 - decay)
    allowed = gain_error / (1 - gain_error) * s + rounding(shift) / (1 - decay)
    assert bool((difference <= allowed).all())


def test_quantised_feedback_is_as_good_as_with_the_exact_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """300 steps of a momentum in 4 bits, of a fixed low-rank signal and fresh noise."""
    rows, columns, decay = 64, 128, 0.95
    left, _ = torch.linalg.qr(torch.randn(rows, 8))
    right, _ = torch.linalg.qr(torch.randn(columns, 8))
    signal = (left * torch.logspace(0, -2, 8)) @ right.mT
    encoders = {
        "exact": lambda gram, shift, backend, **others: exact_operator(gram[0], shift).unsqueeze(0),
        "products": lambda gram, shift, backend, **others: iterate_root(gram, shift, backend),
        "fractions": spectral.encoding_operator,
    }
    state_format = dataclasses.replace(PRESETS["spectral4"], spectral_shift=0.03)
    stored = {name: quantize(torch.zeros(rows, columns), state_format) for name in encoders}
    momentum = torch.zeros(rows, columns)
    for _ in range(300):
        grad = signal + 0.3 * torch.randn(rows, columns) / (rows * columns) ** 0.5
        momentum.mul_(decay).add_(grad, alpha=1 - decay)
        for name, encoder in encoders.items():
            monkeypatch.setattr(spectral, "encoding_operator", encoder)
            updated = stored[name].dequantize().mul_(decay).add_(grad, alpha=1 - decay)
            stored[name] = quantize(updated, state_format)
    update = orthogonalize(momentum)
    spectrum = torch.linalg.svdvals(momentum)
    errors = {}
    for name, matrix in stored.items():
        decoded = matrix.dequantize()
        errors[name] = float((orthogonalize(decoded) - update).norm() / update.norm())
        sizes = torch.linalg.svdvals(decoded) / spectrum
        # Four-bit noise moves the spectrum itself, by 0.74 to 1.59 over 30 seeds.
        assert float(sizes.min()) > 0.6, name
        assert float(sizes.max()) < 1.8, name
    # The ratio was 0.94 to 1.04 over 30 seeds: the encoders leave different quantisation noise.
    assert errors["products"] < 1.1 * errors["exact"]
    assert errors["fractions"] < 1.1 * errors["exact"]
