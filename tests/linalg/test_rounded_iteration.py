"""Newton-Schulz with products of bfloat16 on CPUs: never a larger error than torch.optim.Muon's.

The error is against the polynomial in float64, relative to its norm. torch's iteration runs in
bfloat16 throughout; ours rounds every product of the standard form and some of the Gram form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from orthogonalization import matrix_with
from rounding_backends import BACKENDS, RoundingReference, needs_bfloat16
from torch import Tensor

from lowbit_muon import Muon
from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.coefficients import Triple, resolve_coefficients
from lowbit_muon.linalg.newton_schulz import (
    gram_form_rounds,
    gram_operator,
    standard_form,
    takes_gram_form,
)
from lowbit_muon.state import operands
from lowbit_muon.state.operands import Dense

MUON = resolve_coefficients("muon", 5)
CUBIC = ((1.5, -0.5, 0.0),) * 5
TAYLOR = ((1.875, -1.25, 0.375),) * 5


def power(exponent: float) -> Callable[[int, int], Tensor]:
    """Singular values 1/i^exponent, as a momentum's fall."""
    return lambda m, n: matrix_with(torch.arange(1, m + 1).double() ** -exponent, n)


def two_values(small: float, share: float) -> Callable[[int, int], Tensor]:
    def build(m: int, n: int) -> Tensor:
        values = torch.full((m,), small)
        values[: int(m * share)] = 1
        return matrix_with(values, n)

    return build


def low_rank(share: float) -> Callable[[int, int], Tensor]:
    def build(m: int, n: int) -> Tensor:
        rank = max(1, int(m * share))
        return torch.randn(m, rank) @ torch.randn(rank, n)

    return build


# Gaussian and one outlier: what gradients of small batches and of SmolLM2's layers look like.
GATE: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": torch.randn,
    "1/sqrt(i)": power(0.5),
    "1/i": power(1),
    "1/i^1.5": power(1.5),
    "1/i^2": power(2),
    "1/i^3": power(3),
    "condition 1e2": lambda m, n: matrix_with(torch.logspace(0, -2, m), n),
    "condition 1e4": lambda m, n: matrix_with(torch.logspace(0, -4, m), n),
    "orthogonal": lambda m, n: matrix_with(torch.ones(m), n),
    "near orthogonal": lambda m, n: matrix_with(1 + 0.1 * torch.rand(m), n),
    "rank 1": low_rank(0),
    "rank m/100": low_rank(0.01),
    "rank m/4": low_rank(0.25),
    "rank m/2": low_rank(0.5),
    "outlier": lambda m, n: 0.02 * torch.randn(m, n) + torch.outer(torch.randn(m), torch.randn(n)),
    "an eighth large": two_values(1e-3, 0.125),
    "half large": two_values(3e-2, 0.5),
    "rows of all sizes": lambda m, n: torch.randn(m, n) * torch.exp(2 * torch.randn(m, 1)),
    "columns of all sizes": lambda m, n: torch.randn(m, n) * torch.exp(torch.randn(n)),
    "positive": torch.rand,
}


def exact(x: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    x = x.double() / x.double().norm()
    for a, b, c in coefficients:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def ours(x: Tensor, coefficients: tuple[Triple, ...], backend: Backend) -> Tensor:
    """As a step of the optimizer does it."""
    operand, norm = Dense(x.unsqueeze(0), backend), x.double().norm().view(1)
    if not takes_gram_form(x.shape, coefficients, torch.float32, backend, rounded=True):
        scaled = (x / float(norm)).unsqueeze(0)
        return standard_form(scaled, coefficients, backend, rounded=True)[0]
    rounded = gram_form_rounds(coefficients)
    r = operand.gram(rounded=rounded).div_(float(norm) ** 2)
    q = gram_operator(r, coefficients, backend, rounded=rounded)
    out = torch.empty(1, *x.shape)
    operand.multiply(q, out, alpha=1 / norm, diagonal=0 if rounded else None)
    return out[0]


def theirs(x: Tensor, coefficients: tuple[Triple, ...]) -> Tensor:
    """The update of torch.optim.Muon."""
    param = torch.nn.Parameter(torch.zeros_like(x))
    param.grad = x.clone()
    torch.optim.Muon(
        [param],
        lr=1.0,
        weight_decay=0.0,
        momentum=0.0,
        nesterov=False,
        ns_coefficients=coefficients[0],
        ns_steps=len(coefficients),
    ).step()
    return -param.detach()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def assert_not_worse(x: Tensor, backend: Backend, coefficients: tuple[Triple, ...] = MUON) -> None:
    expected = exact(x, coefficients)
    our_error = error(ours(x, coefficients, backend), expected)
    assert our_error <= error(theirs(x, coefficients), expected)


# Those that decide (CONTRIBUTING.md, Precision), the hardest and the most usual.
DECIDING = ("gaussian", "1/i", "rank m/4", "half large", "columns of all sizes")


@pytest.mark.parametrize(
    ("shape", "spectrum"),
    [
        *itertools.product([(256, 256), (576, 576), (256, 512), (256, 1100)], GATE),
        *(
            pytest.param((577, 1537), name, marks=[] if name in DECIDING else [pytest.mark.long])
            for name in GATE
        ),
    ],
    ids=str,
)
def test_error_is_not_larger_than_torchs(shape: tuple[int, int], spectrum: str) -> None:
    backend = needs_bfloat16(BACKENDS["cpu"]())
    assert_not_worse(GATE[spectrum](*shape), backend)


@pytest.mark.parametrize("spectrum", ["gaussian", "1/i", "condition 1e2", "half large", "rank m/2"])
@pytest.mark.parametrize("shape", [(256, 260), (259, 600)], ids=str)
def test_the_same_without_such_a_processor(shape: tuple[int, int], spectrum: str) -> None:
    backend = BACKENDS["reference"]()
    assert_not_worse(GATE[spectrum](*shape), backend)


@pytest.mark.long
@pytest.mark.parametrize("spectrum", GATE)
@pytest.mark.parametrize(
    "shape",
    [(600, 1199), (512, 2048), (768, 3072), (1024, 1024), (1024, 4096), (900, 1000)],
    ids=str,
)
def test_more_shapes(shape: tuple[int, int], spectrum: str) -> None:
    assert_not_worse(GATE[spectrum](*shape), needs_bfloat16(BACKENDS["cpu"]()))


@pytest.mark.parametrize("coefficients", [MUON[:1], MUON[:2], MUON[:3], MUON[:4], CUBIC, TAYLOR])
@pytest.mark.parametrize("spectrum", ["gaussian", "1/i", "1/i^2", "rank m/4", "half large"])
def test_other_steps_and_coefficients(spectrum: str, coefficients: tuple[Triple, ...]) -> None:
    backend = needs_bfloat16(BACKENDS["cpu"]())
    for shape in ((256, 256), (256, 512)):
        assert_not_worse(GATE[spectrum](*shape), backend, coefficients)


@pytest.mark.parametrize("name", ["muon", "polar_express"])
@pytest.mark.parametrize("steps", [5, 6, 8])
@pytest.mark.parametrize("spectrum", ["gaussian", "1/i", "1/i^2", "rank m/4", "half large"])
def test_the_standard_form_takes_any_coefficients(spectrum: str, steps: int, name: str) -> None:
    x = GATE[spectrum](256, 300)
    coefficients = resolve_coefficients(name, steps)
    expected = exact(x, coefficients)
    found = ours(x, coefficients, needs_bfloat16(BACKENDS["cpu"]()))
    emulated = x.to(torch.bfloat16) / x.norm().to(torch.bfloat16)
    for a, b, c in coefficients:  # torch.optim.Muon's arithmetic; it has one triple for all steps
        gram = emulated @ emulated.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        emulated = torch.addmm(emulated, polynomial, emulated, beta=a)
    assert error(found, expected) <= error(emulated.float(), expected)


@pytest.mark.parametrize(
    ("shape", "name", "steps", "aspect", "gram", "rounded"),
    [
        ((576, 576), "muon", 5, 2.0, False, True),
        ((1151, 576), "muon", 5, 2.0, False, True),
        ((1152, 576), "muon", 5, 2.0, True, True),
        ((1152, 576), "muon", 5, 4.0, False, True),
        ((2304, 576), "muon", 5, 4.0, True, True),
        ((3, 256, 512), "muon", 5, 2.0, True, True),
        ((1152, 576), "muon", 6, 2.0, True, False),
        ((576, 1536), "polar_express", 5, 2.0, True, False),
        ((576, 1536), "polar_express", 8, 2.0, False, True),
    ],
)
def test_which_form_is_rounded(
    shape: tuple[int, ...],
    name: str,
    steps: int,
    aspect: float,
    gram: bool,
    rounded: bool,
) -> None:
    coefficients, backend = resolve_coefficients(name, steps), RoundingReference()
    backend.gram_aspect = aspect
    assert takes_gram_form(shape, coefficients, torch.float32, backend, rounded=True) == gram
    assert not gram or gram_form_rounds(coefficients) == rounded


@pytest.mark.parametrize("shape", [(256, 600), (600, 256), (256, 264)], ids=str)
@pytest.mark.parametrize("state_format", ["fp32", "linear8", "mulaw4"])
def test_the_lean_step_takes_the_same_products(
    shape: tuple[int, int], state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panels of rows, whose parts of Q have their diagonals elsewhere; bfloat16 weights by rows."""
    needs_bfloat16(BACKENDS["cpu"]())
    grad = torch.randn(shape)
    for dtype in (torch.float32, torch.bfloat16):
        found = {}
        for lean in (False, True):
            monkeypatch.setattr(operands, "SCRATCH_FLOATS", 50 * 256 if lean else 2**30)
            for ns_dtype in ("auto", "bfloat16", "float32"):
                param = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
                optimizer = Muon([param], lr=1.0, state_format=state_format, ns_dtype=ns_dtype)
                param.grad = grad.to(dtype)
                optimizer.step()
                found[lean, ns_dtype] = param.detach().float()
        exact_step = found[False, "float32"]
        for lean in (False, True):
            assert torch.equal(found[lean, "auto"], found[lean, "bfloat16"])
            # of a Gaussian matrix: a fifth of torch's 1.2e-2 where it is wide, as much for squares;
            # the other part is the rounding of the weights, to half of 2**-8 each
            limit = 2e-2 + (2**-8 if dtype == torch.bfloat16 else 0)
            assert 0 < error(found[lean, "auto"], exact_step.double()) < limit
