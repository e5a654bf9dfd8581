"""Products of codes against torch's products of the decoded matrix, and the error they leave.

    python -m bench.lut_gemm [--quick] [--repeats N] [--threads N] [--json FILE]

Everything at one shape runs interleaved in one process. The strongest public peer of the integer
Gram matrix is torch._int_mm on a matrix that is int8 already; with the codes it has to be decoded
first, for which the backend's own decoder is taken (to float32, then to int8). The last table is
the relative error after five Newton-Schulz steps when the Gram matrix of the fresh momentum is
taken in each type, beside that of bfloat16 Newton-Schulz.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from bench.harness import interleaved, medians, write_json
from lowbit_muon import PRESETS, QuantizedMatrix, orthogonalize, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.benchmark.momentum import decaying_matrix
from lowbit_muon.lut_gemm import lut_gram, lut_matmul, lut_update
from lowbit_muon.newton_schulz import NS_COEFFICIENTS, operator_of_gram, resolve_coefficients

SHAPES = ((576, 1536), (1024, 1024), (1024, 4096), (2048, 2048))
BITS = (2, 3, 4, 8)
BACKEND = get_backend("auto", torch.device("cpu"))


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


def cases(matrix: Tensor) -> dict[str, Callable[[], object]]:
    """Name -> call; A is symmetric, as the operator of Newton-Schulz is."""
    m, n = matrix.shape
    stored = {bits: coded(matrix, bits) for bits in BITS}
    q = stored[4]
    decoded, buffer = q.dequantize(), torch.empty(m, n)
    scales = q.tensors["scales"]
    whole = (decoded / scales).round().to(torch.int8)
    a = torch.mm(decoded, decoded.mT) / decoded.square().sum()
    square, wide = torch.empty(m, m), torch.empty(m, n)

    def decode_and_int_mm() -> Tensor:
        BACKEND.accumulate(buffer, codes=q.codes())
        levels = buffer.div_(scales).round_().to(torch.int8)
        return torch._int_mm(levels, levels.mT).float().mul_(scales).mul_(scales.mT)

    found: dict[str, Callable[[], object]] = {
        "gram: torch.mm": lambda: torch.mm(decoded, decoded.mT, out=square),
        "gram: torch._int_mm of int8": lambda: torch._int_mm(whole, whole.mT),
        "gram: decode, torch._int_mm": decode_and_int_mm,
        "gram: f32": lambda: lut_gram(q, panel="f32"),
        "gram: s16": lambda: lut_gram(q, panel="s16"),
    }
    for bits in BITS:
        found[f"gram: s8, {bits} bits"] = partial(lut_gram, stored[bits], panel="s8")
    found |= {
        "A X: torch.mm": lambda: torch.mm(a, decoded, out=wide),
        "A X: f32": lambda: lut_matmul(a, q, panel="f32", out=wide),
        "A X: two limbs": lambda: lut_matmul(a, q, panel="s8", out=wide),
        "A X: update of W": lambda: lut_update(wide, a, q, decay=1.0, step_size=1e-9),
        "A A: torch.mm": lambda: torch.mm(a, a, out=square),
        "A A: symmetric": lambda: BACKEND.symmetric_product(a, a, out=square),
    }
    return found


def check(matrix: Tensor) -> None:
    """Raise unless the products are right at this shape."""
    q = coded(matrix, 4)
    x = q.dequantize().double()
    a = (x @ x.mT).float()
    for name, result, exact, limit in (
        ("gram f32", lut_gram(q, panel="f32"), x @ x.mT, 1e-5),
        ("gram s8", lut_gram(q, panel="s8"), x @ x.mT, 1e-6),
        ("gram s16", lut_gram(q, panel="s16"), x @ x.mT, 1e-3),
        ("A X f32", lut_matmul(a, q, panel="f32"), a.double() @ x, 1e-5),
        ("A X two limbs", lut_matmul(a, q, panel="s8"), a.double() @ x, 1e-3),
    ):
        error = float((result - exact).norm() / exact.norm())
        if not error <= limit:
            raise SystemExit(f"{name} {tuple(matrix.shape)}: error {error:.1e} > {limit:.0e}")


def measure(shape: tuple[int, int], repeats: int, generator: torch.Generator) -> dict[str, Any]:
    """Seconds of each case at one shape."""
    matrix = decaying_matrix(*shape, generator)
    check(matrix)
    return {"shape": list(shape), "seconds": medians(interleaved(cases(matrix), repeats))}


def errors(shape: tuple[int, int], generator: torch.Generator) -> dict[str, float]:
    """Relative error of the update by the type in which the Gram matrix is taken."""
    x = decaying_matrix(*shape, generator)
    exact = orthogonalize(x.double())
    coefficients = resolve_coefficients("muon", 5)
    eight = coded(x, 8)

    def update(gram: Tensor) -> Tensor:
        operator, inverse = operator_of_gram(gram, float(x.norm()), coefficients, eps=1e-7)
        return operator @ x * inverse

    updates = {
        "f32": update(BACKEND.symmetric_product(x)),
        "s16": update(BACKEND.rounded_gram(x)),
        "s8": update(lut_gram(eight, panel="s8")),
        "bfloat16 Newton-Schulz": _zeropower_via_newtonschulz(
            x, NS_COEFFICIENTS["muon"][0], 5, 1e-7
        ),
    }
    return {
        name: float((value.double() - exact).norm() / exact.norm())
        for name, value in updates.items()
    }


def show(results: Sequence[dict[str, Any]], found: dict[str, dict[str, float]]) -> None:
    """Times as multiples of torch.mm's speed, then errors."""
    console = Console()
    table = Table(title="times as fast as torch.mm of the decoded float32 matrix")
    table.add_column("product")
    for result in results:
        table.add_column("x".join(map(str, result["shape"])), justify="right")
    for name in results[0]["seconds"]:
        base = name.split(":")[0] + ": torch.mm"
        ratios = (result["seconds"][base] / result["seconds"][name] for result in results)
        table.add_row(name, *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    accuracy = Table(title="error after five Newton-Schulz steps, by the type of the Gram matrix")
    accuracy.add_column("type")
    for shape in found:
        accuracy.add_column(shape, justify="right")
    for name in next(iter(found.values())):
        accuracy.add_row(name, *(f"{values[name]:.1e}" for values in found.values()))
    console.print(accuracy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="the smallest shape, few repeats")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shapes, repeats = (SHAPES[:1], 3) if options.quick else (SHAPES, options.repeats)
    generator = torch.Generator().manual_seed(0)
    results = [measure(shape, repeats, generator) for shape in track(shapes, "shapes")]
    found = {"x".join(map(str, shape)): errors(shape, generator) for shape in shapes[:2]}
    show(results, found)
    if options.json:
        write_json(options.json, {"times": results, "errors": found})


if __name__ == "__main__":
    main()
