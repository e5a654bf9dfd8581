"""The spectral encoder with products of bfloat16 and float16, where it allows them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import pytest
import torch
from companding import spectrum_matrix
from device_reference import DeviceReference
from rounding_backends import BACKENDS, RoundingDevice, needs_bfloat16
from test_root_iteration import SPECTRA
from torch import Tensor

from bench.capture import load
from bench.closed_loop import Sequence, relative_errors
from lowbit_muon import PRESETS, QuantizedMatrix
from lowbit_muon.backends.base import Backend
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.root_iteration import ROOT_TABLE, iterate_root
from lowbit_muon.state.codecs import spectral
from lowbit_muon.state.operands import Dense
from lowbit_muon.state.stored import StoredBatch

# The codec rounds to bfloat16 for no smaller ones, and to float16 for 0.005, too, where the Gram
# matrix of float32 alone moves eigenvalues by more than the root stands.
SHIFTS = (0.1, 0.06, 0.03)
ALL_BACKENDS: dict[str, Callable[[], Backend]] = {**BACKENDS, "device": RoundingDevice}
CASES = [
    *itertools.product(BACKENDS, SHIFTS),
    *itertools.product(["device"], (*SHIFTS, 0.01)),
]


def equal_rows(count: int) -> Callable[[int], Tensor]:
    """Whose Gram matrix has its largest possible elements beside the diagonal."""

    def build(m: int) -> Tensor:
        x = torch.zeros(m, m + 4)
        x[:count, 0] = 1
        return x + 1e-3 * torch.randn(x.shape) / m

    return build


MATRICES: dict[str, Callable[[int], Tensor]] = {
    **{
        name: lambda m, values=values: spectrum_matrix(values(m), m + 44)  # type: ignore[misc]
        for name, values in SPECTRA.items()
    },
    "two equal rows": equal_rows(2),
    "ten equal rows": equal_rows(10),
    "equal rows": equal_rows(256),
    "opposite rows": lambda m: torch.cat([torch.randn(m // 2, m)] * 2) * torch.ones(m, 1),
}


def test_stages_that_are_kept_in_float32() -> None:
    for dtype, stages in ((torch.bfloat16, (1, 3, 4, 5)), (torch.float16, (1, 2, 4, 4))):
        assert tuple(entry.exact_stages(dtype) for entry in ROOT_TABLE) == stages


def gram_matrix(x: Tensor, backend: Backend) -> Tensor:
    """As the codec takes it of x, whose norm is one."""
    if not backend.asynchronous:
        return backend.symmetric_product(x, rounded=True)
    half = (x * x.numel() ** 0.5).half()
    return backend.symmetric_product(half, alpha=1 / x.numel(), out=torch.empty(len(x), len(x)))


@pytest.mark.parametrize(("backend", "shift"), CASES)
@pytest.mark.parametrize("kind", MATRICES)
def test_no_direction_is_amplified_beyond_the_root(kind: str, shift: float, backend: str) -> None:
    """c f is one at most. `exact_stages` lets rounding move an eigenvalue by a sixteenth of what
    the root stands, where c f = 1 + (c f)^3 / 108; a twentieth is five times that. Float32 sums of
    the Gram matrix, which are no part of the root, move it by as much as BLAS lets them: with c =
    0.01 some MKLs took 1.03 to 1.07. From (c f)^3 lambda/c^3 + c f = 1, by (1.05/c)^3 times their
    error's norm."""
    kernels = needs_bfloat16(ALL_BACKENDS[backend]())
    x = MATRICES[kind](256)
    x /= x.norm()
    gram, moved = gram_matrix(x, kernels), 0.0
    if kernels.asynchronous:
        half = (x * x.numel() ** 0.5).half().double()
        error = gram.double() - half @ half.mT / x.numel()
        moved = float(torch.linalg.matrix_norm(error, 2)) * (1.05 / shift) ** 3
    root = iterate_root(gram, shift, kernels, rounded=True)
    eigenvalues = shift * torch.linalg.eigvalsh(root.double())
    assert float(eigenvalues.min()) > 0
    assert float(eigenvalues.max()) < 1.05 + moved


def stored_and_read(x: Tensor, f: StateFormat, backend: Backend, dtype: torch.dtype) -> Tensor:
    rows, columns = x.shape
    quantized = QuantizedMatrix.zeros((rows, columns), f, seed=0, device=x.device)
    stored = StoredBatch([quantized], backend)
    norm = x.double().norm().view(1)
    stored.codec.encode(stored, Dense(x.clone().unsqueeze(0), backend), norm, None, dtype)
    stored.commit()
    return quantized.dequantize()


def error_of_rounding(sequence: Sequence, state_format: StateFormat, backend: Backend) -> float:
    """The updates' error in closed loop, relative to what it is without rounded products."""

    def error(kernels: Backend, dtype: torch.dtype) -> float:
        found = sequence.closed(lambda x: stored_and_read(x, state_format, kernels, dtype))
        return float(relative_errors(found, sequence.updates).mean())

    plain = DeviceReference() if backend.asynchronous else backend
    rounded = error(backend, torch.float16)
    exact = error(plain, torch.float16 if backend.asynchronous else torch.float32)
    assert rounded != exact
    return rounded / exact


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ((256, 256), "spectral3"),
        ((256, 256), "spectral4"),
        pytest.param((256, 640), "spectral4", marks=pytest.mark.long),
        pytest.param((256, 640), "spectral3", marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("backend", ALL_BACKENDS)
def test_error_in_closed_loop(shape: tuple[int, int], name: str, backend: str) -> None:
    """Steps of a slow steep signal and noise; the error of the last updates, stored every time.

    Rounding may add 3% to what the codes cost. Two runs of float32 whose products are summed in
    another order differ by half a percent here.
    """
    kernels = needs_bfloat16(ALL_BACKENDS[backend]())
    m, n = shape
    signal = spectrum_matrix(SPECTRA["power law"](m), n)
    grads = torch.stack([signal + 0.3 * torch.randn(m, n) / (m * n) ** 0.5 for _ in range(40)])
    sequence = Sequence.of(grads, range(36, 40))
    for shift in (0.03, 0.1):
        state_format = dataclasses.replace(PRESETS[name], spectral_shift=shift)
        assert error_of_rounding(sequence, state_format, kernels) <= 1.03


@pytest.mark.parametrize("name", ["spectral4", "spectral3"])
@pytest.mark.parametrize("shift", [0.03, 0.1])
def test_error_in_closed_loop_of_recorded_gradients(
    name: str, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of both matrices, of 64 rows; those of float32 summed in another order differ by up
    to 1.5%."""
    monkeypatch.setattr(spectral, "ROUNDED_ROWS", 1)
    state_format = dataclasses.replace(PRESETS[name], spectral_shift=shift)
    ratios = [
        error_of_rounding(Sequence.of(grads, range(60, 80)), state_format, RoundingDevice())
        for grads in load().values()
    ]
    assert sum(ratios) / len(ratios) <= 1.03
