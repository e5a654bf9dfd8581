"""Which parameters a step takes; all others keep their momentum and their weights."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lowbit_muon.step.rules.stage import Stage, expect, mixed


class Sampling(Stage):
    """The stage before all others."""

    @abstractmethod
    def takes(self, seed: int, count: int | Tensor) -> bool | Tensor:
        """Whether a step takes a parameter.

        seed: the group's. count: how many gradients the parameter has had before this one, skipped
        ones included; an int64 tensor of any size where the host does not know, as the result is.
        """


@dataclass(frozen=True)
class Progressive(Sampling):
    """A parameter is taken in a share of the steps, whenever those of smaller shares are.

    Randomised progressive training, as of Drop-Muon (arXiv 2510.02239): where a step draws a layer
    s of b with equal chances, and takes s and all behind it, layer i is taken in i / b of the
    steps. Any other chances of s are told by what they sum up to at i.

    A step's number is drawn from a hash of the group's `seed` and of the parameter's count, so that
    it is one for all parameters that have had as many gradients, on all processes, and after a
    resume. Parameters that had a gradient less often have draws of their own.
    """

    kind: ClassVar[str] = "progressive"
    share: float = 0.5

    def check(self) -> None:
        """See `Stage.check`."""
        good = 0 < self.share <= 1
        expect(good, "progressive: share", "a number in (0, 1]", self.share)

    def takes(self, seed: int, count: int | Tensor) -> bool | Tensor:
        """See `Sampling.takes`."""
        # Odd constants of MurmurHash3 and xxHash, and the golden ratio, spread what is close.
        start = (seed * 0x85EBCA6B + 0x165667B1) & 0xFFFFFFFF
        drawn: int | Tensor = mixed((count * 0x9E3779B1 + start) & 0xFFFFFFFF)
        return drawn < round(self.share * 2**32)
