"""What storing a momentum in few bits does to its update, matrix by matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.packing import unpack
from lowbit_muon.linalg.coefficients import Triple
from lowbit_muon.state.gradients import is_usable
from lowbit_muon.state.parameter import (
    flatten,
    matrix_views,
    momentum_format,
    read_matrix,
    stored_keys,
)
from lowbit_muon.state.placement import is_dtensor, local_part, shape_only
from lowbit_muon.state.stored import RULE_PREFIX, QuantizedMatrix
from lowbit_muon.state.update_error import UpdateError, next_momentum, rotated_sample


@dataclass(frozen=True)
class Diagnosis:
    """One matrix of an optimizer.

    Attributes:
        name: of its parameter, with the index of the matrix behind it if there are several.
        shape: [rows, columns].
        state_format, rule: names of the format and of the update rule.
        nbytes, bits_per_element: storage of the momentum.
        rule_nbytes: storage of what the update rule keeps beside it.
        steps, skipped: of the parameter so far: updates, and gradients with inf or nan.
        direction_error: error of Muon's update after Newton-Schulz, whatever the rule, if the
            momentum is stored once more in its format, relative, in the Frobenius norm; None for a
            momentum of zeros. Errors of earlier steps add to it: `spectral4` has 0.35 in a closed
            loop against 0.145 stored once (`python -m bench.fidelity_training --steps 12`).
        with_gradient: it is that of the next step's momentum, whose gradient was there. Otherwise
            it is that of a matrix with the stored momentum's singular values and left vectors, but
            entries close to normal: stored values themselves would be stored again without any
            error. For formats that do not rotate, outliers of the real matrix may make it worse.
        effective_rank: exp of the entropy of the singular values (Roy and Vetterli, 2007).
        stable_rank: squared Frobenius norm over squared largest singular value.
        end_codes: share of codes at the lowest and highest level, where entries are clipped; None
            for formats without codes.
    """

    name: str
    shape: tuple[int, int]
    state_format: str
    rule: str
    nbytes: int
    bits_per_element: float
    rule_nbytes: int
    steps: int
    skipped: int
    direction_error: float | None
    with_gradient: bool
    effective_rank: float
    stable_rank: float
    end_codes: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON and loggers."""
        return {**dataclasses.asdict(self), "shape": list(self.shape)}


def diagnose_parameter(
    param: Tensor,
    state: dict[str, Any],
    group: dict[str, Any],
    name: str,
    weights: tuple[float, float],
    coefficients: tuple[Triple, ...],
) -> Iterator[Diagnosis]:
    """The diagnoses of a parameter's matrices, of those that have a momentum.

    weights: of momentum and gradient, see `next_momentum`.
    """
    grad = None
    if param.grad is not None and not is_dtensor(param) and bool(is_usable(param.grad)):
        grad = flatten(param.grad, group)
    views = matrix_views(shape_only(param), group)
    for index, view in enumerate(views):
        if stored_keys(state, [view]):
            device = local_part(param).device
            yield diagnose_matrix(
                read_matrix(state, view, momentum_format(group, state), device),
                None if grad is None else grad[view.rows],
                name=name if len(views) == 1 else f"{name}[{index}]",
                rule=group["rule"]["name"],
                steps=int(state["step"]),
                skipped=int(state["skipped"]),
                weights=weights,
                coefficients=coefficients,
                backend=group["backend"],
            )


def diagnose_matrix(
    stored: QuantizedMatrix,
    grad: Tensor | None,  # [rows, columns], finite
    *,
    name: str,
    rule: str,
    steps: int,
    skipped: int,
    weights: tuple[float, float],
    coefficients: tuple[Triple, ...],
    backend: str,
) -> Diagnosis:
    """The diagnosis of one stored matrix; `grad` is that of the next step, if there is one."""
    decoded = stored.dequantize(backend)
    rule_nbytes = sum(
        tensor.untyped_storage().nbytes()
        for role, tensor in stored.tensors.items()
        if role.startswith(RULE_PREFIX)
    )
    nbytes = stored.nbytes - rule_nbytes
    singular_values = torch.linalg.svdvals(decoded)
    sample = (
        rotated_sample(decoded) if grad is None else next_momentum(stored, grad, weights, backend)
    )
    return Diagnosis(
        name=name,
        shape=stored.shape,
        state_format=stored.state_format.name,
        rule=rule,
        nbytes=nbytes,
        bits_per_element=8 * nbytes / max(1, decoded.numel()),
        rule_nbytes=rule_nbytes,
        steps=steps,
        skipped=skipped,
        direction_error=UpdateError(sample, coefficients, backend).of(stored.state_format),
        with_gradient=grad is not None,
        effective_rank=effective_rank(singular_values),
        stable_rank=stable_rank(singular_values),
        end_codes=end_codes(stored),
    )


def effective_rank(singular_values: Tensor) -> float:
    """exp of the entropy of the singular values [m], as shares of their sum; 0 for zeros."""
    shares = singular_values[singular_values > 0]
    shares = shares / shares.sum()
    return float((-(shares * shares.log()).sum()).exp()) if shares.numel() else 0.0


def stable_rank(singular_values: Tensor) -> float:
    """Sum of squares over the largest square; 0 for zeros."""
    if not singular_values.numel() or not float(singular_values[0]) > 0:
        return 0.0
    return float((singular_values / singular_values[0]).square().sum())


def end_codes(stored: QuantizedMatrix) -> float | None:
    """Share of codes at both ends of the codebook."""
    if stored.state_format.is_dense or not stored.shape[0] * stored.shape[1]:
        return None
    layout = stored.state_format.code_layout()
    highest = len(stored.state_format.code_book().levels) - 1
    codes = unpack(stored.tensors["codes"].cpu(), layout, max(stored.shape))
    return float(((codes == 0) | (codes == highest)).double().mean())
