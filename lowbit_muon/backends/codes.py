"""What kernels are given: packed codes, the terms of a sum of matrices, and products.

Matrices are oriented: the short side is rows (m), the long side columns (n).
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_muon.formats.codebook import Codebook, CodeLayout

# int32 holds that many products of 127 with 127 (a Gram matrix) or 128 (a limb, see code_product).
MAX_INTEGER_TERMS = (2**31 - 1) // (127 * 128)
# The largest whole number whose limbs 256*h + l, l in [-128, 127], have |h| <= 127.
LIMB_LIMIT = 127 * 256 + 127
# Blocks of scales are summed in integers over so many columns at most.
INTEGER_SEGMENT = 512


@dataclass(frozen=True)
class PackedCodes:
    """Codes of a matrix [m, n], or of a batch [b, m, n], with all that is needed to decode them."""

    packed: Tensor  # uint8 [.., m, layout.row_bytes(columns)]
    scales: Tensor  # float32 [.., m, layout.blocks(columns)]
    codebook: Codebook
    layout: CodeLayout
    columns: int  # n

    def row_slice(self, rows: slice) -> PackedCodes:
        """The codes of these rows, of each matrix."""
        return dataclasses.replace(
            self, packed=self.packed[..., rows, :], scales=self.scales[..., rows, :]
        )

    def flat(self) -> PackedCodes:
        """A batch as one matrix of b*m rows; a matrix as it is."""
        return dataclasses.replace(
            self, packed=self.packed.flatten(0, -2), scales=self.scales.flatten(0, -2)
        )


@dataclass(frozen=True)
class Terms:
    """buffer_weight * buffer + code_weight * decode(codes) + grad_weight * grad.

    Absent terms are left out; with buffer_weight 0 the buffer is not read. As a tensor, float32 or
    float64 [b] ([1] of a single matrix), it has a number for each matrix, rounded to float32. codes
    and grad are of the buffer's shape; grad is float32, bfloat16 or float16, with any strides.
    """

    buffer_weight: float | Tensor = 0.0
    codes: PackedCodes | None = None
    code_weight: float = 1.0
    grad: Tensor | None = None
    grad_weight: float = 1.0

    def codes_and_grad(self) -> tuple[PackedCodes, Tensor]:
        """What `Backend.update_codes` adds up; ValueError if the terms are others."""
        if self.codes is None or self.grad is None or self.buffer_weight != 0:
            present = {
                "buffer": self.buffer_weight != 0,
                "codes": self.codes is not None,
                "grad": self.grad is not None,
            }
            got = [name for name, there in present.items() if there]
            raise ValueError(f"terms: expected codes and grad, got {got}")
        return self.codes, self.grad


class Product(NamedTuple):
    """A checked `Backend.product` or `Backend.symmetric_product`, with their arguments.

    shape: of the result, [.., m, n]. addend, other: None if there is nothing to add; other and
    identity are a symmetric product's. out: None for new memory of the factors' dtype. rounded:
    what the factors are rounded to, or None. diagonal: see `Backend.product`; of a symmetric
    product 0 stands for the diagonals of both. (A tuple, since every call makes one.)
    """

    shape: tuple[int, ...]

    a: Tensor  # [.., m, k]
    b: Tensor | None  # [.., k, n]; None: the transpose of a
    out: Tensor | None
    addend: Tensor | None
    alpha: float | Tensor
    beta: float
    active: Tensor | None
    symmetric: bool
    rounded: torch.dtype | None = None
    diagonal: int | None = None
    other: Tensor | None = None
    gamma: float = 1.0
    identity: float = 0.0


@functools.lru_cache(maxsize=64)
def tables(codebook: Codebook) -> tuple[Tensor, Tensor]:
    """Levels and thresholds, float32 in the host's memory."""
    return (
        torch.tensor(codebook.levels, dtype=torch.float32, device="cpu"),
        torch.tensor(codebook.thresholds, dtype=torch.float32, device="cpu"),
    )


@functools.lru_cache(maxsize=64)
def byte_levels(codebook: Codebook, device: torch.device) -> Tensor:
    """Whole levels, int8 [256]: a code past the end means the last level, as everywhere."""
    levels = [int(level) for level in codebook.levels]
    return torch.tensor(levels + levels[-1:] * (256 - len(levels)), dtype=torch.int8, device=device)


@functools.lru_cache(maxsize=1024)
def integer_codes_problem(
    codebook: Codebook, layout: CodeLayout, rows: int, columns: int, *, blocks: bool = False
) -> str | None:
    """Why integer products cannot read codes of [rows, columns], or None if they can.

    They need levels that are whole numbers of at most 127, sums that stay within int32, and one
    scale a row or, where `blocks` are taken, blocks of a multiple of four columns that divides
    INTEGER_SEGMENT or is a multiple of it.
    """
    levels = codebook.levels
    if any(level != int(level) or abs(level) > 127 for level in levels):
        return f"codes: expected whole levels of at most 127, got {levels}"
    block = layout.effective_block(columns)
    aligned = INTEGER_SEGMENT % block == 0 or block % INTEGER_SEGMENT == 0
    if block < columns and not (blocks and block % 4 == 0 and aligned):
        expected = "one scale a row"
        if blocks:
            expected += f" or blocks of a multiple of 4 that goes with {INTEGER_SEGMENT}"
        return f"codes: expected {expected}, got one for {block} of {columns} columns"
    terms = max(columns, rows)
    if terms > MAX_INTEGER_TERMS:
        return f"codes: expected at most {MAX_INTEGER_TERMS} terms a sum, got {terms}"
    return None


def check_integer_codes(codes: PackedCodes, *, blocks: bool = False) -> None:
    """Raise ValueError with `integer_codes_problem`, if there is one."""
    rows = codes.packed.shape[-2]
    problem = integer_codes_problem(
        codes.codebook, codes.layout, rows, codes.columns, blocks=blocks
    )
    if problem is not None:
        raise ValueError(problem)
