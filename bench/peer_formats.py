"""Ways of storing momentum that the package does not have: published schemes, for comparison."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lowbit_muon import PRESETS

# MuonQ's codes under torch.optim.Muon's momentum: what they cost in a drop-in replacement.
MUONQ_TORCH_MOMENTUM = dataclasses.replace(
    PRESETS["muonq4"], name="muonq4, torch's momentum", normalize=False
)
GRASP_BLOCK = 128
GRASP_BITS = (8, 4)  # of the factors, of the residual


def grid_quantize(x: Tensor, bits: int, block: int = GRASP_BLOCK) -> tuple[Tensor, int]:
    """(decoded, bits stored) of x [rows, columns] in blocks of `block` x `block`.

    Each entry is divided by the smaller of its row's and its column's largest magnitude within the
    block and rounded to a symmetric grid; the maxima are kept as float32.
    """
    decoded = torch.empty_like(x)
    largest_code = 2 ** (bits - 1) - 1
    stored = bits * x.numel()
    for row in range(0, x.shape[0], block):
        for column in range(0, x.shape[1], block):
            part = x[row : row + block, column : column + block]
            rows = part.abs().amax(dim=1, keepdim=True)
            columns = part.abs().amax(dim=0, keepdim=True)
            scale = torch.minimum(rows, columns).clamp_min(torch.finfo(x.dtype).tiny)
            codes = (part / scale * largest_code).round()
            decoded[row : row + block, column : column + block] = codes * scale / largest_code
            stored += 32 * (part.shape[0] + part.shape[1])
    return decoded, stored


def grasp(x: Tensor) -> tuple[Tensor, float]:
    """(decoded, bits an element) of 4-bit-Muon-GRASP (ICLR 2026, openreview g2l9bg9DWx).

    The top factors P R^T in 8 bits and the residual in 4, both with grid quantisation. The factors
    are exact here (a warm-started power iteration in the paper), of rank min(m, n)/16 and in blocks
    of 128, which its abstract leaves open.
    """
    rank = max(1, min(x.shape) // 16)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    left, right = u[:, :rank], vt[:rank] * s[:rank, None]
    factor_bits, residual_bits = GRASP_BITS
    stored_left, left_size = grid_quantize(left, factor_bits)
    stored_right, right_size = grid_quantize(right, factor_bits)
    low_rank = stored_left @ stored_right
    residual, size = grid_quantize(x - left @ right, residual_bits)
    return low_rank + residual, (left_size + right_size + size) / x.numel()
