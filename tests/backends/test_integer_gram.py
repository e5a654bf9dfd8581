"""Gram matrices summed in integers by blocks of scales."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import INTEGER_SEGMENT, PackedCodes
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.packing import pack
from lowbit_muon.backends.reference import decode
from lowbit_muon.formats.codebook import CodeLayout
from lowbit_muon.formats.state_format import StateFormat

CPU, REFERENCE = CpuBackend(), Backend()
SHAPES = [(1, 1), (5, 7), (17, 511), (49, 513), (130, 1030), (33, 2100)]
BACKENDS = pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=["cpu", "reference"])


@pytest.fixture(params=cpu.supported_isas())
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield str(request.param)
    cpu.set_isa(before)


def block_codes(rows: int, columns: int, bits: int, block: int) -> PackedCodes:
    """Random codes of every value, each block with a scale of its own, some of them zero."""
    layout = CodeLayout(bits, block, "rms", 2.7)
    codes = torch.randint(2**bits, (rows, columns)).to(torch.uint8)
    scales = torch.rand(rows, layout.blocks(columns)) + 0.5
    scales[:, ::3] *= torch.randint(0, 2, scales[:, ::3].shape)
    book = StateFormat("x", bits, codebook="linear" if bits == 8 else "mu_law", tread="mid_tread")
    return PackedCodes(pack(codes, layout), scales, book.code_book(), layout, columns)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_are_like_the_reference(shape: tuple[int, int], bits: int) -> None:
    for block in (4, 16, 64, 512, 1024, 2048):
        codes = block_codes(*shape, bits, block)
        expected = REFERENCE.code_gram(codes)
        for threads in (1, 2):
            torch.set_num_threads(threads)  # conftest.py sets it back
            assert torch.equal(CPU.code_gram(codes), expected), (block, threads)


@BACKENDS
@pytest.mark.parametrize("block", [16, 512, 1024])
def test_blocks_are_right(block: int, backend: Backend) -> None:
    codes = block_codes(30, 2100, 4, block)
    x = decode(codes).double()
    # Sums within a segment are exact; a term rounds in float32 four times (the sum, two scales,
    # their product), the decoded x once, and adding the segments up once for each.
    operations = 6 + 2100 / min(block, INTEGER_SEGMENT)
    bound = operations * 2**-24 * (x.abs() @ x.abs().mT)
    assert bool(((backend.code_gram(codes) - x @ x.mT).abs() <= bound).all())


@BACKENDS
@pytest.mark.parametrize("block", [3, 6, 20, 100, 768])
def test_other_blocks_raise(block: int, backend: Backend) -> None:
    with pytest.raises(ValueError, match="codes: expected one scale a row or blocks"):
        backend.code_gram(block_codes(4, 1030, 4, block))
