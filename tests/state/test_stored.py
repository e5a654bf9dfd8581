"""Storing one matrix: every preset, shape and dtype; real bytes; validation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbit_muon import PRESETS, QuantizedMatrix, StateFormat, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.state.codecs import spectral

SHAPES = [(0, 5), (5, 0), (1, 1), (1, 77), (77, 1), (8, 64), (33, 65), (129, 40), (64, 64)]
CODED = [name for name in PRESETS if not PRESETS[name].is_dense]


def relative_error(approximation: torch.Tensor, exact: torch.Tensor) -> float:
    return float((approximation - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_keeps_shape_and_stays_finite(name: str, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    q = quantize(x, name, backend="reference")
    decoded = q.dequantize()
    assert decoded.shape == x.shape
    assert decoded.dtype == torch.float32
    assert bool(decoded.isfinite().all())
    if x.numel():
        # A zero matrix would give 1; every format must do better on every shape.
        assert relative_error(decoded, x) < 0.9


@pytest.mark.parametrize("statistic", ["rms", "absmax"])
@pytest.mark.parametrize("size", [1e-40, 1e-44])
def test_a_scale_below_the_smallest_normal_number_is_zero(statistic: str, size: float) -> None:
    """Its inverse would be infinite."""
    one_scale = StateFormat("x", 4, granularity="tensor", statistic=statistic)
    q = quantize(size * torch.randn(8, 20), one_scale, backend="reference")
    assert not q.tensors["scales"].any()
    assert not q.dequantize().any()


def test_a_norm_that_is_too_small_is_zero() -> None:
    for name in [name for name in PRESETS if PRESETS[name].stores_norm]:
        q = quantize(1e-34 * torch.randn(8, 20), name, backend="reference")
        assert not q.tensors["norm"].any(), name
        assert not q.dequantize().any(), name


# Mean squared error of a unit Gaussian (presets.py), and of the spectral formats three times that
# at most: s = y^3 multiplies a relative error of y by up to 3, added in squares over entries.
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("spectral4", 3 * math.sqrt(0.0098)),
        ("spectral3", 3 * math.sqrt(0.035)),
        ("mulaw8", 0.01),
        ("linear8", 0.01),
        ("nf4", 0.12),
        ("bf16", 2**-8),
        ("fp32", 0.0),
    ],
)
@pytest.mark.parametrize("shape", [(96, 256), (256, 96)])
def test_error_on_gaussian_matrices(name: str, bound: float, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    assert relative_error(quantize(x, name).dequantize(), x) <= bound


@pytest.mark.parametrize("name", PRESETS)
def test_dtypes_and_strides(name: str) -> None:
    x = torch.randn(40, 60)
    expected = quantize(x, name).dequantize()
    strided = torch.empty(40, 3, 60)[:, 1].copy_(x)
    assert not strided.is_contiguous()
    assert torch.equal(quantize(strided, name).dequantize(), expected)
    assert torch.equal(quantize(x.double(), name).dequantize(), expected)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        assert torch.equal(
            quantize(half, name).dequantize(), quantize(half.float(), name).dequantize()
        )


@pytest.mark.parametrize("name", PRESETS)
def test_zero_matrices(name: str) -> None:
    assert not quantize(torch.zeros(20, 50), name).dequantize().any()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("size", [1e-20, 1e-6, 1e6, 1e20, 1e30])
def test_magnitude_does_not_matter(name: str, size: float) -> None:
    x = torch.randn(48, 100)
    base = relative_error(quantize(x, name).dequantize(), x)
    scaled = quantize(x * size, name).dequantize().double() / size
    # Scaling by a non-power of two rounds the input anew (2^-24) and may move single codes.
    assert relative_error(scaled, x.double()) == pytest.approx(base, rel=0.05, abs=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("granularity", ["tensor", "row", "block"])
@pytest.mark.parametrize("statistic", ["rms", "absmax"])
@pytest.mark.parametrize("spectral", [False, True])
def test_all_combinations(bits: int, granularity: str, statistic: str, spectral: bool) -> None:
    f = StateFormat(
        "custom",
        bits,
        codebook="power_law",
        exponent=1.2,
        granularity=granularity,  # type: ignore[arg-type]
        block_size=32 if granularity == "block" else 0,
        statistic=statistic,  # type: ignore[arg-type]
        clip=1.0 if statistic == "absmax" else 4.2 if bits == 8 else 2.5,
        spectral=spectral,
        snap_levels=bits < 8,
        factor_rank=0 if spectral else 3,
    )
    x = torch.randn(24, 75)
    decoded = quantize(x, f).dequantize()
    # Uniform levels over +-clip have a step of 2*clip/2**bits and an error of step/sqrt(12) sigma
    # (absmax of 75 normals: about 3 sigma); 3x for the cube of spectral formats, and the factors
    # have 4 bits (10%) on three of 24 directions whatever the residual has.
    step = 2 * max(f.clip, 3) / 2**bits
    assert relative_error(decoded, x) < min(0.95, 3 * step / math.sqrt(12)) + (
        0 if spectral else 0.1
    )
    tall = quantize(x.mT, f).dequantize()
    if not f.has_factors:  # the power iteration works on the matrix as it lies
        assert torch.equal(tall, decoded.mT)


@pytest.mark.parametrize(
    ("name", "largest"), [("spectral4", 4.1), ("spectral3", 3.1), ("mulaw4", 4.55)]
)
@pytest.mark.parametrize("shape", [(576, 1536), (1024, 1024)])
def test_bits_per_element(name: str, largest: float, shape: tuple[int, int]) -> None:
    q = QuantizedMatrix.zeros(shape, PRESETS[name], seed=0, device=torch.device("cpu"))
    assert q.bits_per_element <= largest
    assert q.nbytes == sum(t.untyped_storage().nbytes() for t in q.tensors.values())
    # Nothing hides behind the numbers: each tensor is exactly its own storage.
    for tensor in q.tensors.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", CODED)
def test_backends_agree_on_stored_matrices(name: str) -> None:
    x = torch.randn(70, 150)
    stored = quantize(x, name, backend="reference")
    assert torch.equal(stored.dequantize("auto"), stored.dequantize("reference"))


def test_one_off_factors_find_the_top_subspace() -> None:
    u, _ = torch.linalg.qr(torch.randn(96, 6))
    v, _ = torch.linalg.qr(torch.randn(160, 6))
    x = u @ torch.diag(torch.logspace(1, 0, 6)) @ v.mT + 1e-3 * torch.randn(96, 160)
    error = relative_error(quantize(x, "mulaw4").dequantize(), x)
    # Rank 6 holds all but the noise, so the residual is the factors' own 4-bit error, relative
    # sqrt(0.0098) in each of two, and is quantised to 4 bits itself.
    assert error < 1.1 * math.sqrt(2 * 0.0098) * math.sqrt(0.0098)
    assert torch.equal(
        quantize(x, "mulaw4", seed=3).dequantize(), quantize(x, "mulaw4", seed=3).dequantize()
    )


def test_bad_input_is_named() -> None:
    with pytest.raises(TypeError, match="matrix: expected a tensor, got list"):
        quantize([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matrix: expected 2 dimensions, got shape \(3,\)"):
        quantize(torch.zeros(3))
    with pytest.raises(TypeError, match=r"matrix: .*torch.int64"):
        quantize(torch.zeros(2, 2, dtype=torch.int64))
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="matrix: expected finite"):
            quantize(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="backend"):
        quantize(torch.zeros(2, 2), backend="gpu")


@pytest.mark.parametrize("name", PRESETS)
def test_stored_tensors_are_validated(name: str) -> None:
    f = PRESETS[name]
    tensors = quantize(torch.randn(40, 60), f).tensors
    again = QuantizedMatrix.from_tensors((40, 60), f, tensors)
    assert all(again.tensors[role] is tensors[role] for role in tensors)
    for role, tensor in tensors.items():
        with pytest.raises(ValueError, match=role):
            QuantizedMatrix.from_tensors((40, 60), f, {**tensors, role: tensor[:-1]})
        with pytest.raises(ValueError, match=role):
            QuantizedMatrix.from_tensors((40, 60), f, {**tensors, role: tensor.to(torch.int16)})
        with pytest.raises(ValueError, match=role):
            QuantizedMatrix.from_tensors((40, 60), f, {**tensors, role: "nothing"})
        if tensor.is_floating_point():
            bad = tensor.clone()
            bad.view(-1)[-1] = math.nan
            with pytest.raises(ValueError, match=role):
                QuantizedMatrix.from_tensors((40, 60), f, {**tensors, role: bad})
        if role.endswith(("scales", "norm")):
            with pytest.raises(ValueError, match=role):
                QuantizedMatrix.from_tensors((40, 60), f, {**tensors, role: -tensor - 1})
    with pytest.raises(ValueError, match="extra"):
        QuantizedMatrix.from_tensors((40, 60), f, {**tensors, "extra": torch.zeros(1)})


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(0, 40),
    columns=st.integers(0, 40),
    name=st.sampled_from(sorted(PRESETS)),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**16),
    outliers=st.booleans(),
)
def test_any_finite_matrix_is_stored_finitely(
    rows: int, columns: int, name: str, exponent: int, seed: int, outliers: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    if outliers:
        x = x * 10.0 ** torch.randint(-6, 7, (rows, columns), generator=generator)
    x = (x * 10.0**exponent).float()
    if not bool(x.isfinite().all()):
        return
    decoded = quantize(x, name).dequantize()
    assert bool(decoded.isfinite().all())
    # No format stores more than it was given, but for quantisation: the norm stays below
    # twice its own (2-bit codes overshoot most, and single entries round up to the next level).
    assert decoded.double().norm() <= 2 * x.double().norm() + 1e-30


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("name", ["spectral4", "spectral3", "spectral2"])
def test_both_ways_to_decode_a_spectrum(
    name: str, fast: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By integer products, and in floats by panels of columns, against float64."""
    m, n = 40, 333
    q = quantize(torch.randn(n, m), name, backend=backend)
    kernels = get_backend(backend, q.device)
    monkeypatch.setattr(type(kernels), "fast_code_product", fast)
    monkeypatch.setattr(spectral, "SCRATCH_FLOATS", 100 * m)  # 100 columns
    y = torch.empty(m, n)
    kernels.accumulate(y, Terms(codes=q.codes()))
    y = y.double()
    c = q.state_format.shift(m) - q.tensors["noise"] * (1 / m + 1 / n)
    operator = y @ y.mT + c * torch.eye(m)
    exact = operator @ y
    gain = q.tensors["norm"] / exact.norm()
    # Floats: as many roundings as terms in each of two products, and one of the shift. Integers:
    # operator times scales in 15 bits of the largest of a row, 32639 parts.
    sizes = operator.abs() @ y.abs()
    bound = (m + n + 2) * 2**-24 * (y.abs() @ y.abs().mT @ y.abs() + sizes)
    if fast:
        scales = q.tensors["scales"].view(-1, 1).double().expand(m, 1)
        rows = (operator.abs() * scales.mT).amax(dim=1, keepdim=True) / 32639 / 2
        bound += rows * (y / scales).abs().sum(dim=0)
    # Each entry's error, and the norm's: at most the norm of them. The rotation there and back adds
    # its logarithm of roundings of a row's norm.
    allowed = gain * (bound + exact.abs() * bound.norm() / exact.norm())
    allowed += 2 * math.log2(n) * 2**-23 * gain * exact.norm(dim=1, keepdim=True)
    found = q.dequantize(backend=backend).mT.contiguous()
    kernels.rotate(found)
    error = (found.double() - gain * exact).abs()
    assert bool((error <= allowed).all()), (error / allowed).max()
