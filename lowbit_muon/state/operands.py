"""What products read: matrices in memory, or one that is decoded whenever a product needs it.

The second kind is how large matrices are stepped on CPUs: the fresh momentum
momentum*M + (1 - momentum)*G never exists as a whole. Any panel of its rows is decoded from the
codes and the gradient where a product asks for it, which costs a few percent of the product.
"""

from __future__ import annotations

import copy
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.tensors import accumulation_dtype
from lowbit_muon.state.codec import Stored

# 4 MiB. The same for every number of threads, because sums over panels depend on it and codes must
# not depend on threads.
SCRATCH_FLOATS = 2**20
# Rows that panels of a Gram matrix have at least, however wide: each pair is decoded again.
_FEWEST_ROWS = 64


def row_slices(shape: Sequence[int], backend: Backend) -> list[slice]:
    """The rows that are worked on at once of matrices [b, m, n]: all of them if they fit."""
    b, m, n = shape
    if b > 1 or backend.asynchronous or m * n <= SCRATCH_FLOATS:
        return [slice(0, m)]
    height = max(1, SCRATCH_FLOATS // n)
    return [slice(start, min(start + height, m)) for start in range(0, m, height)]


class Operand(ABC):
    """Matrices X, float32 [b, m, n], with the short side first."""

    def __init__(self, shape: Sequence[int], backend: Backend, device: torch.device) -> None:
        b, m, n = shape
        self.shape = (b, m, n)
        self.backend = backend
        self.device = device

    @abstractmethod
    def gram(self, *, rounded: bool = False) -> Tensor:
        """X X^T, [b, m, m], which the caller may overwrite.

        rounded: X may be rounded to bfloat16 first.
        """

    @abstractmethod
    def multiply(
        self,
        a: Tensor,
        out: Tensor,
        *,
        alpha: Tensor | None = None,
        beta: float = 0.0,
        diagonal: int | None = None,
    ) -> Tensor:
        """out <- alpha * a X + beta * out for a [b, k, m] and float32 out [b, k, n].

        alpha: float64 [b], None for one. diagonal: where given, a and X may be rounded to bfloat16
        first, but for the elements (i + diagonal, i) of a.
        """

    @abstractmethod
    def dense(self) -> Tensor:
        """X as a whole, which the caller may overwrite: the last thing that is asked for."""


class Dense(Operand):
    """Matrices in memory; `keep_gram` if the Gram matrix is needed twice."""

    def __init__(self, matrix: Tensor, backend: Backend, *, keep_gram: bool = False) -> None:
        super().__init__(matrix.shape, backend, matrix.device)
        self.matrix = matrix
        self.keep_gram = keep_gram
        self._gram: Tensor | None = None

    def gram(self, *, rounded: bool = False) -> Tensor:
        """See `Operand.gram`."""
        if self._gram is not None:
            return self._gram
        # (whoever asks next may need it exactly)
        rounded = rounded and not self.keep_gram
        gram = self.backend.symmetric_product(self.matrix, rounded=rounded)
        if self.keep_gram:
            self._gram = gram.clone()
        return gram

    def multiply(
        self,
        a: Tensor,
        out: Tensor,
        *,
        alpha: Tensor | None = None,
        beta: float = 0.0,
        diagonal: int | None = None,
    ) -> Tensor:
        """See `Operand.multiply`."""
        factor = 1.0 if alpha is None else float(alpha) if len(alpha) == 1 else alpha.float()
        return self.backend.product(
            a,
            self.matrix,
            out=out,
            alpha=factor,
            beta=beta,
            rounded=diagonal is not None,
            diagonal=diagonal,
        )

    def dense(self) -> Tensor:
        """See `Operand.dense`; not held here any longer."""
        matrix = self.matrix
        del self.matrix
        return matrix

    def times(self, v: Tensor) -> Tensor:
        """X V, [b, m, r], for v [b, n, r]."""
        return self.backend.product(self.matrix, v)

    def transposed_times(self, v: Tensor) -> Tensor:
        """X^T V, [b, n, r], for v [b, m, r]."""
        return self.backend.product(self.matrix.mT, v)

    def panels(
        self, divisor: Tensor | None, *, read_only: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """(rows, X / divisor), copies unless they are read only.

        divisor: float64 [b], None for one, inf for zeros.
        """
        if divisor is None:
            values = self.matrix if read_only else self.matrix.clone()
        elif self.backend.asynchronous:  # zeros whatever X is
            values = torch.empty_like(self.matrix)
            self.backend.scaled(self.matrix, divisor.reciprocal(), out=values)
        else:
            values = self.matrix / divisor.float().view(-1, 1, 1)
        yield slice(0, self.shape[1]), values


class Panels(Operand):
    """weight * M + grad_weight * G of one stored matrix M whose rows decode by themselves.

    Its panels share scratch memory, so it has one user at a time.
    """

    def __init__(self, stored: Stored, terms: Terms) -> None:
        """terms: of the stored matrix, as the buffer, and a gradient [1, m, n]."""
        super().__init__(stored.shape, stored.backend, stored.device)
        self._decoder = stored.codec.decoder(stored)
        self._terms = terms
        self._scratch: list[Tensor] = []  # at most one; copies of this object share it

    def scale(self, factor: float) -> None:
        """Multiply all by a factor."""
        self._terms = self._weighted(factor, factor)

    def ahead(self, momentum: float, share: float) -> Panels:
        """momentum * X + share * grad_weight * G as another object; shares the scratch memory."""
        other = copy.copy(self)
        # momentum * (momentum*M + w*G) + share*w*G
        other._terms = self._weighted(momentum, share + momentum)
        return other

    def _weighted(self, stored: float, grad: float) -> Terms:
        terms = self._terms
        return Terms(
            terms.buffer_weight * stored, grad=terms.grad, grad_weight=terms.grad_weight * grad
        )

    def squares(self) -> Tensor:
        """The sum of squares, float64 [1]; not finite if any element is not."""
        total = torch.zeros(1, dtype=accumulation_dtype(self.device), device=self.device)
        for rows in row_slices(self.shape, self.backend):
            total += self._load(rows, self._memory(rows))
        return total

    def _load(self, rows: slice, out: Tensor) -> Tensor:
        grad = None if self._terms.grad is None else self._terms.grad[:, rows]
        return self._decoder.add(out, dataclasses.replace(self._terms, grad=grad), rows)

    def _memory(self, rows: slice) -> Tensor:
        """Scratch memory for these rows."""
        if not self._scratch:
            height = row_slices(self.shape, self.backend)[0].stop
            shape = (1, height, self.shape[2])
            self._scratch.append(torch.empty(shape, dtype=torch.float32, device=self.device))
        return self._scratch[0][:, : rows.stop - rows.start]

    def panels(
        self, divisor: Tensor | None = None, *, read_only: bool = False
    ) -> Iterator[tuple[slice, Tensor]]:
        """See `Dense.panels`."""
        for rows in row_slices(self.shape, self.backend):
            panel = self._memory(rows)
            self._load(rows, panel)
            yield rows, panel if divisor is None else panel.div_(divisor.float().view(-1, 1, 1))

    def gram(self, *, rounded: bool = False) -> Tensor:
        """See `Operand.gram`.

        The iteration that follows takes more than 4 m^2 floats, so 3 m^2 are free for panels here.
        """
        _, m, n = self.shape
        self._scratch.clear()
        result = torch.empty(m, m, dtype=torch.float32, device=self.device)
        room = max(SCRATCH_FLOATS, 3 * m * m)
        height = m if m * n <= room else min(m, max(_FEWEST_ROWS, room // (2 * n)))
        slots = torch.empty(
            1 if height == m else 2, height, n, dtype=torch.float32, device=self.device
        )
        slices = [slice(start, min(start + height, m)) for start in range(0, m, max(1, height))]
        for i, rows in enumerate(slices):
            panel = slots[0, : rows.stop - rows.start]
            self._load(rows, panel.unsqueeze(0))
            self.backend.symmetric_product(panel, out=result[rows, rows], rounded=rounded)
            for below in slices[i + 1 :]:
                other = slots[1, : below.stop - below.start]
                self._load(below, other.unsqueeze(0))
                block = result[below, rows]
                self.backend.product(other, panel.mT, out=block, rounded=rounded)
                result[rows, below] = block.mT
        return result.unsqueeze(0)

    def multiply(
        self,
        a: Tensor,
        out: Tensor,
        *,
        alpha: Tensor | None = None,
        beta: float = 0.0,
        diagonal: int | None = None,
    ) -> Tensor:
        """See `Operand.multiply`."""
        factor = 1.0 if alpha is None else float(alpha)
        for rows, panel in self.panels():
            # the diagonal of the panel's columns of a
            place = None if diagonal is None else diagonal + rows.start
            self.backend.product(
                a[..., rows],
                panel,
                out=out,
                alpha=factor,
                beta=beta,
                rounded=place is not None,
                diagonal=place,
            )
            beta = 1.0
        return out

    def dense(self) -> Tensor:
        """See `Operand.dense`."""
        result = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for rows in row_slices(self.shape, self.backend):
            self._load(rows, result[:, rows])
        return result

    def times(self, v: Tensor) -> Tensor:
        """See `Dense.times`."""
        result = torch.empty(1, self.shape[1], v.shape[-1], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels():
            self.backend.product(panel, v, out=result[:, rows])
        return result

    def transposed_times(self, v: Tensor) -> Tensor:
        """See `Dense.transposed_times`."""
        result = torch.zeros(1, self.shape[2], v.shape[-1], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels():
            self.backend.product(panel.mT, v[:, rows], out=result, beta=1.0)
        return result

    def release(self) -> None:
        """Give the scratch memory back."""
        self._scratch.clear()


class Companded(Operand):
    """The codes' own matrix Y of a spectral format, which has the momentum's polar factor.

    Its products are of integers where that is faster; else, and where someone asks for Y as a
    whole, it is decoded.
    """

    def __init__(self, codes: PackedCodes, backend: Backend, *, rotated: bool) -> None:
        shape = (*codes.packed.shape[:2], codes.columns)
        super().__init__(shape, backend, codes.packed.device)
        self._codes, self._rotated = codes, rotated
        self._gram = backend.code_gram(codes)

    def norm(self) -> Tensor:
        """||Y||_F of each matrix, float64 [b]; to be asked before `gram` is overwritten."""
        diagonal = self._gram.diagonal(dim1=1, dim2=2)
        return diagonal.to(accumulation_dtype(self.device)).sum(dim=1).sqrt()

    def gram(self, *, rounded: bool = False) -> Tensor:
        """See `Operand.gram`; a rotation of the columns does not change it."""
        return self._gram

    def multiply(
        self,
        a: Tensor,
        out: Tensor,
        *,
        alpha: Tensor | None = None,
        beta: float = 0.0,
        diagonal: int | None = None,
    ) -> Tensor:
        """See `Operand.multiply`; by panels of the result, which are rotated back."""
        factor = 1.0 if alpha is None else alpha.float().view(-1, 1, 1)
        for rows in row_slices(out.shape, self.backend):
            product = self._unrotated(self._times_codes(a[:, rows]))
            part = out[:, rows]
            if beta == 0:
                part.copy_(product.mul_(factor))
            else:
                part.mul_(beta).add_(product.mul_(factor))
        return out

    def dense(self) -> Tensor:
        """See `Operand.dense`."""
        return self._unrotated(self._decoded())

    def _times_codes(self, a: Tensor) -> Tensor:
        """A times Y as the codes have it."""
        if self.backend.fast_code_product:
            return self.backend.code_product(a, self._codes)
        return self.backend.product(a, self._decoded())

    def _decoded(self) -> Tensor:
        """Y as the codes have it."""
        result = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        self.backend.accumulate(result, Terms(codes=self._codes))
        return result

    def _unrotated(self, x: Tensor) -> Tensor:
        if self._rotated:
            self.backend.rotate(x, inverse=True)
        return x
