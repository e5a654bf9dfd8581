"""Square matrices that stages keep in a byte an element: orthogonal bases, symmetric factors.

A basis is kept as whole numbers of a 127th of the largest element of each column. That element is
some 4 / sqrt(m) in a basis of no preferred directions, so that rounding, uniform within half a
code, is wrong by 4 / (254 sqrt(3)) = 0.9 % of the column's norm.

A factor S is positive, and kept as its diagonal in float32 and what is beside it as whole numbers
of a 32767th of sqrt(S_ii S_jj), which none exceeds: of S_ij = S_ji the high byte is above the
diagonal, the low one below it. Small eigenvalues need all 16 bits. An average over twenty steps
gathers errors of 3.2 half codes / sqrt(3), a noise whose spectral norm is 2 sqrt(m) times that: of
codes of eight bits, for m = 512, a third of the diagonal, and small eigenvalues came out negative.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.stage import TINY

_LARGEST_CODE, _LARGEST_PAIR = 127, 32767


def square_state(name: str, m: int, bits: int) -> RuleState:
    """What is kept of a basis or a factor [m, m]."""
    if bits == 32:
        return {name: Kept((m, m))}
    return {name: Kept((m, m), torch.int8), f"{name}_scales": Kept((1, m))}


def read_basis(state: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """A basis as it is kept, float32 [b, m, m]; zeros before the first."""
    codes = state[name].float()
    return codes if bits == 32 else codes * state[f"{name}_scales"]


def keep_basis(
    state: dict[str, Tensor],
    name: str,
    bases: Tensor,
    bits: int,
    indices: list[int] | None = None,
) -> None:
    """Keep bases [k, m, m], which `read_basis` returns but for rounding.

    indices: of k matrices in a batch; the others keep theirs, to the bit. All if None.
    """
    new = {name: bases}
    if bits == 8:
        largest = torch.linalg.vector_norm(bases, ord=torch.inf, dim=1, keepdim=True)
        scales = largest / _LARGEST_CODE
        codes = (bases / scales.clamp_min(TINY)).round_().to(torch.int8)
        new = {name: codes, f"{name}_scales": scales}
    for key, value in new.items():
        if indices is None:
            state[key] = value
        else:
            state[key] = state[key].clone()
            state[key][indices] = value


def decoded_factor(state: Mapping[str, Tensor], name: str, bits: int) -> Tensor:
    """A symmetric positive factor as it is kept, float32 [b, m, m]; zeros before the first."""
    codes = state[name]
    if bits == 32:
        return codes
    diagonal = state[f"{name}_scales"]
    roots = diagonal.sqrt() / _LARGEST_PAIR**0.5
    low = _transposed(codes).view(torch.uint8)
    pairs = codes.to(torch.int16).mul_(256).add_(low).triu_(1)
    factor = pairs.add_(_transposed(pairs)).float().mul_(roots * roots.mT)
    factor.diagonal(dim1=1, dim2=2).copy_(diagonal.squeeze(1))
    return factor


def encoded_factor(name: str, factor: Tensor, bits: int) -> dict[str, Tensor]:
    """Inverse of `decoded_factor`, but for rounding: what is kept, by name.

    What codes have made of a factor may have less than nothing on its diagonal in another basis.
    """
    if bits == 32:
        return {name: factor}
    diagonal = factor.diagonal(dim1=1, dim2=2).unsqueeze(1).clamp_min(0.0)
    inverse = diagonal.clamp_min(TINY).rsqrt() * _LARGEST_PAIR**0.5
    pairs = (factor * inverse).mul_(inverse.mT).round_().clamp_(-_LARGEST_PAIR, _LARGEST_PAIR)
    pairs = pairs.to(torch.int16)
    low = (pairs & 255).to(torch.uint8).view(torch.int8)
    codes = (pairs >> 8).to(torch.int8).triu_(1).add_(low.mT.tril(-1))
    return {name: codes, f"{name}_scales": diagonal}


def _transposed(x: Tensor) -> Tensor:
    """A copy of each matrix's transpose; torch has a fast way for one matrix only."""
    out = torch.empty_like(x)
    for new, each in zip(out, x, strict=True):
        new.copy_(each.mT)
    return out
