"""An operand that is decoded panel by panel, against the matrix as a whole in float64."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit_muon import PRESETS, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.state import operands
from lowbit_muon.state.operands import Companded, Dense, Panels
from lowbit_muon.state.stored import StoredBatch, orient

CPU = torch.device("cpu")
BACKENDS = ("reference", "auto")
FORMATS = ("mulaw4", "muonq4", "linear8", "nf4", "bf16", "fp32")


@pytest.fixture(autouse=True)
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for panels of a few rows."""
    monkeypatch.setattr(operands, "SCRATCH_FLOATS", 1000)
    monkeypatch.setattr(operands, "_FEWEST_ROWS", 3)


def operand(
    shape: tuple[int, int], name: str, backend: Backend
) -> tuple[Panels, Callable[[float, float], tuple[Tensor, Tensor]]]:
    """0.9 M - 0.3 G of a stored M, and what v M + w G is: (itself, |v M| + |w G|), float64."""
    stored, grad = quantize(torch.randn(shape), PRESETS[name]), torch.randn(shape)
    m, g = orient(stored.dequantize()).double(), orient(grad).double()
    terms = Terms(0.9, grad=orient(grad).unsqueeze(0), grad_weight=-0.3)
    panels = Panels(StoredBatch([stored], backend), terms)
    return panels, lambda v, w: (v * m + w * g, abs(v) * m.abs() + abs(w) * g.abs())


def close(found: Tensor, exact: Tensor, size: Tensor, terms: int) -> None:
    """Within the rounding of sums of `terms` products, |left| |right| = `size`, and of entries.

    An entry takes 16 roundings at most: the code's level, scale and factors, norm, gradient.
    """
    assert found.shape == (1, *exact.shape)
    assert bool(((found[0].double() - exact).abs() <= (terms + 16) * 2**-24 * size).all())


# Of 40 rows with room for 4800 floats: in halves of it 14 rows, 14 and 12; in 80 columns all.
@pytest.mark.parametrize(
    ("shape", "panels"), [((40, 80), 1), ((40, 170), 3), ((170, 40), 3), ((41, 600), 11)], ids=str
)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gram_matrix_read_in_pairs_of_panels(
    backend: str,
    name: str,
    shape: tuple[int, int],
    panels: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernels = get_backend(backend, CPU)
    x, sums = operand(shape, name, kernels)
    exact, size = sums(0.9, -0.3)
    blocks: list[Tensor] = []
    product = kernels.symmetric_product

    def watched(panel: Tensor, *, out: Tensor, rounded: bool) -> Tensor:
        assert not rounded
        blocks.append(out)
        return product(panel, out=out)

    monkeypatch.setattr(kernels, "symmetric_product", watched)
    gram = x.gram()
    assert len(blocks) == panels
    close(gram, exact @ exact.mT, size @ size.mT, max(shape))
    assert torch.equal(gram, gram.mT)


@pytest.mark.parametrize("shape", [(40, 170), (170, 40)], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_products_read_panel_by_panel(backend: str, name: str, shape: tuple[int, int]) -> None:
    kernels = get_backend(backend, CPU)
    x, sums = operand(shape, name, kernels)
    exact, size = sums(0.9, -0.3)
    assert len(list(x.panels())) == 8  # of five rows
    a, v, w = torch.randn(1, 7, 40), torch.randn(1, 170, 3), torch.randn(1, 40, 3)
    out = torch.randn(1, 7, 170)
    expected = -0.5 * a[0].double() @ exact + 2 * out[0].double()
    sizes = 0.5 * a[0].double().abs() @ size + 2 * out[0].double().abs()
    found = x.multiply(a, out, alpha=torch.tensor([-0.5], dtype=torch.float64), beta=2.0)
    assert found is out
    # one sum for each panel is rounded more
    close(found, expected, sizes, 40 + 8)
    close(x.times(v), exact @ v[0].double(), size @ v[0].double().abs(), 170)
    close(x.transposed_times(w), exact.mT @ w[0].double(), size.mT @ w[0].double().abs(), 40 + 8)
    close(x.dense(), exact, size, 0)
    # squares of entries that are wrong by 16 roundings
    allowed = 2 * 17 * 2**-24 * float((exact.abs() * size).sum())
    assert float(x.squares()) == pytest.approx(float(exact.square().sum()), abs=allowed)


@pytest.mark.parametrize("name", FORMATS)
def test_it_is_scaled_and_looks_ahead_without_a_copy(name: str) -> None:
    x, sums = operand((40, 170), name, get_backend("reference", CPU))
    ahead = x.ahead(0.95, 1.0)  # 0.95 X - 0.3 G
    close(ahead.dense(), *sums(0.95 * 0.9, -(1 + 0.95) * 0.3), 0)
    x.scale(0.7)
    close(x.dense(), *sums(0.7 * 0.9, -0.7 * 0.3), 0)
    close(ahead.dense(), *sums(0.95 * 0.9, -(1 + 0.95) * 0.3), 0)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_operand_without_a_gradient_is_the_stored_matrix(backend: str, name: str) -> None:
    kernels = get_backend(backend, CPU)
    stored = quantize(torch.randn(40, 170), PRESETS[name])
    exact = 0.9 * stored.dequantize().double()
    x = Panels(StoredBatch([stored], kernels), Terms(0.9))
    close(x.dense(), exact, exact.abs(), 0)
    close(x.gram(), exact @ exact.mT, exact.abs() @ exact.abs().mT, 170)
    close(x.ahead(0.5, 1.0).dense(), 0.5 * exact, 0.5 * exact.abs(), 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_products_do_not_read_what_they_overwrite(backend: str) -> None:
    """With a beta of zero `out` may hold anything; without `out` there is nothing to add."""
    kernels = get_backend(backend, CPU)
    x, _ = operand((40, 170), "mulaw4", kernels)
    a = torch.randn(1, 7, 40)
    dense = Dense(x.dense(), kernels)
    stored = quantize(torch.randn(40, 170), PRESETS["spectral4"])
    batched = dataclasses.replace(
        stored.codes(),
        packed=stored.codes().packed.unsqueeze(0),
        scales=stored.codes().scales.unsqueeze(0),
    )
    companded = Companded(batched, kernels, rotated=True)
    for each in (x, dense, companded):
        assert each.multiply(a, torch.full((1, 7, 170), math.nan)).isfinite().all()
    matrix = dense.matrix
    found = kernels.product(a, matrix, out=torch.full((1, 7, 170), math.nan))
    assert torch.equal(kernels.product(a, matrix, beta=0.5), found)
    assert found.isfinite().all()
    square = torch.full((1, 40, 40), math.nan)
    assert kernels.symmetric_product(matrix, out=square).isfinite().all()
    codes = stored.codes()
    found = kernels.code_product(a[0], codes, out=torch.full((7, 170), math.nan))
    assert torch.equal(kernels.code_product(a[0], codes, beta=0.5), found)
    assert found.isfinite().all()
