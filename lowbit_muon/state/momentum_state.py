"""The momentum update: decode, add the gradient, hand over what is orthogonalised, encode.

Formats with a companded spectrum are decoded into one float32 buffer. All others are never decoded
as a whole: `StoredSum` reads the codes again for every product (`row_source`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend, reads_integer_codes
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.rows import SCRATCH_FLOATS, DenseRows, RowSource
from lowbit_muon.state.stored import QuantizedMatrix, orient, rescaling

# A momentum of a larger norm is taken as if it were not finite: its scales, and sums of it in
# products, would leave float32 (3.4e38) when they are rotated, clipped, companded or factorised.
LARGEST_NORM = 1e32
NORM_EPS = 1e-7  # MuonQ's guard when it divides by a norm (arXiv 2605.11396)

# What takes the matrix X [m, n] that is to be orthogonalised: (X, ||X||_F, scale). X is scale times
# the momentum, or times what Nesterov makes of it.
Use = Callable[[RowSource, float, float], None]


class NonFiniteGradientError(ValueError):
    """A gradient with inf, nan or values near float32's end; raised before anything changes."""


class StoredSum(RowSource):
    """alpha * M + gamma * G of a stored momentum M and a gradient G, decoded as it is read."""

    def __init__(
        self,
        momentum: QuantizedMatrix,
        backend: Backend,
        *,
        alpha: float = 1.0,
        addend: Tensor | None = None,  # [m, n], any float dtype but float64, any strides
        gamma: float = 1.0,
    ) -> None:
        super().__init__(sorted(momentum.shape), backend, momentum.device)
        self._decoder = momentum.decoder(backend)
        self._alpha, self._addend, self._gamma = alpha, addend, gamma

    def load(self, rows: slice, out: Tensor) -> float:
        """See `RowSource.load`; returns the sum of squares as well."""
        addend = None if self._addend is None else self._addend[rows]
        return self._decoder.load(
            rows, out, weight=self._alpha, addend=addend, addend_weight=self._gamma
        )

    def squares(self) -> float:
        """The sum of squares, in float64; not finite if any element is not."""
        total = 0.0
        for rows in self.slices():
            total += self.load(rows, self.panel_memory(rows))
        return total

    def weighted(self, alpha: float, gamma: float) -> StoredSum:
        """The same matrices with other weights, sharing the scratch memory."""
        other = object.__new__(StoredSum)
        other.__dict__.update(self.__dict__, _alpha=alpha, _gamma=gamma)
        return other


class StoredSpectrum(RowSource):
    """The codes' own matrix Y of a spectral format, which has the momentum's polar factor.

    Only integer products of the codes are taken: Y is never decoded.
    """

    def __init__(self, momentum: QuantizedMatrix, backend: Backend) -> None:
        super().__init__(sorted(momentum.shape), backend, momentum.device)
        self._codes = momentum.codes()
        self._rotate = momentum.state_format.rotate
        self._gram = backend.code_gram(self._codes)
        self._norm = math.sqrt(
            float(self._gram.diagonal().to(accumulation_dtype(self.device)).sum())
        )
        self._shift = momentum.state_format.spectral_shift
        self._momentum_norm = float(momentum.tensors["norm"])

    def load(self, rows: slice, out: Tensor) -> None:
        """See `RowSource.load`."""
        self.backend.accumulate(out, codes=self._codes.row_slice(rows))
        if self._rotate:
            self.backend.rotate(out, inverse=True)

    def gram(self) -> Tensor:
        """Y Y^T, [m, m], which a rotation of the columns does not change; to be taken once."""
        return self._gram

    def norm(self) -> float:
        """||Y||_F."""
        return self._norm

    @property
    def scale(self) -> float:
        """||Y||_F relative to the momentum's norm."""
        return self._norm / self._momentum_norm if self._momentum_norm > 0 else 1.0

    @property
    def lift(self) -> float:
        """How much larger than in the momentum small singular values are, both of norm one."""
        return 1 / (self._shift * self._norm) if self._norm > 0 else 1.0

    def add_product(self, a: Tensor, out: Tensor, *, alpha: float, beta: float) -> None:
        """See `RowSource.add_product`; by panels of the result, which are rotated back."""
        for start in range(0, out.shape[0], self.height):
            rows = slice(start, start + self.height)
            update = self.backend.code_product(a[rows], self._codes)
            if self._rotate:
                self.backend.rotate(update, inverse=True)
            part = out[rows]
            if beta == 0:
                part.copy_(update.mul_(alpha))
            else:
                part.mul_(beta).add_(update, alpha=alpha)


def update_momentum(
    momentum: QuantizedMatrix,
    grad: Tensor,  # [rows, columns], any float dtype and strides
    *,
    decay: float,
    nesterov: bool,
    backend: Backend,
    use: Use,
    from_stored: bool = False,
) -> None:
    """M <- decay*M + (1 - decay)*G in the stored matrix, and `use` of what is orthogonalised.

    That is M, or with Nesterov decay*M + (1 - decay)*G, as it was before it was quantised; with
    `from_stored` it is what the codes hold, without Nesterov's look-ahead. A format with
    `normalize` divides G by its Frobenius norm, sums, and divides M by its norm
    (arXiv 2605.11396).

    Raises NonFiniteGradientError, with nothing changed and nothing used, if the new momentum is not
    finite.
    """
    oriented = orient(grad.float() if grad.dtype == torch.float64 else grad)
    normalize = momentum.state_format.normalize
    terms = _Terms(
        momentum=momentum,
        grad=oriented,
        decay=decay,
        # (a norm is not finite if any element is not)
        grad_weight=1 / (float(frobenius_norm(oriented)) + NORM_EPS) if normalize else 1 - decay,
        nesterov=nesterov,
        backend=backend,
    )
    m, n = oriented.shape
    in_memory = momentum.state_format.spectral or m * n <= SCRATCH_FLOATS
    (_update_in_memory if in_memory else _update_by_panels)(terms, None if from_stored else use)
    if from_stored:
        _use_stored(momentum, backend, use)


@dataclass(frozen=True)
class _Terms:
    """What goes into one momentum update."""

    momentum: QuantizedMatrix
    grad: Tensor  # [m, n]
    decay: float
    grad_weight: float
    nesterov: bool
    backend: Backend

    def norm_and_scale(self, squares: float) -> tuple[float, float]:
        """The new momentum's norm and what it is multiplied by before products square it."""
        if not squares <= LARGEST_NORM**2:
            raise NonFiniteGradientError(describe(self.grad))
        norm = math.sqrt(squares)
        normalize = self.momentum.state_format.normalize
        return norm, 1 / (norm + NORM_EPS) if normalize else rescaling(norm)

    def store(self, source: RowSource, norm: float, scale: float) -> None:
        """Store the new momentum, of which `source` is `scale` times."""
        if self.momentum.state_format.normalize:
            norm, scale = norm * scale, 1.0  # what is stored is the scaled momentum itself
        self.momentum.store(source, norm, scale=scale)


def _update_in_memory(terms: _Terms, use: Use | None) -> None:
    """With one float32 buffer [m, n]: spectral formats, and what fits the scratch memory."""
    momentum, backend, grad = terms.momentum, terms.backend, terms.grad
    buffer = torch.empty(grad.shape, dtype=torch.float32, device=grad.device)
    if momentum.state_format.spectral:
        momentum.decode_spectral(buffer, backend)
        squares = backend.accumulate(
            buffer, buffer_weight=terms.decay, grad=grad, grad_weight=terms.grad_weight
        )
    else:
        squares = StoredSum(
            momentum, backend, alpha=terms.decay, addend=grad, gamma=terms.grad_weight
        ).load(slice(0, grad.shape[0]), buffer)
    norm, scale = terms.norm_and_scale(squares)
    if scale != 1:
        buffer.mul_(scale)
    # Without a look-ahead the encoder and the iteration start from the same Gram matrix.
    twice = momentum.state_format.spectral and use is not None and not terms.nesterov
    source = DenseRows(buffer, backend, keep_gram=twice)
    terms.store(source, norm, scale)
    if use is None:
        return
    if terms.nesterov:
        squares = backend.accumulate(
            buffer, buffer_weight=terms.decay, grad=grad, grad_weight=terms.grad_weight * scale
        )
        use(DenseRows(buffer, backend), math.sqrt(squares), scale)
    else:
        use(source, norm * scale, scale)


def _update_by_panels(terms: _Terms, use: Use | None) -> None:
    """Without a buffer [m, n]: the codes are decoded for every product, and replaced last."""
    fresh = StoredSum(
        terms.momentum, terms.backend, alpha=terms.decay, addend=terms.grad, gamma=terms.grad_weight
    )
    norm, scale = terms.norm_and_scale(fresh.squares())
    alpha, gamma = scale * terms.decay, scale * terms.grad_weight
    scaled = fresh.weighted(alpha, gamma)
    if use is not None and terms.nesterov:
        # decay * (decay*M + w*G) + w*G
        ahead = fresh.weighted(terms.decay * alpha, (1 + terms.decay) * gamma)
        use(ahead, math.sqrt(ahead.squares()), scale)
    elif use is not None:
        use(scaled, norm * scale, scale)
    terms.store(scaled, norm, scale)


def _use_stored(momentum: QuantizedMatrix, backend: Backend, use: Use) -> None:
    """`use` of what the codes hold."""
    if momentum.state_format.spectral and reads_integer_codes(momentum.codes()):
        spectrum = StoredSpectrum(momentum, backend)
        use(spectrum, spectrum.norm(), spectrum.scale)
        return
    source: RowSource
    if momentum.state_format.spectral:
        buffer = torch.empty(sorted(momentum.shape), dtype=torch.float32, device=momentum.device)
        momentum.decode_spectral(buffer, backend)
        source, squares = DenseRows(buffer, backend), backend.accumulate(buffer, buffer_weight=1.0)
    else:
        source = StoredSum(momentum, backend)
        squares = source.squares()
    scale = rescaling(math.sqrt(squares))
    if scale != 1:
        source = DenseRows(source.dense() * scale, backend)
    use(source, math.sqrt(squares) * scale, scale)


def frobenius_norm(grad: Tensor) -> Tensor:
    """Frobenius norm; not finite if any element is not."""
    return torch.linalg.vector_norm(grad, dtype=accumulation_dtype(grad.device))


def is_usable(grad: Tensor, *, parts: int = 1) -> Tensor:
    """Whether a gradient cannot take a momentum beyond `LARGEST_NORM`; a bool on its device.

    parts: of how many of its size the gradient is one.
    """
    if not grad.numel():
        return torch.ones((), dtype=torch.bool, device=grad.device)
    # The largest entry, since it is found without a copy; nan is not below anything.
    # (float32, since the limit would be inf in float16.)
    largest = torch.linalg.vector_norm(grad, ord=math.inf).float()
    return largest <= LARGEST_NORM / math.sqrt(grad.numel() * parts)


def describe(grad: Tensor) -> str:
    """What is wrong with a gradient that is not usable."""
    bad = int((~grad.isfinite()).sum())
    if not bad:
        return f"expected finite values of a norm below {LARGEST_NORM:g}, got a larger one"
    return f"expected finite values, got {bad} of {grad.numel()} elements inf or nan"
