"""Time the ways to orthogonalise a matrix against each other and torch.optim.Muon's own.

    python -m bench.orthogonalize [--quick] [--isas LEVEL ...] [--threads N ...] [--json FILE]

For each shape the error against float64 comes first: a method whose error exceeds that of
torch.optim.Muon's bfloat16 function, the peer, is an error and not timed. gram-newton-schulz from
PyPI (float16, a restart after two steps, torch's products) is another peer, where it is installed.
Fractions count the operations a method does, triangles where it computes one (`operations`).
`lowbit_muon.linalg.newton_schulz.takes_gram_form` has its thresholds from the
results in bench/results/orthogonalize.json. Where other programs keep the cores busy set
OMP_WAIT_POLICY=passive, or threads that wait in a loop for one that is not running distort what is
measured.
"""

from __future__ import annotations

import argparse
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
from bench.machine_peaks import best_isa, roofs
from lowbit_muon.backends import get_backend
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS, resolve_coefficients
from lowbit_muon.linalg.newton_schulz import orthogonalize
from lowbit_muon.tools.benchmark.cases import Case, Prepared, UnavailableError
from lowbit_muon.tools.benchmark.counts import (
    BF16_PRODUCT,
    NS_STEPS,
    newton_schulz_operations,
    orthogonalize_operations,
    plain_newton_schulz_operations,
    product_operations,
    symmetric_operations,
)
from lowbit_muon.tools.benchmark.gates import GateError, Passed, expect_close
from lowbit_muon.tools.benchmark.measure import measure_cases
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

STEPS, EPS = NS_STEPS, 1e-7
BACKEND = get_backend("auto", torch.device("cpu"))
BASELINE, PEER, PACKAGE = "plain fp32", "torch.optim.Muon", "gram-newton-schulz fp16"
PRODUCT = "X Xᵀ: torch.mm"
METHODS = ("newton_schulz", "gram", "auto")
ROWS = (64, 128, 192, 256, 384, 576, 768, 1024, 2048)
QUICK_ROWS = (64, 256, 576)
ASPECTS = (1.0, 8 / 3, 4.0)
FLOP_BUDGET = 4e11  # for the repeats of the baseline at one shape: a few seconds
PACKAGE_ROWS = 256  # torch multiplies batches of float16 at 1 GFLOP/s or so on a CPU
# A float32 sum of n terms is off by about sqrt(n) 2^-24: 6e-6 at 8192.
PRODUCT_ERROR = 1e-5


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


def operations(method: str, m: int, n: int) -> float:
    """What a method multiplies and adds for [m, n], m <= n."""
    if method == "auto":
        return orthogonalize_operations(m, n, BACKEND)
    if method == "plain":
        return plain_newton_schulz_operations(m, n)
    return newton_schulz_operations(m, n, gram_form=method == "gram")


class Shape:
    """One matrix X [m, n], and what every method is held to."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.m, self.n = x.shape

    @cached_property
    def exact(self) -> Tensor:
        """In float64."""
        return reference(self.x)

    @cached_property
    def allowed(self) -> float:
        """The peer's error: nothing is timed that is worse than what it replaces."""
        return self.error(shipped(self.x))

    def error(self, found: Tensor) -> float:
        """Relative, in the Frobenius norm."""
        return float((found.double() - self.exact).norm() / self.exact.norm())

    def held(self, call: Callable[[Tensor], Tensor]) -> Prepared:
        """A method that is precise enough."""
        error = self.error(call(self.x))
        if not error <= self.allowed:
            raise GateError(f"error {error:.2e} > {self.allowed:.2e} of {PEER}")
        return Prepared(lambda: call(self.x), Passed(error, self.allowed))

    def package(self) -> Prepared:
        """gram-newton-schulz in torch operations and not compiled."""
        if self.m > PACKAGE_ROWS:
            raise UnavailableError(f"float16 products of more than {PACKAGE_ROWS} rows take long")
        try:
            from gram_newton_schulz import GramNewtonSchulz
        except ImportError as error:
            raise UnavailableError(f"{error}; pip install --no-deps gram-newton-schulz") from error
        call = GramNewtonSchulz(
            ns_epsilon=EPS,
            ns_use_kernels=False,
            ns_coefficients=[list(triple) for triple in resolve_coefficients("muon", STEPS)],
            compile_kwargs=None,
        )
        return self.held(call)

    def products(self, isa: str) -> list[Case]:
        """X X^T both ways."""
        m, n, x = self.m, self.n, self.x
        square = torch.empty(m, m)
        gram = partial(BACKEND.symmetric_product, x, out=square)

        def ours() -> Prepared:
            exact = x.double() @ x.double().mT
            return Prepared(gram, expect_close("gram", gram(), exact, PRODUCT_ERROR))

        theirs = partial(Prepared, lambda: torch.mm(x, x.mT, out=square))
        peak = f"fp32 {best_isa()}"
        return [
            Case(PRODUCT, with_work(theirs, product_operations(m, n, m), peak), peer=True),
            Case(
                "X Xᵀ: gram",
                with_work(ours, symmetric_operations(m, n), f"fp32 {isa}"),
                baseline=PRODUCT,
                isa=isa,
            ),
        ]

    def cases(self, isa: str) -> list[Case]:
        """Peers, methods, products and roofs."""
        plain = operations("plain", self.m, self.n)
        peak = f"fp32 {best_isa()}"
        found = [
            Case(
                BASELINE, with_work(partial(self.held, plain_newton_schulz), plain, peak), peer=True
            ),
            Case(
                PEER,
                with_work(partial(self.held, shipped), plain, BF16_PRODUCT),
                "bf16",
                baseline=BASELINE,
                peer=True,
            ),
            Case(PACKAGE, self.package, "fp16", baseline=BASELINE, peer=True),
        ]
        for method in METHODS:
            call = partial(orthogonalize, steps=STEPS, coefficients="muon", method=method, eps=EPS)
            work = operations(method, self.m, self.n)
            prepare = with_work(partial(self.held, call), work, f"fp32 {isa}")
            found.append(Case(method, prepare, baseline=BASELINE, isa=isa))
        return [*found, *self.products(isa), *roofs({peak, f"fp32 {isa}", BF16_PRODUCT})]


def shipped(x: Tensor) -> Tensor:
    """torch.optim.Muon's function, in bfloat16."""
    found: Tensor = _zeropower_via_newtonschulz(x, NS_COEFFICIENTS["muon"][0], STEPS, EPS)
    return found


def rounds(m: int, n: int, most: int) -> int:
    """As many as fit the budget, at least three."""
    return int(min(max(FLOP_BUDGET / operations("plain", m, n), 3), most))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ways to orthogonalise a matrix.")
    add_options(parser)
    options = parser.parse_args(arguments)
    most = options.repeats or (5 if options.quick else 31)
    generator = torch.Generator().manual_seed(0)
    record = Record(options.json)
    for m in QUICK_ROWS if options.quick else ROWS:
        for aspect in ASPECTS:
            shape = m, round(m * aspect)
            matrix = Shape(decaying_matrix(*shape, generator))
            for run in runs(options):
                with run.applied():
                    found = measure_cases(matrix.cases(run.isa), shape, rounds(*shape, most))
                record.add(found)
    record.close()


if __name__ == "__main__":
    main()
