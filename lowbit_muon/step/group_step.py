"""One step of a parameter group: its options, resolved, and the update of one matrix on a host."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend, is_device_backend
from lowbit_muon.linalg.newton_schulz import (
    Triple,
    choose_method,
    operator_of_gram,
    orthogonalize,
    resolve_coefficients,
)
from lowbit_muon.state.momentum_state import StoredSpectrum, update_momentum
from lowbit_muon.state.parameter import MatrixView, flatten
from lowbit_muon.state.rounding import Compensation, StochasticRounding
from lowbit_muon.state.rows import RowSource
from lowbit_muon.state.stored import QuantizedMatrix, orient
from lowbit_muon.step.options import AdjustLr, NsDtype


@dataclass(frozen=True)
class GroupStep:
    """What one step needs to know of its group, resolved once for all its matrices."""

    coefficients: Sequence[Triple]
    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    eps: float
    adjust_lr_fn: AdjustLr | None
    ns_input: Literal["exact", "stored"]
    ns_dtype: NsDtype
    stochastic_rounding: bool
    backend_name: str

    @classmethod
    def from_group(cls, group: dict[str, Any]) -> GroupStep:
        return cls(
            coefficients=resolve_coefficients(group["ns_coefficients"], group["ns_steps"]),
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            eps=group["eps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            ns_input=group["ns_input"],
            ns_dtype=group["ns_dtype"],
            stochastic_rounding=group["stochastic_rounding"],
            backend_name=group["backend"],
        )

    def update_matrix(
        self,
        weight: Tensor,
        grad: Tensor,
        momentum: QuantizedMatrix,
        *,
        rounding: StochasticRounding | Compensation | None = None,
    ) -> None:
        """One Muon step of one matrix: weight and grad [rows, columns].

        rounding: of the new weight; to the nearest, if it is not given.
        """
        if weight.numel() == 0:
            return
        backend: Backend = get_backend(self.backend_name, weight.device)
        update_momentum(
            momentum,
            grad,
            decay=self.momentum,
            nesterov=self.nesterov,
            backend=backend,
            use=functools.partial(self._update_weight, weight, rounding),
            from_stored=self.ns_input == "stored",
        )

    def _update_weight(
        self,
        weight: Tensor,
        rounding: StochasticRounding | Compensation | None,
        x: RowSource,
        norm: float,
        scale: float,
    ) -> None:
        """W <- (1 - lr*wd) W - lr*update_scale*orthogonalize(X); X is `scale` times too large."""
        lr = float(self.lr)
        decay = 1 - lr * self.weight_decay
        step_size = lr * update_scale(self.adjust_lr_fn, weight.shape)
        eps, oriented = self.eps * scale, orient(weight)
        coefficients = self.coefficients
        if isinstance(x, StoredSpectrum):
            coefficients = steps_after_lift(coefficients, x.lift)
        if choose_method(x.shape, coefficients, torch.float32, x.device) == "newton_schulz":
            update = orthogonalize(
                x.dense(), len(coefficients), coefficients, "newton_schulz", eps=eps
            )
            if rounding is not None:
                rounding.update(oriented, update, decay, step_size)
            else:
                oriented.mul_(decay).add_(update, alpha=-step_size)
            return
        operator, inverse_norm = operator_of_gram(x.gram(), norm, coefficients, eps=eps)
        if rounding is not None:
            update = torch.empty(oriented.shape, dtype=torch.float32, device=x.device)
            x.add_product(operator, update, alpha=inverse_norm, beta=0.0)
            rounding.update(oriented, update, decay, step_size)
        else:
            # One product with the weight as its addend: the update itself is never stored.
            x.add_product(operator, oriented, alpha=-step_size * inverse_norm, beta=decay)


def compensation(
    state: Mapping[str, Any], view: MatrixView, group: dict[str, Any]
) -> Compensation | None:
    """What a matrix's weights are rounded with, if its parameter's state keeps remainders."""
    if "remainder" not in state:
        return None
    return Compensation(flatten(state["remainder"], group)[view.rows])


def rounding_seed(seed: int, parameter: int, matrix: int) -> int:
    """Where the seeds of a matrix's stochastic rounding start: different for each matrix.

    Odd constants of MurmurHash3 and xxHash spread neighbouring numbers.
    """
    return (seed * 0x85EBCA6B + parameter * 0xC2B2AE35 + matrix * 0x27D4EB2F) & 0x7FFFFFFF


def seed_of_step(start: int | Tensor, step: int | Tensor) -> Any:
    """The seed of a matrix in this step, below 2**31; ints or int64 tensors."""
    return (start + step * 0x9E3779B1) & 0x7FFFFFFF


def steps_after_lift(coefficients: Sequence[Triple], lift: float) -> Sequence[Triple]:
    """The steps that are left for a matrix whose small singular values are `lift` times larger.

    A step multiplies small singular values by a; the first steps, as far as the lift makes up for
    them, are left out. One is always left.
    """
    saved = 0
    while saved + 1 < len(coefficients) and lift >= coefficients[saved][0]:
        lift /= coefficients[saved][0]
        saved += 1
    return coefficients[saved:]


def update_scale(adjust_lr_fn: AdjustLr | None, shape: Sequence[int]) -> float:
    """Factor of the learning rate for a matrix [rows, columns] (see `Muon`)."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def check_ns_dtype(group: dict[str, Any], backend: Backend) -> None:
    """Raise ValueError unless a backend takes a group's `ns_dtype`."""
    if group["ns_dtype"] not in ("auto", "float32") and not is_device_backend(backend):
        raise ValueError(
            f"ns_dtype: expected 'auto' or 'float32' with backend '{backend.name}', which "
            f"computes in float32, got {group['ns_dtype']!r}"
        )


def check_gradient(param: Tensor) -> Tensor:
    """The gradient; raises, as torch.optim.Muon does, for one that Muon cannot take."""
    if torch.is_complex(param):
        raise RuntimeError("Muon does not support complex parameters")
    assert param.grad is not None
    if param.grad.is_sparse:
        raise RuntimeError("Muon does not support sparse gradients")
    return param.grad


def count_skipped(state: dict[str, Any], param: Tensor) -> None:
    """Count a gradient that was left out in the parameter's state, and warn of the first."""
    state["skipped"] += 1
    if state["skipped"] == 1:
        warnings.warn(
            f"a gradient of a parameter of size {tuple(param.shape)} held inf or nan, or was too "
            "large: the parameter and its state were left as they were (nonfinite='skip')",
            RuntimeWarning,
            stacklevel=3,
        )
