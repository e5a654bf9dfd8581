"""Decoding, adding and quantising row by row, against the reference without tolerance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from comparison import (
    CODED_PRESETS,
    GRAD_TYPES,
    KINDS,
    REFERENCE,
    TRITON,
    assert_same,
    assert_same_scales,
    assert_same_squares,
    awkward,
    codebooks,
    layout,
    non_finite,
    random_codes,
    strided_like,
)
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.formats.codebook import CODE_BITS, CodeLayout
from lowbit_muon.formats.presets import PRESETS

COLUMNS = (1, 64, 65, 129, 515)
BLOCKS = (0, 3, 64, 100)
STATISTICS = ("rms", "absmax")


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_byte_decodes(bits: int) -> None:
    """All 256 values of a packed byte, also codes past the levels."""
    columns = 256 * 8 // bits if bits != 3 else 1024
    codes_layout = layout(bits)
    size = codes_layout.row_bytes(columns)
    start = torch.tensor([0, 1, 37]).view(-1, 1)
    packed = (start + torch.arange(size)).remainder(256).to(torch.uint8)
    assert all(len(row.unique()) == 256 for row in packed)
    for codebook in codebooks(bits):
        codes = PackedCodes(packed, torch.rand(3, 1) + 0.5, codebook, codes_layout, columns)
        found, expected = torch.empty(3, columns), torch.empty(3, columns)
        TRITON.accumulate(found, Terms(codes=codes))
        REFERENCE.accumulate(expected, Terms(codes=codes))
        assert_same(found, expected)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("place", range(len(COLUMNS)))
def test_quantize_and_decode(bits: int, place: int) -> None:
    columns = COLUMNS[place]
    x = awkward(columns)
    for index in (place % 4, (place + 2) % 4):  # two of the blocks for every width
        block, statistic = BLOCKS[index], STATISTICS[(place // 4 + bits) % 2]
        codes_layout = layout(bits, block, statistic, 1.1)
        book = codebooks(bits)[index % 3]
        packed = torch.empty(6, codes_layout.row_bytes(columns), dtype=torch.uint8)
        scales = torch.empty(6, codes_layout.blocks(columns))
        out = TRITON.quantize(x, book, codes_layout, packed=packed, scales=scales)
        assert out[0] is packed
        assert out[1] is scales
        assert_same_scales(scales, REFERENCE.quantize(x, book, codes_layout)[1], statistic)
        assert torch.equal(packed, REFERENCE.encode(x, scales, book, codes_layout))
        if index == place % 4:
            assert torch.equal(packed, TRITON.encode(x, scales, book, codes_layout))
            codes = PackedCodes(packed, scales, book, codes_layout, columns)
            found, expected = torch.empty(6, columns), torch.empty(6, columns)
            TRITON.accumulate(found, Terms(codes=codes))
            REFERENCE.accumulate(expected, Terms(codes=codes))
            assert_same(found, expected)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_threshold_is_strict(bits: int) -> None:
    """Codes exactly at, just below and just above every threshold, and of what is not finite."""
    for codebook in codebooks(bits):
        at = torch.tensor(codebook.thresholds)
        infinity = torch.tensor(math.inf)
        limits = torch.tensor([0.0, -0.0, 1e30, -1e30, math.inf, -math.inf, math.nan])
        z = torch.cat([at, torch.nextafter(at, infinity), torch.nextafter(at, -infinity), limits])
        z = z.view(1, -1)
        for codes_layout in {layout(bits), CodeLayout(8, 0, "absmax", 1.0)}:
            found = TRITON.encode(z, torch.ones(1, 1), codebook, codes_layout)
            expected = REFERENCE.encode(z, torch.ones(1, 1), codebook, codes_layout)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("block", [0, 64])
def test_what_is_not_finite_shows_in_the_scales(statistic: str, block: int) -> None:
    x = non_finite(torch.randn(3, 200))
    codes_layout, book = layout(4, block, statistic), codebooks(4)[0]
    packed, scales = TRITON.quantize(x, book, codes_layout)
    assert_same_scales(scales, REFERENCE.quantize(x, book, codes_layout)[1], statistic)
    assert not scales[0].isfinite().all()
    assert torch.equal(packed, REFERENCE.encode(x, scales, book, codes_layout))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*itertools.product([(1, 1), (1, 200), (5, 129)], GRAD_TYPES), ((9, 600), torch.bfloat16)],
)
def test_accumulate(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    values, start = torch.randn(shape).to(dtype), torch.randn(shape)
    for index, kind in enumerate(KINDS):
        bits = (None, 2, 3, 4, 8)[(index + columns) % 5]
        codes = None
        if bits is not None:
            block = (0, 100)[index % 2]
            codes_layout, book = layout(bits, block), codebooks(bits)[0]
            codes = PackedCodes(
                *REFERENCE.quantize(start, book, codes_layout), book, codes_layout, columns
            )
        grad = strided_like(values, kind)
        for weight in (0.0, 0.95):
            wide = torch.full((rows, columns + 7), math.nan)
            found = wide[:, :columns]
            if weight:
                found.copy_(start)
            expected = start.clone()
            terms = Terms(weight, codes, 0.7, grad, 0.05)
            squares = TRITON.accumulate(found, terms)
            wanted = REFERENCE.accumulate(expected, terms)
            assert_same(found, expected)
            assert wide[:, columns:].isnan().all()
            assert_same_squares(squares, wanted, columns)


def test_accumulate_of_one_term_and_of_wide_rows() -> None:
    """Also rows that several programs share."""
    start = torch.randn(2, 10000)
    buffer = start.clone()
    squares = TRITON.accumulate(buffer, Terms(0.5))
    assert_same(buffer, start * 0.5)
    assert_same_squares(squares, buffer.double().square().sum(dim=1), 10000)
    assert not TRITON.accumulate(buffer.fill_(math.nan), Terms()).any()
    assert torch.equal(buffer, torch.zeros(2, 10000))


def test_accumulate_with_a_weight_for_each_matrix() -> None:
    """Numbers of float64 are rounded to float32 first."""
    weights = torch.tensor([0.3, 0.0, 1e-30], dtype=torch.float64)
    for dtype, batch in ((torch.float64, 3), (torch.float32, 3), (torch.float64, 1)):
        start, grad = torch.randn(2, batch, 7, 1100).unbind()
        terms = Terms(weights[:batch].to(dtype), grad=grad, grad_weight=0.1)
        found, expected = start.clone(), start.clone()
        squares = TRITON.accumulate(found, terms)
        assert_same_squares(squares, REFERENCE.accumulate(expected, terms), 1100)
        assert_same(found, expected)
        assert_same(found[0], start[0] * weights[0].float() + grad[0] * 0.1)


def test_accumulate_is_that_of_the_cpu() -> None:
    codes, grad = random_codes(3, 515, 3), torch.randn(515, 3).T
    found, expected = torch.randn(2, 3, 515).unbind()
    expected.copy_(found)
    terms = Terms(0.9, codes, 0.3, grad)
    squares = TRITON.accumulate(found, terms)
    assert_same_squares(squares, CpuBackend().accumulate(expected, terms), 515)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_gradient(dtype: torch.dtype) -> None:
    """All 65,536 values of a 16-bit float convert exactly, subnormals and infinities included."""
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(8, 8192)
    for values in (grad, grad.T.contiguous().T):
        found = torch.empty(values.shape)
        TRITON.accumulate(found, Terms(grad=values))
        assert_same(found, values.float())


def assert_same_update(codes: PackedCodes, grad: Tensor, out_dtype: torch.dtype | None) -> None:
    """`update_codes` with every result, also where it is not read."""
    shape, terms = grad.shape, Terms(0.0, codes, 0.95, grad, 0.05)
    results = []
    for backend in (TRITON, REFERENCE):
        packed, scales = torch.empty_like(codes.packed), torch.empty_like(codes.scales)
        out = None if out_dtype is None else torch.empty(shape, dtype=out_dtype)
        squares = backend.update_codes(
            terms, packed=packed, scales=scales, out=out, out_weights=(0.9, 0.1)
        )
        results.append((packed, scales, squares, out))
    (packed, scales, squares, out), (_, wanted_scales, wanted_squares, wanted_out) = results
    if out is not None:
        assert_same(out, wanted_out)
    for sums, wanted_sums in zip(squares, wanted_squares, strict=True):
        assert_same_squares(sums, wanted_sums, shape[-1])
    assert_same_scales(scales, wanted_scales, codes.layout.statistic)
    x = torch.empty(shape)
    REFERENCE.accumulate(x, terms)
    assert torch.equal(packed, REFERENCE.encode(x, scales, codes.codebook, codes.layout))


@pytest.mark.parametrize("name", CODED_PRESETS)
def test_update_codes(name: str) -> None:
    book, codes_layout = PRESETS[name].code_book(), PRESETS[name].code_layout()
    for index, shape in enumerate(((1, 1), (1, 515), (3, 64), (9, 200), (2, 2500))):
        start = torch.randn(shape)
        codes = PackedCodes(
            *REFERENCE.quantize(start, book, codes_layout), book, codes_layout, shape[1]
        )
        grad = strided_like(torch.randn(shape), KINDS[(index + len(name)) % 5])
        grad = grad.to(GRAD_TYPES[index % 3], memory_format=torch.preserve_format)
        assert_same_update(codes, grad, (None, *GRAD_TYPES)[(index + len(name)) % 4])


@pytest.mark.parametrize("bits", [3, 4, *(pytest.param(b, marks=pytest.mark.long) for b in (2, 8))])
def test_batches_are_their_rows(bits: int) -> None:
    """Gradients in any layout, and a result whose rows are not at even distances."""
    codes = random_codes(3, 129, bits, block_size=(0, 100)[bits % 2], batch=2)
    values = torch.randn(2, 3, 129).to(GRAD_TYPES[bits % 3])
    turned = values.transpose(0, 1).contiguous().transpose(0, 1)
    for grad in (values, values.mT.contiguous().mT, turned):
        found, expected = torch.randn(2, 2, 3, 129).unbind()
        expected.copy_(found)
        terms = Terms(0.9, codes, 0.7, grad, 0.05)
        squares = TRITON.accumulate(found, terms)
        assert_same_squares(squares, REFERENCE.accumulate(expected, terms), 129)
        assert_same(found, expected)
        assert_same_update(codes, grad, GRAD_TYPES[(bits + 1) % 3])
    out, wanted = torch.empty(2, 129, 3).mT, torch.empty(2, 3, 129)
    for result in (out, wanted):
        TRITON.update_codes(
            Terms(codes=codes, grad=turned),
            packed=torch.empty_like(codes.packed),
            scales=torch.empty_like(codes.scales),
            out=result,
        )
    assert torch.equal(out, wanted)
    x, book, codes_layout = turned.float(), codes.codebook, codes.layout
    packed, scales = TRITON.quantize(x, book, codes_layout)
    assert torch.equal(TRITON.encode(x, scales, book, codes_layout), packed)
    for i, one in enumerate(x):
        assert torch.equal(TRITON.quantize(one, book, codes_layout)[0], packed[i])
        assert torch.equal(TRITON.quantize(one, book, codes_layout)[1], scales[i])


def test_update_of_what_is_not_finite() -> None:
    book, codes_layout = codebooks(3)[0], layout(3, 100)
    codes = PackedCodes(
        *REFERENCE.quantize(torch.randn(3, 200), book, codes_layout), book, codes_layout, 200
    )
    assert_same_update(codes, non_finite(torch.randn(3, 200)), torch.bfloat16)


def test_update_reads_no_value_of_weight_zero() -> None:
    codes = random_codes(2, 65, 4)
    codes.scales.fill_(math.inf)
    grad, out = torch.randn(2, 65), torch.empty(2, 65)
    TRITON.update_codes(
        Terms(codes=codes, grad=grad),
        packed=torch.empty_like(codes.packed),
        scales=torch.empty_like(codes.scales),
        out=out,
        out_weights=(0.0, 2.0),
    )
    assert_same(out, 2 * grad)


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    book, codes_layout = codebooks(3)[0], layout(3)
    packed, scales = TRITON.quantize(torch.empty(shape), book, codes_layout)
    assert packed.shape == (shape[0], codes_layout.row_bytes(shape[1]))
    codes = PackedCodes(packed, scales, book, codes_layout, shape[1])
    grad = torch.empty(shape, dtype=torch.bfloat16)
    squares = TRITON.accumulate(torch.empty(shape), Terms(1.0, codes, grad=grad))
    both = TRITON.update_codes(
        Terms(codes=codes, grad=grad),
        packed=torch.empty_like(packed),
        scales=torch.empty_like(scales),
    )
    for sums in (squares, *both):
        assert torch.equal(sums, torch.zeros(shape[0], dtype=torch.float64))


def test_rows_at_uneven_distances_are_written_back() -> None:
    """A slice of a batch; what lies between is left alone."""
    memory = torch.randn(2, 9, 8)
    found, expected = memory.clone(), memory.clone()
    for backend, x in ((TRITON, found), (REFERENCE, expected)):
        backend.accumulate(x[:, :4], Terms(0.5))
        backend.rotate(x[:, :4])
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 4:], memory[:, 4:])
