"""The C++ backend against the reference: every ISA level this machine has, with no tolerance.

One exception: the RMS sums the same squares in another order than the reference, so a scale may
differ by one unit in the last place where the double-precision root rounds to a neighbouring float.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.formats.codebook import CODE_BITS, Codebook, CodeLayout, nearest_codebook
from lowbit_muon.formats.state_format import StateFormat

if cpu.unavailable_reason() is not None:
    pytest.skip(str(cpu.unavailable_reason()), allow_module_level=True)

REFERENCE = Backend()
COLUMNS = (1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1300)
BLOCKS = (0, 1, 3, 32, 100, 512)
GUARD_BYTES = 64
GRAD_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before, threads = cpu.isa(), torch.get_num_threads()
    cpu.set_isa(request.param)
    torch.set_num_threads(1)
    yield request.param
    cpu.set_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture
def backend() -> CpuBackend:
    return CpuBackend()


def codebooks(bits: int) -> list[Codebook]:
    """Codebooks that take each path of the search, of all and of fewer than 2**bits levels."""
    mu_law = StateFormat("x", bits, snap_levels=False)
    linear = StateFormat("x", bits, codebook="linear", tread="mid_tread", snap_levels=False)
    steep = StateFormat("x", bits, mu=255.0, tread="mid_tread", snap_levels=False)
    lopsided = nearest_codebook([1.5**k - 3 for k in range(2**bits - 1)][: 2**7])
    return [mu_law.code_book(), linear.code_book(), steep.code_book(), lopsided]


def book(bits: int) -> Codebook:
    return codebooks(bits)[0]


def layout(bits: int, block_size: int = 0, statistic: str = "rms", clip: float = 2.7) -> CodeLayout:
    return CodeLayout(bits, block_size, statistic, clip)  # type: ignore[arg-type]


def awkward(columns: int) -> Tensor:
    """Rows of ordinary, zero, denormal, barely normal, huge and widely spread values."""
    normal = torch.randn(6, columns)
    factors = torch.tensor([1.0, 0.0, 1e-40, 1.2e-38, 1e37, 1.0]).view(6, 1)
    x = normal * factors
    x[4, :1] = 3e38
    x[5] *= torch.logspace(-30, 30, columns)
    return x


def guarded(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN (or 255) inside a larger allocation, and that allocation as bytes."""
    size = math.prod(shape) * dtype.itemsize
    raw = torch.full((size + 2 * GUARD_BYTES,), 0xFF, dtype=torch.uint8)
    return raw[GUARD_BYTES : GUARD_BYTES + size].view(dtype).view(shape), raw


def assert_guards_intact(*allocations: Tensor) -> None:
    for raw in allocations:
        assert raw[:GUARD_BYTES].eq(0xFF).all()
        assert raw[-GUARD_BYTES:].eq(0xFF).all()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_scales(found: Tensor, expected: Tensor, statistic: str) -> None:
    assert found.shape == expected.shape
    # Positive floats are ordered like their bits: neighbours differ by one.
    steps = (found.view(torch.int32) - expected.view(torch.int32)).abs()
    assert steps.max() <= (1 if statistic == "rms" else 0)


def assert_same_squares(found: Tensor, expected: Tensor, columns: int) -> None:
    """Both add the same non-negative doubles of a row: each sum is within columns * 2^-53 of the
    true one, relatively (Higham, Accuracy and Stability, section 4.2)."""
    assert (found.dtype, found.shape) == (torch.float64, expected.shape)
    assert ((found - expected).abs() <= 2 * columns * 2.0**-53 * expected).all()


def packed_codes(backend: CpuBackend, x: Tensor, codes_layout: CodeLayout) -> PackedCodes:
    codebook = book(codes_layout.bits)
    return PackedCodes(
        *backend.quantize(x, codebook, codes_layout), codebook, codes_layout, x.shape[1]
    )


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_quantize_and_dequantize(backend: CpuBackend, bits: int, columns: int) -> None:
    x = awkward(columns)
    rows = x.shape[0]
    for block, statistic in itertools.product(BLOCKS, ("rms", "absmax")):
        codes_layout = layout(bits, block, statistic, 1.1)
        packed, packed_raw = guarded((rows, codes_layout.row_bytes(columns)), torch.uint8)
        scales, scales_raw = guarded((rows, codes_layout.blocks(columns)), torch.float32)
        out = backend.quantize(x, book(bits), codes_layout, packed=packed, scales=scales)
        assert out[0] is packed
        assert out[1] is scales
        expected_scales = REFERENCE.quantize(x, book(bits), codes_layout)[1]
        assert_same_scales(scales, expected_scales, statistic)
        assert torch.equal(packed, REFERENCE.encode(x, scales, book(bits), codes_layout))

        codes = PackedCodes(packed, scales, book(bits), codes_layout, columns)
        found, found_raw = guarded((rows, columns), torch.float32)
        expected = torch.empty(rows, columns)
        backend.accumulate(found, Terms(codes=codes))
        REFERENCE.accumulate(expected, Terms(codes=codes))
        assert_same(found, expected)
        assert_guards_intact(packed_raw, scales_raw, found_raw)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_threshold_is_strict(backend: CpuBackend, bits: int) -> None:
    """Codes exactly at, just below and just above every threshold, counted in Python."""
    for codebook in codebooks(bits):
        at = torch.tensor(codebook.thresholds)
        infinity = torch.tensor(math.inf)
        z = torch.cat(
            [at, torch.nextafter(at, infinity), torch.nextafter(at, -infinity), torch.tensor([0.0])]
        )
        limits = torch.cat([at[:1] - 1e30, at[-1:] + 1e30])
        z = torch.cat([z, limits]).view(1, -1)
        expected = [sum(t < v for t in at.tolist()) for v in z[0].tolist()]
        identity = CodeLayout(8, 0, "absmax", 1.0)  # one byte a code
        for codes_layout in {layout(bits), identity}:
            packed = backend.encode(z, torch.ones(1, 1), codebook, codes_layout)
            reference = REFERENCE.encode(z, torch.ones(1, 1), codebook, codes_layout)
            assert torch.equal(packed, reference)
            if codes_layout.bits == 8:
                assert packed[0].tolist() == expected


def test_random_codebooks(backend: CpuBackend) -> None:
    """Any number of levels with any spacing, among them thresholds that share a cell."""
    generator = torch.Generator().manual_seed(1)
    for bits, trial in itertools.product(CODE_BITS, range(25)):
        count = int(torch.randint(1, 2**bits + 1, (), generator=generator))
        steps = torch.rand(count, generator=generator) ** (1 + trial % 5) + 1e-3
        codebook = nearest_codebook(torch.cumsum(steps, 0).sub(count / 4).tolist())
        x = count * (torch.rand(2, 300, generator=generator) - 0.3)
        found = backend.encode(x, torch.ones(2, 1), codebook, layout(bits))
        assert torch.equal(found, REFERENCE.encode(x, torch.ones(2, 1), codebook, layout(bits)))


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_byte_decodes(backend: CpuBackend, bits: int) -> None:
    """All 256 values of a packed byte, in every place of a chunk; also codes past the levels."""
    columns = 1024
    codes_layout = layout(bits)
    size = codes_layout.row_bytes(columns)
    packed = (torch.arange(256).view(-1, 1) + torch.arange(size)).remainder(256).to(torch.uint8)
    scales = torch.rand(256, 1) + 0.5
    for codebook in codebooks(bits):
        codes = PackedCodes(packed, scales, codebook, codes_layout, columns)
        found, expected = torch.empty(256, columns), torch.empty(256, columns)
        backend.accumulate(found, Terms(codes=codes))
        REFERENCE.accumulate(expected, Terms(codes=codes))
        assert_same(found, expected)


def strided_like(values: Tensor, kind: str) -> Tensor:
    """The same matrix in another memory layout."""
    rows, columns = values.shape
    if kind == "padded":
        return torch.empty(rows, columns + 5, dtype=values.dtype)[:, :columns].copy_(values)
    if kind == "tall":
        return values.T.contiguous().T
    if kind == "tall padded":
        return torch.empty(columns, rows + 3, dtype=values.dtype)[:, :rows].copy_(values.T).T
    if kind == "every other":
        return torch.empty(rows, 2 * columns, dtype=values.dtype)[:, ::2].copy_(values)
    return values


KINDS = ("contiguous", "padded", "tall", "tall padded", "every other")


@pytest.mark.parametrize("dtype", GRAD_TYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 129), (33, 600), (64, 64), (70, 513)])
def test_accumulate(backend: CpuBackend, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, columns = shape
    values = torch.randn(shape).to(dtype)
    start = torch.randn(shape)
    wide = torch.full((rows, columns + 7), math.nan)
    for kind, bits, weight in itertools.product(KINDS, (None, 3, 4), (0.0, 0.95)):
        grad = strided_like(values, kind)
        codes = None if bits is None else packed_codes(backend, start, layout(bits, 100))
        found = wide[:, :columns]
        found.copy_(start if weight else torch.full(shape, math.nan))
        expected = start.clone()
        terms = Terms(weight, codes, 0.7, grad, 0.05)
        squares = backend.accumulate(found, terms)
        wanted = REFERENCE.accumulate(expected, terms)
        assert torch.equal(found, expected), (kind, bits, weight)
        assert wide[:, columns:].isnan().all()
        assert_same_squares(squares, wanted, columns)


def test_accumulate_of_one_term(backend: CpuBackend) -> None:
    start = torch.randn(3, 200)
    buffer = start.clone()
    squares = backend.accumulate(buffer, Terms(0.5))
    assert_same_squares(squares, (start.double() / 2).square().sum(dim=1), 200)
    assert torch.equal(buffer, start * 0.5)
    buffer.fill_(math.nan)
    assert torch.equal(backend.accumulate(buffer, Terms()), torch.zeros(3).double())
    assert torch.equal(buffer, torch.zeros(3, 200))


def test_accumulate_with_a_weight_for_each_matrix(backend: CpuBackend) -> None:
    """Numbers of float64 are rounded to float32 first."""
    weights = torch.tensor([0.3, 0.0, 1e-30], dtype=torch.float64)
    for dtype, batch in ((torch.float64, 3), (torch.float32, 3), (torch.float64, 1)):
        start, grad = torch.randn(2, batch, 7, 1100).unbind()
        terms = Terms(weights[:batch].to(dtype), grad=grad, grad_weight=0.1)
        found, expected = start.clone(), start.clone()
        squares = backend.accumulate(found, terms)
        assert_same_squares(squares, REFERENCE.accumulate(expected, terms), 1100)
        assert_same(found, expected)
        assert_same(found[0], start[0] * weights[0].float() + grad[0] * 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_precision_gradient(backend: CpuBackend, dtype: torch.dtype) -> None:
    """All 65,536 values of a 16-bit float convert exactly, subnormals and infinities included."""
    grad = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(64, 1024)
    for values in (grad, grad.T.contiguous().T, grad.T.contiguous()):
        found = torch.empty(values.shape)
        backend.accumulate(found, Terms(grad=values))
        assert_same(found, values.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (40, 511), (40, 599)])
def test_non_finite_gradient_shows(backend: CpuBackend, bad: float, place: tuple[int, int]) -> None:
    for kind in ("contiguous", "tall"):
        grad = strided_like(torch.randn(41, 600), kind)
        grad[place] = bad
        buffer = torch.randn(41, 600)
        squares = backend.accumulate(buffer, Terms(0.9, grad=grad))
        others = torch.arange(41) != place[0]
        assert not squares[place[0]].isfinite()
        assert squares[others].isfinite().all()


def test_result_does_not_depend_on_threads_or_isa(backend: CpuBackend, isa: str) -> None:
    x = torch.randn(301, 513) * torch.logspace(-3, 3, 513)
    grad = torch.randn(513, 301, dtype=torch.bfloat16).T
    results = []
    for level, threads in itertools.product(("baseline", isa), (1, 2, 3, 4, 5, 7)):
        cpu.set_isa(level)
        torch.set_num_threads(threads)
        codes = packed_codes(backend, x, layout(4))
        buffer = x.clone()
        squares = backend.accumulate(buffer, Terms(0.9, codes, grad=grad))
        rotated = x.clone()
        backend.rotate(rotated)
        results.append((squares, codes.packed, codes.scales, buffer, rotated))
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            assert torch.equal(found, expected)


def test_strided_input_is_read_as_it_is(backend: CpuBackend) -> None:
    x = torch.randn(6, 300)
    expected = backend.quantize(x, book(4), layout(4, 64))
    for kind in KINDS:
        found = backend.quantize(strided_like(x, kind), book(4), layout(4, 64))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0)])
def test_empty(backend: CpuBackend, shape: tuple[int, int]) -> None:
    codes = packed_codes(backend, torch.empty(shape), layout(3))
    buffer = torch.empty(shape)
    grad = torch.empty(shape, dtype=torch.bfloat16)
    squares = backend.accumulate(buffer, Terms(1.0, codes, grad=grad))
    assert torch.equal(squares, torch.zeros(shape[0]).double())


def test_wrong_tensors_raise(backend: CpuBackend) -> None:
    x = torch.randn(4, 200)
    good = packed_codes(backend, x, layout(4))

    def quantize(x: Tensor, **out: Tensor) -> object:
        return backend.quantize(x, book(4), layout(4), **out)

    def decode(**fields: object) -> object:
        codes = PackedCodes(**{**good.__dict__, **fields})
        return backend.accumulate(torch.empty(4, 200), Terms(codes=codes))

    cases = [
        (TypeError, "x", lambda: quantize(x.double())),
        (ValueError, "x", lambda: quantize(x[0])),
        (ValueError, "x", lambda: quantize(x.to("meta"))),
        (ValueError, "x", lambda: quantize(x.to_sparse())),
        (TypeError, "packed", lambda: quantize(x, packed=torch.empty(4, 104, dtype=torch.int8))),
        (ValueError, "packed", lambda: quantize(x, packed=good.packed[:, 1:])),
        (ValueError, "packed", lambda: quantize(x, packed=good.packed.T.contiguous().T)),
        (ValueError, "scales", lambda: quantize(x, scales=torch.empty(4, 2))),
        (ValueError, "scales", lambda: backend.encode(x, torch.ones(3, 1), book(4), layout(4))),
        (ValueError, "codes.packed", lambda: decode(packed=good.packed[:3])),
        (ValueError, "codes.scales", lambda: decode(scales=good.scales.expand(4, 2))),
        (TypeError, "codes.scales", lambda: decode(scales=good.scales.half())),
        (ValueError, "codes", lambda: decode(columns=199)),
        (ValueError, "buffer", lambda: backend.accumulate(x[:1].expand(4, 200), Terms())),
        (ValueError, "buffer", lambda: backend.accumulate(x.T, Terms())),
        (TypeError, "buffer", lambda: backend.accumulate(x.half(), Terms())),
        (ValueError, "buffer_weight", lambda: backend.accumulate(x, Terms(torch.ones(2)))),
        (ValueError, "grad", lambda: backend.accumulate(x, Terms(grad=x.T))),
        (TypeError, "grad", lambda: backend.accumulate(x, Terms(grad=x.int()))),
        (ValueError, "grad", lambda: backend.accumulate(x, Terms(grad=x.to("meta")))),
        (ValueError, "bits", lambda: backend.quantize(x, book(4), layout(5))),
        (ValueError, "codebook", lambda: backend.quantize(x, book(8), layout(4))),
    ]
    for error, parameter, call in cases:
        with pytest.raises(error, match=f"^{parameter}: expected .* got "):
            call()


def test_isa_choice(isa: str) -> None:
    assert cpu.isa() == isa
    assert cpu.supported_isas()[0] == "baseline"
    with pytest.raises(ValueError, match=r"expected one .*baseline.*got 'mmx'"):
        cpu.set_isa("mmx")
    assert cpu.isa() == isa


@pytest.mark.parametrize("columns", [*COLUMNS, 15, 16, 17, 31, 32, 33, 576])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation_bit_for_bit(backend: CpuBackend, columns: int, inverse: bool) -> None:
    """In a guarded buffer with rows further apart than they are long."""
    padded, raw = guarded((5, columns + 3), torch.float32)
    x = padded[:, :columns].copy_(torch.randn(5, columns))
    gaps, before = padded[:, columns:].clone().view(torch.int32), raw.clone()
    expected = x.clone()
    REFERENCE.rotate(expected, inverse=inverse)
    backend.rotate(x, inverse=inverse)
    assert torch.equal(x, expected)
    assert torch.equal(padded[:, columns:].view(torch.int32), gaps)
    assert torch.equal(raw[:GUARD_BYTES], before[:GUARD_BYTES])
    assert torch.equal(raw[-GUARD_BYTES:], before[-GUARD_BYTES:])


def test_rotation_of_nothing_and_on_two_threads(backend: CpuBackend) -> None:
    for shape in ((0, 5), (5, 0)):
        backend.rotate(torch.empty(shape))
    x = torch.randn(300, 333)
    alone = x.clone()
    backend.rotate(alone)
    torch.set_num_threads(2)
    backend.rotate(x)
    assert torch.equal(x, alone)


def test_rotation_rejects_what_it_cannot_write(backend: CpuBackend) -> None:
    with pytest.raises(TypeError, match=r"x: expected torch.float32"):
        backend.rotate(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match="x: expected contiguous rows"):
        backend.rotate(torch.zeros(3, 2).mT)
