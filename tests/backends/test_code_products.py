"""Products of 2- to 8-bit codes: bit for bit like the reference, and it like exact integers."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cpu_backend import KINDS, assert_guards_intact, guarded, strided_like
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import LIMB_LIMIT, MAX_INTEGER_TERMS, PackedCodes
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.backends.packing import pack, unpack
from lowbit_muon.formats.codebook import CODE_BITS, Codebook, CodeLayout, nearest_codebook
from lowbit_muon.formats.state_format import StateFormat

CPU, REFERENCE = CpuBackend(), Backend()
LEVELS = cpu.supported_isas()
# Around words of 2 and 4 codes, strips of 16, groups of 48 rows; two panels of 512 and a rest.
ROWS = (1, 3, 4, 5, 15, 17, 47, 49, 64, 130)
COLUMNS = (1, 2, 3, 4, 5, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1030)
# One, pairs, the most that are decoded where they are multiplied, and more (kNarrowRows).
OUT_ROWS = (0, 1, 2, 3, 12, 13, 16, 17, 50)
# Zero, below the smallest normal float32, small, large, and so large that products overflow.
AWKWARD_SCALES = (0.0, 1e-38, 1e-30, 1.0, 1e15, 1e30, 3e38)
BACKENDS = pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=["cpu", "reference"])


@pytest.fixture(autouse=True)
def keep_isa() -> Iterator[None]:
    before = cpu.isa()
    yield
    cpu.set_isa(before)


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    cpu.set_isa(request.param)
    return str(request.param)


def codebooks(bits: int) -> list[Codebook]:
    """Snapped levels as states have them, and lopsided ones that leave some codes unused."""
    mu_law = StateFormat("x", bits, codebook="linear" if bits == 8 else "mu_law", tread="mid_tread")
    lopsided = [-127.0, *map(float, range(min(2**bits - 3, 100))), 127.0]
    return [mu_law.code_book(), nearest_codebook(lopsided)]


def layout(bits: int) -> CodeLayout:
    return CodeLayout(bits, 0, "rms", 2.7)


def random_codes(
    rows: int,
    columns: int,
    bits: int,
    scales: Sequence[float] | None = None,
    codebook: Codebook | None = None,
) -> PackedCodes:
    """Every value of a code in turn, shuffled; also those past the last level."""
    order = torch.randperm(rows * columns).view(rows, columns)
    packed = pack(order.remainder(2**bits).to(torch.uint8), layout(bits))
    values = torch.rand(rows, 1) + 0.5
    if scales is not None:
        values = torch.tensor(scales)[torch.arange(rows) % len(scales)].view(-1, 1)
    book = codebook or codebooks(bits)[rows % 2]
    return PackedCodes(packed, values, book, layout(bits), columns)


def constant_codes(rows: int, columns: int, levels: Sequence[float]) -> PackedCodes:
    """4 bits with scales of one; row i has the level i modulo their number in each column."""
    book = nearest_codebook(sorted(levels))
    index = torch.tensor([book.levels.index(level) for level in levels], dtype=torch.uint8)
    codes = index[torch.arange(rows) % len(levels)].view(-1, 1).expand(rows, columns)
    return PackedCodes(pack(codes, layout(4)), torch.ones(rows, 1), book, layout(4), columns)


def integers(codes: PackedCodes) -> Tensor:
    """The levels, int64 [m, n]; a code past the last level means the last."""
    levels = torch.tensor(codes.codebook.levels, dtype=torch.int64)
    indices = unpack(codes.packed, codes.layout, codes.columns).long()
    return levels[indices.clamp(max=len(levels) - 1)]


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal; any NaN is like any other, and so is a zero (float64 sums of integers may be -0)."""
    both_nan = found.isnan() & expected.isnan()
    return found.shape == expected.shape and bool(((found == expected) | both_nan).all())


def each_level() -> Iterator[str]:
    """Sets each level in turn."""
    for name in LEVELS:
        cpu.set_isa(name)
        yield name


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_gram_bit_for_bit(bits: int, rows: int) -> None:
    for columns in COLUMNS:
        scales = AWKWARD_SCALES if columns % 4 == 3 else None
        codes = random_codes(rows, columns, bits, scales)
        expected = REFERENCE.code_gram(codes)
        for name in each_level():
            assert same(CPU.code_gram(codes), expected), (columns, name)
        if scales is None:
            levels = integers(codes)
            outer = codes.scales * codes.scales.mT
            assert torch.equal(expected, (levels @ levels.mT).float() * outer), columns


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_product_bit_for_bit(bits: int, rows: int) -> None:
    """In a guarded `out`, which is not read unless beta says so."""
    for index, columns in enumerate(COLUMNS):
        out_rows = OUT_ROWS[(index + rows) % len(OUT_ROWS)]
        kind, beta = KINDS[(index + rows) % 5], (0.0, -0.7, 1.0)[(index + bits) % 3]
        awkward = columns % 4 == 3
        codes = random_codes(rows, columns, bits, AWKWARD_SCALES if awkward else None)
        a = torch.randn(out_rows, rows)
        if awkward:
            a *= torch.logspace(-30, 8, out_rows).view(-1, 1)
            a[:, :4] *= torch.tensor([1e30, 1.0, 0.0, -1.0])[:rows]
        start = torch.randn(out_rows, columns)
        strided = strided_like(a, kind)
        expected = REFERENCE.code_product(a, codes, out=start.clone(), beta=beta)
        for name in each_level():
            out, raw = guarded((out_rows, columns), torch.float32)
            if beta:
                out.copy_(start)
            assert CPU.code_product(strided, codes, out=out, beta=beta) is out
            assert same(out, expected), (columns, name, kind, beta)
            assert_guards_intact(raw)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_times_bit_for_bit(bits: int, rows: int) -> None:
    for index, columns in enumerate(COLUMNS):
        out_columns = (0, 1, 2, 3, 8, 17)[(index + rows) % 6]
        awkward = columns % 4 == 3
        codes = random_codes(rows, columns, bits, AWKWARD_SCALES if awkward else None)
        v = torch.randn(columns, out_columns)
        if awkward:
            v *= torch.logspace(-30, 8, out_columns)
            v[:4] *= torch.tensor([1e30, 1.0, 0.0, -1.0])[:columns].view(-1, 1)
        strided = strided_like(v, KINDS[(index + rows) % 5])
        expected = REFERENCE.code_times(codes, v)
        for name in each_level():
            assert same(CPU.code_times(codes, strided), expected), (columns, name)


@pytest.mark.parametrize("shape", [(131, 513, 9), (1100, 1030, 2), (70, 9000, 12)], ids=str)
def test_threads_change_nothing_in_narrow_products(level: str, shape: tuple[int, int, int]) -> None:
    """Shapes with more work than one thread takes, in parts that are no whole blocks of rows."""
    rows, columns, narrow = shape
    assert rows * columns * narrow >= 2**19
    codes = random_codes(rows, columns, 3)
    a, v = torch.randn(narrow, rows), torch.randn(columns, narrow)
    product, times = REFERENCE.code_product(a, codes), REFERENCE.code_times(codes, v)
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        assert same(CPU.code_product(a, codes), product), threads
        assert same(CPU.code_times(codes, v), times), threads


@pytest.mark.parametrize("shape", [(130, 513, 65), (300, 1030, 200), (1100, 70, 64)], ids=str)
def test_two_threads_change_nothing(level: str, shape: tuple[int, int, int]) -> None:
    """Shapes with more work than one thread takes (kWorkPerThread in csrc/cpu/workspace.hpp)."""
    rows, columns, out_rows = shape
    assert min(rows * rows * columns / 8, out_rows * rows * columns / 4) >= 2 * 2**19
    codes = random_codes(rows, columns, 4)
    a, start = torch.randn(out_rows, rows), torch.randn(out_rows, columns)
    gram = REFERENCE.code_gram(codes)
    product = REFERENCE.code_product(a, codes, out=start.clone(), beta=0.5)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert same(CPU.code_gram(codes), gram), threads
        found = CPU.code_product(a, codes, out=start.clone(), beta=0.5)
        assert same(found, product), threads


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_byte(bits: int) -> None:
    """All 256 values of a packed byte in each place of a chunk, and codes past the last level."""
    columns = 512
    size = layout(bits).row_bytes(columns)
    packed = (torch.arange(256).view(-1, 1) + torch.arange(size)).remainder(256).to(torch.uint8)
    for book in codebooks(bits):
        codes = PackedCodes(packed, torch.ones(256, 1), book, layout(bits), columns)
        levels = integers(codes)
        gram = (levels @ levels.mT).float()
        assert torch.equal(REFERENCE.code_gram(codes), gram)
        # A unit matrix is LIMB_LIMIT units; times a level that is exact in float32.
        product = torch.tensor(1.0) / LIMB_LIMIT * (levels * LIMB_LIMIT).float()
        narrow = torch.eye(256)[250:]
        times = torch.tensor(1.0) / LIMB_LIMIT * (levels * LIMB_LIMIT).float()
        for name in each_level():
            assert torch.equal(CPU.code_gram(codes), gram), name
            assert torch.equal(CPU.code_product(torch.eye(256), codes), product), name
            assert torch.equal(CPU.code_product(narrow, codes), product[250:]), name
            assert torch.equal(CPU.code_times(codes, torch.eye(columns)), times), name


@given(
    rows=st.integers(1, 100),
    columns=st.integers(1, 1100),
    bits=st.sampled_from(CODE_BITS),
    table=st.sets(st.integers(-127, 127), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=60, deadline=None)
def test_gram_is_exact(rows: int, columns: int, bits: int, table: set[int], seed: int) -> None:
    torch.manual_seed(seed)
    book = nearest_codebook([float(level) for level in sorted(table)])
    codes = random_codes(rows, columns, bits, [1.0], book)
    # float32(sum): numpy rounds int64 to the nearest float32, as the kernels do int32.
    levels = integers(codes).numpy()
    expected = torch.from_numpy((levels @ levels.T).astype(np.float32))
    assert torch.equal(REFERENCE.code_gram(codes), expected)
    for name in each_level():
        assert torch.equal(CPU.code_gram(codes), expected), name


@pytest.mark.parametrize("columns", [1030, MAX_INTEGER_TERMS])
def test_largest_sums_of_a_gram_matrix(level: str, columns: int) -> None:
    """The sums themselves in Python, at most 2.13e9 of int32's 2.147e9."""
    levels = [127, -127, 0, -1]
    codes = constant_codes(4, columns, levels)
    sums = [[float(columns * x * y) for y in levels] for x in levels]
    assert torch.equal(CPU.code_gram(codes), torch.tensor(sums))
    assert torch.equal(REFERENCE.code_gram(codes), torch.tensor(sums))


@pytest.mark.parametrize("rows", [1030, MAX_INTEGER_TERMS])
@pytest.mark.parametrize("whole", [LIMB_LIMIT, -LIMB_LIMIT, 127 * 256 - 128, -128, 127, -32384])
def test_largest_sums_of_a_product(level: str, rows: int, whole: int) -> None:
    """Limbs of -128, -127 and 127 in all places but one, times levels of 127 and -127."""
    a = torch.full((2, rows), float(whole))
    a[:, 0] = LIMB_LIMIT  # so the unit is one, and the rest stays whole
    a[1] *= -1
    for value in (127, -127):
        codes = constant_codes(rows, 1, [value])
        found = CPU.code_product(a, codes)
        for row, sign in enumerate((1, -1)):
            high = low = 0
            for count, number in ((rows - 1, sign * whole), (1, sign * LIMB_LIMIT)):
                lower = (number + 128) % 256 - 128
                high += count * value * (number - lower) // 256
                low += count * value * lower
            limbs = torch.tensor([high, low], dtype=torch.float32)
            assert found[row, 0] == 256 * limbs[0] + limbs[1], (value, row)
        assert same(found, REFERENCE.code_product(a, codes))
        row = constant_codes(1, rows, [value])
        assert torch.equal(CPU.code_times(row, a.mT), found.mT)
        assert torch.equal(REFERENCE.code_times(row, a.mT), found.mT)


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_every_whole_number_has_its_limbs(level: str, shift: float) -> None:
    """A row [x, LIMB_LIMIT] times levels [1, 0] is x rounded, halves to even, for each x."""
    x = torch.arange(-LIMB_LIMIT, LIMB_LIMIT).float().view(-1, 1) + shift
    a = torch.cat([x, torch.full_like(x, LIMB_LIMIT)], dim=1)
    codes = constant_codes(2, 1, [1, 0])
    expected = torch.tensor([float(round(value)) for value in x[:, 0].tolist()]).view(-1, 1)
    assert torch.equal(CPU.code_product(a, codes), expected)
    assert torch.equal(REFERENCE.code_product(a, codes), expected)


def assert_within_half_a_unit(backend: Backend, a: Tensor, codes: PackedCodes) -> None:
    """The unit of row i is w = max_k |a_ik s_k| / 32639, and u = 2^-24.

    Rounding to a whole number costs w / 2 in each of a_ik s_k. Beside that round: the product with
    the scale, the inverse unit, the product with that and the unit (4 u of |a_ik s_k|); two sums to
    float32, their sum and its product with the unit (3 u of 256 |h| + |l| <= |a_ik s_k| / w + 257
    in units). Together below w/2 + 8 u (|a_ik s_k| + 257 w), times the magnitude of the level.
    """
    levels = integers(codes).double()
    scaled = a.double() * codes.scales[:, 0].double()
    unit = scaled.abs().amax(dim=1, keepdim=True) / LIMB_LIMIT
    bound = (unit / 2 + 8 * 2.0**-24 * (scaled.abs() + 257 * unit)) @ levels.abs()
    error = (backend.code_product(a, codes).double() - scaled @ levels).abs()
    assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("rows", ROWS)
def test_error_of_a_product(level: str, bits: int, rows: int) -> None:
    codes = random_codes(rows, 65, bits)
    codes.scales.mul_(torch.logspace(-3, 3, rows).view(-1, 1))
    for size in (1e-20, 1.0, 1e25):  # units stay normal numbers, and sums finite
        for a in (torch.randn(17, rows), torch.eye(rows), torch.randn(3, rows) ** 3):
            assert_within_half_a_unit(CPU, size * a, codes)
            if level == LEVELS[0]:
                assert_within_half_a_unit(REFERENCE, size * a, codes)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("columns", [1, 65, 513])
def test_error_of_a_product_from_the_right(level: str, bits: int, columns: int) -> None:
    """As `assert_within_half_a_unit` with the scales outside: one more rounding, for each row."""
    codes = random_codes(17, columns, bits)
    codes.scales.mul_(torch.logspace(-3, 3, 17).view(-1, 1))
    levels, scales = integers(codes).double(), codes.scales.double()
    for size in (1e-20, 1.0, 1e25):
        v = size * torch.randn(columns, 9)
        wide = v.double()
        unit = wide.abs().amax(dim=0) / LIMB_LIMIT
        bound = levels.abs() @ (unit / 2 + 9 * 2.0**-24 * (wide.abs() + 257 * unit))
        exact = levels @ wide
        for backend in (CPU, REFERENCE) if level == LEVELS[0] else (CPU,):
            error = (backend.code_times(codes, v).double() - scales * exact).abs()
            assert (error <= scales * bound).all(), (error / (scales * bound)).max()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 5, 511, 512, 599])
def test_bad_columns_stay_alone(level: str, bad: float, place: int) -> None:
    codes = random_codes(70, 600, 4)
    v = torch.randn(600, 5)
    clean = CPU.code_times(codes, v)
    v[place, 1] = bad
    v[:, 3] = 0
    found = CPU.code_times(codes, v)
    assert found[:, 1].isnan().all()
    assert not found[:, 3].any()
    assert torch.equal(found[:, [0, 2, 4]], clean[:, [0, 2, 4]])
    assert same(found, REFERENCE.code_times(codes, v))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 512, 599])
def test_bad_rows_stay_alone(level: str, bad: float, place: int) -> None:
    codes = random_codes(600, 70, 4)
    a = torch.randn(20, 600)
    clean = CPU.code_product(a, codes)
    spoiled = a.clone()
    spoiled[[3, 16], place] = bad
    spoiled[5] = 0
    spoiled[6] = bad
    others = [row for row in range(20) if row not in (3, 5, 6, 16)]
    for beta in (0.0, 0.5):
        start = torch.randn(20, 70)
        found = CPU.code_product(spoiled, codes, out=start.clone(), beta=beta)
        assert found[[3, 6, 16]].isnan().all()
        assert torch.equal(found[5], beta * start[5])
        assert torch.equal(found[others], (beta * start + clean)[others])
        expected = REFERENCE.code_product(spoiled, codes, out=start.clone(), beta=beta)
        assert same(found, expected)
        few = CPU.code_product(spoiled[:8], codes, out=start[:8].clone(), beta=beta)
        assert same(few, found[:8])


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1.0, 1e20, 1e38])
def test_rounding_of_many_rows(level: str, size: float) -> None:
    """Enough elements that an inverse unit one step off moves some of them over a half."""
    codes = constant_codes(500, 2, [1, -1, 0])
    a = torch.rand(400, 500).sub_(0.5).mul_(size)
    assert same(CPU.code_product(a, codes), REFERENCE.code_product(a, codes))


def test_non_contiguous_codes_and_repeated_rows(level: str) -> None:
    codes = random_codes(5, 70, 4)
    wide = torch.empty(5, 2 * codes.packed.shape[1], dtype=torch.uint8)[:, ::2].copy_(codes.packed)
    scales = torch.empty(5, 3)[:, 1:2].copy_(codes.scales)
    strided = dataclasses.replace(codes, packed=wide, scales=scales)
    assert same(CPU.code_gram(strided), REFERENCE.code_gram(codes))
    a = torch.randn(1, 5).expand(7, 5)
    assert same(CPU.code_product(a, strided), REFERENCE.code_product(a, codes))
    v = torch.randn(70, 1).expand(70, 7)
    assert same(CPU.code_times(strided, v), REFERENCE.code_times(codes, v))


@BACKENDS
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (0, 5), (3, 0)])
def test_empty(backend: Backend, rows: int, columns: int) -> None:
    packed = torch.zeros(rows, layout(4).row_bytes(columns), dtype=torch.uint8)
    scales = torch.ones(rows, layout(4).blocks(columns))
    codes = PackedCodes(packed, scales, codebooks(4)[0], layout(4), columns)
    assert torch.equal(backend.code_gram(codes), torch.zeros(rows, rows))
    for out_rows, beta in itertools.product((0, 2), (0.0, 0.5)):
        start = torch.randn(out_rows, columns)
        out = start.clone() if beta else torch.full_like(start, math.nan)
        backend.code_product(torch.ones(out_rows, rows), codes, out=out, beta=beta)
        assert torch.equal(out, beta * start), (out_rows, beta)
    for out_columns in (0, 2):
        found = backend.code_times(codes, torch.ones(columns, out_columns))
        assert torch.equal(found, torch.zeros(rows, out_columns)), out_columns


@BACKENDS
def test_codes_that_are_no_integers_raise(backend: Backend) -> None:
    good = random_codes(3, 70, 4)
    too_many = MAX_INTEGER_TERMS + 1
    cases: list[tuple[str, dict[str, Any]]] = [
        ("whole levels of at most 127", {"codebook": nearest_codebook([-1.0, 0.5])}),
        ("whole levels of at most 127", {"codebook": nearest_codebook([-128.0, 1.0])}),
        ("whole levels of at most 127", {"codebook": nearest_codebook([1.0, 128.0])}),
        # Not blocks of 35 in any case; a product takes none at all.
        ("one scale a row", {"scales": torch.ones(3, 2), "layout": CodeLayout(4, 35, "rms", 2.7)}),
        (f"at most {MAX_INTEGER_TERMS} terms a sum", {"columns": too_many}),
        (
            f"at most {MAX_INTEGER_TERMS} terms a sum",
            {
                "packed": torch.empty(1, 1, dtype=torch.uint8).expand(too_many, 36),
                "scales": torch.empty(1, 1).expand(too_many, 1),
            },
        ),
    ]
    for message, fields in cases:
        codes = dataclasses.replace(good, **fields)
        for call in (
            lambda codes=codes: backend.code_gram(codes),
            lambda codes=codes: backend.code_product(torch.ones(2, 3), codes),
            lambda codes=codes: backend.code_times(codes, torch.ones(70, 2)),
        ):
            with pytest.raises(ValueError, match=f"^codes: expected {message}.* got "):
                call()
    blocks = dataclasses.replace(
        good, scales=torch.ones(3, 2), layout=CodeLayout(4, 64, "rms", 2.7)
    )
    with pytest.raises(ValueError, match=r"^codes: expected one scale a row, got "):
        backend.code_product(torch.ones(2, 3), blocks)
    with pytest.raises(ValueError, match=r"^codes: expected one scale a row, got "):
        backend.code_times(blocks, torch.ones(70, 2))


@pytest.mark.parametrize(
    ("error", "name", "fields"),
    [
        (ValueError, "codes.packed", {"packed": torch.zeros(3, 34, dtype=torch.uint8)}),
        (ValueError, "codes.packed", {"columns": 72}),
        (TypeError, "codes.packed", {"packed": torch.zeros(3, 35, dtype=torch.int8)}),
        (
            ValueError,
            "codes.packed",
            {"packed": torch.zeros(3, 35, dtype=torch.uint8, device="meta")},
        ),
        (TypeError, "codes.scales", {"scales": torch.ones(3, 1).half()}),
        (ValueError, "codes.scales", {"scales": torch.ones(2, 1)}),
        (ValueError, "codes.scales", {"scales": torch.ones(3, 1, device="meta")}),
    ],
)
def test_wrong_codes_raise(error: type[Exception], name: str, fields: dict[str, Any]) -> None:
    codes = dataclasses.replace(random_codes(3, 70, 4), **fields)
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        CPU.code_gram(codes)
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        CPU.code_product(torch.ones(2, 3), codes)
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        CPU.code_times(codes, torch.ones(codes.columns, 2))


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "a", {"a": [[1.0, 1.0, 1.0]]}),
        (TypeError, "a", {"a": torch.ones(2, 3).double()}),
        (ValueError, "a", {"a": torch.ones(3, 2)}),
        (ValueError, "a", {"a": torch.ones(3)}),
        (ValueError, "a", {"a": torch.tensor(1.0)}),
        (ValueError, "a", {"a": torch.ones(2, 3, 1)}),
        (ValueError, "a", {"a": torch.ones(1, 2, 3)}),
        (ValueError, "a", {"a": torch.ones(2, 3, device="meta")}),
        (ValueError, "a", {"a": torch.ones(2, 3).to_sparse()}),
        (TypeError, "out", {"out": torch.ones(2, 70).double()}),
        (ValueError, "out", {"out": torch.ones(2, 71)}),
        (ValueError, "out", {"out": torch.ones(70)}),
        (ValueError, "out", {"out": torch.ones(70, 2).mT}),
        (ValueError, "out", {"out": torch.ones(2, 140)[:, ::2]}),
        (ValueError, "out", {"out": torch.ones(2, 70, device="meta")}),
    ],
)
def test_wrong_tensors_raise(
    error: type[Exception], name: str, arguments: dict[str, object]
) -> None:
    good: dict[str, Any] = {"a": torch.ones(2, 3)}
    with pytest.raises(error, match=f"^{name}: expected .* got "):
        CPU.code_product(codes=random_codes(3, 70, 4), **{**good, **arguments})


@pytest.mark.parametrize(
    ("error", "v"),
    [
        (TypeError, [[1.0]]),
        (TypeError, torch.ones(70, 2).double()),
        (ValueError, torch.ones(2, 70)),
        (ValueError, torch.ones(70)),
        (ValueError, torch.ones(1, 70, 2)),
        (ValueError, torch.ones(70, 2, device="meta")),
        (ValueError, torch.ones(70, 2).to_sparse()),
    ],
)
def test_wrong_columns_raise(error: type[Exception], v: Any) -> None:
    with pytest.raises(error, match=r"^v: expected .* got "):
        CPU.code_times(random_codes(3, 70, 4), v)
