"""A float64 reference of Muon whose layers are sampled; see `oracles`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from oracles.base import Oracle


def draw(seed: int, count: int) -> float:
    """A number in [0, 1): the first steps of MurmurHash3's finaliser, in whole numbers."""
    bits = (count * 0x9E3779B1 + seed * 0x85EBCA6B + 0x165667B1) % 2**32
    bits = (bits ^ bits // 2**16) * 0x85EBCA6B % 2**32
    bits = (bits ^ bits // 2**13) * 0xC2B2AE35 % 2**32
    return bits / 2**32


@dataclass(kw_only=True, eq=False)
class DropMuon(Oracle):
    """Drop-Muon (arXiv 2510.02239), one layer: if it is sampled, M <- mu M + (1 - mu) G and
    W <- (1 - eta lambda) W - eta s polar(M); else both stay. eta takes the place of the paper's
    step size times the dual norm of M, as its experiments have Muon's steps."""

    nesterov: bool = False
    share: float = 0.5
    seed: int = 0

    def step(self, grad: Tensor) -> None:
        if draw(self.seed, self.steps) < self.share:
            super().step(grad)
        else:
            self.steps += 1
