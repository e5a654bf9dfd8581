"""The reference backend against brute force, element by element in Python."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.packing import pack, unpack
from lowbit_muon.backends.reference import decode
from lowbit_muon.formats.codebook import CODE_BITS, CodeLayout, nearest_codebook, rotation_signs
from lowbit_muon.formats.state_format import StateFormat

BACKEND = Backend()
COLUMNS = [1, 2, 3, 5, 63, 64, 65, 127, 128, 129, 200, 255, 257, 511, 512, 513]


def layout(
    bits: int, block_size: int = 0, statistic: str = "rms", clip: float = 0.02
) -> CodeLayout:
    return CodeLayout(bits, block_size, statistic, clip)  # type: ignore[arg-type]


def brute_force_row(codes: list[int], bits: int) -> bytes:
    """The layout of `CodeLayout`, bit by bit."""
    out = b""
    shift = 0
    for plane in layout(bits).planes:
        fields = 8 // plane
        for start in range(0, len(codes), 64 * fields):
            chunk = [(c >> shift) & (2**plane - 1) for c in codes[start : start + 64 * fields]]
            width = math.ceil(len(chunk) / fields)
            row = [0] * width
            for index, code in enumerate(chunk):
                row[index % width] |= code << (plane * (index // width))
            out += bytes(row)
        shift += plane
    return out


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_packing_is_the_documented_layout(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
    packed = pack(codes, layout(bits))
    assert packed.shape == (3, layout(bits).row_bytes(columns))
    for row, packed_row in zip(codes.tolist(), packed, strict=True):
        assert bytes(packed_row.tolist()) == brute_force_row(row, bits)
    assert torch.equal(unpack(packed, layout(bits), columns), codes)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_every_code_decodes_to_its_level(bits: int) -> None:
    book = StateFormat("x", bits, snap_levels=False).code_book()
    codes = torch.arange(2**bits, dtype=torch.uint8).repeat(2, 1)
    scales = torch.tensor([[0.5], [3.0]])
    packed = PackedCodes(pack(codes, layout(bits)), scales, book, layout(bits), 2**bits)
    buffer = torch.empty(2, 2**bits)
    BACKEND.accumulate(buffer, Terms(codes=packed))
    for row, scale in zip(buffer, (0.5, 3.0), strict=True):
        expected = [np.float32(level) * np.float32(scale) for level in book.levels]
        assert row.tolist() == [float(v) for v in expected]


@pytest.mark.parametrize("bits", CODE_BITS)
def test_codes_at_and_beside_every_threshold(bits: int) -> None:
    book = StateFormat("x", bits, snap_levels=False).code_book()
    thresholds = torch.tensor(book.thresholds)
    infinity = torch.tensor(math.inf)
    points = torch.cat(
        [thresholds, thresholds.nextafter(infinity), thresholds.nextafter(-infinity)]
    )
    x = points.view(1, -1)
    packed = BACKEND.encode(x, torch.ones(1, 1), book, layout(bits))
    codes = unpack(packed, layout(bits), x.shape[1])[0].tolist()
    exact = [np.float32(t) for t in book.thresholds]
    assert codes == [sum(np.float32(p) > t for t in exact) for p in points.tolist()]


@pytest.mark.parametrize("statistic", ["rms", "absmax"])
@pytest.mark.parametrize("block_size", [0, 1, 3, 32, 100, 2048])
def test_scales_by_brute_force(statistic: str, block_size: int) -> None:
    x = torch.randn(4, 130)
    used = layout(4, block_size, statistic, 0.3)
    book = StateFormat("x", 4).code_book()
    _, scales = BACKEND.quantize(x, book, used)
    size = block_size if 0 < block_size < 130 else 130
    for i, row in enumerate(x.tolist()):
        for b, start in enumerate(range(0, 130, size)):
            block = row[start : start + size]
            value = (
                max(abs(v) for v in block)
                if statistic == "absmax"
                else math.sqrt(math.fsum(v * v for v in block) / len(block))
            )
            # One rounding of the statistic and one of the product: two float32 ulps.
            assert scales[i, b].item() == pytest.approx(value * np.float32(0.3), rel=2**-22)


@pytest.mark.parametrize("bits", CODE_BITS)
def test_quantise_picks_the_nearest_level(bits: int) -> None:
    f = StateFormat("x", bits, snap_levels=False)
    x = torch.randn(5, 257)
    packed, scales = BACKEND.quantize(x, f.code_book(), f.code_layout())
    codes = PackedCodes(packed, scales, f.code_book(), f.code_layout(), 257)
    decoded = torch.empty(5, 257)
    BACKEND.accumulate(decoded, Terms(codes=codes))
    levels = torch.tensor(f.code_book().levels)
    distances = (x[:, :, None] - levels * scales[:, :, None]).abs()
    # A value within rounding of a threshold may go either way: three float32 roundings.
    slack = 3 * 2**-24 * x.abs().max()
    assert bool(((x - decoded).abs() <= distances.amin(dim=2) + slack).all())


@pytest.mark.parametrize("value", [0.0, 1e-45, -1e-39])
def test_rows_too_small_for_a_scale_are_zero(value: float) -> None:
    f = StateFormat("x", 4)
    x = torch.full((2, 70), value)
    packed, scales = BACKEND.quantize(x, f.code_book(), f.code_layout())
    assert not scales.any()
    decoded = torch.empty(2, 70)
    codes = PackedCodes(packed, scales, f.code_book(), f.code_layout(), 70)
    squares = BACKEND.accumulate(decoded, Terms(codes=codes))
    assert not squares.any()
    assert not decoded.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_accumulate_is_what_it_says(dtype: torch.dtype) -> None:
    f = StateFormat("x", 4)
    m, n = 6, 131
    packed, scales = BACKEND.quantize(torch.randn(m, n), f.code_book(), f.code_layout())
    codes = PackedCodes(packed, scales, f.code_book(), f.code_layout(), n)
    grad = torch.randn(n, m, dtype=dtype).mT
    buffer = torch.randn(m, n)
    decoded = torch.empty(m, n)
    BACKEND.accumulate(decoded, Terms(codes=codes))
    expected = 0.5 * buffer.double() + 0.25 * decoded.double() + 0.125 * grad.double()
    squares = BACKEND.accumulate(buffer, Terms(0.5, codes, 0.25, grad, 0.125))
    # The weights are powers of two, so only the two sums round: two float32 half-ulps.
    bound = 2 * 2**-24 * (expected.abs() + 1)
    assert bool(((buffer.double() - expected).abs() <= bound).all())
    assert torch.equal(squares, buffer.double().square().sum(dim=1))


def test_accumulate_does_not_read_a_buffer_of_weight_zero() -> None:
    buffer = torch.full((2, 3), math.nan)
    assert BACKEND.accumulate(buffer, Terms(grad=torch.ones(2, 3))).tolist() == [3.0, 3.0]
    assert torch.equal(buffer, torch.ones(2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_elements_show_in_the_sum(bad: float) -> None:
    grad = torch.zeros(3, 5)
    grad[1, 4] = bad
    squares = BACKEND.accumulate(torch.zeros(3, 5), Terms(grad=grad))
    assert squares.isfinite().tolist() == [True, False, True]


def test_a_short_codebook_leaves_codes_unused() -> None:
    book = nearest_codebook([-1.0, 0.0, 1.0])
    x = torch.linspace(-5, 5, 31).view(1, -1)
    packed = BACKEND.encode(x, torch.ones(1, 1), book, layout(2))
    assert unpack(packed, layout(2), 31).max() == 2


@pytest.mark.parametrize("columns", [1, 2, 3, 5, 64, 96, 127, 577])
def test_rotation_is_orthogonal_flat_and_inverted(columns: int) -> None:
    matrix = torch.eye(columns)
    BACKEND.rotate(matrix)
    # log2(columns) + 1 roundings of float32 for each of two transforms, on entries of at most one
    tolerance = 2 * (columns.bit_length() + 1) * 2**-24 * math.sqrt(columns)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(columns), rtol=0, atol=tolerance)
    # A single column is spread: no entry keeps more than a few times the flat share.
    assert matrix.abs().max() <= min(1.0, 6 / math.sqrt(columns)) + tolerance
    BACKEND.rotate(matrix, inverse=True)
    torch.testing.assert_close(matrix, torch.eye(columns), rtol=0, atol=tolerance)


def test_rotation_is_the_documented_product() -> None:
    columns, size = 6, 4
    hadamard = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    first, second = (torch.tensor(signs) for signs in rotation_signs(columns))
    assert set(first.tolist()) <= {-1.0, 1.0}
    a, b = torch.eye(columns), torch.eye(columns)
    a[:size, :size] = hadamard
    b[-size:, -size:] = hadamard
    x = torch.randn(3, columns)
    expected = x @ torch.diag(first) @ a @ torch.diag(second) @ b
    BACKEND.rotate(x)
    torch.testing.assert_close(x, expected)


SHAPES = [(5, 129), (1, 7), (7, 1), (1, 1), (0, 5), (5, 0), (0, 0)]


def coded(batch: int, m: int, n: int, bits: int, block_size: int = 0) -> PackedCodes:
    """Random bytes with levels that integer products take."""
    kind = "linear" if bits == 8 else "mu_law"
    book = StateFormat("x", bits, codebook=kind, tread="mid_tread").code_book()
    used = layout(bits, block_size)
    packed = torch.randint(0, 256, (batch, m, used.row_bytes(n)), dtype=torch.uint8)
    return PackedCodes(packed, torch.rand(batch, m, used.blocks(n)), book, used, n)


def matrices(codes: PackedCodes) -> list[PackedCodes]:
    return [
        replace(codes, packed=packed, scales=scales)
        for packed, scales in zip(codes.packed, codes.scales, strict=True)
    ]


def assert_batch(found: Tensor, expected: list[Tensor]) -> None:
    """Each matrix by itself, to the bit."""
    assert found.shape[0] == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("bits", CODE_BITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_are_coded_matrix_by_matrix(batch: int, shape: tuple[int, int], bits: int) -> None:
    for block_size, statistic in ((0, "rms"), (64, "absmax")):
        codes = coded(batch, *shape, bits, block_size)
        book, used = codes.codebook, layout(bits, block_size, statistic)
        assert_batch(decode(codes), [decode(one) for one in matrices(codes)])
        x = torch.randn(batch, *shape)
        packed, scales = BACKEND.quantize(x, book, used)
        each = [BACKEND.quantize(one, book, used) for one in x]
        assert_batch(packed, [one for one, _ in each])
        assert_batch(scales, [one for _, one in each])
        given = torch.rand(scales.shape)
        assert_batch(
            BACKEND.encode(x, given, book, used),
            [BACKEND.encode(one, s, book, used) for one, s in zip(x, given, strict=True)],
        )
        gram = BACKEND.code_gram(codes)
        assert gram.shape == (batch, shape[0], shape[0])
        assert_batch(gram, [BACKEND.code_gram(one) for one in matrices(codes)])
        rotated = x.clone()
        BACKEND.rotate(rotated)
        for one in x:
            BACKEND.rotate(one)
        assert torch.equal(rotated, x)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_are_added_and_updated_matrix_by_matrix(batch: int, shape: tuple[int, int]) -> None:
    codes = coded(batch, *shape, 4)
    grad = torch.randn(batch, *reversed(shape)).half().mT
    buffer, expected = torch.randn(2, batch, *shape).unbind()
    expected.copy_(buffer)
    squares = BACKEND.accumulate(buffer, Terms(0.9, codes, 0.7, grad, -0.1))
    ones = [Terms(0.9, c, 0.7, g, -0.1) for c, g in zip(matrices(codes), grad, strict=True)]
    each = [BACKEND.accumulate(one, terms) for one, terms in zip(expected, ones, strict=True)]
    assert squares.shape == (batch, shape[0])
    assert squares.dtype == torch.float64
    assert_batch(squares, each)
    assert torch.equal(buffer, expected)

    def update(codes: PackedCodes, grad: Tensor) -> tuple[Tensor, ...]:
        packed, scales = torch.empty_like(codes.packed), torch.empty_like(codes.scales)
        out = torch.empty(grad.shape, dtype=torch.bfloat16)
        terms = Terms(0.0, codes, 0.7, grad, -0.1)
        squares = BACKEND.update_codes(
            terms, packed=packed, scales=scales, out=out, out_weights=(0.9, 0.1)
        )
        return packed, scales, out, *squares

    alone = [update(c, g) for c, g in zip(matrices(codes), grad, strict=True)]
    for index, found in enumerate(update(codes, grad)):
        assert_batch(found, [one[index] for one in alone])


@pytest.mark.parametrize("place", ["contiguous", "transposed", "half", "none"])
def test_an_update_is_the_same_wherever_it_is_put(place: str) -> None:
    """X may be summed up in `out` itself, which must not change a bit."""
    codes, grad = coded(2, 5, 40, 4), torch.randn(2, 5, 40)
    x = torch.empty_like(grad)
    x_squares = BACKEND.accumulate(x, Terms(0.0, codes, 0.7, grad, -0.1))
    packed, scales = BACKEND.quantize(x, codes.codebook, codes.layout)
    ahead = x.clone()
    ahead_squares = BACKEND.accumulate(ahead, Terms(0.9, grad=grad, grad_weight=0.1))
    outs = {
        "contiguous": torch.full_like(x, math.nan),
        "transposed": torch.full((2, 40, 5), math.nan).mT,
        "half": torch.full_like(x, math.nan, dtype=torch.float16),
        "none": None,
    }
    out = outs[place]
    new_packed, new_scales = torch.empty_like(packed), torch.empty_like(scales)
    terms = Terms(0.0, codes, 0.7, grad, -0.1)
    squares = BACKEND.update_codes(
        terms, packed=new_packed, scales=new_scales, out=out, out_weights=(0.9, 0.1)
    )
    assert torch.equal(new_packed, packed)
    assert torch.equal(new_scales, scales)
    assert torch.equal(squares[0], x_squares)
    if out is None:
        assert not squares[1].any()
        return
    assert torch.equal(squares[1], ahead_squares)
    assert torch.equal(out, ahead.to(out.dtype))


def test_an_update_needs_no_memory_beside_a_float32_out(monkeypatch: pytest.MonkeyPatch) -> None:
    buffers = []
    accumulate = Backend._accumulate

    def record(self: Backend, buffer: Tensor, terms: Terms) -> Tensor:
        buffers.append(buffer)
        return accumulate(self, buffer, terms)

    monkeypatch.setattr(Backend, "_accumulate", record)
    codes, grad = coded(2, 5, 40, 4), torch.randn(2, 5, 40)
    packed, scales, out = map(torch.empty_like, (codes.packed, codes.scales, grad))
    BACKEND.update_codes(Terms(codes=codes, grad=grad), packed=packed, scales=scales, out=out)
    assert len(buffers) == 2
    assert all(buffer is out for buffer in buffers)


def test_an_update_overwrites_nothing_that_it_reads() -> None:
    codes, grad = coded(1, 2, 3, 4), torch.ones(1, 2, 3)
    places = {"packed": codes.packed.clone(), "scales": codes.scales.clone()}
    for name, read in (("packed", codes.packed), ("scales", codes.scales), ("out", grad)):
        with pytest.raises(ValueError, match=f"^{name}: expected other memory .* got "):
            BACKEND.update_codes(Terms(codes=codes, grad=grad), **{**places, name: read})


def test_an_update_is_of_codes_and_a_gradient() -> None:
    codes, grad = coded(1, 2, 3, 4), torch.ones(1, 2, 3)
    places = {"packed": codes.packed.clone(), "scales": codes.scales.clone()}
    for terms, got in (
        (Terms(codes=codes), "'codes'"),
        (Terms(grad=grad), "'grad'"),
        (Terms(0.5, codes, grad=grad), "'buffer', 'codes', 'grad'"),
    ):
        with pytest.raises(ValueError, match=rf"^terms: expected codes and grad, got \[{got}\]"):
            BACKEND.update_codes(terms, **places)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_batches_are_multiplied_matrix_by_matrix(batch: int, shape: tuple[int, int]) -> None:
    """Small whole numbers, whose products and sums are exact in any order."""

    def whole(*size: int) -> Tensor:
        return torch.randint(-8, 9, (batch, *size)).float()

    m, n = shape
    a, b, start, addend = whole(4, m), whole(m, n), whole(4, n), whole(4, 4)
    alpha, active = torch.arange(batch) * 0.5 - 0.5, torch.arange(batch) != 1
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        out = start.to(dtype, copy=True)
        BACKEND.product(a.to(dtype), b.to(dtype), out=out, alpha=alpha, beta=2.0, active=active)
        values = alpha.view(-1, 1, 1) * (a @ b) + 2 * start
        expected = torch.where(active.view(-1, 1, 1), values, start)
        assert torch.equal(out, expected.to(dtype))
        assert_batch(
            BACKEND.product(a.to(dtype), b.to(dtype), alpha=alpha),
            [
                BACKEND.product(x.to(dtype), y.to(dtype), alpha=z.view(1))
                for x, y, z in zip(a, b, alpha, strict=True)
            ],
        )
        symmetric = addend + addend.mT
        out = symmetric.to(dtype, copy=True)
        BACKEND.symmetric_product(a.to(dtype), addend=out, alpha=0.5, out=out, active=active)
        values = 0.5 * (a @ a.mT) + symmetric
        expected = torch.where(active.view(-1, 1, 1), values, symmetric)
        assert torch.equal(out, expected.to(dtype))
    codes, left = coded(batch, m, n, 4), torch.randn(batch, 4, m)
    for dtype in (torch.float32, torch.bfloat16):
        out = start.to(dtype, copy=True)
        singles = [one.clone() for one in out]
        BACKEND.code_product(left, codes, out=out, beta=0.5)
        for x, one, result in zip(left, matrices(codes), singles, strict=True):
            BACKEND.code_product(x, one, out=result, beta=0.5)
        assert_batch(out, singles)
    fresh = BACKEND.code_product(left, codes)
    assert fresh.shape == (batch, 4, n)
    right = torch.randn(batch, n, 4)
    each = zip(matrices(codes), right, strict=True)
    assert_batch(BACKEND.code_times(codes, right), [BACKEND.code_times(*pair) for pair in each])


@pytest.mark.parametrize("shape", [(1, 1), (5, 20), (49, 30), (3, 5, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_symmetric_products_of_every_dtype(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Sums in float32 (float64), rounded once; exactly symmetric; `out` is written and not read.

    A term passes k sums, a product with each factor, the sum with the addend and the mean of the
    two halves: k + 4 roundings. What float64 is compared with has as many.
    """
    *batch, m, k = shape
    x, start = torch.randn(shape).to(dtype), torch.randn(*batch, m, m)
    addend = (start + start.mT).to(dtype)
    diagonal = 2.0 ** torch.randint(-2, 3, (k, 1)) * (1 - 2 * torch.randint(0, 2, (k, 1)))
    signed = diagonal.to(dtype) * x.mT  # exact, and so x times it is symmetric
    roundings = (k + 4) * (2 * 2**-53 if dtype == torch.float64 else 2**-24)

    def assert_near(found: Tensor, right: Tensor, alpha: float, beta: float) -> None:
        exact = alpha * (x.double() @ right.double()) + beta * addend.double()
        size = abs(alpha) * (x.double().abs() @ right.double().abs())
        size += abs(beta) * addend.double().abs()
        allowed = roundings * size + torch.finfo(dtype).eps / 2 * exact.abs()
        assert found.dtype == dtype
        assert ((found.double() - exact).abs() <= allowed).all()
        assert torch.equal(found, found.mT)

    assert_near(BACKEND.symmetric_product(x), x.mT, 1, 0)
    assert_near(BACKEND.symmetric_product(x.mT.contiguous().mT), x.mT, 1, 0)
    assert_near(BACKEND.symmetric_product(x, signed), signed, 1, 0)
    canvas = torch.full((*batch, m + 2, m + 3), math.nan, dtype=dtype)
    inner = canvas[..., 1:-1, 1:-2]
    for other, right in ((None, x.mT), (signed, signed)):
        assert BACKEND.symmetric_product(x, other, alpha=0.5, out=inner) is inner
        assert_near(inner, right, 0.5, 0)
        inner.copy_(addend)
        BACKEND.symmetric_product(x, other, addend=inner, beta=-2.0, alpha=0.5, out=inner)
        assert_near(inner, right, 0.5, -2)
    inner.fill_(math.nan)
    assert canvas.isnan().all()  # nothing was written around it


def test_a_cautious_update_decays_where_signs_agree() -> None:
    """And where one of both is zero, or their product is too small for a float32."""
    values = [0.0, -0.0, 1.0, -3.0, 1e-30, -1e-30]
    weight = torch.tensor([values] * len(values))
    update = weight.T.contiguous()
    decay, step = np.float32(0.9), np.float32(0.25)
    expected = weight.tolist()
    for row, u in enumerate(values):
        for column, w in enumerate(values):
            agree = float(np.float32(w) * np.float32(u)) >= 0
            kept = np.float32(w) * (decay if agree else np.float32(1))
            expected[row][column] = kept - np.float32(u) * step
    BACKEND.update_weight(
        weight, update, decay=torch.tensor(0.9), step_size=torch.tensor(0.25), cautious=True
    )
    assert torch.equal(weight, torch.tensor(np.array(expected)))
