"""The low-rank part of a momentum matrix: one warm-started power iteration (arXiv 2605.11396)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_EPS = 1e-7  # MuonQ's guard against columns that have died


# A product with the matrix: [columns, rank] -> [rows, rank], or of its transpose the other way.
Product = Callable[[Tensor], Tensor]


def power_iteration(
    times: Product, transposed_times: Product, right_factor: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of block power iteration for M [rows, columns], given by its products.

    times: V -> M V; transposed_times: V -> M^T V; right_factor: the last one, float32
    [columns, rank]. Q = R / column norms; P = qr(M Q); R = M^T P. Returns (P [rows, rank] with
    orthonormal columns, R [columns, rank]); P R^T is the projection of M on P. All may be batches,
    [b, ..].
    """
    # Entries of at most one keep the norm of the columns within float32.
    largest = right_factor.abs().amax(dim=(-2, -1), keepdim=True)
    directions = right_factor / torch.where(largest > 0, largest, 1)
    directions /= directions.norm(dim=-2, keepdim=True) + _EPS
    product = times(directions)
    with _one_thread(product.device):
        left_factor, _ = torch.linalg.qr(product)
    return left_factor, transposed_times(left_factor)


def random_right_factor(columns: int, rank: int, seed: int, device: torch.device) -> Tensor:
    """Gaussian start of the iteration, float32 [columns, rank], the same for a seed everywhere.

    Drawn on the CPU, since generators of different devices give different numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, rank, generator=generator, dtype=torch.float32, device="cpu").to(
        device
    )


@contextlib.contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """LAPACK's results depend on the number of threads; stored codes must not."""
    threads = torch.get_num_threads()
    if threads == 1 or device.type != "cpu":
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
