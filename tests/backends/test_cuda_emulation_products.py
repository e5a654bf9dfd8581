"""The CUDA kernels' integer products, executed on the CPU: the C++ backend's bits."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from cuda_emulation import COMPILER, GIVEN_LIBRARY, backend, forwards, library
from test_code_products import AWKWARD_SCALES, constant_codes, random_codes, same
from test_cpu_backend import KINDS, assert_guards_intact, codebooks, guarded, layout, strided_like
from test_integer_gram import block_codes

from lowbit_muon.backends.codes import LIMB_LIMIT, MAX_INTEGER_TERMS, PackedCodes
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.formats.codebook import CODE_BITS

if COMPILER is None and GIVEN_LIBRARY is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

__all__ = ["backend", "forwards", "library"]  # fixtures
CPU = CpuBackend()


@pytest.mark.parametrize("tile", [64, 128])
@pytest.mark.parametrize("bits", CODE_BITS)
def test_gram(backend: CudaBackend, bits: int, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows around tiles; whole chunks, remainders, rows of any alignment."""
    monkeypatch.setattr(backend, "gram_tile", tile)
    for rows, columns in ((1, 1), (3, 64), (17, 129), (65, 512), (130, 576), (70, 1027), (9, 1536)):
        codes = random_codes(rows, columns, bits, AWKWARD_SCALES if columns == 129 else None)
        found = backend.code_gram(codes)
        assert same(found, CPU.code_gram(codes)), (rows, columns)
        assert torch.equal(found.nan_to_num(), found.mT.nan_to_num())


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("block", [32, 64, 512, 1024, 16])
def test_gram_by_blocks(forwards: CudaBackend, bits: int, block: int) -> None:
    """The last takes the reference: a slice of the tensor cores is 32 columns."""
    for rows, columns in ((66, 1030), (5, 2112)):
        codes = block_codes(rows, columns, bits, block)
        assert torch.equal(forwards.code_gram(codes), CPU.code_gram(codes)), (rows, columns)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_gram_of_every_byte(forwards: CudaBackend, bits: int) -> None:
    """All 256 values of a byte in each place of a chunk, against codebooks that are cut short."""
    size = layout(bits).row_bytes(512)
    packed = (torch.arange(256).view(-1, 1) + torch.arange(size)).remainder(256).to(torch.uint8)
    for count in {2**bits, 2**bits - 1, 3}:
        levels = [float(min(127, 5 * k) - 127 + k) for k in range(min(count, 128))]
        book = dataclasses.replace(
            codebooks(bits)[0], levels=tuple(levels), thresholds=tuple(levels[1:])
        )
        codes = PackedCodes(packed, torch.ones(256, 1), book, layout(bits), 512)
        assert torch.equal(forwards.code_gram(codes), CPU.code_gram(codes))


def test_gram_of_a_batch(backend: CudaBackend) -> None:
    one, other = random_codes(70, 300, 3), random_codes(70, 300, 3)
    other = dataclasses.replace(other, codebook=one.codebook)
    batch = dataclasses.replace(
        one,
        packed=torch.stack([one.packed, other.packed]),
        scales=torch.stack([one.scales, other.scales]),
    )
    expected = torch.stack([CPU.code_gram(one), CPU.code_gram(other)])
    assert torch.equal(backend.code_gram(batch), expected)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_product(backend: CudaBackend, bits: int) -> None:
    """Around tiles and steps, any strides of A, rows that are not finite or too small."""
    shapes = itertools.product((1, 17, 64, 130), (3, 64, 129, 515), (1, 70))
    for index, (rows, columns, out_rows) in enumerate(shapes):
        codes = random_codes(rows, columns, bits, AWKWARD_SCALES if columns == 129 else None)
        a = torch.randn(out_rows, rows)
        if columns == 129:
            a *= torch.logspace(-30, 8, out_rows).view(-1, 1)
            a[out_rows // 2, 0] = math.nan
        a = strided_like(a, KINDS[index % len(KINDS)])
        start, beta = torch.randn(out_rows, columns), (0.0, -0.7)[index % 2]
        out, raw = guarded((out_rows, columns), torch.float32)
        if beta:
            out.copy_(start)
        assert backend.code_product(a, codes, out=out, beta=beta) is out
        expected = CPU.code_product(a, codes, out=start, beta=beta)
        assert same(out, expected), (rows, columns, out_rows)
        assert_guards_intact(raw)


def test_every_limb(forwards: CudaBackend) -> None:
    """A row [x, LIMB_LIMIT] times levels [1, 0] is x: every whole number, and halves to even."""
    x = torch.arange(-LIMB_LIMIT, LIMB_LIMIT, 7).float().view(-1, 1)
    codes = constant_codes(2, 1, [1, 0])
    for shift in (0.0, 0.5):
        a = torch.cat([x + shift, torch.full_like(x, LIMB_LIMIT)], dim=1)
        assert torch.equal(forwards.code_product(a, codes), CPU.code_product(a, codes))


def test_product_of_a_batch(backend: CudaBackend) -> None:
    one = random_codes(20, 70, 4)
    batch = dataclasses.replace(
        one,
        packed=torch.stack([one.packed, one.packed.flip(0)]),
        scales=torch.stack([one.scales, one.scales.flip(0)]),
    )
    a = torch.randn(5, 2, 20).transpose(0, 1)
    expected = [
        CPU.code_product(a[i], dataclasses.replace(one, packed=p, scales=s))
        for i, (p, s) in enumerate(zip(batch.packed, batch.scales, strict=True))
    ]
    assert torch.equal(backend.code_product(a, batch), torch.stack(expected))


def test_largest_sums(forwards: CudaBackend) -> None:
    codes = constant_codes(3, MAX_INTEGER_TERMS // 8, [127, -127, 0])
    assert torch.equal(forwards.code_gram(codes), CPU.code_gram(codes))
    a = torch.ones(1, codes.packed.shape[0])
    assert torch.equal(forwards.code_product(a, codes), CPU.code_product(a, codes))
