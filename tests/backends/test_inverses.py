"""`Backend.partial_fractions` against float64, for all sizes, levels and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu.adapter import set_isa, supported_isas, unavailable_reason

CPU = torch.device("cpu")
POLES, WEIGHTS = (1e-4, 0.02, 0.5, 1.0, 3.0), (2e-4, 0.1, 0.2, -0.3, 1.0)
SUM = (0.5, -0.25, POLES, WEIGHTS)
# Leaves of 64, one more, halves that are no whole strips, several levels.
SIZES = (1, 2, 3, 16, 17, 63, 64, 65, 96, 127, 128, 129, 200, 259, 300)

needs_extension = pytest.mark.skipif(
    unavailable_reason() is not None, reason="the C++ extension was not built"
)


def positive(size: int, *batch: int) -> Tensor:
    """A Gram matrix of trace one and of half the rank."""
    x = torch.randn(*batch, size, max(1, size // 2))
    gram = x @ x.mT
    gram = gram.tril() + gram.tril(-1).mT
    return gram / gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[..., None, None]


def exact(x: Tensor) -> Tensor:
    eye, wide = torch.eye(x.shape[-1], dtype=torch.float64), x.double()
    found = 0.5 * eye - 0.25 * wide
    for pole, weight in zip(POLES, WEIGHTS, strict=True):
        found = found + weight * torch.linalg.inv(wide + pole * eye)
    return found


def check(found: Tensor, x: Tensor) -> None:
    """Norm-wise: the inverse of the smallest pole is off by its condition, 1/1e-4, times a few
    units of float32 (Higham, Accuracy and Stability, theorem 14.1, without the dimension: rounding
    errors average out)."""
    wanted = exact(x)
    bound = 8 * 2.0**-24 / POLES[0] * float(torch.linalg.matrix_norm(wanted, 2).amax())
    assert float(torch.linalg.matrix_norm(found.double() - wanted, 2).amax()) <= bound
    assert torch.equal(found, found.mT)
    assert found.is_contiguous()


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "cpu" and unavailable_reason() is not None:
        pytest.skip("the C++ extension was not built")
    return get_backend(request.param, CPU)


@pytest.mark.parametrize("size", SIZES)
def test_all_sizes(size: int, backend: Backend) -> None:
    x = positive(size)
    before = x.clone()
    found = backend.partial_fractions(x, *SUM)
    assert torch.equal(x, before)
    check(found, x)


@needs_extension
@pytest.mark.parametrize("isa", supported_isas() if unavailable_reason() is None else [])
def test_all_levels(isa: str) -> None:
    before = supported_isas()[-1]
    set_isa(isa)
    try:
        for size in (17, 64, 150):
            x = positive(size)
            found = get_backend("cpu", CPU).partial_fractions(x, *SUM)
            check(found, x)
    finally:
        set_isa(before)


@needs_extension
@pytest.mark.parametrize("size", [40, 260, 1040])
def test_bits_do_not_depend_on_threads_or_batch(size: int) -> None:
    backend = get_backend("cpu", CPU)
    x = positive(size, *(() if size > 1000 else (3,)))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(backend.partial_fractions(x, *SUM))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    for matrix, together in zip(x, found[0], strict=True) if x.ndim == 3 else ():
        alone = backend.partial_fractions(matrix, *SUM)
        assert torch.equal(alone, together)


def test_strides_and_dtypes(backend: Backend) -> None:
    x = positive(70)
    plain = backend.partial_fractions(x, *SUM)
    wide = torch.zeros(70, 99)
    wide[:, :70] = x
    spread = torch.zeros(140, 70).T
    spread[:, ::2] = x
    for view in (wide[:, :70], spread[:, ::2], x.T.contiguous().T):
        found = backend.partial_fractions(view, *SUM)
        assert torch.equal(found, plain)
    double = backend.partial_fractions(x.double(), *SUM)
    # float64, condition 1e4
    torch.testing.assert_close(double, exact(x), rtol=1e-10, atol=1e-10)


def test_nothing_to_do(backend: Backend) -> None:
    for shape in ((0, 0), (0, 3, 3), (2, 0, 0)):
        assert backend.partial_fractions(torch.zeros(shape), *SUM).shape == shape
    x = torch.full((3, 3), 0.5)
    assert torch.equal(backend.partial_fractions(x, 2.0, -1.0, (), ()), 2 * torch.eye(3) - x)


def test_refusals(backend: Backend) -> None:
    x = torch.eye(3)
    with pytest.raises(ValueError, match=r"^x: expected square matrices, got shape \(3, 4\)$"):
        backend.partial_fractions(torch.zeros(3, 4), *SUM)
    with pytest.raises(TypeError, match=r"^x: expected torch\.float32 or torch\.float64, got "):
        backend.partial_fractions(x.half(), *SUM)
    with pytest.raises(ValueError, match=r"^weights: expected 2 numbers, got 1$"):
        backend.partial_fractions(x, 0.0, 0.0, (1.0, 2.0), (1.0,))
