"""Gradients whitened by what their layers read: Newton-Muon."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.coded import keep_basis, read_basis, square_state
from lowbit_muon.step.rules.gradient import GradientTransform
from lowbit_muon.step.rules.stage import expect

_BASIS, _VALUES = "inputs_basis", "inputs_values"


@dataclass(frozen=True)
class InputWhitened(GradientTransform):
    """G <- G (K + (ridge tr(K) / columns + eps) I)^-1, with K of the mean of x x^T over inputs x.

    K, `initial` times I at first, becomes decay K + (1 - decay) mean(x x^T) in every `every`-th
    step (arXiv 2604.01472, algorithm 1; zhehangdu/Newton-Muon, whose numbers these are; there all
    layers have the same steps, and the inputs of an MLP's last matrix are whitened in four blocks).
    Layers take turns, from the first step on, so that few products x x^T are held at a time.
    `optimizers.layer_inputs` collects inputs, and a GPU's host waits when they are taken.

    largest: layers that read more columns are not whitened.

    K is kept as its eigenvectors and, in float32, its eigenvalues. bits: of an eigenvector's
    element, 8 in codes (`step.rules.coded`), or 32. They are made orthogonal again before K takes
    more; to be 0.9 % off puts 0.009^2 of K's mean into small eigenvalues, where `ridge` is 0.2.
    """

    kind: ClassVar[str] = "input_whitened"
    needs_inputs: ClassVar[bool] = True
    every: int = 32
    decay: float = 0.95
    ridge: float = 0.2
    initial: float = 1e-3
    eps: float = 1e-8
    largest: int = 10000
    bits: int = 8

    def check(self) -> None:
        """See `Stage.check`."""
        expect(self.decay < 1, "input_whitened: decay", "a number in [0, 1)", self.decay)
        expect(self.ridge > 0, "input_whitened: ridge", "a number > 0", self.ridge)

    def state(self, shape: tuple[int, int]) -> RuleState:
        """See `Stage.state`."""
        if shape[1] > self.largest:
            return {}
        return square_state(_BASIS, shape[1], self.bits) | {_VALUES: Kept((1, shape[1]))}

    def apply(
        self, grads: Tensor, state: dict[str, Tensor], beta: float, momentum: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See `GradientTransform.apply`."""
        if _VALUES not in state:  # too large
            return grads, None
        basis, values = read_basis(state, _BASIS, self.bits), state[_VALUES]
        mean = values.mean(dim=2, keepdim=True)
        grads = grads.float()
        whitened = (grads @ basis).div_(values + (self.ridge * mean + self.eps)) @ basis.mT
        at_first = grads / (self.initial * (1 + self.ridge) + self.eps)
        return torch.where(mean > 0, whitened, at_first), None

    def taken(self, state: Mapping[str, Tensor], moment: Tensor) -> dict[str, Tensor]:
        """What is kept after K has taken a mean of x x^T, float32 [columns, columns].

        state: of one matrix, as it is kept, without a batch's dimension.
        """
        wide = accumulation_dtype(moment.device)
        batch = {name: state[name].to(moment.device).unsqueeze(0) for name in self.state((1, 1))}
        values = batch[_VALUES][0].to(wide)
        if bool(values.any()):
            basis = torch.linalg.qr(read_basis(batch, _BASIS, self.bits)[0].to(wide)).Q
            before = (basis * values) @ basis.mT
        else:
            before = self.initial * torch.eye(len(moment), dtype=wide, device=moment.device)
        new, vectors = torch.linalg.eigh(torch.lerp(moment.to(wide), before, self.decay))
        batch[_VALUES] = new.clamp_min_(0.0).float().view(1, 1, -1)
        keep_basis(batch, _BASIS, vectors.float().unsqueeze(0), self.bits)
        return {name: value[0] for name, value in batch.items()}
