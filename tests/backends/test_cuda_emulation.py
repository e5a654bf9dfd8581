"""The CUDA kernels, executed on the CPU, against the reference: bit for bit, in three schedules.

As with the C++ backend, an RMS scale may differ by one unit in the last place, because its squares
are added in another order.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from cuda_emulation import COMPILER, GIVEN_LIBRARY, backend, forwards, library
from test_code_products import random_codes
from test_cpu_backend import (
    GRAD_TYPES,
    KINDS,
    assert_guards_intact,
    assert_same,
    assert_same_scales,
    awkward,
    codebooks,
    guarded,
    layout,
    strided_like,
)
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.formats.codebook import CODE_BITS, CodeLayout
from lowbit_muon.formats.presets import PRESETS

if COMPILER is None and GIVEN_LIBRARY is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

__all__ = ["backend", "forwards", "library"]  # fixtures
CPU, REFERENCE = CpuBackend(), Backend()
COLUMNS = (1, 2, 5, 63, 64, 65, 127, 128, 129, 257, 513, 1300)
BLOCKS = (0, 1, 3, 32, 100, 512)
# Rows that do not fit in shared memory (kKeptColumns in csrc/cuda/update.cu).
LONG_ROW = 10241


def assert_squares(found: Tensor, expected: Tensor, columns: int) -> None:
    """Two sums of the same non-negative doubles: each is within columns * 2^-53 of the true one,
    relatively (Higham, Accuracy and Stability, section 4.2)."""
    assert found.dtype == torch.float64
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    bound = 2 * columns * 2.0**-53 * expected[finite]
    assert bool(((found - expected)[finite].abs() <= bound).all())


def update(
    backend: Backend, codes: PackedCodes, grad: Tensor, out: Tensor | None = None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Packed codes, scales and sums of squares of an update in guarded memory."""
    packed, packed_raw = guarded(tuple(codes.packed.shape), torch.uint8)
    scales, scales_raw = guarded(tuple(codes.scales.shape), torch.float32)
    terms = Terms(0.0, codes, 0.95, grad, 0.05)
    squares = backend.update_codes(
        terms, packed=packed, scales=scales, out=out, out_weights=(0.7, 0.3)
    )
    assert_guards_intact(packed_raw, scales_raw)
    return packed, scales, squares


def assert_update(
    backend: CudaBackend, codes: PackedCodes, grad: Tensor, dtype: torch.dtype
) -> None:
    shape = tuple(grad.shape)
    out, out_raw = guarded(shape, dtype)
    packed, scales, squares = update(backend, codes, grad, out)
    wanted = torch.empty(shape, dtype=dtype)
    _, wanted_scales, wanted_squares = update(REFERENCE, codes, grad, wanted)
    assert_same(out, wanted)
    assert_guards_intact(out_raw)
    assert_same_scales(scales, wanted_scales, codes.layout.statistic)
    for sums, wanted_sums in zip(squares, wanted_squares, strict=True):
        assert_squares(sums, wanted_sums, shape[-1])
    x = torch.empty(shape)
    REFERENCE.accumulate(x, Terms(0.0, codes, 0.95, grad, 0.05))
    expected = CPU.encode(x, scales, codes.codebook, codes.layout)
    assert torch.equal(packed, expected)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_codec(backend: CudaBackend, bits: int) -> None:
    """Quantise, encode, decode and update: every block size and statistic, guarded memory."""
    book = codebooks(bits)[0]
    for columns in COLUMNS:
        x = awkward(columns)
        rows = x.shape[0]
        for block, statistic in itertools.product(BLOCKS, ("rms", "absmax")):
            codes_layout = layout(bits, block, statistic, 1.1)
            packed, packed_raw = guarded((rows, codes_layout.row_bytes(columns)), torch.uint8)
            scales, scales_raw = guarded((rows, codes_layout.blocks(columns)), torch.float32)
            out = backend.quantize(x, book, codes_layout, packed=packed, scales=scales)
            assert out[0] is packed
            assert out[1] is scales
            expected_scales = CPU.quantize(x, book, codes_layout)[1]
            assert_same_scales(scales, expected_scales, statistic)
            assert torch.equal(packed, CPU.encode(x, scales, book, codes_layout))
            assert torch.equal(packed, backend.encode(x, scales, book, codes_layout))

            codes = PackedCodes(packed, scales, book, codes_layout, columns)
            found, found_raw = guarded((rows, columns), torch.float32)
            squares = backend.accumulate(found, Terms(codes=codes))
            expected = torch.empty(rows, columns)
            assert_squares(squares, REFERENCE.accumulate(expected, Terms(codes=codes)), columns)
            assert_same(found, expected)
            assert_guards_intact(packed_raw, scales_raw, found_raw)
            dtype = GRAD_TYPES[columns % 3]
            assert_update(backend, codes, torch.randn(rows, columns).to(dtype), dtype)


@pytest.mark.parametrize("name", [name for name, f in PRESETS.items() if not f.is_dense])
def test_presets(backend: CudaBackend, name: str) -> None:
    book, codes_layout = PRESETS[name].code_book(), PRESETS[name].code_layout()
    for columns in (130, 2176):
        x = torch.randn(3, columns)
        codes = PackedCodes(*backend.quantize(x, book, codes_layout), book, codes_layout, columns)
        expected = CPU.encode(x, codes.scales, book, codes_layout)
        assert torch.equal(codes.packed, expected)
        assert_update(backend, codes, torch.randn(3, columns).bfloat16(), torch.bfloat16)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("block", [0, 96, 2048])
def test_rows_too_long_to_keep(forwards: CudaBackend, bits: int, block: int) -> None:
    codes_layout = layout(bits, block)
    book = codebooks(bits)[1]
    x = torch.randn(2, LONG_ROW)
    codes = PackedCodes(*CPU.quantize(x, book, codes_layout), book, codes_layout, LONG_ROW)
    assert_update(forwards, codes, torch.randn(2, LONG_ROW).half(), torch.float32)
    grad = torch.randn(2, LONG_ROW)
    with pytest.raises(ValueError, match="out: expected other memory than that of grad"):
        update(forwards, codes, grad, out=grad)  # which is read again after `out` is written


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_threshold_is_strict(forwards: CudaBackend, bits: int) -> None:
    """Exactly at, just below and above every threshold; no number goes past them all."""
    for book in codebooks(bits):
        at = torch.tensor(book.thresholds)
        infinity = torch.tensor(math.inf)
        z = torch.cat([at, torch.nextafter(at, infinity), torch.nextafter(at, -infinity)])
        z = torch.cat([z, torch.tensor([0.0, math.inf, -math.inf, math.nan, 1e30])]).view(1, -1)
        for codes_layout in {layout(bits), CodeLayout(8, 0, "absmax", 1.0)}:
            found = forwards.encode(z, torch.ones(1, 1), book, codes_layout)
            assert torch.equal(found, REFERENCE.encode(z, torch.ones(1, 1), book, codes_layout))


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_byte_decodes(forwards: CudaBackend, bits: int) -> None:
    """All 256 values of a packed byte, in every place of a chunk; also codes past the levels."""
    columns = 1024
    codes_layout = layout(bits)
    size = codes_layout.row_bytes(columns)
    packed = (torch.arange(256).view(-1, 1) + torch.arange(size)).remainder(256).to(torch.uint8)
    scales = torch.rand(256, 1) + 0.5
    for book in codebooks(bits):
        codes = PackedCodes(packed, scales, book, codes_layout, columns)
        found, expected = torch.empty(256, columns), torch.empty(256, columns)
        forwards.accumulate(found, Terms(codes=codes))
        CPU.accumulate(expected, Terms(codes=codes))
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", GRAD_TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (3, 600)])
def test_accumulate(backend: CudaBackend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, columns = shape
    start = torch.randn(shape)
    wide = torch.full((rows, columns + 7), math.nan)
    for kind, bits, weight in itertools.product(KINDS, (None, 3, 4), (0.0, 0.95)):
        grad = strided_like(torch.randn(shape).to(dtype), kind)
        codes = None
        if bits is not None:
            book, codes_layout = codebooks(bits)[0], layout(bits, 100)
            quantized = CPU.quantize(start, book, codes_layout)
            codes = PackedCodes(*quantized, book, codes_layout, columns)
        found = wide[:, :columns]
        found.copy_(start if weight else torch.full(shape, math.nan))
        expected = start.clone()
        terms = Terms(weight, codes, 0.7, grad, 0.05)
        squares = backend.accumulate(found, terms)
        wanted = REFERENCE.accumulate(expected, terms)
        assert torch.equal(found, expected), (kind, bits, weight)
        assert_squares(squares, wanted, columns)
        assert wide[:, columns:].isnan().all()
    assert backend.accumulate(torch.ones(2, 3), Terms(2.0)).tolist() == [12.0, 12.0]
    weights = torch.tensor([2.0, 1.0])
    assert backend.accumulate(torch.ones(2, 1, 3), Terms(weights)).tolist() == [[12.0], [3.0]]


@pytest.mark.parametrize("bits", CODE_BITS)
def test_batches_are_their_rows(backend: CudaBackend, bits: int) -> None:
    """Gradients in any layout, and a result whose rows are not at even distances."""
    one = random_codes(15, 129, bits)
    packed, scales = one.packed.view(3, 5, -1), one.scales.view(3, 5, -1)
    codes = dataclasses.replace(one, packed=packed, scales=scales)
    values = torch.randn(3, 5, 129).to(GRAD_TYPES[bits % 3])
    turned = values.transpose(0, 1).contiguous().transpose(0, 1)
    for grad in (values, values.mT.contiguous().mT, turned):
        found, expected = torch.randn(2, 3, 5, 129).unbind()
        expected.copy_(found)
        terms = Terms(0.9, codes, 0.7, grad, 0.05)
        squares = backend.accumulate(found, terms)
        assert_squares(squares, REFERENCE.accumulate(expected, terms), 129)
        assert_same(found, expected)
        assert_update(backend, codes, grad, GRAD_TYPES[(bits + 1) % 3])
    out, wanted = torch.empty(3, 129, 5).mT, torch.empty(3, 5, 129)
    assert torch.equal(update(backend, codes, turned, out)[0], update(backend, codes, turned)[0])
    update(REFERENCE, codes, turned, wanted)
    assert_same(out, wanted)
    x, book, codes_layout = turned.float(), codes.codebook, codes.layout
    packed, scales = backend.quantize(x, book, codes_layout)
    assert torch.equal(backend.encode(x, scales, book, codes_layout), packed)
    for i, matrix in enumerate(x):
        assert torch.equal(backend.quantize(matrix, book, codes_layout)[0], packed[i])
        assert torch.equal(backend.quantize(matrix, book, codes_layout)[1], scales[i])
    x, expected = values.float().clone(), values.float().clone()
    backend.rotate(x)
    REFERENCE.rotate(expected)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_number(forwards: CudaBackend, dtype: torch.dtype) -> None:
    """Read exactly, and written as torch rounds: halfway cases, subnormals, infinities."""
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 1024)
    found = torch.empty(grad.shape)
    forwards.accumulate(found, Terms(grad=grad))
    assert_same(found, grad.float())
    between = (found.view(torch.int32) + torch.randint(-(2**17), 2**17, found.shape)).int()
    halfway = grad.double().add(grad.double().roll(1)).div(2).float()
    for x in (found, between.view(torch.float32), halfway):
        out, expected = torch.empty_like(grad)[None], torch.empty_like(grad)[None]
        one = torch.ones(1)
        assert_same(
            forwards.scaled(x[None], one, out=out), REFERENCE.scaled(x[None], one, out=expected)
        )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_in_its_row(backend: CudaBackend, bad: float) -> None:
    codes = random_codes(5, 300, 4)
    for place in ((0, 0), (3, 299)):
        grad = torch.randn(5, 300)
        grad[place] = bad
        out = torch.empty(5, 300)
        *_, squares = update(backend, codes, grad, out)
        expected = torch.ones(5, dtype=torch.bool)
        expected[place[0]] = False
        for sums in squares:
            assert torch.equal(sums.isfinite(), expected)
        for statistic in ("absmax", "rms"):
            codes_layout = layout(4, 64, statistic)
            scales = backend.quantize(grad, codes.codebook, codes_layout)[1]
            assert_same_scales(
                scales.nan_to_num(),
                CPU.quantize(grad, codes.codebook, codes_layout)[1].nan_to_num(),
                "rms",
            )


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("columns", [*COLUMNS, 3, 8, 16, 31, 48, 2048])
def test_rotation(backend: CudaBackend, columns: int, inverse: bool) -> None:
    padded, raw = guarded((3, columns + 3), torch.float32)
    x = padded[:, :columns].copy_(torch.randn(3, columns))
    expected = x.clone()
    CPU.rotate(expected, inverse=inverse)
    backend.rotate(x, inverse=inverse)
    assert torch.equal(x, expected)
    assert padded[:, columns:].isnan().all()
    assert_guards_intact(raw)


def test_longest_rotations(forwards: CudaBackend) -> None:
    for columns in (24 * 1024, 24 * 1024 + 1):  # the last in shared memory, and the reference
        x = torch.randn(1, columns)
        expected = x.clone()
        CPU.rotate(expected)
        forwards.rotate(x)
        assert torch.equal(x, expected)


@pytest.mark.parametrize("weight_type", GRAD_TYPES)
@pytest.mark.parametrize("update_type", GRAD_TYPES)
def test_update_weight(
    backend: CudaBackend, weight_type: torch.dtype, update_type: torch.dtype
) -> None:
    for kind, update_kind in itertools.product(KINDS, ("contiguous", "tall")):
        for decay, step, seed in ((0.9, 0.1, None), (1.0, 0.0, 7), (0.99, 1e-3, -5)):
            if seed is not None and weight_type != torch.bfloat16:
                continue
            weight = strided_like(torch.randn(40, 70).to(weight_type), kind)
            change = strided_like(torch.randn(40, 70).to(update_type), update_kind)
            change[3, 4] = math.inf
            expected = weight.clone()
            arguments = {
                "decay": torch.tensor([decay]),
                "step_size": torch.tensor(step),
                "seed": None if seed is None else torch.tensor([seed], dtype=torch.int32),
                "cautious": kind == "contiguous",
            }
            change[5, 6] = 0.0
            backend.update_weight(weight, change, **arguments)
            REFERENCE.update_weight(expected, change, **arguments)
            assert_same(weight, expected)


@pytest.mark.parametrize("dtype", GRAD_TYPES)
def test_scaled(backend: CudaBackend, dtype: torch.dtype) -> None:
    x = torch.randn(3, 70, 77)
    x[1] = math.nan
    factor = torch.tensor([0.3, 0.0, -2.0])
    out, raw = guarded((3, 70, 77), dtype)
    expected = torch.empty(3, 70, 77, dtype=dtype)
    assert backend.scaled(x, factor, out=out) is out
    assert torch.equal(out, REFERENCE.scaled(x, factor, out=expected))
    assert torch.equal(backend.scaled(x, factor.double(), out=out), expected)
    assert_guards_intact(raw)


def test_empty(forwards: CudaBackend) -> None:
    for rows, columns in ((0, 0), (0, 7), (7, 0)):
        x = torch.empty(rows, columns)
        book = codebooks(3)[0]
        codes = PackedCodes(*forwards.quantize(x, book, layout(3)), book, layout(3), columns)
        assert torch.equal(codes.scales, torch.zeros(rows, layout(3).blocks(columns)))
        assert torch.equal(forwards.accumulate(x, Terms(codes=codes)), torch.zeros(rows).double())
        zeros = torch.zeros(rows, rows)
        integers = random_codes(1, 1, 3).codebook
        whole = dataclasses.replace(codes, codebook=integers)
        assert torch.equal(forwards.code_gram(whole), zeros)
        product = forwards.code_product(torch.ones(2, rows), whole)
        assert torch.equal(product, torch.zeros(2, columns))
        for sums in update(forwards, codes, x)[2]:
            assert torch.equal(sums, torch.zeros(rows).double())
        forwards.rotate(x)
        one = torch.ones(1)
        forwards.update_weight(x, x.half(), decay=one, step_size=one)
        assert forwards.scaled(x[None], one, out=x[None].clone()).numel() == 0


def test_autograd_sees_what_changes(forwards: CudaBackend) -> None:
    x = torch.randn(2, 64)
    version = x._version
    forwards.rotate(x)
    forwards.accumulate(x, Terms(0.5))
    assert x._version >= version + 2


def test_wrong_tensors_raise(forwards: CudaBackend) -> None:
    x = torch.randn(4, 200)
    book = codebooks(4)[0]
    good = PackedCodes(*CPU.quantize(x, book, layout(4)), book, layout(4), 200)

    def quantize(x: Tensor, **out: Tensor) -> object:
        return forwards.quantize(x, book, layout(4), **out)

    def decode(**fields: object) -> object:
        codes = dataclasses.replace(good, **fields)
        return forwards.accumulate(torch.empty(4, 200), Terms(codes=codes))

    def add(**arguments: object) -> object:
        return update(forwards, good, **{"grad": x, **arguments})

    one, whole = torch.ones(1), random_codes(4, 70, 4)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (TypeError, "x", lambda: quantize(x.double())),
        (ValueError, "x", lambda: quantize(x[0])),
        (ValueError, "x", lambda: quantize(x.to("meta"))),
        (ValueError, "x", lambda: quantize(x.to_sparse())),
        (TypeError, "packed", lambda: quantize(x, packed=torch.empty(4, 104, dtype=torch.int8))),
        (ValueError, "packed", lambda: quantize(x, packed=good.packed.T.contiguous().T)),
        (ValueError, "scales", lambda: quantize(x, scales=torch.empty(4, 2))),
        (ValueError, "scales", lambda: forwards.encode(x, torch.ones(3, 1), book, layout(4))),
        (ValueError, "codebook", lambda: forwards.quantize(x, codebooks(8)[0], layout(4))),
        (ValueError, "codes.packed", lambda: decode(packed=good.packed[:3])),
        (TypeError, "codes.scales", lambda: decode(scales=good.scales.half())),
        (ValueError, "codes", lambda: decode(columns=199)),
        (ValueError, "bits", lambda: decode(layout=dataclasses.replace(layout(4), bits=5))),
        (ValueError, "buffer", lambda: forwards.accumulate(x[:1].expand(4, 200), Terms())),
        (TypeError, "buffer", lambda: forwards.accumulate(x.half(), Terms())),
        (ValueError, "out", lambda: add(out=x)),
        (ValueError, "packed", lambda: forwards.update_codes(
            Terms(codes=good, grad=x), packed=good.packed, scales=good.scales.clone())),
        (ValueError, "scales", lambda: forwards.update_codes(
            Terms(codes=good, grad=x), packed=good.packed.clone(), scales=good.scales)),
        (ValueError, "grad", lambda: forwards.accumulate(x, Terms(grad=x.T))),
        (TypeError, "grad", lambda: forwards.accumulate(x, Terms(grad=x.int()))),
        (ValueError, "codes", lambda: add(grad=x.T)),
        (ValueError, "out", lambda: add(out=x.T)),
        (TypeError, "out", lambda: add(out=x.double())),
        (ValueError, "codes.packed", lambda: forwards.code_gram(
            dataclasses.replace(random_codes(3, 70, 4), packed=good.packed))),
        (TypeError, "a", lambda: forwards.code_product(x.double(), whole)),
        (ValueError, "a", lambda: forwards.code_product(x, whole)),
        (ValueError, "out", lambda: forwards.code_product(x[:, :4], whole, out=x)),
        (ValueError, "x", lambda: forwards.scaled(x, one, out=x)),
        (ValueError, "factor", lambda: forwards.scaled(x[None], torch.ones(2), out=x[None])),
        (TypeError, "weight", lambda: forwards.update_weight(
            x, x, decay=one, step_size=one, seed=one.int())),
        (ValueError, "decay", lambda: forwards.update_weight(
            x, x, decay=torch.ones(2), step_size=one)),
    ]  # fmt: skip
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()


def test_rows_at_uneven_distances_are_written_back(forwards: CudaBackend) -> None:
    """A slice of a batch; what lies between is left alone."""
    memory = torch.randn(2, 9, 8)
    found, expected = memory.clone(), memory.clone()
    for kernels, x in ((forwards, found), (REFERENCE, expected)):
        kernels.accumulate(x[:, :4], Terms(0.5))
        kernels.rotate(x[:, :4])
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 4:], memory[:, 4:])
