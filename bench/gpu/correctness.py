"""Every kernel of a GPU backend against the reference on the CPU.

Each check draws its input on the CPU, runs the reference there and the backend on the device, and
compares on the CPU: bit for bit where the contract says so, else within the rounding of sums.
`sizes` lets the same checks run in the Triton interpreter, which takes milliseconds a program.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon import PRESETS, Muon
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms, integer_codes_problem
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

REFERENCE = Backend()
GRAD_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODED = tuple(name for name, f in PRESETS.items() if not f.is_dense)


@dataclass(frozen=True)
class Sizes:
    """[m, n] of the matrices that are checked, orders of dense products, formats of steps."""

    matrices: Sequence[tuple[int, int]] = (
        (1, 1), (3, 64), (17, 129), (200, 1000), (576, 1536), (512, 4096),
    )  # fmt: skip
    products: Sequence[tuple[int, int, int]] = (
        (1, 1, 1), (17, 33, 65), (128, 128, 128), (576, 1536, 576), (200, 1000, 300),
    )  # fmt: skip
    step_formats: Sequence[str] = tuple(PRESETS)


@dataclass(frozen=True)
class Check:
    """One kernel's check; `run` raises AssertionError and returns what it compared."""

    name: str
    run: Callable[[Backend, torch.device, Sizes], int]


def normal(shape: Sequence[int], seed: int) -> Tensor:
    """float32, as spread as a momentum: rows of different sizes, some zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x *= torch.logspace(-6, 2, shape[-2]).unsqueeze(-1)
    if shape[-2] > 2:
        x[..., 1, :] = 0
    return x


def every_code(state_format: StateFormat, m: int, n: int, seed: int) -> PackedCodes:
    """Random bytes, so that each code occurs; scales of several sizes, one zero."""
    generator = torch.Generator().manual_seed(seed)
    layout = state_format.code_layout()
    packed = torch.randint(0, 256, (m, layout.row_bytes(n)), dtype=torch.uint8, generator=generator)
    scales = torch.rand(m, layout.blocks(n), generator=generator) + 0.01
    scales[m // 2, 0] = 0
    return PackedCodes(packed, scales, state_format.code_book(), layout, n)


def moved(codes: PackedCodes, device: torch.device) -> PackedCodes:
    """The same codes on the device."""
    return replace(codes, packed=codes.packed.to(device), scales=codes.scales.to(device))


def same(name: str, ours: Tensor, theirs: Tensor) -> int:
    """Raise unless bit-identical, NaN included; returns the elements compared."""
    ours = ours.cpu()
    if not torch.equal(ours.isnan(), theirs.isnan()) or not torch.equal(
        ours.nan_to_num(0), theirs.nan_to_num(0)
    ):
        different = int((ours != theirs).sum())
        raise AssertionError(f"{name}: {different} of {theirs.numel()} elements differ")
    return theirs.numel()


def near(name: str, ours: Tensor, theirs: Tensor, bound: Tensor | float) -> int:
    """Raise unless every element is within `bound`; returns the elements compared."""
    excess = (ours.cpu().double() - theirs.double()).abs() - bound
    if theirs.numel() and not bool((excess <= 0).all()):
        raise AssertionError(f"{name}: error exceeds its bound by {float(excess.max()):.3g}")
    return theirs.numel()


def near_scales(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise unless scales agree to a unit in the last place: squares are added in another order."""
    near(f"{name} scales", ours, theirs, theirs.double().abs() * 2.0**-23)


def formats_and_sizes(sizes: Sizes) -> Iterator[tuple[StateFormat, int, int]]:
    """Every coded preset with every size."""
    for name, (m, n) in itertools.product(CODED, sizes.matrices):
        yield PRESETS[name], m, n


def formats_sizes_and_dtypes(
    sizes: Sizes,
) -> Iterator[tuple[StateFormat, int, int, torch.dtype]]:
    """Every format with bfloat16 gradients, two formats with all three dtypes.

    Each combination is a kernel that has to be compiled first, half a second of the eight minutes.
    """
    for f, m, n in formats_and_sizes(sizes):
        for dtype in GRAD_DTYPES if f.name in ("spectral4", "linear8") else (torch.bfloat16,):
            yield f, m, n, dtype


def check_accumulate(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Decoding, weighted sums and row sums of squares; strided and half-precision gradients."""
    count = 0
    for f, m, n, dtype in formats_sizes_and_dtypes(sizes):
        codes = every_code(f, m, n, seed=m + n)
        grad = normal((n, m), seed=1).to(dtype).mT
        expected, found = (normal((m, n), seed=2).to(d) for d in ("cpu", device))
        squares = REFERENCE.accumulate(expected, Terms(0.7, codes, 0.3, grad, -1.25))
        there = Terms(0.7, moved(codes, device), 0.3, grad.to(device), -1.25)
        ours = backend.accumulate(found, there)
        count += same(f"{f.name} {m}x{n} {dtype}", found, expected)
        # a sum of n squares in float64, in another order
        near("squares", ours, squares, squares * n * 2.0**-52)
    return count


def check_quantize(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Statistics, thresholds and packing."""
    count = 0
    for f, m, n in formats_and_sizes(sizes):
        x, book, layout = normal((m, n), seed=m * n), f.code_book(), f.code_layout()
        packed, scales = REFERENCE.quantize(x, book, layout)
        ours, our_scales = backend.quantize(x.to(device), book, layout)
        near_scales(f"{f.name} {m}x{n}", our_scales, scales)
        packed = REFERENCE.encode(x, our_scales.cpu(), book, layout)
        count += same(f"{f.name} {m}x{n} codes", ours, packed)
        again = backend.encode(x.to(device), our_scales, book, layout)
        count += same(f"{f.name} {m}x{n} encode", again, packed)
    return count


def check_update_codes(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """The fused pass, non-finite gradients included."""
    count = 0
    for f, m, n, dtype in formats_sizes_and_dtypes(sizes):
        codes = every_code(f, m, n, seed=m + n)
        grad = normal((m, n), seed=3).to(dtype)
        outcome = []
        for chosen, place in ((REFERENCE, torch.device("cpu")), (backend, device)):
            packed = torch.empty_like(codes.packed, device=place)
            scales = torch.empty_like(codes.scales, device=place)
            out = torch.empty(m, n, device=place)
            terms = Terms(0.0, moved(codes, place), 0.9, grad.to(place), 0.1)
            squares = chosen.update_codes(
                terms, packed=packed, scales=scales, out=out, out_weights=(0.9, 0.1)
            )
            outcome.append((packed, scales, out, squares))
        (packed, scales, out, squares), (ours, our_scales, our_out, our_squares) = outcome
        near_scales(f"{f.name} {m}x{n} {dtype}", our_scales, scales)
        x = torch.empty(m, n)
        REFERENCE.accumulate(x, Terms(0.0, codes, 0.9, grad, 0.1))
        packed = REFERENCE.encode(x, our_scales.cpu(), codes.codebook, codes.layout)
        count += same(f"{f.name} {m}x{n} {dtype} codes", ours, packed)
        count += same(f"{f.name} {m}x{n} {dtype} out", our_out, out)
        for our_sums, sums in zip(our_squares, squares, strict=True):
            near("squares", our_sums, sums, sums * n * 2.0**-52)
        if m * n == 1:
            continue
        grad[0, n // 2] = float("inf")
        terms = Terms(0.0, moved(codes, device), 0.9, grad.to(device), 0.1)
        squares = backend.update_codes(terms, packed=ours, scales=our_scales)
        if bool(squares[0].sum().isfinite()):
            raise AssertionError(f"{f.name} {m}x{n}: a non-finite gradient was not seen")
    return count


def check_rotate(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """The Walsh-Hadamard rotation and its inverse."""
    count = 0
    for (m, n), inverse in itertools.product(sizes.matrices, (False, True)):
        expected = normal((m, n), seed=n)
        found = expected.to(device, copy=True)
        REFERENCE.rotate(expected, inverse=inverse)
        backend.rotate(found, inverse=inverse)
        count += same(f"{m}x{n}", found, expected)
    return count


def check_code_products(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Integer Gram matrices and products, batched, for every code that integers can read."""
    count = 0
    for f, m, n in formats_and_sizes(sizes):
        single = every_code(f, m, n, seed=m + n)
        other = every_code(f, m, n, seed=m + n + 1)
        codes = replace(
            single,
            packed=torch.stack([single.packed, other.packed]),
            scales=torch.stack([single.scales, other.scales]),
        )
        try:
            gram = REFERENCE.code_gram(codes)
        except ValueError:
            continue
        count += same(f"{f.name} {m}x{n} gram", backend.code_gram(moved(codes, device)), gram)
        if not integer_codes_problem(codes.codebook, codes.layout, m, n):
            a = torch.randn(2, min(m, 70), m, generator=torch.Generator().manual_seed(m))
            product = REFERENCE.code_product(a, codes)
            ours = backend.code_product(a.to(device), moved(codes, device))
            count += same(f"{f.name} {m}x{n} product", ours, product)
            v = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(n))
            times = backend.code_times(moved(codes, device), v.to(device))
            count += same(f"{f.name} {m}x{n} times", times, REFERENCE.code_times(codes, v))
            for dtype in GRAD_DTYPES:
                weights = [normal(product.shape, seed=9).to(dtype).to(d) for d in ("cpu", device)]
                REFERENCE.code_product(a, codes, out=weights[0], beta=0.9)
                backend.code_product(a.to(device), moved(codes, device), out=weights[1], beta=0.9)
                count += same(f"{f.name} {m}x{n} update {dtype}", weights[1], weights[0])
    return count


def check_dense_products(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Products and symmetric products of three dtypes, addends, and inactive matrices."""
    count = 0
    for (m, n, k), dtype in itertools.product(sizes.products, GRAD_DTYPES):
        generator = torch.Generator().manual_seed(m)
        a = torch.randn(2, m, k, generator=generator).to(dtype)
        b = torch.randn(2, k, n, generator=generator).to(dtype)
        addend = torch.randn(2, m, m, generator=generator)
        addend = (addend + addend.mT).to(dtype)
        a32, b32 = a.double(), b.double()
        active = torch.tensor([True, False])
        # k products summed in float32 and one rounding to the dtype of the result; of float32,
        # each product is three of TF32 and lacks a fourth of 2**-22
        eps = torch.finfo(dtype).eps + (k + 8 * (dtype == torch.float32)) * 2.0**-23
        out = torch.full((2, m, n), 7.0, dtype=dtype, device=device)
        backend.product(a.to(device), b.to(device), out=out, alpha=0.5, active=active.to(device))
        expected = 0.5 * (a32 @ b32)
        bound = eps * 0.5 * (a32.abs() @ b32.abs())
        count += near(f"{m}x{k}x{n} {dtype}", out[0], expected[0], bound[0])
        same("inactive", out[1], torch.full((m, n), 7.0, dtype=dtype))
        plain = backend.product(a.to(device), b.to(device), alpha=0.5)
        # the vendor's kernels may round partial sums of half precision as well
        near(f"plain {m}x{k}x{n} {dtype}", plain, expected, 4 * bound)
        found = backend.symmetric_product(
            a.to(device), addend=addend.to(device), alpha=0.5, beta=-2.0
        )
        expected = 0.5 * (a32 @ a32.mT) - 2 * addend.double()
        bound = eps * (0.5 * (a32.abs() @ a32.abs().mT) + 2 * addend.double().abs())
        count += near(f"symmetric {m}x{k} {dtype}", found, expected, bound)
        same("symmetry", found, found.mT.cpu().contiguous())
        if dtype == torch.float32:
            # the diagonal is kept: beside it float16 would lose the rest
            addend.diagonal(dim1=1, dim2=2).add_(1000.0)
            kept = torch.diag_embed(addend.double().diagonal(dim1=1, dim2=2))
            half = (addend - kept.float()).to(backend.rounded_dtype or torch.bfloat16).double()
            square = addend.to(device)
            found = backend.symmetric_product(square, square, rounded=True)
            rest = addend.double() - kept
            expected = kept @ addend.double() + rest @ kept + half @ half
            bound = (
                (m + 8) * 2.0**-23 * (kept @ rest.abs() * 2 + kept @ kept + half.abs() @ half.abs())
            )
            count += near(f"rounded {m}x{m}", found, expected, bound)
            same("symmetry", found, found.mT.cpu().contiguous())
    return count


def check_weights(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """`scaled`, weight updates, and stochastic rounding."""
    count = 0
    for (m, n), dtype in itertools.product(sizes.matrices, GRAD_DTYPES):
        x, update = normal((2, m, n), seed=m), normal((m, n), seed=n).to(dtype)
        x[1, 0, 0] = float("nan")
        factor = torch.tensor([0.3, 0.0])
        outs = [torch.empty(2, m, n, dtype=dtype, device=d) for d in ("cpu", device)]
        REFERENCE.scaled(x, factor, out=outs[0])
        backend.scaled(x.to(device), factor.to(device), out=outs[1])
        count += same(f"scaled {m}x{n} {dtype}", outs[1], outs[0])
        seeds = (None, -7) if dtype == torch.bfloat16 else (None,)
        for seed, cautious in itertools.product(seeds, (False, True)):
            weights = [normal((n, m), seed=5).to(dtype).to(d).mT for d in ("cpu", device)]
            for chosen, weight in zip((REFERENCE, backend), weights, strict=True):
                place = weight.device
                chosen.update_weight(
                    weight,
                    update.to(place),
                    decay=torch.tensor(0.999).to(place),
                    step_size=torch.tensor(0.01).to(place),
                    seed=None if seed is None else torch.tensor(seed, dtype=torch.int32).to(place),
                    cautious=cautious,
                )
            name = f"weight {m}x{n} {dtype} {seed} {cautious}"
            count += same(name, weights[1], weights[0])
    return count


def check_sums(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """`combined`: three sums of five matrices. Torch may fuse a product with its sum."""
    count = 0
    numbers = [[1.0, 0.5, -0.3, 2.0, 0.1], [1.0, -1.5, 0.7, 0.2, -0.9]]
    numbers.append([1.0, 0.3, 1.1, -0.6, 0.8])
    for m, n in sizes.matrices:
        terms = [normal((m, n), seed=seed) for seed in range(5)]
        found = backend.combined(numbers, [term.to(device) for term in terms])
        for row, ours, theirs in zip(
            numbers, found, REFERENCE.combined(numbers, terms), strict=True
        ):
            size = sum(abs(c) * x.double().abs() for c, x in zip(row, terms, strict=True))
            count += near(f"combined {m}x{n}", ours, theirs, 10 * 2.0**-24 * size)
    return count


def check_steps(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Three optimizer steps of every format against the CPU's own step, in float32 and float16."""
    shapes = [shape for shape in sizes.matrices if shape[0] * shape[1] < 2**20]
    count = 0
    for name, ns_dtype in itertools.product(sizes.step_formats, ("float32", "float16")):
        trained = []
        for place, options in (
            (torch.device("cpu"), {"backend": "auto"}),
            (device, {"backend": backend.name, "ns_dtype": ns_dtype}),
        ):
            trained.append(_train(name, shapes, place, options))
        for (expected, start), (found, _) in zip(*trained, strict=True):
            moved_by = float((expected - start).norm())
            # A code that rounding flips is worth up to 4% in a small matrix, where an iteration
            # (spectral, power) enlarges rounding; half precision: see `newton_schulz`.
            iterates = PRESETS[name].spectral or PRESETS[name].has_factors
            bound = 0.1 if iterates or ns_dtype == "float16" else 0.01
            error = float((found.cpu() - expected).norm())
            if not error <= bound * moved_by:
                shape = tuple(expected.shape)
                raise AssertionError(f"{name} {ns_dtype} {shape}: {error / moved_by:.3g}")
            count += expected.numel()
    return count


def check_offload(backend: Backend, device: torch.device, sizes: Sizes) -> int:
    """Steps with the codes in host memory are those with the codes on the device, bit for bit.

    Several shapes are several batches, so that copies run while others compute.
    """
    shapes = [shape for shape in sizes.matrices if shape[0] * shape[1] < 2**20]
    count = 0
    for name in sizes.step_formats:
        options = {"backend": backend.name, "ns_dtype": "float32"}
        here, there = (
            _train(name, shapes, device, {**options, "offload": offload})
            for offload in (False, True)
        )
        for (expected, _), (found, _) in zip(here, there, strict=True):
            count += same(f"{name} {tuple(expected.shape)} offload", found, expected.cpu())
    return count


def _train(
    name: str, shapes: Sequence[tuple[int, int]], device: torch.device, options: dict[str, Any]
) -> list[tuple[Tensor, Tensor]]:
    """(weights after three steps, before) of each shape."""
    generator = torch.Generator().manual_seed(0)
    starts = [torch.randn(shape, generator=generator) for shape in shapes]
    params = [nn.Parameter(start.to(device, copy=True)) for start in starts]
    optimizer = Muon(params, lr=0.02, state_format=name, **options)
    for _ in range(3):
        for param in params:
            param.grad = decaying_matrix(param.shape[0], param.shape[1], generator).to(device)
        optimizer.step()
    return [(p.detach(), start) for p, start in zip(params, starts, strict=True)]


CHECKS = (
    Check("accumulate", check_accumulate),
    Check("quantize", check_quantize),
    Check("update_codes", check_update_codes),
    Check("rotate", check_rotate),
    Check("code products", check_code_products),
    Check("dense products", check_dense_products),
    Check("weights", check_weights),
    Check("sums of matrices", check_sums),
    Check("optimizer steps", check_steps),
    Check("host offload", check_offload),
)
