"""Products of codes, against the reference without tolerance."""

from __future__ import annotations

import dataclasses
import itertools
from unittest import mock

import pytest
import torch
from comparison import KINDS, REFERENCE, TRITON, assert_same, random_codes, strided_like
from torch import Tensor

from lowbit_muon.backends.codes import PackedCodes, check_integer_codes
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.packing import pack
from lowbit_muon.backends.triton import integer_products
from lowbit_muon.backends.triton.device import Target
from lowbit_muon.formats.codebook import CODE_BITS, nearest_codebook

CPU = CpuBackend()
COLUMNS = (1, 3, 64, 65, 128, 200, 515, 1030)
# Zero, below the smallest normal float32, small, large, and so large that products overflow.
AWKWARD_SCALES = (0.0, 1e-38, 1e-30, 1.0, 1e15, 1e30, 3e38)


def assert_same_gram(codes: PackedCodes) -> None:
    found = TRITON.code_gram(codes)
    assert_same(found, REFERENCE.code_gram(codes))
    if codes.packed.ndim == 2:
        assert_same(found, CPU.code_gram(codes))


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", [1, 17, 65, 130])
def test_gram_bit_for_bit(bits: int, rows: int) -> None:
    """One, two and three tiles across; with and without whole chunks."""
    for index in range(rows % 4, len(COLUMNS), 2 if rows < 100 else 4):
        scales = AWKWARD_SCALES if index % 3 == 0 else ()
        lopsided = (index + bits) % 2 == 1
        assert_same_gram(random_codes(rows, COLUMNS[index], bits, lopsided=lopsided, scales=scales))


def test_gram_in_large_tiles() -> None:
    """As it is launched where warp groups multiply."""
    large = Target(prmt=False, group_products=True, float_precision="ieee")
    with mock.patch.object(integer_products, "target", return_value=large):
        for bits in CODE_BITS:
            assert_same_gram(random_codes(130, 515, bits))


@pytest.mark.parametrize("bits", CODE_BITS)
def test_gram_of_every_pair_of_codes(bits: int) -> None:
    """Rows of one code each: entry (i, j) is columns * level_i * level_j, the largest exact."""
    codes = random_codes(2**bits if bits < 8 else 127, 515, bits)
    count = len(codes.codebook.levels)
    index = torch.arange(codes.packed.shape[0]).clamp(max=count - 1).to(torch.uint8)
    packed = pack(index.view(-1, 1).expand(-1, 515), codes.layout)
    ones = torch.ones_like(codes.scales)
    found = TRITON.code_gram(dataclasses.replace(codes, packed=packed, scales=ones))
    levels = torch.tensor(codes.codebook.levels)[index.long()]
    assert torch.equal(found, 515 * torch.outer(levels, levels))


@pytest.mark.parametrize("block", [4, 32, 64, pytest.param(512, marks=pytest.mark.long), 1024])
def test_gram_with_blocks_of_scales(block: int) -> None:
    for bits, columns in itertools.product((3, 8), (block - 1, block + 5, 2 * block + 3)):
        columns = min(columns, 1100)
        assert_same_gram(random_codes(17, columns, bits, block_size=block))
    assert_same_gram(random_codes(65, 2 * block + 4, 4, block_size=block, scales=AWKWARD_SCALES))


def test_batches() -> None:
    for bits, block in ((4, 0), (3, 0), (8, 0), (4, 64)):
        codes = random_codes(19, 515, bits, block_size=block, batch=3)
        assert_same_gram(codes)
        if block:
            continue
        a, start = torch.randn(3, 5, 19), torch.randn(3, 5, 515)
        found = TRITON.code_product(a.mT.contiguous().mT, codes, out=start.clone(), beta=0.5)
        assert_same(found, REFERENCE.code_product(a, codes, out=start, beta=0.5))


def test_rows_of_a_larger_matrix() -> None:
    """A slice, and memory with other strides."""
    codes = random_codes(40, 515, 4)
    assert_same_gram(codes.row_slice(slice(3, 30)))
    turned = dataclasses.replace(codes, packed=codes.packed.T.contiguous().T)
    assert_same_gram(turned)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", [1, 17, 65])
def test_product_bit_for_bit(bits: int, rows: int) -> None:
    for index in range(rows % 2, len(COLUMNS), 2):
        columns = COLUMNS[index]
        out_rows, beta = (
            (1, 5, 65 if columns < 500 else 7)[(index + bits) % 3],
            (0.0, -0.7, 1.0)[(index + rows) % 3],
        )
        awkward = index % 4 == 3
        codes = random_codes(rows, columns, bits, scales=AWKWARD_SCALES if awkward else ())
        a = torch.randn(out_rows, rows)
        if awkward:
            a *= torch.logspace(-30, 8, out_rows).view(-1, 1)
            a[:, :4] *= torch.tensor([1e30, 1.0, 0.0, -1.0])[:rows]
        strided = strided_like(a, KINDS[(index + rows) % 5])
        start = torch.randn(out_rows, columns)
        out = start.clone() if beta else torch.empty(out_rows, columns)
        assert TRITON.code_product(strided, codes, out=out, beta=beta) is out
        assert_same(out, REFERENCE.code_product(a, codes, out=start.clone(), beta=beta))
        assert_same(out, CPU.code_product(a, codes, out=start.clone(), beta=beta))


def test_product_of_what_is_not_finite() -> None:
    """Only the rows that hold it."""
    codes = random_codes(20, 200, 3)
    a = torch.randn(4, 20)
    a[1, 3], a[2, 5] = float("inf"), float("nan")
    found = TRITON.code_product(a, codes)
    assert_same(found, REFERENCE.code_product(a, codes))
    assert found.isfinite().all(dim=1).tolist() == [True, False, False, True]


def test_empty() -> None:
    for rows, columns in ((0, 0), (0, 5), (5, 0)):
        codes = random_codes(rows, columns, 4)
        assert torch.equal(TRITON.code_gram(codes), torch.zeros(rows, rows))
        out = torch.full((3, columns), 2.0)
        result = TRITON.code_product(torch.ones(3, rows), codes, out=out, beta=0.5)
        assert torch.equal(result, torch.ones(3, columns))
        fresh = TRITON.code_product(torch.ones(3, rows), codes)
        assert torch.equal(fresh, torch.zeros(3, columns))


def test_codes_that_integers_cannot_sum_raise() -> None:
    codes = random_codes(4, 200, 4)
    fractions = dataclasses.replace(codes, codebook=nearest_codebook([-0.5, 0.5]))
    blocks = random_codes(4, 200, 4, block_size=50)
    calls = [
        lambda: TRITON.code_gram(fractions),
        lambda: TRITON.code_product(torch.ones(2, 4), fractions),
        lambda: TRITON.code_gram(blocks),
        lambda: TRITON.code_product(torch.ones(2, 4), random_codes(4, 200, 4, block_size=64)),
    ]
    check_integer_codes(codes)
    for call in calls:
        with pytest.raises(ValueError, match=r"^codes: expected"):
            call()


def wrong(codes: PackedCodes, **fields: Tensor) -> PackedCodes:
    return dataclasses.replace(codes, **fields)


def test_wrong_tensors_raise() -> None:
    codes, a = random_codes(4, 200, 4), torch.ones(3, 4)
    cases = [
        (
            ValueError,
            "codes.packed",
            lambda: TRITON.code_gram(wrong(codes, packed=codes.packed[:, 1:])),
        ),
        (
            TypeError,
            "codes.packed",
            lambda: TRITON.code_gram(wrong(codes, packed=codes.packed.char())),
        ),
        (
            ValueError,
            "codes.scales",
            lambda: TRITON.code_gram(wrong(codes, scales=codes.scales[1:])),
        ),
        (ValueError, "a", lambda: TRITON.code_product(a[:, 1:], codes)),
        (TypeError, "a", lambda: TRITON.code_product(a.double(), codes)),
        (ValueError, "out", lambda: TRITON.code_product(a, codes, out=torch.ones(3, 199))),
        (ValueError, "out", lambda: TRITON.code_product(a, codes, out=torch.ones(200, 3).T)),
    ]
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()
