"""Square matrices that stages keep in 8 bits: orthogonal bases, and symmetric positive factors.

A basis is kept as whole numbers of a 127th of the largest element of each column. That element is
some 4 / sqrt(m) in a basis of no preferred directions, so that rounding, uniform within half a
code, is wrong by 4 / (254 sqrt(3)) = 0.9 % of the column's norm.

A factor is kept as its diagonal in float32 and what is beside it as whole numbers of a 127th of
sqrt(S_ii S_jj), which no element of a positive matrix exceeds.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.stage import TINY

_LARGEST_CODE = 127


def square_state(name: str, m: int, bits: int) -> RuleState:
    """What is kept of a basis or a factor [m, m]."""
    if bits == 32:
        return {name: Kept((m, m))}
    return {name: Kept((m, m), torch.int8), f"{name}_scales": Kept((1, m))}


def read_basis(state: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """A basis as it is kept, float32 [b, m, m]; zeros before the first."""
    codes = state[name].float()
    return codes if bits == 32 else codes * state[f"{name}_scales"]


def keep_basis(state: dict[str, Tensor], name: str, basis: Tensor, bits: int) -> None:
    """Inverse of `read_basis`, but for rounding."""
    if bits == 32:
        state[name] = basis
        return
    largest = torch.linalg.vector_norm(basis, ord=torch.inf, dim=1, keepdim=True)
    scales = largest / _LARGEST_CODE
    state[name] = (basis / scales.clamp_min(TINY)).round_().to(torch.int8)
    state[f"{name}_scales"] = scales


def decoded_factor(state: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """A symmetric positive factor as it is kept, float32 [b, m, m]; zeros before the first."""
    codes = state[name].float()
    if bits == 32:
        return codes
    diagonal = state[f"{name}_scales"]
    roots = diagonal.sqrt() / _LARGEST_CODE**0.5
    factor = codes * roots * roots.mT
    factor.diagonal(dim1=1, dim2=2).copy_(diagonal.squeeze(1))
    return factor


def encoded_factor(name: str, factor: Tensor, bits: int) -> dict[str, Tensor]:
    """Inverse of `decoded_factor`, but for rounding: what is kept, by name.

    What codes have made of a factor may have less than nothing on its diagonal in another basis.
    """
    if bits == 32:
        return {name: factor}
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(1).clamp_min(0.0)
    roots = diagonal.clamp_min(TINY).sqrt() / _LARGEST_CODE**0.5
    codes = (factor / roots / roots.mT).round_().clamp_(-_LARGEST_CODE, _LARGEST_CODE)
    return {name: codes.to(torch.int8), f"{name}_scales": diagonal}
