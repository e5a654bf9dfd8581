"""Batches in the C++ backend: each matrix as if it were alone, bit for bit, and like the reference.

On every ISA level, on fewer and on more threads than there are matrices, in every memory layout.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from test_code_products import layout as code_layout
from test_code_products import random_codes
from test_cpu_backend import (
    GRAD_TYPES,
    assert_same_scales,
    assert_same_squares,
    book,
    layout,
)
from test_product_kernels import assert_product, commuting_factors, exact
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.formats.codebook import CodeLayout
from lowbit_muon.formats.state_format import StateFormat

CPU, REFERENCE = CpuBackend(), Backend()
# Batches that are empty, of one matrix and of empty matrices; odd sizes, one row, one column; rows
# for more than one thread (kElementsPerThread in csrc/cpu/codec.cpp) that end within a matrix.
SHAPES = (
    *((0, 3, 5), (1, 1, 1), (1, 20, 31), (3, 1, 9), (3, 9, 1), (2, 0, 4), (2, 4, 0)),
    *((3, 17, 33), (7, 16, 16), (5, 33, 600)),
)
# [batch, rows, depth, columns]; then work for several threads: one matrix each in the first (see
# split_threads in csrc/cpu/workspace.hpp), all on one in the second.
PRODUCTS = (
    *((0, 3, 4, 5), (1, 5, 7, 3), (3, 1, 9, 1), (3, 9, 1, 20), (2, 0, 3, 4), (2, 3, 0, 4)),
    *((2, 3, 4, 0), (7, 16, 16, 16), (3, 8, 500, 8), (3, 15, 197, 49)),
    *((9, 65, 70, 49), (2, 260, 270, 257)),
)
KINDS = ("contiguous", "tall", "padded", "even rows", "every other", "interleaved")


def with_threads(shapes: Sequence[Any], shared: int) -> pytest.MarkDecorator:
    """Each shape on one thread; the last `shared`, with work for several, on more as well."""
    pairs = [(shape, 1) for shape in shapes]
    pairs += itertools.product(shapes[-shared:], (2, 5))
    return pytest.mark.parametrize(("shape", "threads"), pairs, ids=str, indirect=["threads"])


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> int:
    torch.set_num_threads(request.param)  # conftest.py sets it back
    return int(request.param)


@pytest.fixture(params=cpu.supported_isas(), autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.isa()
    cpu.set_isa(request.param)
    yield str(request.param)
    cpu.set_isa(before)


def laid_out(values: Tensor, kind: str) -> Tensor:
    """The same matrices, [b, m, n], in another memory layout."""
    b, m, n = values.shape
    views = {
        "contiguous": lambda: torch.empty(b, m, n, dtype=values.dtype),
        "tall": lambda: torch.empty(b, n, m, dtype=values.dtype).mT,
        "padded": lambda: torch.empty(b, m + 2, n + 3, dtype=values.dtype)[:, 1:-1, 2:-1],
        "even rows": lambda: torch.empty(b, m, n + 5, dtype=values.dtype)[..., :n],
        "every other": lambda: torch.empty(2 * b, m, 2 * n, dtype=values.dtype)[::2, :, ::2],
        "interleaved": lambda: torch.empty(m, b, n, dtype=values.dtype).transpose(0, 1),
    }
    return views[kind]().copy_(values)


def batch_codes(shape: tuple[int, int, int], codes_layout: CodeLayout) -> PackedCodes:
    x = torch.randn(shape)
    packed, scales = REFERENCE.quantize(x, book(codes_layout.bits), codes_layout)
    return PackedCodes(packed, scales, book(codes_layout.bits), codes_layout, shape[-1])


def codes_of(codes: PackedCodes, index: int | slice) -> PackedCodes:
    return dataclasses.replace(codes, packed=codes.packed[index], scales=codes.scales[index])


# ---- Row by row ----


@pytest.mark.usefixtures("threads")
@with_threads(SHAPES, 1)
def test_quantize_encode_and_rotate(shape: tuple[int, int, int]) -> None:
    values = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    for bits, block in itertools.product((3, 4), (0, 100)):
        codes_layout = layout(bits, block)
        scales = CPU.quantize(values, book(bits), codes_layout)[1]
        if values.numel():
            wanted = REFERENCE.quantize(values, book(bits), codes_layout)[1]
            assert_same_scales(scales, wanted, "rms")
        expected = REFERENCE.encode(values, scales, book(bits), codes_layout)
        for kind in KINDS:
            x = laid_out(values, kind)
            found = CPU.quantize(x, book(bits), codes_layout)
            assert torch.equal(found[0], expected), kind
            assert torch.equal(found[1], scales), kind
            out = torch.empty_like(expected)
            assert CPU.encode(x, scales, book(bits), codes_layout, packed=out) is out
            assert torch.equal(out, expected), kind
            for i in range(len(x)):
                alone = CPU.quantize(x[i], book(bits), codes_layout)
                assert torch.equal(expected[i], alone[0])
                assert torch.equal(scales[i], alone[1])
    for kind, inverse in itertools.product(("contiguous", "padded", "even rows"), (False, True)):
        x, rotated = laid_out(values, kind), values.clone()
        CPU.rotate(x, inverse=inverse)
        REFERENCE.rotate(rotated, inverse=inverse)
        assert torch.equal(x, rotated), (kind, inverse)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", GRAD_TYPES)
@with_threads(SHAPES, 1)
def test_accumulate(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    start, values = torch.randn(shape), torch.randn(shape).to(dtype)
    buffers = ("contiguous", "padded", "even rows", "interleaved")
    for number, (bits, weight) in enumerate(itertools.product((None, 3, 4), (0.0, 0.9))):
        codes = None if bits is None else batch_codes(shape, layout(bits, 100))
        expected = start.clone()
        wanted = REFERENCE.accumulate(expected, Terms(weight, codes, 0.7, values, -0.3))
        for index, kind in enumerate(KINDS):
            grad = laid_out(values, kind)
            buffer = start if weight else torch.full(shape, math.nan)
            found = laid_out(buffer, buffers[(number + index) % len(buffers)])
            squares = CPU.accumulate(found, Terms(weight, codes, 0.7, grad, -0.3))
            assert torch.equal(found, expected), (kind, bits, weight)
            assert_same_squares(squares, wanted, shape[-1])
            for i in range(shape[0]):
                own = None if codes is None else codes_of(codes, i)
                alone = start[i].clone()
                row_sums = CPU.accumulate(alone, Terms(weight, own, 0.7, grad[i], -0.3))
                assert torch.equal(alone, found[i])
                assert torch.equal(row_sums, squares[i])


@pytest.mark.parametrize("rows", [1, 3, 4, 8, 10, 31, 32, 33])
def test_short_tall_gradients(rows: int) -> None:
    """Columns that lie close together are transposed in place, four by four and the rest."""
    for columns, dtype, gap in itertools.product((1, 2, 5, 16, 130, 1030), GRAD_TYPES, (0, 1, 40)):
        whole = torch.randn(2, columns, rows + gap).to(dtype)
        for grad in (whole[..., :rows].mT, whole[:1, :1, :rows].expand(2, columns, rows).mT):
            found = torch.empty(2, rows, columns)
            CPU.accumulate(found, Terms(grad=grad))
            assert torch.equal(found, grad.float()), (columns, dtype, gap)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
def test_update_of_codes() -> None:
    shape, codes_layout = (3, 17, 600), layout(4, 100)
    codes = batch_codes(shape, codes_layout)
    terms = Terms(codes=codes, code_weight=0.9, grad=torch.randn(shape), grad_weight=0.1)
    results = []
    for backend in (CPU, REFERENCE):
        packed, scales = torch.empty_like(codes.packed), torch.empty_like(codes.scales)
        out = torch.empty(shape, dtype=torch.bfloat16)
        sums = backend.update_codes(
            terms, packed=packed, scales=scales, out=out, out_weights=(0.5, 0.25)
        )
        results.append((*sums, packed, scales, out))
    for found, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert_same_squares(found, expected, shape[-1])
    assert_same_scales(results[0][3], results[1][3], "rms")
    assert torch.equal(results[0][4], results[1][4])


# ---- Products ----


@pytest.mark.usefixtures("threads")
@with_threads(PRODUCTS, 2)
def test_product(shape: tuple[int, int, int, int]) -> None:
    batch, rows, depth, columns = shape
    a, b = torch.randn(batch, rows, depth), torch.randn(batch, depth, columns)
    start, beta = torch.randn(batch, rows, columns), exact(-0.3)
    alphas = torch.randn(2 * batch)[::2]
    for index, kind in enumerate(KINDS):
        left, right = laid_out(a, kind), laid_out(b, KINDS[index - 2])
        out, alone = laid_out(start, KINDS[index - 1]), laid_out(start, KINDS[index - 1])
        assert CPU.product(left, right, out=out, alpha=alphas, beta=beta) is out
        plain = CPU.product(left, right)
        for i in range(batch):
            alpha = float(alphas[i])
            CPU.product(left[i], right[i], out=alone[i], alpha=alpha, beta=beta)
            assert_product(out[i], a[i], b[i], alpha, beta, start[i])
            assert torch.equal(plain[i], CPU.product(left[i], right[i]))
        assert torch.equal(out, alone), kind


@pytest.mark.usefixtures("threads")
@with_threads(PRODUCTS, 2)
def test_symmetric_product(shape: tuple[int, int, int, int]) -> None:
    batch, size, depth, _ = shape
    pairs = [commuting_factors(size, depth) for _ in range(batch)]
    a = torch.stack([pair[0] for pair in pairs]) if pairs else torch.empty(0, size, depth)
    b = torch.stack([pair[1] for pair in pairs]) if pairs else torch.empty(0, depth, size)
    start = torch.randn(batch, size, size)
    start += start.mT.clone()
    weights: dict[str, Any] = {"alpha": exact(0.3), "beta": exact(-1.7)}
    for index, kind in enumerate(KINDS):
        left, addend = laid_out(a, kind), laid_out(start, KINDS[index - 1])
        right = laid_out(b, KINDS[index - 2]) if index % 2 else None
        out_kind = ("contiguous", "tall", "padded", "interleaved")[index % 4]
        out, alone = laid_out(start, out_kind), laid_out(start, out_kind)
        added = out if kind == "tall" else addend
        assert CPU.symmetric_product(left, right, addend=added, out=out, **weights) is out
        plain = CPU.symmetric_product(left, right)
        assert torch.equal(out, out.mT)
        for i in range(batch):
            own = None if right is None else right[i]
            added = alone[i] if kind == "tall" else addend[i]
            CPU.symmetric_product(left[i], own, addend=added, out=alone[i], **weights)
            wanted = a[i].mT if own is None else b[i]
            assert_product(out[i], a[i], wanted, weights["alpha"], weights["beta"], start[i])
            assert torch.equal(plain[i], CPU.symmetric_product(left[i], own))
        assert torch.equal(out, alone), kind


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("bits", [3, 8])
@with_threads(PRODUCTS, 2)
def test_integer_products(shape: tuple[int, int, int, int], bits: int) -> None:
    batch, out_rows, rows, columns = shape
    blocks = code_layout(bits).blocks(columns)  # none in an empty row
    each = [random_codes(rows, columns, bits) for _ in range(max(batch, 1))]
    each = [dataclasses.replace(one, scales=one.scales[:, :blocks]) for one in each]
    codes = PackedCodes(
        torch.stack([one.packed for one in each])[:batch],
        torch.stack([one.scales for one in each])[:batch],
        each[0].codebook,
        code_layout(bits),
        columns,
    )
    gram = CPU.code_gram(codes)
    assert torch.equal(gram, REFERENCE.code_gram(codes))
    a, start = torch.randn(batch, out_rows, rows), torch.randn(batch, out_rows, columns)
    products = {
        beta: REFERENCE.code_product(a, codes, out=start.clone(), beta=beta) for beta in (0.0, -0.7)
    }
    few_rows = REFERENCE.code_product(a[:, :3], codes)
    by_columns = REFERENCE.code_times(codes, start.mT)
    for kind, beta in zip(KINDS, itertools.cycle(products), strict=False):
        left, out = laid_out(a, kind), start.clone() if beta else torch.empty_like(start)
        assert CPU.code_product(left, codes, out=out, beta=beta) is out
        assert torch.equal(out, products[beta]), kind
        for i, one in enumerate(each[:batch]):
            assert torch.equal(gram[i], CPU.code_gram(one))
            alone = CPU.code_product(left[i], one, out=start[i].clone(), beta=beta)
            assert torch.equal(out[i], alone)
        narrow = CPU.code_product(left[:, :3], codes)
        assert torch.equal(narrow, few_rows), kind
        v = laid_out(start, kind).mT
        times = CPU.code_times(codes, v)
        assert torch.equal(times, by_columns), kind
        for i, one in enumerate(each[:batch]):
            assert torch.equal(times[i], CPU.code_times(one, v[i]))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2, 5], indirect=True)
@pytest.mark.parametrize("block", [16, 512, 1024])
def test_gram_of_blocks(block: int) -> None:
    """Sums of levels, and integer sums of a segment, start afresh for each matrix."""
    state_format = StateFormat("x", 4, tread="mid_tread")
    for shape in ((3, 20, 2100), (2, 130, 1030)):
        codes_layout = CodeLayout(4, block, "rms", 2.7)
        packed, scales = CPU.quantize(torch.randn(shape), state_format.code_book(), codes_layout)
        codes = PackedCodes(packed, scales, state_format.code_book(), codes_layout, shape[-1])
        gram = CPU.code_gram(codes)
        assert torch.equal(gram, REFERENCE.code_gram(codes))
        # The rows of a batch are not contiguous if only some are taken.
        some = codes.row_slice(slice(1, 9))
        assert torch.equal(CPU.code_gram(some), gram[:, 1:9, 1:9])


def test_workspace_of_a_batch_is_that_of_one_matrix_for_each_thread() -> None:
    a = torch.randn(64, 48, 96)
    codes = batch_codes((64, 48, 96), layout(8))
    book_of_integers = StateFormat("x", 8, codebook="linear", tread="mid_tread").code_book()
    codes = dataclasses.replace(codes, codebook=book_of_integers)

    def most(index: slice, threads: int) -> list[int]:
        torch.set_num_threads(threads)
        found = []
        own = codes_of(codes, index)
        for call in (
            lambda: CPU.product(a[index].mT, a[index]),
            lambda: CPU.symmetric_product(a[index]),
            lambda: CPU.code_gram(own),
            lambda: CPU.code_product(a[index, :, :48], own),
            lambda: CPU.code_product(a[index, :8, :48], own),
            lambda: CPU.code_times(own, a[index, :8].mT),
        ):
            cpu.take_most_workspace()
            call()
            found.append(cpu.take_most_workspace())
        return found

    one, many = most(slice(1), 1), most(slice(64), 1)
    assert min(one) > 0
    assert many == one
    # 64 matrices have work for at least three threads in each of the calls
    assert most(slice(64), 3) == [3 * size for size in one]


# ---- What kernels do not take, and must not take ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_and_inactive_matrices_are_left_to_torch(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 5, 7), torch.randn(3, 7, 5)
    start = torch.randn(3, 5, 5)
    start += start.mT.clone()
    active = torch.tensor([True, False, True])
    alphas = torch.rand(3)
    cases: list[tuple[Any, dict[str, Any]]] = [
        ((dtype, dtype), {}),
        ((dtype, dtype), {"active": active}),
        ((torch.float32, torch.float32), {"active": active}),
        ((torch.float32, dtype), {}),
    ]
    for (factor_dtype, out_dtype), options in cases:
        left, right = a.to(factor_dtype), b.to(factor_dtype)
        results = []
        for backend in (CPU, REFERENCE):
            out = start.to(out_dtype)
            assert backend.product(left, right, out=out, alpha=alphas, beta=0.5, **options) is out
            square = start.to(out_dtype)
            backend.symmetric_product(left, addend=square, beta=0.5, out=square, **options)
            results.append((out, square))
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
            assert torch.equal(found[1], start[1].to(out_dtype)) == ("active" in options)
    assert CPU.product(a.to(dtype), b.to(dtype)).dtype == dtype
    assert CPU.symmetric_product(a.to(dtype)).dtype == dtype


def test_autograd_knows_what_changes() -> None:
    """A batch that was saved for a backward pass cannot change behind its back."""
    a, codes = torch.randn(2, 3, 3), random_codes(3, 3, 4)
    codes = dataclasses.replace(
        codes, packed=codes.packed.expand(2, 3, -1), scales=codes.scales.expand(2, 3, -1)
    )
    out = torch.randn(2, 3, 3)
    for call in (
        lambda: CPU.product(a, a, out=out),
        lambda: CPU.product(a, a, out=out.mT),
        lambda: CPU.symmetric_product(a, out=out),
        lambda: CPU.code_product(a, codes, out=out),
    ):
        before = out._version
        call()
        assert out._version > before


def test_wrong_batches_raise() -> None:
    a, square = torch.ones(2, 3, 4), torch.ones(2, 3, 3)
    codes = batch_codes((2, 3, 40), layout(4))
    both = dataclasses.replace(codes, codebook=random_codes(3, 40, 4).codebook)
    alone = codes_of(both, 0)
    grad, buffer = torch.ones(2, 3, 40), torch.ones(2, 3, 40)
    cases = [
        (ValueError, "b", lambda: CPU.product(a, torch.ones(4, 3))),
        (ValueError, "b", lambda: CPU.product(a, torch.ones(3, 4, 3))),
        (ValueError, "b", lambda: CPU.symmetric_product(a, torch.ones(1, 4, 3))),
        (ValueError, "out", lambda: CPU.product(a, a.mT, out=square[0])),
        (ValueError, "out", lambda: CPU.symmetric_product(a, out=square[:1])),
        (ValueError, "out", lambda: CPU.symmetric_product(a, out=square[:1].expand(2, 3, 3))),
        (ValueError, "addend", lambda: CPU.symmetric_product(a, addend=square[0])),
        (ValueError, "alpha", lambda: CPU.product(a, a.mT, alpha=torch.ones(3))),
        (TypeError, "alpha", lambda: CPU.product(a, a.mT, alpha=torch.ones(2).double())),
        (TypeError, "active", lambda: CPU.product(a, a.mT, active=torch.ones(2))),
        (ValueError, "codes.scales", lambda: CPU.code_gram(
            dataclasses.replace(both, scales=alone.scales))),
        (ValueError, "a", lambda: CPU.code_product(torch.ones(2, 3), both)),
        (ValueError, "a", lambda: CPU.code_product(torch.ones(2, 2, 3), alone)),
        (ValueError, "out", lambda: CPU.code_product(torch.ones(2, 2, 3), both, out=square)),
        (ValueError, "v", lambda: CPU.code_times(both, torch.ones(40, 3))),
        (ValueError, "v", lambda: CPU.code_times(alone, torch.ones(2, 40, 3))),
        (ValueError, "grad", lambda: CPU.accumulate(buffer, Terms(grad=grad[0]))),
        (TypeError, "grad", lambda: CPU.accumulate(buffer, Terms(grad=[grad]))),  # type: ignore
        (ValueError, "codes.packed", lambda: CPU.accumulate(buffer, Terms(codes=alone))),
        (ValueError, "buffer", lambda: CPU.accumulate(buffer[:1].expand(2, 3, 40), Terms())),
        (ValueError, "buffer", lambda: CPU.accumulate(torch.ones(1, 2, 3, 40), Terms())),
        (ValueError, "x", lambda: CPU.rotate(buffer.mT)),
        (ValueError, "packed", lambda: CPU.encode(
            buffer, codes.scales, book(4), layout(4), packed=codes.packed[:1])),
        (ValueError, "scales", lambda: CPU.encode(buffer, codes.scales[0], book(4), layout(4))),
    ]  # fmt: skip
    for error, name, call in cases:
        with pytest.raises(error, match=f"^{name}: expected .* got "):
            call()
