"""Gram matrices summed in integers by blocks of scales, and of rows rounded to int16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit_muon.backends.base import (
    INTEGER_SEGMENT,
    WHOLE_LIMIT,
    WHOLE_SEGMENT,
    PackedCodes,
)
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.reference import ReferenceBackend, decode, pack
from lowbit_muon.formats.codebook import CodeLayout
from lowbit_muon.formats.state_format import StateFormat

CPU, REFERENCE = CpuBackend(), ReferenceBackend()
SHAPES = [(1, 1), (5, 7), (17, 511), (49, 513), (130, 1030), (33, 2100)]
BACKENDS = pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=["cpu", "reference"])


@pytest.fixture(params=cpu.supported_isas())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield str(request.param)
    cpu.set_isa(before)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield int(request.param)
    torch.set_num_threads(before)


def block_codes(rows: int, columns: int, bits: int, block: int) -> PackedCodes:
    """Random codes of every value, each block with a scale of its own, some of them zero."""
    layout = CodeLayout(bits, block, "rms", 2.7)
    codes = torch.randint(2**bits, (rows, columns)).to(torch.uint8)
    scales = torch.rand(rows, layout.blocks(columns)) + 0.5
    scales[:, ::3] *= torch.randint(0, 2, scales[:, ::3].shape)
    book = StateFormat("x", bits, codebook="linear" if bits == 8 else "mu_law", tread="mid_tread")
    return PackedCodes(pack(codes, layout), scales, book.code_book(), layout, columns)


@pytest.mark.usefixtures("level", "threads")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_like_the_reference(shape: tuple[int, int], bits: int) -> None:
    for block in (4, 16, 64, 512, 1024, 2048):
        codes = block_codes(*shape, bits, block)
        assert torch.equal(CPU.code_gram(codes), REFERENCE.code_gram(codes)), block


@BACKENDS
@pytest.mark.parametrize("block", [16, 512, 1024])
def test_blocks_are_right(block: int, backend: CpuBackend | ReferenceBackend) -> None:
    codes = block_codes(30, 2100, 4, block)
    x = decode(codes).double()
    # Sums within a segment are exact; a term rounds in float32 four times (the sum, two scales,
    # their product), the decoded x once, and adding the segments up once for each.
    operations = 6 + 2100 / min(block, INTEGER_SEGMENT)
    bound = operations * 2**-24 * (x.abs() @ x.abs().mT)
    assert bool(((backend.code_gram(codes) - x @ x.mT).abs() <= bound).all())


@BACKENDS
@pytest.mark.parametrize("block", [3, 6, 20, 100, 768])
def test_other_blocks_raise(block: int, backend: CpuBackend | ReferenceBackend) -> None:
    with pytest.raises(ValueError, match="codes: expected one scale a row or blocks"):
        backend.code_gram(block_codes(4, 1030, 4, block))


def strided(x: Tensor) -> list[Tensor]:
    """The same matrix with contiguous rows, contiguous columns, and neither."""
    apart = torch.full((2 * x.shape[0], 3 * x.shape[1]), torch.nan)[::2, ::3]
    return [x, x.mT.contiguous().mT, apart.copy_(x)]


@pytest.mark.usefixtures("level", "threads")
@pytest.mark.parametrize("shape", [*SHAPES, (3, 0), (0, 3), (20, 256), (20, 257)], ids=str)
def test_rounded_rows_are_like_the_reference(shape: tuple[int, int]) -> None:
    x = torch.randn(shape) * torch.logspace(-20, 10, shape[0])[:, None]
    expected = REFERENCE.rounded_gram(x)
    for view in strided(x) if x.numel() else [x]:
        assert torch.equal(CPU.rounded_gram(view), expected)


@pytest.mark.usefixtures("level")
def test_largest_sums_fit() -> None:
    """A segment of the largest numbers is the last that int32 holds."""
    assert WHOLE_SEGMENT * WHOLE_LIMIT**2 < 2**31
    x = torch.ones(3, WHOLE_SEGMENT)
    x[1] = -1
    exact = torch.full((3, 3), float(WHOLE_SEGMENT))
    exact[1] *= -1
    exact[:, 1] *= -1
    # One rounding of the unit on either side.
    assert bool(((CPU.rounded_gram(x) - exact).abs() <= 4 * 2**-24 * WHOLE_SEGMENT).all())


@BACKENDS
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_rows_stay_alone(bad: float, backend: CpuBackend | ReferenceBackend) -> None:
    x = torch.randn(20, 300)
    expected = backend.rounded_gram(x)
    for layout in (x, x.mT.contiguous().mT):
        spoilt = layout.clone(memory_format=torch.preserve_format)
        spoilt[7, 299] = bad
        found = backend.rounded_gram(spoilt)
        assert bool(found[7].isnan().all())
        assert bool(found[:, 7].isnan().all())
        others = [i for i in range(20) if i != 7]
        assert torch.equal(found[others][:, others], expected[others][:, others])


@BACKENDS
def test_rows_too_small_to_divide_are_zero(backend: CpuBackend | ReferenceBackend) -> None:
    x = torch.full((2, 8), 1e-40)
    x[1] = 1
    assert torch.equal(backend.rounded_gram(x)[0], torch.zeros(2))
