"""The spectral encoder with products of bfloat16, where it allows them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from companding import spectrum_matrix
from rounding_backends import BACKENDS, needs_bfloat16
from test_root_iteration import SPECTRA
from torch import Tensor

from bench.closed_loop import Sequence, relative_errors
from lowbit_muon import PRESETS, QuantizedMatrix
from lowbit_muon.backends.base import Backend
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.root_iteration import ROOT_TABLE, iterate_root
from lowbit_muon.state.operands import Dense
from lowbit_muon.state.stored import StoredBatch

# The codec rounds for no smaller ones.
SHIFTS = (0.1, 0.06, 0.03)


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
    assert {e.shift: e.exact_stages for e in ROOT_TABLE} == {0.1: 1, 0.03: 3, 0.01: 4, 0.005: 5}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_direction_is_amplified_beyond_the_root(kind: str, shift: float, backend: str) -> None:
    """c f is one at most. `exact_stages` lets rounding move an eigenvalue by a sixteenth of what
    the root stands, where c f = 1 + (c f)^3 / 108; a twentieth is five times that."""
    kernels = needs_bfloat16(BACKENDS[backend]())
    x = MATRICES[kind](256)
    x /= x.norm()
    gram = kernels.symmetric_product(x, rounded=True)
    root = iterate_root(gram, shift, kernels, rounded=True)
    eigenvalues = shift * torch.linalg.eigvalsh(root.double())
    assert float(eigenvalues.min()) > 0
    assert float(eigenvalues.max()) < 1.05


def stored_and_read(x: Tensor, f: StateFormat, backend: Backend, dtype: torch.dtype) -> Tensor:
    rows, columns = x.shape
    quantized = QuantizedMatrix.zeros((rows, columns), f, seed=0, device=x.device)
    stored = StoredBatch([quantized], backend)
    norm = x.double().norm().view(1)
    stored.codec.encode(stored, Dense(x.clone().unsqueeze(0), backend), norm, None, dtype)
    stored.commit()
    return quantized.dequantize()


@pytest.mark.parametrize("name", ["spectral4", "spectral3"])
@pytest.mark.parametrize("shape", [(256, 256), (256, 640)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_error_in_closed_loop(shape: tuple[int, int], name: str, backend: str) -> None:
    """Steps of a slow steep signal and noise; the error of the last updates, stored every time.

    Rounding may add 3% to what the codes cost. Two runs of float32 whose products are summed in
    another order differ by half a percent here.
    """
    kernels = needs_bfloat16(BACKENDS[backend]())
    m, n = shape
    signal = spectrum_matrix(SPECTRA["power law"](m), n)
    grads = torch.stack([signal + 0.3 * torch.randn(m, n) / (m * n) ** 0.5 for _ in range(40)])
    sequence = Sequence.of(grads, range(36, 40))
    errors = {
        dtype: float(
            relative_errors(
                sequence.closed(
                    lambda x, dtype=dtype: stored_and_read(  # type: ignore[misc]
                        x, PRESETS[name], kernels, dtype
                    )
                ),
                sequence.updates,
            ).mean()
        )
        for dtype in (torch.float32, torch.float16)
    }
    assert errors[torch.float16] != errors[torch.float32]
    assert errors[torch.float16] <= 1.03 * errors[torch.float32]
