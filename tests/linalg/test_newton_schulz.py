"""Every way to orthogonalise against the polynomial applied to singular values in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from hypothesis import example, given, settings
from hypothesis import strategies as st
from orthogonalization import (
    METHODS,
    MUON,
    assert_orthogonalized,
    brute_force,
    matrix_with,
    polynomial,
    tolerance,
)
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.linalg.coefficients import (
    NS_COEFFICIENTS,
    composed_polynomial,
    gram_is_precise,
    resolve_coefficients,
)
from lowbit_muon.linalg.newton_schulz import (
    gram_operator,
    orthogonalize,
    takes_gram_form,
)

BACKEND = get_backend("auto", torch.device("cpu"))

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "flat": lambda m: torch.ones(m),
    "condition 1e2": lambda m: torch.logspace(0, -2, m),
    "condition 1e6": lambda m: torch.logspace(0, -6, m),
    "quarter rank": lambda m: torch.logspace(0, -2, m) * (torch.arange(m) < m // 4),
    "one large": lambda m: torch.where(torch.arange(m) == 0, 1, 2e-3),
    "rank one": lambda m: (torch.arange(m) == 0).float(),
}


# Five steps of which are precise in the Gram form; of the others the standard form is taken.
GRAM_NAMES = {
    *("muon", "polar_express", "quintic", "turbo", "deepseekv4", "lipschitz", "converging")
}


def test_which_polynomials_the_gram_form_takes() -> None:
    for name in NS_COEFFICIENTS:
        precise = gram_is_precise(resolve_coefficients(name, 5), torch.float32)
        assert precise == (name in GRAM_NAMES), name


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(
    ("shape", "steps"),
    [((48, 48), 1), ((48, 48), 5), ((48, 48), 6), ((390, 400), 6)],
    ids=str,
)
def test_steep_and_deficient_spectra(
    shape: tuple[int, int], spectrum: str, steps: int, coefficients: str, method: str
) -> None:
    x = matrix_with(SPECTRA[spectrum](shape[0]), shape[1])
    triples = resolve_coefficients(coefficients, steps)
    if not gram_is_precise(triples, torch.float32):
        method = "newton_schulz"
    result = orthogonalize(x, steps, coefficients, method)
    assert_orthogonalized(result, x, method, triples)


@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
def test_no_singular_value_changes_its_sign_but_with_aol(coefficients: str) -> None:
    """After each step, and those of the default five: an update along no direction goes uphill."""
    values = torch.linspace(1e-3, 1, 1000, dtype=torch.float64)
    for steps in range(1, 6):
        kept = polynomial(values, resolve_coefficients(coefficients, steps)) > 0
        assert bool(kept.all()) == (coefficients != "aol"), steps


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
def test_many_steps(coefficients: str, method: str) -> None:
    """Steps beyond what the Gram form in float32 can take: it says so, the others go on."""
    x = matrix_with(SPECTRA["condition 1e2"](32), 40)
    triples = resolve_coefficients(coefficients, 12)
    if coefficients not in GRAM_NAMES:
        method = "newton_schulz"
    if method == "gram":
        with pytest.raises(ValueError, match=r"12 steps.*Gram form in torch\.float32"):
            orthogonalize(x, 12, coefficients, method)
        x = x.double()
    result = orthogonalize(x, 12, coefficients, method)
    assert_orthogonalized(result, x, method, triples)
    if coefficients == "polar_express":  # its limit is the polar factor
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        assert float((result - u @ vh).norm()) <= tolerance(x, triples, method)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    method=st.sampled_from([*METHODS, "auto"]),
    coefficients=st.sampled_from(sorted(NS_COEFFICIENTS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    decay=st.floats(0, 3),
)
@example(1, 26, 2762, "newton_schulz", "cans", torch.float64, 1.69140625)  # steep at one
@settings(max_examples=150, deadline=None)
def test_any_shape_dtype_and_spectrum(
    rows: int,
    columns: int,
    seed: int,
    method: str,
    coefficients: str,
    dtype: torch.dtype,
    decay: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, columns + 1) ** -decay
    x = (torch.randn(rows, columns, generator=generator) * scales).to(dtype)
    triples = resolve_coefficients(coefficients, 5)
    if coefficients not in GRAM_NAMES:
        method = "newton_schulz"
    chosen = "gram" if method == "auto" else method  # no bound is wider for these sizes
    assert_orthogonalized(orthogonalize(x, 5, coefficients, method), x, chosen, triples)


@given(
    exponent=st.integers(-100, 120),
    method=st.sampled_from(METHODS),
    shape=st.sampled_from([(6, 9), (9, 6), (2, 5, 7)]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_scale_invariance(exponent: int, method: str, shape: tuple[int, ...], seed: int) -> None:
    """A power of two changes no mantissa; only where the range forces another scaling first do
    the roundings differ, by the same bound as against the exact result."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    result = orthogonalize(x * 2.0**exponent, method=method, eps=0)
    assert_orthogonalized(result, x, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "factor"),
    [
        (torch.float16, 300),
        (torch.float32, 1e-8),
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float32, 5e37),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
    ],
    ids=str,
)
def test_extreme_magnitudes(dtype: torch.dtype, factor: float, method: str) -> None:
    x = torch.randn(12, 20, dtype=torch.float64).clamp(-3, 3)
    scaled = (x * factor).to(dtype)
    result = orthogonalize(scaled, method=method, eps=0)
    exact = brute_force(scaled.double() / factor)
    # As assert_orthogonalized, but at the size of one: the SVD in float64 would overflow too.
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    allowed = tolerance(x, MUON, method, arithmetic) + torch.finfo(dtype).eps * exact.norm()
    assert (result.double() - exact).norm() <= allowed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("magnitude", [1e-8, 1e-12, 1e-20, 1e-35])
def test_eps_is_a_floor_of_the_norm(magnitude: float, method: str) -> None:
    x = torch.randn(4, 6) * magnitude
    result = orthogonalize(x, method=method, eps=1e-7)
    exact = brute_force(x, eps=1e-7)
    # Errors are relative to the norm that is below eps (or, for Gram forms, to its square).
    size = min(float(x.double().norm()) / 1e-7, 1)
    allowed = tolerance(x, MUON, method) * size
    assert float((result.double() - exact).norm()) <= allowed


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("eps", [0.0, 1e-7])
def test_zero_and_non_finite(method: str, eps: float) -> None:
    for shape in ((3, 5), (5, 3), (2, 3, 5)):
        assert torch.equal(
            orthogonalize(torch.zeros(shape), method=method, eps=eps), torch.zeros(shape)
        )
    batch = torch.randn(4, 5, 7)
    batch[1] = 0
    batch[2, 0, 0] = math.nan
    batch[3, 4, 6] = math.inf
    result = orthogonalize(batch, method=method, eps=eps)
    assert_orthogonalized(result[0], batch[0], method)
    assert torch.equal(result[1], torch.zeros(5, 7))
    assert result[2:].isnan().all()
    assert orthogonalize(batch[2], method=method, eps=eps).isnan().all()
    assert orthogonalize(batch[3], method=method, eps=eps).isnan().all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "shape", [(0, 0), (0, 4), (4, 0), (0, 3, 4), (2, 0, 4), (2, 4, 0)], ids=str
)
def test_empty(shape: tuple[int, ...], method: str) -> None:
    assert orthogonalize(torch.empty(shape), method=method).shape == shape


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1)], ids=str)
def test_vectors(shape: tuple[int, int], method: str) -> None:
    x = torch.randn(shape)
    assert_orthogonalized(orthogonalize(x, method=method), x, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(24, 40), (400, 410)], ids=str)
def test_layouts_do_not_matter(shape: tuple[int, int], method: str) -> None:
    """Transposed, offset, strided and expanded views give their own matrix's result."""
    rows, columns = shape
    x = torch.randn(rows, columns)
    surroundings = torch.full((2, 2 * rows + 1, 3 * columns + 2), math.nan)
    views = (
        x.mT.contiguous().mT,
        x.mT.contiguous(),
        surroundings[0, 1 : rows + 1, 2 : columns + 2].copy_(x),
        surroundings[1, ::2, ::3][:rows, :columns].copy_(x),
        x[:1].expand(rows, -1),
    )
    for view in views:
        result = orthogonalize(view, method=method)
        assert_orthogonalized(result, view, method)
        assert result.is_contiguous()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(3, 16, 24), (3, 24, 16), (1, 5, 5)], ids=str)
def test_batch_is_matrix_by_matrix(shape: tuple[int, int, int], method: str) -> None:
    x = torch.randn(shape) * torch.tensor([1.0, 1e-3, 1e4])[: shape[0], None, None]
    for layout in (x, x.mT.contiguous().mT):
        assert_orthogonalized(orthogonalize(layout, method=method), x, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1, 1e-30])
def test_input_is_not_modified(method: str, dtype: torch.dtype, scale: float) -> None:
    x = (torch.randn(7, 9) * scale).to(dtype).requires_grad_()
    before, version = x.detach().clone(), x._version
    result = orthogonalize(x, method=method)
    assert torch.equal(x.detach(), before)
    assert x._version == version
    assert not result.requires_grad


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (96, 160)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_agrees_with_torch(shape: tuple[int, int], method: str) -> None:
    """torch rounds three products a step to bfloat16, relative precision 2^-8. Errors of one step
    are multiplied by the next steps' slope relative to their lift, at most 1 for a singular value
    that is still rising, which in these well-conditioned matrices all are at first."""
    x = torch.randn(shape)
    peer = _zeropower_via_newtonschulz(x, NS_COEFFICIENTS["muon"][0], 5, 1e-7).float()
    error = (orthogonalize(x, method=method) - peer).norm() / peer.norm()
    assert error <= 5 * 3 * 2**-8
    assert error >= 2**-11  # it is torch's bfloat16 that differs: else this test compares nothing


def test_default_coefficients_are_torchs() -> None:
    import torch.optim._muon as peer

    assert NS_COEFFICIENTS["muon"] == ((peer.DEFAULT_A, peer.DEFAULT_B, peer.DEFAULT_C),)


def test_polar_express_constants() -> None:
    """Each minimax polynomial maps its interval [l, u] onto one centred at 1, p(l) + p(u) = 2, on
    which the next is minimax (arXiv 2505.16932, Theorem 3.1); the first interval is [1e-3, 1].
    A slip in any a, b or c shows. The table holds p(x/1.01) but for the last."""
    low, high = 1e-3, 1.0
    table = NS_COEFFICIENTS["polar_express"]
    for step in table:
        safety = 1 if step is table[-1] else 1.01
        ends = torch.tensor([low, high], dtype=torch.float64) * safety
        low, high = polynomial(ends, (step,)).tolist()
        # Four roundings of terms whose magnitudes |a| u + |b| u^3 + |c| u^5 sum to less than 50.
        assert low + high == pytest.approx(2, abs=4 * 50 * 2**-52)
        high = 2 - low
    assert low == pytest.approx(1, abs=1e-9)


def test_resolve_coefficients() -> None:
    first, second = (1.0, 2.0, 3.0), (4.0, 5.0, 6.0)
    assert resolve_coefficients((1, 2, 3), 2) == (first, first)
    assert resolve_coefficients([first, second], 1) == (first,)
    assert resolve_coefficients([first, list(second)], 4) == (first, second, second, second)
    assert len(resolve_coefficients("polar_express", 20)) == 20
    assert resolve_coefficients("polar_express", 9)[-1] == (1.875, -1.25, 0.375)


@pytest.mark.parametrize(
    ("coefficients", "steps", "error", "message"),
    [
        ("jordan", 5, ValueError, "coefficients: expected one of.*muon.*polar_express.*'jordan'"),
        ((1.0, 2.0), 5, ValueError, r"coefficients: expected \(a, b, c\)"),
        ((1.0, 2.0, math.nan), 5, ValueError, "finite"),
        ([(1.0, 2.0, 3.0), (1.0,)], 5, ValueError, "coefficients"),
        (["muon"], 5, ValueError, "coefficients"),
        ([], 5, ValueError, "non-empty"),
        (3.0, 5, ValueError, r"got 3\.0"),
        ("muon", 0, ValueError, "steps: expected 1 to 99, got 0"),
        ("muon", 100, ValueError, "steps: expected 1 to 99, got 100"),
        ("muon", 5.0, TypeError, "steps: expected an int, got float"),
        ("muon", True, TypeError, "steps: expected an int, got bool"),
    ],
)
def test_bad_coefficients(
    coefficients: Any, steps: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_coefficients(coefficients, steps)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "x: .*torch.int32"),
        ({"x": torch.ones(2, 2, dtype=torch.complex64)}, TypeError, "x: .*complex64"),
        ({"x": torch.ones(3)}, ValueError, r"x: expected \[m, n\].*\(3,\)"),
        ({"x": torch.ones(1, 2, 3, 4)}, ValueError, r"\(1, 2, 3, 4\)"),
        ({"method": "svd"}, ValueError, "method: expected one of.*'svd'"),
        ({"eps": -1e-7}, ValueError, "eps: expected a number >= 0, got -1e-07"),
        ({"eps": math.nan}, ValueError, "eps"),
        ({"backend": "fast"}, ValueError, "backend: expected one of.*'fast'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonalize(**{"x": torch.ones(2, 2), **arguments})


@pytest.mark.parametrize("coefficients", NS_COEFFICIENTS)
def test_composed_polynomial(coefficients: str) -> None:
    triples = resolve_coefficients(coefficients, 5)
    values = torch.logspace(-8, 0, 200, dtype=torch.float64)
    # h = |a|+|b|+|c| < 48 a step in relative precision 2^-52, times the slope in the eigenvalue of
    # the steps that follow, below 1e3 (what `tolerance` computes at 1).
    torch.testing.assert_close(
        composed_polynomial(values**2, triples) * values,
        polynomial(values, triples),
        rtol=0,
        atol=5 * 48 * 1e3 * 2**-52,
    )
    edges = composed_polynomial(torch.tensor([0.0, -1e-7]), triples)
    assert edges.dtype == torch.float32
    assert edges.tolist() == pytest.approx([math.prod(a for a, _, _ in triples)] * 2, rel=2**-23)


@pytest.mark.parametrize("shape", [(20, 30), (30, 30), (400, 420)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e9])
def test_operator_gives_the_update(shape: tuple[int, int], scale: float) -> None:
    """From the Gram matrix of an X that was not scaled, as in a step."""
    x = torch.randn(shape) * scale
    gram = (x.double() @ x.double().mT).float()
    inverse = 1 / float(x.norm())
    operator = gram_operator(gram.mul_(inverse).mul_(inverse), MUON, BACKEND)
    assert_orthogonalized(operator @ x * inverse, x, "gram")


def test_operator_of_a_zero_matrix() -> None:
    assert bool(gram_operator(torch.zeros(3, 3), MUON, BACKEND).isfinite().all())


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("size", [16, 400])
def test_operator_from_the_gram_matrix(size: int, steps: int) -> None:
    triples = resolve_coefficients("muon", steps)
    x = matrix_with(torch.logspace(0, -1, size), size + 8)
    x = x / x.norm()
    assert_orthogonalized(gram_operator(x @ x.mT, triples, BACKEND) @ x, x, "gram", triples)


def test_gram_is_precise() -> None:
    for name in ("muon", "polar_express"):
        assert gram_is_precise(resolve_coefficients(name, 6), torch.float32)
        assert not gram_is_precise(resolve_coefficients(name, 7), torch.float32)
        assert not gram_is_precise(resolve_coefficients(name, 5), torch.bfloat16)
        assert gram_is_precise(resolve_coefficients(name, 12), torch.float64)


def test_takes_gram_form() -> None:
    def gram_form(
        *shape: int,
        steps: int = 5,
        dtype: torch.dtype = torch.float32,
        backend: Backend = BACKEND,
    ) -> bool:
        return takes_gram_form(shape, resolve_coefficients("muon", steps), dtype, backend)

    # Half of a symmetric product, in batches as well.
    assert gram_form(64, 64)
    assert gram_form(256, 64)
    assert gram_form(8, 64, 64)
    assert gram_form(8, 64, 128)
    # Products as a whole: only where two of m^2 n are far fewer.
    for backend, dtype in ((DeviceReference(), torch.float32), (BACKEND, torch.float64)):
        assert not gram_form(256, 256, backend=backend, dtype=dtype)
        assert not gram_form(8, 96, 64, backend=backend, dtype=dtype)
        assert gram_form(256, 512, backend=backend, dtype=dtype)
    assert not gram_form(256, 512, steps=7)


@pytest.mark.parametrize(
    "shape", [(40, 40), (30, 50), (260, 300), (3, 20, 20), (3, 20, 40)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auto_is_the_chosen_method(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    chosen = "gram" if takes_gram_form(shape, MUON, dtype, BACKEND) else "newton_schulz"
    assert torch.equal(orthogonalize(x), orthogonalize(x, method=chosen))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (3, 6, 20)], ids=str)
def test_number_of_products(shape: tuple[int, ...], steps: int) -> None:
    """What takes_gram_form's docstring counts: none is wasted, R is not updated at the end."""
    batch, m, n = shape[0] if len(shape) == 3 else 1, min(shape[-2:]), max(shape[-2:])
    counted = {
        "newton_schulz": steps * m**3 + 2 * steps * m**2 * n,
        "gram": (4 * steps - 3) * m**3 + 2 * m**2 * n,
    }
    for method, multiply_adds in counted.items():
        with FlopCounterMode(display=False) as counter:
            # (the counter sees torch's products, which float64 takes)
            orthogonalize(torch.randn(shape, dtype=torch.float64), steps, method=method)
        assert counter.get_total_flops() == 2 * batch * multiply_adds


def peak_floats(function: Callable[[], object], trace: Path) -> float:
    """The most float32 of tensor memory alive at once during a call, above what was before."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    memory = [event["args"] for event in events if event["name"] == "[memory]"]
    before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
    return (max(event["Total Allocated"] for event in memory) - before) / 4


@pytest.mark.parametrize("shape", [(400, 400), (400, 1600), (1600, 400)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_peak_memory(shape: tuple[int, int], method: str, tmp_path: Path) -> None:
    """The docstring's formula. The slack is for what is small against m x m: norms, at most 3 n
    floats."""
    x = torch.randn(shape)
    short, long = sorted(shape)
    formula = {
        "newton_schulz": 2 * short * long + 2 * short**2,
        "gram": max(4 * short**2, short * long + short**2),
    }[method]
    found = peak_floats(lambda: orthogonalize(x, method=method), tmp_path / "trace.json")
    slack = 3 * long
    assert formula <= found + slack
    assert found <= formula + slack
    assert found <= 5 * short * long
