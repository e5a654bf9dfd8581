"""One step of many matrices of one shape on a device, without the host waiting for it.

The same update as `momentum_state` and `muon` make matrix by matrix on a CPU. Which gradients are
finite is known to the device alone: every state and weight is written through a mask, so a matrix
with a non-finite gradient keeps both.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit_muon.backends.base import DeviceBackend
from lowbit_muon.linalg.half_precision import orthogonalize_batch
from lowbit_muon.linalg.newton_schulz import Triple, orthogonalize_normalized
from lowbit_muon.state.matrix_batch import MatrixBatch
from lowbit_muon.state.momentum_state import LARGEST_NORM, NORM_EPS, frobenius_norm
from lowbit_muon.state.rounding import Compensation
from lowbit_muon.state.stored import QuantizedMatrix, orient

# 16 Mi elements: enough to fill a GPU. While they are worked on they take 10 to 16 bytes each, and
# with a spectral encoder's m x m matrices, for m = n, up to 50.
BATCH_ELEMENTS = 2**24
# Small enough for float32 beside the square root of a matrix's size.
_LARGEST_FACTOR = 1e30

ProductDtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class MatrixUpdate:
    """One matrix of a step. weight, grad: [rows, columns], any float dtype and strides."""

    weight: Tensor
    grad: Tensor
    momentum: QuantizedMatrix
    compensation: Compensation | None = None


@dataclass(frozen=True)
class _Fresh:
    """What is to be orthogonalised: one X, float32 [b, m, n], until it is taken out."""

    matrices: list[Tensor]
    norm: Tensor  # float64 [b], zero where not accepted
    accepted: Tensor  # bool [b]
    scale: Tensor | None = None  # float64 [b]: X is so many times the momentum; None: once


@dataclass(frozen=True)
class BatchStep:
    """What all matrices of a batch share. lr may be a tensor on the device."""

    lr: float | Tensor
    weight_decay: float
    momentum: float
    nesterov: bool
    coefficients: Sequence[Triple]
    eps: float
    update_scale: float
    ns_dtype: ProductDtype
    from_stored: bool
    backend: DeviceBackend

    def __call__(
        self,
        updates: Sequence[MatrixUpdate],
        seeds: Sequence[Tensor] | None = None,
        allowed: Tensor | None = None,
    ) -> Tensor:
        """Update momenta and weights; returns which were accepted, bool [b].

        All matrices have one shape, format, dtype of weight and of gradient, and device. seeds:
        int32, one element each, to round bfloat16 weights stochastically. allowed: bool [b], False
        for matrices that are to be left as they are.
        """
        batch = MatrixBatch([update.momentum for update in updates], self.backend)
        grads = [_as_gradient(update.grad) for update in updates]
        fresh = self._update_momentum(batch, grads, allowed)
        del grads
        update = self._orthogonalize(fresh)
        self._update_weights(updates, update, fresh.accepted, seeds)
        return fresh.accepted

    def _update_momentum(
        self, batch: MatrixBatch, grads: list[Tensor], allowed: Tensor | None
    ) -> _Fresh:
        """Store the new momentum, and return what is to be orthogonalised."""
        backend, decay = self.backend, self.momentum
        grad_weight = 1 - decay
        normalize = batch.state_format.normalize
        if normalize:
            grad_weight = 1.0
            grads = [grad.float() / (frobenius_norm(grad).float() + NORM_EPS) for grad in grads]
        if batch.is_plain and not normalize:
            return self._update_plain(batch, grads, allowed)
        buffer = batch.decode()
        norm, accepted = _norms(
            backend.accumulate_rows(x, buffer_weight=decay, grad=grad, grad_weight=grad_weight)
            for x, grad in zip(buffer, grads, strict=True)
        )
        accepted, norm = _only(accepted, allowed, norm)
        scale = None
        if normalize:
            scale = inverse = 1 / (norm + NORM_EPS)
            buffer.mul_(inverse.float().view(-1, 1, 1))
            grads = [grad * factor for grad, factor in zip(grads, inverse.float(), strict=True)]
            norm = norm * inverse
        batch.encode(buffer, norm, dtype=self._encoder_dtype)
        if batch.state_format.is_dense and self.nesterov:
            batch.commit(accepted)  # before the buffer changes
        if self.from_stored:
            return self._stored(batch, accepted)
        if self.nesterov:
            norm, _ = _norms(
                backend.accumulate_rows(x, buffer_weight=decay, grad=grad, grad_weight=grad_weight)
                for x, grad in zip(buffer, grads, strict=True)
            )
            norm = torch.where(accepted, norm, 0.0)
        batch.commit(accepted)
        return _Fresh([buffer], norm, accepted, scale)

    def _update_plain(
        self, batch: MatrixBatch, grads: list[Tensor], allowed: Tensor | None
    ) -> _Fresh:
        """In one pass over codes and gradients."""
        decay, grad_weight = self.momentum, 1 - self.momentum
        codes = batch.codes()
        batch.new = {
            "codes": torch.empty_like(codes.packed),
            "scales": torch.empty_like(codes.scales),
        }
        x = torch.empty(batch.shape, dtype=torch.float32, device=codes.packed.device)
        ahead = self.nesterov and not self.from_stored
        squares = torch.stack(
            [
                self.backend.update_codes(
                    dataclasses.replace(codes, packed=codes.packed[i], scales=codes.scales[i]),
                    grad,
                    code_weight=decay,
                    grad_weight=grad_weight,
                    packed=batch.new["codes"][i],
                    scales=batch.new["scales"][i],
                    out=None if self.from_stored else x[i],
                    out_value_weight=decay if ahead else 1.0,
                    out_grad_weight=grad_weight if ahead else 0.0,
                ).sum(dim=1)
                for i, grad in enumerate(grads)
            ]
        )
        accepted, norm = _only(_acceptable(squares[:, 0]), allowed, squares[:, 1].sqrt())
        if self.from_stored:
            return self._stored(batch, accepted)
        batch.commit(accepted)
        return _Fresh([x], norm, accepted)

    def _stored(self, batch: MatrixBatch, accepted: Tensor) -> _Fresh:
        """What the codes hold now."""
        batch.commit(accepted)
        buffer = batch.decode()
        norm, _ = _norms(
            self.backend.accumulate_rows(matrix, buffer_weight=1.0) for matrix in buffer
        )
        return _Fresh([buffer], norm, accepted)

    @property
    def _encoder_dtype(self) -> torch.dtype:
        """bfloat16 would be a tenth of 4-bit noise after the encoder has enlarged it."""
        return torch.float32 if self.ns_dtype == "float32" else torch.float16

    def _orthogonalize(self, fresh: _Fresh) -> Tensor:
        """Of X / max(norm, eps) where accepted, [b, m, n]; takes X out of `fresh`."""
        x, norm = fresh.matrices.pop(), fresh.norm
        _, m, n = x.shape
        eps = self.eps if fresh.scale is None else self.eps * fresh.scale
        divisor = norm.clamp_min(eps).clamp_min(1 / _LARGEST_FACTOR)
        factor = torch.where(fresh.accepted, 1 / divisor, 0.0)
        if self.ns_dtype == "float32":
            self.backend.scaled(x, factor.float(), out=x)
            return orthogonalize_normalized(x, self.coefficients)
        unit = 1 / math.sqrt(m * n)
        dtype = torch.float16 if self.ns_dtype == "float16" else torch.bfloat16
        half = torch.empty(x.shape, dtype=dtype, device=x.device)
        self.backend.scaled(x, (factor / unit).float(), out=half)
        del x  # nobody else holds it, and what follows takes as much again
        unit_norm = (norm * factor).float()
        return orthogonalize_batch(half, unit_norm, self.coefficients, self.backend, unit=unit)

    def _update_weights(
        self,
        updates: Sequence[MatrixUpdate],
        update: Tensor,
        accepted: Tensor,
        seeds: Sequence[Tensor] | None,
    ) -> None:
        lr = self.lr
        if isinstance(lr, Tensor):  # a CPU scalar would have to be copied to the device
            lr = lr.reshape(()) if lr.device == update.device else float(lr)
        # Products with the mask and no constants, which would have to be copied to the device.
        mask = accepted.float()
        decay, step_size = 1 - mask * (lr * self.weight_decay), mask * (lr * self.update_scale)
        for index, one in enumerate(updates):
            if one.compensation is not None:
                one.compensation.update(
                    orient(one.weight), update[index], decay[index], step_size[index]
                )
                continue
            if one.weight.dtype == torch.float64:  # kernels know no such weights
                change = update[index].double() * step_size[index]
                orient(one.weight).mul_(decay[index]).sub_(change)
                continue
            self.backend.update_weight(
                orient(one.weight),
                update[index],
                decay=decay[index],
                step_size=step_size[index],
                seed=None if seeds is None else seeds[index],
            )


def _as_gradient(grad: Tensor) -> Tensor:
    """Oriented, in a dtype that kernels take."""
    return orient(grad.float() if grad.dtype == torch.float64 else grad)


def _norms(row_squares: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """(norms float64 [b], whether they are finite) from each matrix's row sums of squares."""
    squares = torch.stack([rows.sum() for rows in row_squares])
    return squares.sqrt(), _acceptable(squares)


def _acceptable(squares: Tensor) -> Tensor:
    """Whether sums of squares [b] are finite and those of a norm that is not too large."""
    return squares.isfinite() & (squares <= LARGEST_NORM**2)


def _only(finite: Tensor, allowed: Tensor | None, norm: Tensor) -> tuple[Tensor, Tensor]:
    """(accepted, norm where accepted and else zero)."""
    accepted = finite if allowed is None else finite & allowed
    return accepted, torch.where(accepted, norm, 0.0)
