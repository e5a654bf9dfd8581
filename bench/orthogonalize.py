"""Time the ways to orthogonalise a matrix against each other and torch.optim.Muon's own.

    python -m bench.orthogonalize [--quick] [--threads N] [--json FILE]

For each shape the error against float64 comes first: a method whose error exceeds that of
torch.optim.Muon's bfloat16 function, the peer, stops the run. `lowbit_muon.newton_schulz` and
`lowbit_muon.products` take their thresholds from the results in bench/results/orthogonalize.json.
Where other programs keep the cores busy set OMP_WAIT_POLICY=passive, or threads that wait in a loop
for one that is not running distort what is measured.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from bench.harness import interleaved, medians, write_json
from lowbit_muon.benchmark.momentum import decaying_matrix
from lowbit_muon.newton_schulz import NS_COEFFICIENTS, gram, orthogonalize, resolve_coefficients

STEPS, EPS = 5, 1e-7
BASELINE, PEER = "plain fp32", "torch.optim.Muon"
ROWS = (64, 128, 192, 256, 384, 576, 768, 1024, 2048)
QUICK_ROWS = (64, 256, 576)
ASPECTS = (1.0, 8 / 3, 4.0)
FLOP_BUDGET = 4e11  # for the repeats of the baseline at one shape: a few seconds
Result = dict[str, Any]


def plain_newton_schulz(x: Tensor) -> Tensor:
    """The usual three products a step, all in float32."""
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in resolve_coefficients("muon", STEPS):
        gram_matrix = x @ x.mT
        polynomial = torch.addmm(gram_matrix, gram_matrix, gram_matrix, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def reference(x: Tensor) -> Tensor:
    """The polynomial on the singular values of x, in float64."""
    exact = x.double()
    exact = exact / exact.norm()
    squares, vectors = torch.linalg.eigh(exact @ exact.mT)
    factor = torch.ones_like(squares)
    for a, b, c in resolve_coefficients("muon", STEPS):
        step = a + b * squares + c * squares**2
        factor, squares = factor * step, squares * step**2
    return (vectors * factor) @ (vectors.mT @ exact)


def variants(x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Name -> call; all compute the same polynomial of x."""
    triple = NS_COEFFICIENTS["muon"][0]
    return {
        BASELINE: lambda: plain_newton_schulz(x),
        PEER: lambda: _zeropower_via_newtonschulz(x, triple, STEPS, EPS),
        "newton_schulz": lambda: orthogonalize(x, STEPS, "muon", "newton_schulz", eps=EPS),
        "gram": lambda: orthogonalize(x, STEPS, "muon", "gram", eps=EPS),
        "eigh": lambda: orthogonalize(x, STEPS, "muon", "eigh", eps=EPS),
        "auto": lambda: orthogonalize(x, STEPS, "muon", "auto", eps=EPS),
    }


def errors(x: Tensor) -> dict[str, float]:
    """Relative Frobenius error of each variant; raises where one is worse than the peer."""
    exact = reference(x)
    found = {
        name: float((call().double() - exact).norm() / exact.norm())
        for name, call in variants(x).items()
    }
    for name, error in found.items():
        if not error <= found[PEER]:
            raise SystemExit(
                f"{name} {tuple(x.shape)}: error {error:.2e} > {found[PEER]:.2e} of {PEER}"
            )
    return found


def measure(rows: int, aspect: float, generator: torch.Generator, most: int) -> Result:
    """One shape: errors, seconds of each variant, and seconds of X X^T both ways."""
    x = decaying_matrix(rows, round(rows * aspect), generator)
    found = errors(x)
    plain_flop = STEPS * (4 * aspect + 2) * rows**3
    repeats = int(min(max(FLOP_BUDGET / plain_flop, 3), most))
    square = torch.empty(rows, rows)
    products: dict[str, Callable[[], Tensor]] = {
        "torch.mm": lambda: torch.mm(x, x.mT, out=square),
        "gram": lambda: gram(x, out=square),
    }
    return {
        "shape": list(x.shape),
        "repeats": repeats,
        "error": found,
        "seconds": medians(interleaved(variants(x), repeats)),
        "product_seconds": medians(interleaved(products, 3 * repeats)),
    }


def show(results: Sequence[Result], console: Console) -> None:
    """Two tables with one row for each shape: times as ratios, and errors."""
    names = list(results[0]["seconds"])
    times = Table(title=f"{STEPS} steps: time relative to {BASELINE}")
    accuracy = Table(title="relative error against float64")
    for heading in ("shape", f"{BASELINE} ms", *names[1:], "XXᵀ / torch.mm"):
        times.add_column(heading, justify="right")
    for heading in ("shape", *names):
        accuracy.add_column(heading, justify="right")
    for result in results:
        shape = "x".join(map(str, result["shape"]))
        seconds, products = result["seconds"], result["product_seconds"]
        base = seconds[BASELINE]
        times.add_row(
            shape,
            f"{base * 1e3:.2f}",
            *(f"{seconds[name] / base:.2f}" for name in names[1:]),
            f"{products['gram'] / products['torch.mm']:.2f}",
        )
        accuracy.add_row(shape, *(f"{result['error'][name]:.1e}" for name in names))
    console.print(times)
    console.print(accuracy)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="three sizes, few repeats")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    rows, most = (QUICK_ROWS, 5) if options.quick else (ROWS, 31)
    shapes = [(m, aspect) for m in rows for aspect in ASPECTS]
    results = [measure(m, aspect, generator, most) for m, aspect in track(shapes, "shapes")]
    show(results, Console())
    if options.json:
        write_json(options.json, results)


if __name__ == "__main__":
    main()
