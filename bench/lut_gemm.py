"""Products of codes against torch's products of the decoded matrix, and the error they leave.

    python -m bench.lut_gemm [--quick] [--repeats N] [--isas LEVEL ...] [--threads N ...]
                             [--json FILE]

Everything at one shape runs interleaved in one process, the roofs as well. A product that computes
one triangle counts the operations it does, m(m+1) n of torch.mm's 2 m^2 n, and two limbs count as
two products: the fraction says how busy the units are, the ratio what it is worth. Decoding and
packing are in the time and not in the work. A X with k rows and X V with k columns, "narrow", are
bound by reading and decoding.

The strongest public peer of the integer Gram matrix is torch._int_mm on a matrix that is int8
already; with the codes it has to be decoded first, for which the backend's own decoder is taken (to
float32, then to int8). That of A X is torch's int4 weight product (bfloat16 activations, groups of
32, a zero point): other codes, held to their own decoded weights. The last rows are the relative
error after five Newton-Schulz steps when the Gram matrix of the fresh momentum is taken in each
type, beside that of bfloat16 Newton-Schulz.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from bench.harness import (
    Record,
    add_options,
    runs,
    with_work,
)
from bench.machine_peaks import best_isa, code_type, roofs
from lowbit_muon import PRESETS, QuantizedMatrix, orthogonalize, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS, resolve_coefficients
from lowbit_muon.linalg.newton_schulz import gram_operator
from lowbit_muon.state.coded_products import Panel, lut_gram, lut_matmul, lut_times
from lowbit_muon.tools.benchmark.cases import Case, Prepared, UnavailableError
from lowbit_muon.tools.benchmark.counts import (
    BF16_PRODUCT,
    product_operations,
    symmetric_operations,
)
from lowbit_muon.tools.benchmark.gates import allowed_gram_error, expect_close, relative_error
from lowbit_muon.tools.benchmark.measure import Result, measure_cases
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

SHAPES = ((576, 1536), (1024, 1024), (1024, 4096), (2048, 2048))
BITS = (2, 3, 4, 8)
NARROW = (1, 8)  # k: rows of A, columns of V
NARROW_BITS = (2, 3, 4)
BACKEND = get_backend("auto", torch.device("cpu"))
INT4_GROUP = 32  # the smallest, and most precise, of what torch's product takes
INT4_MULTIPLE = 16  # of its output's columns
# Relative errors. A float32 sum of n terms is off by about sqrt(n) 2^-24: 4e-6 at 4096.
FLOAT32_ERROR = 1e-5
# A row's largest entry is about five times its rms: rounding to a 32639th of it leaves 4e-5 of each
# entry.
LIMBS_ERROR = 1e-4
# Whole sums are exact; scales and decoding round five times by 2^-24.
DECODED_ERROR = 2.0**-20
# bfloat16 rounds weights and results by at most 2^-9 each.
INT4_ERROR = 2.0**-8


def coded(matrix: Tensor, bits: int) -> QuantizedMatrix:
    """The matrix in plain codes of one scale a row, on the codebook of the spectral formats."""
    preset = PRESETS["linear8" if bits == 8 else f"spectral{bits}"]
    return quantize(
        matrix,
        dataclasses.replace(
            preset, name=f"{bits} bits", spectral=False, rotate=False, granularity="row",
            block_size=0,
        ),
    )  # fmt: skip


class Operands:
    """A matrix X [m, n] in codes and decoded, A [m, m] as the operator of Newton-Schulz is."""

    def __init__(self, matrix: Tensor) -> None:
        self.m, self.n = matrix.shape
        self.stored = {bits: coded(matrix, bits) for bits in BITS}
        self.q = self.stored[4]
        self.decoded = self.q.dequantize()
        self.scales = self.q.tensors["scales"]
        self.levels = (self.decoded / self.scales).round().to(torch.int8)
        self.a = torch.mm(self.decoded, self.decoded.mT) / self.decoded.square().sum()
        self.square, self.wide = torch.empty(self.m, self.m), torch.empty(self.m, self.n)
        self.buffer = torch.empty(self.m, self.n)

    @cached_property
    def exact(self) -> dict[str, Tensor]:
        """In float64, by what the names of cases begin with."""
        x, a = self.decoded.double(), self.a.double()
        return {"gram": x @ x.mT, "A X": a @ x, "A A": a @ a}

    def held(self, name: str, call: Callable[[], Tensor], allowed: float) -> Prepared:
        """A call whose result is one of the exact ones."""
        return Prepared(call, expect_close(name, call(), self.exact[name], allowed))

    def narrow(self, count: int, bits: int, *, right: bool) -> Prepared:
        """lut_matmul of so many rows, or lut_times of so many columns, in two limbs."""
        q, x = self.stored[bits], self.stored[bits].dequantize().double()
        given = self.decoded[:count].mT if right else self.a[:count]
        exact = x @ given.double() if right else given.double() @ x
        multiply = partial(lut_times, q, given) if right else partial(lut_matmul, given, q)
        call = partial(multiply, panel="s8")
        return Prepared(call, expect_close("narrow", call(), exact, LIMBS_ERROR))

    def gram(self, panel: Panel, bits: int) -> Prepared:
        """lut_gram."""
        q = self.stored[bits]
        x = q.dequantize().double()
        exact = self.exact["gram"] if bits == 4 else x @ x.mT
        call = partial(lut_gram, q, panel=panel)
        passed = expect_close("gram", call(), exact, allowed_gram_error(x, q.state_format))
        return Prepared(call, passed)

    def int_mm_of_int8(self) -> Prepared:
        """Whole sums alone; no scales."""
        return Prepared(lambda: torch._int_mm(self.levels, self.levels.mT))

    def decode_and_int_mm(self) -> Tensor:
        """X X^T with torch's integer product."""
        BACKEND.accumulate(self.buffer, Terms(codes=self.q.codes()))
        levels = self.buffer.div_(self.scales).round_().to(torch.int8)
        return torch._int_mm(levels, levels.mT).float().mul_(self.scales).mul_(self.scales.mT)

    def int4_packed(self) -> Prepared:
        """torch's product with the weights X^T [n, m] in four bits, groups along m."""
        if self.m % INT4_GROUP or self.n % INT4_MULTIPLE:
            raise UnavailableError(
                f"it takes multiples of {INT4_GROUP} and {INT4_MULTIPLE}, got {self.m}x{self.n}"
            )
        codes, scales_and_zeros, weights = int4_codes(self.decoded.mT.contiguous())
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        a = self.a.bfloat16()

        def product() -> Tensor:
            found: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
                a, packed, INT4_GROUP, scales_and_zeros
            )
            return found

        exact = a.double() @ weights.double().mT
        return Prepared(product, expect_close("A X", product(), exact, INT4_ERROR))


def int4_codes(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 weights [n, k] as torch's product wants them, k a multiple of 32.

    Codes int32 [n, k], bfloat16 scales and zeros [k / 32, n, 2], and the float32 weights
    (code - 8) * scale + zero that they mean.
    """
    n, k = weights.shape
    groups = weights.view(n, k // INT4_GROUP, INT4_GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    zero = (low + 8 * scale.float()).bfloat16()
    wide_scale, wide_zero = scale.float()[..., None], zero.float()[..., None]
    codes = ((groups - wide_zero) / wide_scale + 8).round_().clamp_(0, 15)
    decoded = ((codes - 8) * wide_scale + wide_zero).view(n, k)
    scales_and_zeros = torch.stack([scale, zero], -1).transpose(0, 1).contiguous()
    return codes.to(torch.int32).view(n, k), scales_and_zeros, decoded


def cases(x: Operands, isa: str) -> list[Case]:
    """Peers, ours and the roofs of both; names begin with the product."""
    ours, torchs = (f"{code_type(level)} {level}" for level in (isa, best_isa()))
    triangle, whole = symmetric_operations(x.m, x.n), product_operations(x.m, x.n, x.m)
    square = product_operations(x.m, x.m, x.m)
    found: list[Case] = []

    def add(
        name: str,
        prepare: Callable[[], Prepared],
        work: float,
        roof: str,
        *,
        peer: bool = False,
        dtype: str = "fp32",
    ) -> None:
        baseline = f"{name.split(':')[0]}: torch.mm"
        found.append(
            Case(
                name, with_work(prepare, work, roof), dtype, peer=peer,
                baseline=None if name == baseline else baseline, isa=None if peer else isa,
            )
        )  # fmt: skip

    def plain(call: Callable[[], Tensor]) -> Callable[[], Prepared]:
        return lambda: Prepared(call)

    float_peer, float_ours = f"fp32 {best_isa()}", f"fp32 {isa}"
    add(
        "gram: torch.mm",
        plain(lambda: torch.mm(x.decoded, x.decoded.mT, out=x.square)),
        whole, float_peer, peer=True,
    )  # fmt: skip
    add("gram: torch._int_mm of int8", x.int_mm_of_int8, whole, torchs, peer=True, dtype="int8")
    add(
        "gram: decode, torch._int_mm",
        lambda: x.held("gram", x.decode_and_int_mm, DECODED_ERROR),
        whole, torchs, peer=True,
    )  # fmt: skip
    add("gram: f32", lambda: x.gram("f32", 4), triangle, float_ours)
    for bits in BITS:
        add(f"gram: s8, {bits} bits", partial(x.gram, "s8", bits), triangle, ours)
    add(
        "A X: torch.mm", plain(lambda: torch.mm(x.a, x.decoded, out=x.wide)), whole, float_peer,
        peer=True,
    )  # fmt: skip
    add("A X: torch int4pack bf16", x.int4_packed, whole, BF16_PRODUCT, peer=True, dtype="bf16")
    f32 = partial(lut_matmul, x.a, x.q, panel="f32", out=x.wide)
    limbs = partial(lut_matmul, x.a, x.q, panel="s8", out=x.wide)
    add("A X: f32", lambda: x.held("A X", f32, FLOAT32_ERROR), whole, float_ours)
    add("A X: two limbs", lambda: x.held("A X", limbs, LIMBS_ERROR), 2 * whole, ours)
    for right, count in itertools.product((False, True), NARROW):
        name = f"{'X V' if right else 'A X'}, k = {count}"
        wide = (x.decoded, x.decoded[:count].mT) if right else (x.a[:count], x.decoded)
        work = product_operations(count, x.m, x.n)
        add(f"{name}: torch.mm", plain(partial(torch.mm, *wide)), work, float_peer, peer=True)
        for bits in NARROW_BITS:
            prepare = partial(x.narrow, count, bits, right=right)
            add(f"{name}: two limbs, {bits} bits", prepare, 2 * work, ours)
    add(
        "A A: torch.mm", plain(lambda: torch.mm(x.a, x.a, out=x.square)), square, float_peer,
        peer=True,
    )  # fmt: skip
    symmetric = partial(BACKEND.symmetric_product, x.a, x.a, out=x.square)
    add(
        "A A: symmetric",
        lambda: x.held("A A", symmetric, FLOAT32_ERROR),
        symmetric_operations(x.m, x.m), float_ours,
    )  # fmt: skip
    return [*found, *roofs({float_ours, float_peer, ours, torchs, BF16_PRODUCT})]


def update_errors(shape: tuple[int, int], generator: torch.Generator) -> list[Result]:
    """Relative error of the update by the type in which the Gram matrix is taken."""
    x = decaying_matrix(*shape, generator)
    exact = orthogonalize(x.double())
    coefficients = resolve_coefficients("muon", 5)
    eight = coded(x, 8)

    def update(gram: Tensor) -> Tensor:
        return gram_operator(gram / x.norm() ** 2, coefficients, BACKEND) @ x / x.norm()

    updates = {
        "f32": update(BACKEND.symmetric_product(x)),
        "s8": update(lut_gram(eight, panel="s8")),
        "bfloat16 Newton-Schulz": _zeropower_via_newtonschulz(
            x, NS_COEFFICIENTS["muon"][0], 5, 1e-7
        ),
    }
    return [
        Result(
            f"update: {name}", shape, None, "cpu", "fp32", "measured",
            error=relative_error(value, exact),
        )
        for name, value in updates.items()
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Products of codes against torch's.")
    add_options(parser)
    options = parser.parse_args(arguments)
    repeats = options.repeats or (3 if options.quick else 9)
    record = Record(options.json)
    for shape in SHAPES[: 1 if options.quick else None]:
        generator = torch.Generator().manual_seed(0)
        matrix = decaying_matrix(*shape, generator)
        for run in runs(options):
            with run.applied():
                record.add(measure_cases(cases(Operands(matrix), run.isa), shape, repeats))
        if shape in SHAPES[:2]:
            record.add(update_errors(shape, generator))
    record.close()


if __name__ == "__main__":
    main()
