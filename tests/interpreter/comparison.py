"""What the tests of this folder share: both backends, awkward numbers, memory layouts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes
from lowbit_muon.backends.packing import pack
from lowbit_muon.backends.triton.backend import TritonBackend
from lowbit_muon.formats.codebook import Codebook, CodeLayout, nearest_codebook
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.formats.state_format import StateFormat

TRITON, REFERENCE = TritonBackend(), Backend()
GRAD_TYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("contiguous", "padded", "tall", "tall padded", "every other")
CODED_PRESETS = sorted(name for name, f in PRESETS.items() if not f.is_dense)


def layout(bits: int, block_size: int = 0, statistic: str = "rms", clip: float = 2.7) -> CodeLayout:
    return CodeLayout(bits, block_size, statistic, clip)  # type: ignore[arg-type]


def codebooks(bits: int) -> list[Codebook]:
    """Codebooks of all and of fewer than 2**bits levels, with even and uneven steps."""
    mu_law = StateFormat("x", bits, snap_levels=False)
    steep = StateFormat("x", bits, mu=255.0, tread="mid_tread", snap_levels=False)
    lopsided = nearest_codebook([1.5**k - 3 for k in range(2**bits - 1)][: 2**7])
    return [mu_law.code_book(), steep.code_book(), lopsided]


def integer_book(bits: int, lopsided: bool = False) -> Codebook:
    """Levels as integer products take them; if lopsided, some codes have none."""
    if lopsided:
        return nearest_codebook([-127.0, *map(float, range(min(2**bits - 3, 100))), 127.0])
    kind = "linear" if bits == 8 else "mu_law"
    return StateFormat("x", bits, codebook=kind, tread="mid_tread").code_book()  # type: ignore[arg-type]


def random_codes(
    rows: int,
    columns: int,
    bits: int,
    *,
    lopsided: bool = False,
    block_size: int = 0,
    scales: tuple[float, ...] = (),
    batch: int = 0,
) -> PackedCodes:
    """Every value of a code in turn, shuffled; also those past the last level."""
    code_layout = layout(bits, block_size)
    total = max(batch, 1) * rows
    order = torch.randperm(total * columns).view(total, columns)
    packed = pack(order.remainder(2**bits).to(torch.uint8), code_layout)
    values = torch.rand(total, code_layout.blocks(columns)) + 0.5
    if scales:
        values = torch.tensor(scales)[torch.randint(len(scales), values.shape)]
    if batch:
        packed, values = packed.view(batch, rows, -1), values.view(batch, rows, -1)
    return PackedCodes(packed, values, integer_book(bits, lopsided), code_layout, columns)


def awkward(columns: int) -> Tensor:
    """Rows of ordinary, zero, denormal, barely normal, huge and widely spread values."""
    factors = torch.tensor([1.0, 0.0, 1e-40, 1.2e-38, 1e37, 1.0]).view(6, 1)
    x = torch.randn(6, columns) * factors
    x[4, :1] = 3e38
    x[5] *= torch.logspace(-30, 30, columns)
    return x


def strided_like(values: Tensor, kind: str) -> Tensor:
    """The same matrix in another memory layout."""
    rows, columns = values.shape
    if kind == "padded":
        return torch.empty(rows, columns + 5, dtype=values.dtype)[:, :columns].copy_(values)
    if kind == "tall":
        return values.T.contiguous().T
    if kind == "tall padded":
        return torch.empty(columns, rows + 3, dtype=values.dtype)[:, :rows].copy_(values.T).T
    if kind == "every other":
        return torch.empty(rows, 2 * columns, dtype=values.dtype)[:, ::2].copy_(values)
    return values


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to the bit, but for the sign of zero and the kind of NaN."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_scales(found: Tensor, expected: Tensor, statistic: str) -> None:
    """The RMS sums the same squares in another order, so its root may round to a neighbour."""
    assert found.shape == expected.shape
    both_nan = found.isnan() & expected.isnan()
    # Positive floats are ordered like their bits: neighbours differ by one.
    steps = (found.view(torch.int32) - expected.view(torch.int32)).abs()
    assert steps[~both_nan].le(1 if statistic == "rms" else 0).all()


def assert_same_squares(found: Tensor, expected: Tensor, columns: int) -> None:
    """Both add the same `columns` non-negative doubles: each sum is within columns * 2^-53 of the
    true one, relatively (Higham, Accuracy and Stability, section 4.2)."""
    assert found.dtype == torch.float64
    assert found.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    error = (found - expected).abs()
    assert error[finite].le(2 * columns * 2.0**-53 * expected[finite]).all()


def non_finite(x: Tensor) -> Tensor:
    """x with an infinity and NaNs in two rows."""
    x[0, x.shape[1] // 2] = math.inf
    x[-1, -1] = math.nan
    return x
