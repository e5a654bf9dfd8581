"""The values that codes stand for, and how codes and scales lie in memory: what a kernel sees."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CodebookKind = Literal["mu_law", "linear", "power_law", "table"]
Tread = Literal["mid_rise", "mid_tread"]
Statistic = Literal["rms", "absmax"]

CODE_BITS = (2, 3, 4, 8)
# A plane packs codes in chunks of one AVX-512 register (see `CodeLayout`).
CHUNK_BYTES = 64


@dataclass(frozen=True)
class Codebook:
    """The values a code stands for, before its scale.

    levels: ascending, at most 2**bits. thresholds: ascending, one fewer; the code of z is the
    number of thresholds strictly below z.
    """

    levels: tuple[float, ...]
    thresholds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.levels:
            raise ValueError("levels: expected at least one level, got none")
        if any(b <= a for a, b in itertools.pairwise(self.levels)):
            raise ValueError(f"levels: expected strictly ascending values, got {self.levels}")
        if len(self.thresholds) != len(self.levels) - 1:
            raise ValueError(
                f"thresholds: expected {len(self.levels) - 1} values (one fewer than levels), "
                f"got {len(self.thresholds)}"
            )


def nearest_codebook(levels: Sequence[float]) -> Codebook:
    """Codebook that maps each value to its nearest level (thresholds at the midpoints)."""
    return Codebook(tuple(levels), tuple((a + b) / 2 for a, b in itertools.pairwise(levels)))


@dataclass(frozen=True)
class CodeLayout:
    """How codes and scales of an oriented matrix [m, n] lie in memory.

    Codes: uint8 [m, row_bytes(n)]; every row starts at a byte. A plane of b bits (1, 2, 4 or 8)
    packs a row in chunks of 64 bytes, 512/b codes; the last chunk may be short. A chunk of t codes
    takes w = ceil(t*b/8) bytes, and byte j holds code i*w + j in its i-th field of b bits, so that
    one shift and mask decodes 64 consecutive codes without interleaving. 2, 4 and 8 bits are one
    plane; 3 bits are the 2-bit plane of the low bits followed by the 1-bit plane of the high bit.

    Scales: float32 [m, blocks(n)]; block_size 0 means one scale for the whole row.
    scale = statistic(block) * clip.
    """

    bits: int
    block_size: int
    statistic: Statistic
    clip: float

    @property
    def planes(self) -> tuple[int, ...]:
        """Bits of each plane, low bits first."""
        return (2, 1) if self.bits == 3 else (self.bits,)

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (a few frozen layouts, for ever)
    def row_bytes(self, columns: int) -> int:
        """Bytes of one packed row of `columns` codes."""
        total = 0
        for plane_bits in self.planes:
            full, rest = divmod(columns, CHUNK_BYTES * 8 // plane_bits)
            total += full * CHUNK_BYTES + -(-rest * plane_bits // 8)
        return total

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (a few frozen layouts, for ever)
    def effective_block(self, columns: int) -> int:
        """Codes that share a scale in a row of `columns` codes; at least 1."""
        return max(1, min(self.block_size or columns, columns))

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (a few frozen layouts, for ever)
    def blocks(self, columns: int) -> int:
        """Scales of one row of `columns` codes."""
        return -(-columns // self.effective_block(columns))


def rotation_signs(columns: int) -> tuple[list[float], list[float]]:
    """+1 or -1 for each column, twice: the signs before each of a rotation's two transforms.

    Bits 0 and 1 of the finaliser of MurmurHash3 (https://github.com/aappleby/smhasher) of the
    column's number: fixed for ever, the same in every backend, and unlike a Walsh function.
    """
    hashes = []
    for column in range(columns):
        h = column + 1
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = ((h ^ (h >> shift)) * factor) & 0xFFFFFFFF
        hashes.append(h ^ (h >> 16))
    return [1.0 - 2 * (h & 1) for h in hashes], [1.0 - (h & 2) for h in hashes]


def mu_law_expand(value: float, mu: float) -> float:
    """The inverse of sign(x) ln(1 + mu |x|) / ln(1 + mu), the mu-law of ITU-T G.711."""
    return math.copysign(math.expm1(abs(value) * math.log1p(mu)) / mu, value)


def uniform_positions(bits: int, tread: Tread) -> list[float]:
    """Equally spaced positions in [-1, 1]: 2**bits without a zero, or 2**bits - 1 with one."""
    if tread == "mid_rise":
        count = 2**bits
        return [(2 * k + 1 - count) / (count - 1) for k in range(count)]
    largest = 2 ** (bits - 1) - 1
    return [k / largest for k in range(-largest, largest + 1)]
