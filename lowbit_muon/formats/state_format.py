"""What a stored momentum looks like.

Nothing here touches a tensor. A `StateFormat` says how one momentum matrix is stored; the codec
turns it into a `Codebook` (the values) and a `CodeLayout` (bits, scales), which is all that a
kernel ever sees.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lowbit_muon.formats.codebook import (
    CODE_BITS,
    Codebook,
    CodebookKind,
    CodeLayout,
    Statistic,
    Tread,
    mu_law_expand,
    nearest_codebook,
    uniform_positions,
)

FORMAT_VERSION = 1

Granularity = Literal["tensor", "row", "block"]
ResidualAfter = Literal["stored", "exact"]

DENSE_BITS = (16, 32)
# Integer units take int8 operands, so snapped levels are whole numbers of at most this size.
INT8_MAX = 127
# Beyond these a field makes no other format: levels merge in float32, or all values get one code.
LARGEST_PARAMETER = 1e6
# The smallest shift that the spectral encoder has coefficients for (`linalg.root_iteration`).
SMALLEST_SHIFT = 0.005
# The usual shift, and that of matrices with at least so many rows (short side) and bits an element.
# `bench.training` at widths 128, 512 and 1024 (bench/results/README.md): 0.1 trains worse at 128,
# or with fewer bits, and else no worse; the encoder then needs a third fewer products.
SHIFT, WIDE_SHIFT, WIDE_ROWS, WIDE_BITS = 0.03, 0.1, 512, 4
# Codes of a companded scale are expanded by exp in float32, which overflows from 88 on.
LARGEST_EXPONENT = 80


@dataclass(frozen=True)
class StateFormat:
    """How one momentum matrix is stored. Frozen, hashable, and `to_dict`/`from_dict` round-trip.

    Attributes:
        name: what tables and errors call it; of presets also what `state_format` takes.
        bits: 2, 3, 4 or 8 for codes; 16 (bfloat16) or 32 (float32) for a dense, uncoded state, for
            which the codec fields are unused; it has no factors and nothing is companded.
        codebook, mu, exponent, tread, table: the levels: mu-law with parameter mu, linear, power
            law sign(u)|u|**exponent, each mid-rise (2**bits levels, none at zero) or mid-tread
            (2**bits - 1 levels, one at zero), or an explicit ascending table.
        granularity, block_size: one scale for the tensor, for each row of the short side, or for
            each block of `block_size` along the long side.
        statistic, clip: the largest level stands for clip * RMS or clip * absmax of its block.
        snap_levels: levels are whole numbers of at most 127, so that integer matrix units read the
            same codes exactly.
        companded_scale: values are mu-law companded first and the (then linear) codes and their
            scales live in the companded domain, as MuonQ does (arXiv 2605.11396).
        factor_rank, factor_divisor: a low-rank part of this rank, or of rank max(1, min(rows,
            columns) // factor_divisor), kept beside the codes; 0 and 0 for none.
        factor_bits: bits of the low-rank factors' codes, one scale for each column of a factor.
        residual_after: the codes hold what is left after the factors as they are stored, which
            makes up for their quantisation, or, as in MuonQ, after the exact ones.
        spectral, spectral_shift: store Y = U y(S) V^T with y^3 + c*y = s instead of M = U S V^T
            (singular values scaled to sum of squares one), c = spectral_shift >= 0.005; None for
            0.03 below 512 rows (short side) and with fewer than 4 bits, else 0.1 (`shift`).
        rotate: codes and factors are taken after a fixed orthogonal transform of their rows, so
            that a few large columns do not spoil a row's scale (`backends.base.Backend.rotate`).
        normalize: gradient and momentum are divided by their Frobenius norms in every step and the
            momentum is a sum (MuonQ).
    """

    name: str
    bits: int
    codebook: CodebookKind = "mu_law"
    mu: float = 2.0
    exponent: float = 1.0
    tread: Tread = "mid_rise"
    table: tuple[float, ...] | None = None
    granularity: Granularity = "row"
    block_size: int = 0
    statistic: Statistic = "rms"
    clip: float = 2.7
    snap_levels: bool = True
    companded_scale: bool = False
    factor_rank: int = 0
    factor_divisor: int = 0
    factor_bits: int = 4
    residual_after: ResidualAfter = "stored"
    spectral: bool = False
    spectral_shift: float | None = None
    rotate: bool = False
    normalize: bool = False

    def __post_init__(self) -> None:
        _check_format(self)

    def shift(self, rows: int) -> float:
        """The c of a spectral format for a matrix of so many rows (short side)."""
        if self.spectral_shift is not None:
            return self.spectral_shift
        return WIDE_SHIFT if rows >= WIDE_ROWS and self.bits >= WIDE_BITS else SHIFT

    @property
    def is_dense(self) -> bool:
        """True if the state is stored uncoded, in bfloat16 or float32."""
        return self.bits in DENSE_BITS

    @property
    def has_factors(self) -> bool:
        """True if a low-rank part is kept beside the codes."""
        return bool(self.factor_rank or self.factor_divisor)

    @property
    def stores_norm(self) -> bool:
        """True if the matrix is stored scaled to norm one, with its Frobenius norm beside it."""
        return self.spectral or self.companded_scale

    def rank(self, rows: int, columns: int) -> int:
        """Rank of the low-rank part of a rows x columns matrix; 0 if the format has none.

        At least 1 and at most the short side, so that a small matrix is stored in the same way
        as a large one.
        """
        short = min(rows, columns)
        if not self.has_factors or short == 0:
            return 0
        return min(short, self.factor_rank or max(1, short // self.factor_divisor))

    def code_book(self) -> Codebook:
        """Levels and thresholds of the codes."""
        return _build_codebook(self, self.bits)

    def factor_code_book(self) -> Codebook:
        """Levels and thresholds of the low-rank factors' codes."""
        return _build_codebook(self, self.factor_bits)

    def code_layout(self) -> CodeLayout:
        """Packing and scale rule of the codes."""
        return CodeLayout(self.bits, self.block_size, self.statistic, self._scale_factor(self.bits))

    def factor_layout(self) -> CodeLayout:
        """Packing and scale rule of the factors, stored transposed: one scale a row."""
        return CodeLayout(self.factor_bits, 0, self.statistic, self._scale_factor(self.factor_bits))

    def _scale_factor(self, bits: int) -> float:
        """clip, divided by the largest level: scale * largest level = clip * statistic."""
        return self.clip / max(abs(level) for level in _build_codebook(self, bits).levels)

    def to_dict(self) -> dict[str, Any]:
        """Plain values (str, int, float, bool, None, list) only."""
        values = dataclasses.asdict(self)
        values["table"] = None if self.table is None else list(self.table)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StateFormat:
        """Inverse of `to_dict`. Raises ValueError naming an unknown, missing or bad field."""
        if not isinstance(values, Mapping):
            raise ValueError(f"format: expected a mapping of fields, got {type(values).__name__}")
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(map(str, set(values) - known))
        missing = sorted({"name", "bits"} - set(values))
        if unknown or missing:
            raise ValueError(f"format: unknown fields {unknown}, missing fields {missing}")
        fields = dict(values)
        if isinstance(fields.get("table"), list):
            fields["table"] = tuple(fields["table"])
        return cls(**fields)


def _expect(condition: bool, field: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{field}: expected {expected}, got {got!r}")


def is_finite_number(value: object) -> bool:
    """True for a finite int or float (not bool) that a float can hold."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an int beyond the largest float
        return False


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_format(f: StateFormat) -> None:
    _expect(isinstance(f.name, str) and bool(f.name), "name", "a non-empty string", f.name)
    _expect(
        _is_count(f.bits) and f.bits in CODE_BITS + DENSE_BITS,
        "bits",
        "2, 3, 4, 8, 16 or 32",
        f.bits,
    )
    choices = {
        "codebook": ("mu_law", "linear", "power_law", "table"),
        "tread": ("mid_rise", "mid_tread"),
        "granularity": ("tensor", "row", "block"),
        "statistic": ("rms", "absmax"),
        "residual_after": ("stored", "exact"),
    }
    for field, allowed in choices.items():
        _expect(getattr(f, field) in allowed, field, f"one of {allowed}", getattr(f, field))
    for field in ("snap_levels", "companded_scale", "spectral", "rotate", "normalize"):
        _expect(isinstance(getattr(f, field), bool), field, "a bool", getattr(f, field))
    for field in ("mu", "exponent", "clip", "spectral_shift"):
        value = getattr(f, field)
        if value is None and field == "spectral_shift":
            continue
        smallest = SMALLEST_SHIFT if field == "spectral_shift" else 1 / LARGEST_PARAMETER
        _expect(
            is_finite_number(value) and smallest <= value <= LARGEST_PARAMETER,
            field,
            f"a number from {smallest:g} to {LARGEST_PARAMETER:g}",
            value,
        )
    for field in ("block_size", "factor_rank", "factor_divisor"):
        _expect(_is_count(getattr(f, field)), field, "a whole number >= 0", getattr(f, field))
    _expect(
        (f.block_size > 0) == (f.granularity == "block"),
        "block_size",
        "a positive size with granularity 'block' and 0 otherwise",
        f.block_size,
    )
    _expect(
        _is_count(f.factor_bits) and f.factor_bits in CODE_BITS,
        "factor_bits",
        f"one of {CODE_BITS}",
        f.factor_bits,
    )
    _expect(
        not (f.factor_rank and f.factor_divisor),
        "factor_rank",
        "either factor_rank or factor_divisor to be 0",
        (f.factor_rank, f.factor_divisor),
    )
    _expect(
        not (f.spectral and f.has_factors),
        "spectral",
        "no low-rank factors together with spectral companding",
        (f.factor_rank, f.factor_divisor),
    )
    _expect(
        (f.table is not None) == (f.codebook == "table"),
        "table",
        "levels if and only if codebook is 'table'",
        f.table,
    )
    if f.table is not None:
        fewest_bits = min(f.bits, f.factor_bits) if f.has_factors else f.bits
        _expect(
            isinstance(f.table, tuple)
            and all(is_finite_number(level) for level in f.table)
            and 1 < len(f.table) <= 2**fewest_bits,
            "table",
            f"a tuple of 2 to {2**fewest_bits} finite levels",
            f.table,
        )
    _expect(
        not (f.spectral and f.companded_scale),
        "companded_scale",
        "False together with spectral companding",
        f.companded_scale,
    )
    if f.companded_scale:
        _expect(f.codebook == "mu_law", "codebook", "'mu_law' with companded_scale", f.codebook)
        largest = LARGEST_EXPONENT / math.log1p(f.mu)
        _expect(f.clip <= largest, "clip", f"at most {largest:g} with companded_scale", f.clip)
    if f.is_dense:
        for field in ("spectral", "companded_scale", "factor_rank", "factor_divisor"):
            got = getattr(f, field)
            _expect(not got, field, f"{type(got)(0)!r} with {f.bits} bits, which are no codes", got)
        return
    _build_codebook(f, f.bits)  # raises if two levels are equal
    if f.has_factors:
        _build_codebook(f, f.factor_bits)


# The field that says what a codebook's levels are.
_LEVELS_FROM = {"mu_law": "mu", "linear": "bits", "power_law": "exponent", "table": "table"}


@functools.lru_cache(maxsize=256)
def _build_codebook(f: StateFormat, bits: int) -> Codebook:
    if f.table is not None:
        levels = list(f.table)
    else:
        positions = uniform_positions(bits, f.tread)
        if f.codebook == "linear" or f.companded_scale:
            levels = positions
        elif f.codebook == "mu_law":
            levels = [mu_law_expand(u, f.mu) for u in positions]
        else:
            levels = [math.copysign(abs(u) ** f.exponent, u) for u in positions]
    as_float32 = [ctypes.c_float(level).value for level in levels]
    _expect(
        all(a < b for a, b in itertools.pairwise(as_float32)) and math.isfinite(sum(as_float32)),
        _LEVELS_FROM[f.codebook],
        "finite, strictly ascending levels in float32",
        levels,
    )
    if f.snap_levels:
        largest = max(abs(level) for level in levels)
        levels = [float(round(INT8_MAX * level / largest)) for level in levels]
        if len(set(levels)) != len(levels):
            raise ValueError(
                f"snap_levels: expected levels that stay distinct as int8, got {levels}; "
                "use snap_levels=False with this codebook"
            )
    return nearest_codebook(levels)
