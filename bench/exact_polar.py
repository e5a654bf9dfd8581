"""Exact polar factors: by singular values, as the library takes them, and by QDWH.

    python -m bench.exact_polar [--device cpu|cuda] [--repeats N]

QDWH (Nakatsukasa and Higham, SIAM J. Sci. Comput. 35, 2013) waits for nobody on a device. All are
in float64; with Cholesky factors, which float32 matrices allow it (its errors are 2^-53 times the
first c, 3e9). What is below 1e-6 of the largest singular value is noise of float32, which
`exact_polar` leaves out. QDWH makes it as large as the rest, so that a second iteration, for the
sign of H - 1e-6 with H the symmetric factor, has to take it off again: the row with "cut". (There
1e-6 is of a bound, up to m^(1/8) times the largest singular value, and at condition 1e6 some
directions fall below it.) Columns:
errors relative to U V^T where singular values fall to 1/condition, those of numpy's decomposition
being the truth; the largest singular value that noise of a matrix of rank 8 gets, 0 at best; the
time of a call relative to `exact_polar`.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness import interleaved, medians
from lowbit_muon.step.rules.direction import exact_polar

SHAPES = ((64, 32, 32), (1, 256, 256), (1, 256, 1024), (1, 1024, 256), (1, 1024, 1024))
CONDITIONS = (1e2, 1e4, 1e6)
CUT = 1e-6
RANK = 8


def dynamic_weights(smallest: float) -> list[tuple[float, float, float]]:
    """(a, b, c) of each step for singular values in [smallest, 1]; Halley's at the end."""
    steps: list[tuple[float, float, float]] = []
    while 1 - smallest > 1e-15 and len(steps) < 8:
        square = smallest * smallest
        d = (4 * (1 - square) / square**2) ** (1 / 3)
        root = math.sqrt(1 + d)
        a = root + math.sqrt(8 - 4 * d + 8 * (2 - square) / (square * root)) / 2
        b = (a - 1) ** 2 / 4
        c = a + b - 1
        steps.append((a, b, c))
        smallest = min(1.0, smallest * (a + b * square) / (1 + c * square))
    return steps


def iterated(x: Tensor, smallest: float) -> Tensor:
    """X <- (b/c) X + (a - b/c) (I + c X X^T)^-1 X of float64 [b, m, n] with m <= n."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device).expand(x.shape[0], -1, -1)
    for a, b, c in dynamic_weights(smallest):
        factor = torch.linalg.cholesky_ex(torch.baddbmm(eye, x, x.mT, alpha=c)).L
        x = (b / c) * x + (a - b / c) * torch.cholesky_solve(x, factor)
    return x


def qdwh(x: Tensor, *, cut: bool) -> Tensor:
    """The polar factor of float32 [b, rows, columns], not zero."""
    if x.shape[1] > x.shape[2]:
        return qdwh(x.mT, cut=cut).mT
    q, r = torch.linalg.qr(x.double().mT)
    short = r.mT
    gram = short @ short.mT
    # (the sum of eighth powers)^(1/8): the largest singular value, or up to m^(1/8) of it
    bound = torch.linalg.matrix_norm(gram @ gram, keepdim=True) ** 0.25
    short = short / bound
    polar = iterated(short, CUT / 10)
    if cut:
        symmetric = polar @ short.mT
        symmetric = (symmetric + symmetric.mT) / 2
        eye = torch.eye(short.shape[1], dtype=short.dtype, device=short.device)
        polar = (polar + iterated(symmetric - CUT * eye, CUT / 20) @ polar) / 2
    return (polar @ q.mT).to(x.dtype)


METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "exact_polar": exact_polar,
    "QDWH": functools.partial(qdwh, cut=False),
    "QDWH, cut": functools.partial(qdwh, cut=True),
}


def with_condition(shape: tuple[int, int, int], condition: float) -> Tensor:
    """float32; singular values fall geometrically from 1 to a little above 1 / condition."""
    generator = torch.Generator().manual_seed(0)
    batch, rows, columns = shape
    short = min(rows, columns)
    left, right = (
        torch.linalg.qr(torch.randn(batch, n, short, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    values = torch.logspace(0, -0.99 * math.log10(condition), short, dtype=torch.float64)
    return ((left * values) @ right.mT).float()


def errors(
    method: Callable[[Tensor], Tensor], shape: tuple[int, int, int], device: str
) -> tuple[list[float], float]:
    """(relative errors for CONDITIONS, what noise gets)."""
    found = []
    for condition in CONDITIONS:
        x = with_condition(shape, condition)
        u, _, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
        exact = u @ vh
        difference = method(x.to(device)).cpu().double().numpy() - exact
        found.append(float(np.linalg.norm(difference) / np.linalg.norm(exact)))
    generator = torch.Generator().manual_seed(1)
    batch, rows, columns = shape
    left = torch.randn(batch, rows, RANK, generator=generator)
    x = left @ torch.randn(batch, RANK, columns, generator=generator)
    values = torch.linalg.svdvals(method(x.to(device)).cpu().double())
    return found, float(values[:, RANK:].max())


def main() -> None:
    """Print a table for each shape."""
    parser = argparse.ArgumentParser(description="exact polar factors by SVD and by QDWH")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    options = parser.parse_args()
    console = Console()
    for shape in SHAPES:
        x = with_condition(shape, 1e4).to(options.device)
        cases = {name: functools.partial(method, x) for name, method in METHODS.items()}
        seconds = medians(interleaved(cases, options.repeats))
        table = Table(title="x".join(map(str, shape)), box=None, pad_edge=False)
        for heading in ("", *(f"condition {each:.0e}" for each in CONDITIONS), "noise", "time"):
            table.add_column(heading)
        for name, method in METHODS.items():
            relative, noise = errors(method, shape, options.device)
            ratio = seconds[name] / seconds["exact_polar"]
            table.add_row(
                name, *(f"{each:.1e}" for each in relative), f"{noise:.1e}", f"{ratio:.2f}"
            )
        console.print(table)


if __name__ == "__main__":
    main()
