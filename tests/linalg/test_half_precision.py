"""Half-precision Newton-Schulz against the polynomial in float64; products emulated on CPUs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor

from lowbit_muon.linalg import newton_schulz
from lowbit_muon.linalg.coefficients import (
    composed_polynomial,
    gain_bounds,
    resolve_coefficients,
    restart_lengths,
)
from lowbit_muon.linalg.newton_schulz import orthogonalize_half, standard_form

BACKEND = DeviceReference()
DTYPES = (torch.float16, torch.bfloat16)


def decaying(m: int, n: int) -> Tensor:
    """Singular values 1/i, which is how a momentum's fall; Frobenius norm one."""
    basis = torch.linalg.qr(torch.randn(m, m))[0]
    right = torch.linalg.qr(torch.randn(n, m))[0]
    matrix = basis * (1 / torch.arange(1, m + 1)) @ right.mT
    return matrix / matrix.norm()


def exact(x: Tensor, coefficients: Any) -> Tensor:
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    return u * (s * composed_polynomial(s.square(), coefficients)).unsqueeze(-2) @ vt


def prepare(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
    """x [b, m, n] as `orthogonalize_half` takes it: (half, norms, unit)."""
    unit = 1 / math.sqrt(x.shape[1] * x.shape[2])
    return (x / unit).to(dtype), torch.linalg.vector_norm(x, dim=(1, 2)), unit


def errors(ours: Tensor, theirs: Tensor) -> list[float]:
    difference = (ours.double() - theirs).norm(dim=(1, 2)) / theirs.norm(dim=(1, 2))
    return difference.tolist()


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (128, 130)])
@pytest.mark.parametrize("name", ["muon", "polar_express"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_against_float64(dtype: torch.dtype, name: str, shape: tuple[int, int]) -> None:
    """As near as 16 eps for these spectra; the standard form in the dtype reaches 4 eps."""
    coefficients = resolve_coefficients(name, 5)
    x = torch.stack([decaying(*shape) for _ in range(3)])
    half, norm, unit = prepare(x, dtype)
    before = half.clone()
    found = orthogonalize_half(half, norm, coefficients, BACKEND, unit=unit)
    # what rounding of the input alone does is not the algorithm's error
    given = exact(half.double() * unit, coefficients)
    assert max(errors(found, given)) < 16 * torch.finfo(dtype).eps
    assert torch.equal(half, before)
    assert found.dtype == dtype


@pytest.mark.parametrize("name", ["muon", "polar_express"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_row(dtype: torch.dtype, name: str) -> None:
    """Its only singular value is one, where the polynomial is so steep that eps moves it within its
    range and, by five roundings of up to twice eps, beyond; the direction is kept."""
    coefficients = resolve_coefficients(name, 5)
    x = decaying(1, 50)[None]
    half, norm, unit = prepare(x, dtype)
    found = orthogonalize_half(half, norm, coefficients, BACKEND, unit=unit).double()
    low, high = gain_bounds(coefficients)
    eps = torch.finfo(dtype).eps
    assert low - 10 * eps <= found.norm() <= high + 10 * eps
    # three runs round an entry by eps/2 each; below 2**-14 float16 rounds absolutely
    torch.testing.assert_close(found / found.norm(), (half.double() / half.double().norm()),
                               rtol=2 * eps, atol=eps * 1e-2)  # fmt: skip


def test_runs_of_steps() -> None:
    muon, polar = (resolve_coefficients(name, 5) for name in ("muon", "polar_express"))
    assert restart_lengths(muon, torch.float16) == (2, 2, 1)
    assert restart_lengths(muon, torch.bfloat16) == (2, 2, 1)
    assert restart_lengths(polar, torch.bfloat16) == (1, 1, 2, 1)  # a = 8.2 in its first step
    assert restart_lengths(muon, torch.float32) == (5,)
    assert sum(restart_lengths(resolve_coefficients("muon", 9), torch.float16)) == 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_guard_repeats_what_went_wrong(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without restarts a matrix of low rank diverges; its neighbour in the batch does not."""
    monkeypatch.setattr(newton_schulz, "restart_lengths", lambda c, _: (len(c),))
    coefficients = resolve_coefficients("polar_express", 5)
    low_rank = torch.randn(64, 2) @ torch.randn(2, 96)
    easy = torch.randn(64, 96)
    x = torch.stack([low_rank / low_rank.norm(), easy / easy.norm()])
    half, norm, unit = prepare(x, dtype)
    seen: list[Tensor] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["active"].clone())
        return standard_form(*args, **kwargs)

    monkeypatch.setattr(newton_schulz, "standard_form", watched)
    found = orthogonalize_half(half, norm, coefficients, BACKEND, unit=unit)
    assert seen[0].tolist()[0]
    given = exact(half.double() * unit, coefficients)
    # the standard form rounds X in every step, which lifts noise of eps as if it were signal
    assert errors(found, given)[0] < 1
    assert found.isfinite().all()


@pytest.mark.parametrize("factor", [0.3, 3.0, math.inf, math.nan])
def test_the_guard_sees_norms_out_of_range(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a result that is too small, too large or not finite."""
    spoilt = newton_schulz._run_of_steps
    flags: list[Tensor] = []

    def scaled(x: Tensor, *args: Any) -> Tensor:
        result = spoilt(x, *args)
        result[1] *= factor
        return result

    monkeypatch.setattr(newton_schulz, "_run_of_steps", scaled)
    monkeypatch.setattr(newton_schulz, "restart_lengths", lambda c, _: (len(c),))
    monkeypatch.setattr(
        newton_schulz, "standard_form", lambda *_, active, **__: flags.append(active)
    )
    one = torch.zeros(16, 20)
    one[0, 0] = 1
    half, norm, unit = prepare(torch.stack([one, one if factor < 1 else torch.eye(16, 20) / 4]),
                               torch.float16)  # fmt: skip
    orthogonalize_half(half, norm, resolve_coefficients("muon", 2), BACKEND, unit=unit)
    assert flags[0].tolist() == [False, True]


def test_the_guard_lets_correct_results_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros, tiny norms (below eps), one row, low rank: none is repeated."""
    flags: list[Tensor] = []
    monkeypatch.setattr(
        newton_schulz, "standard_form", lambda *_, active, **__: flags.append(active)
    )
    rank_one = torch.outer(torch.randn(20), torch.randn(30))
    x = torch.stack(
        [torch.zeros(20, 30), decaying(20, 30), 1e-3 * decaying(20, 30), rank_one / rank_one.norm()]
    )
    for dtype in DTYPES:
        for name in ("muon", "polar_express"):
            half, norm, unit = prepare(x, dtype)
            result = orthogonalize_half(
                half, norm, resolve_coefficients(name, 5), BACKEND, unit=unit
            )
            assert not result[0].any()
    assert not torch.stack(flags).any()


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_standard_form_writes_active_matrices_only(dtype: torch.dtype, steps: int) -> None:
    coefficients = resolve_coefficients("muon", steps)
    x = torch.stack([decaying(24, 40) for _ in range(3)])
    half, _, unit = prepare(x, dtype)
    out = torch.full_like(half, 7)
    standard_form(
        half, coefficients, BACKEND, unit=unit, out=out, active=torch.tensor([True, False, True])
    )
    assert (out[1] == 7).all()
    given = exact(half.double() * unit, coefficients)
    assert max(errors(out[[0, 2]], given[[0, 2]])) < 16 * torch.finfo(dtype).eps
