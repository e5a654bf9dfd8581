"""A matrix that is read by panels of rows, so that it need never exist as a whole.

The fresh momentum decay*M + (1 - decay)*G is such a matrix: any panel of it can be decoded from the
codes and the gradient when a product needs it. What fits into the scratch memory is decoded once
and kept; a larger matrix is decoded again for every product, which costs a few percent of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend

# 4 MiB. The same for every number of threads, because sums over panels depend on it and codes must
# not depend on threads.
SCRATCH_FLOATS = 2**20
# Rows that panels of a Gram matrix have at least, however wide: each pair is decoded again.
_FEWEST_ROWS = 64


class RowSource(ABC):
    """A float32 matrix [m, n] with the short side first; one user at a time, since panels share
    memory."""

    def __init__(self, shape: Sequence[int], backend: Backend, device: torch.device) -> None:
        m, n = shape
        self.shape = (m, n)
        self.backend = backend
        self.device = device
        self._scratch: list[Tensor] = []  # at most one; copies of this object share it

    @abstractmethod
    def load(self, rows: slice, out: Tensor) -> float | None:
        """Write these rows into `out`."""

    @property
    def height(self) -> int:
        """Rows of a panel; all of them if the matrix fits."""
        m, n = self.shape
        return max(1, m if m * n <= SCRATCH_FLOATS else SCRATCH_FLOATS // n)

    def slices(self) -> list[slice]:
        """The rows of each panel."""
        m = self.shape[0]
        return [slice(start, min(start + self.height, m)) for start in range(0, m, self.height)]

    def panel_memory(self, rows: slice) -> Tensor:
        """Scratch memory for these rows."""
        if not self._scratch:
            shape = (self.height, self.shape[1])
            self._scratch.append(torch.empty(shape, dtype=torch.float32, device=self.device))
        return self._scratch[0][: rows.stop - rows.start]

    def release(self) -> None:
        """Give the scratch memory back."""
        self._scratch.clear()

    def panel(self, rows: slice) -> Tensor:
        """These rows in scratch memory, which the caller may overwrite."""
        panel = self.panel_memory(rows)
        self.load(rows, panel)
        return panel

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, values) in turn; the values may be overwritten."""
        for rows in self.slices():
            yield rows, self.panel(rows)

    def gram(self) -> Tensor:
        """X X^T, [m, m].

        The iteration that follows takes more than 4 m^2 floats, so 3 m^2 are free for panels here.
        """
        m, n = self.shape
        self.release()
        result = torch.empty(m, m, dtype=torch.float32, device=self.device)
        room = max(SCRATCH_FLOATS, 3 * m * m)
        height = m if m * n <= room else min(m, max(_FEWEST_ROWS, room // (2 * n)))
        slots = torch.empty(
            1 if height == m else 2, height, n, dtype=torch.float32, device=self.device
        )
        slices = [slice(start, min(start + height, m)) for start in range(0, m, max(1, height))]
        for i, rows in enumerate(slices):
            panel = slots[0, : rows.stop - rows.start]
            self.load(rows, panel)
            self.backend.symmetric_product(panel, out=result[rows, rows])
            for below in slices[i + 1 :]:
                other = slots[1, : below.stop - below.start]
                self.load(below, other)
                block = result[below, rows]
                self.backend.product(other, panel.mT, out=block)
                result[rows, below] = block.mT
        return result

    def dense(self) -> Tensor:
        """The whole matrix."""
        result = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        for rows in self.slices():
            self.load(rows, result[rows])
        return result

    def times(self, v: Tensor) -> Tensor:
        """X V, [m, r], for v [n, r]."""
        result = torch.empty(self.shape[0], v.shape[1], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels():
            self.backend.product(panel, v, out=result[rows])
        return result

    def transposed_times(self, v: Tensor) -> Tensor:
        """X^T V, [n, r], for v [m, r]."""
        result = torch.zeros(self.shape[1], v.shape[1], dtype=torch.float32, device=self.device)
        for rows, panel in self.panels():
            self.backend.product(panel.mT, v[rows], out=result, beta=1.0)
        return result

    def add_product(self, a: Tensor, out: Tensor, *, alpha: float, beta: float) -> None:
        """out <- alpha * a X + beta * out for a [k, m] and out [k, n].

        `out` of another dtype than float32 is rounded after each factor and not for each panel, so
        panels of its rows are computed one by one.
        """
        if self.shape[0] == 0:
            out.mul_(beta) if beta else out.zero_()
            return
        if out.dtype == torch.float32:
            for rows, panel in self.panels():
                self.backend.product(a[:, rows], panel, out=out, alpha=alpha, beta=beta)
                beta = 1.0
            return
        height = max(1, SCRATCH_FLOATS // (2 * max(1, self.shape[1])))
        for start in range(0, out.shape[0], height):
            part = out[start : start + height]
            update = torch.empty(part.shape, dtype=torch.float32, device=self.device)
            self.add_product(a[start : start + height], update, alpha=alpha, beta=0.0)
            if beta == 0:
                part.copy_(update)
            else:
                part.mul_(beta).add_(update)


class DenseRows(RowSource):
    """A matrix that is in memory; `keep_gram` if its Gram matrix is needed twice."""

    def __init__(self, matrix: Tensor, backend: Backend, *, keep_gram: bool = False) -> None:
        super().__init__(matrix.shape, backend, matrix.device)
        self.matrix = matrix
        self._keep_gram = keep_gram
        self._gram: Tensor | None = None

    def load(self, rows: slice, out: Tensor) -> None:
        """See `RowSource.load`."""
        out.copy_(self.matrix[rows])

    def gram(self) -> Tensor:
        """See `RowSource.gram`. The caller may change what comes last."""
        if self._gram is not None:
            return self._gram
        gram = self.backend.symmetric_product(self.matrix)
        if self._keep_gram:
            self._gram = gram.clone()
        return gram

    def times(self, v: Tensor) -> Tensor:
        """See `RowSource.times`."""
        return self.backend.product(self.matrix, v)

    def transposed_times(self, v: Tensor) -> Tensor:
        """See `RowSource.transposed_times`."""
        return self.backend.product(self.matrix.mT, v)

    def add_product(self, a: Tensor, out: Tensor, *, alpha: float, beta: float) -> None:
        """See `RowSource.add_product`."""
        if out.dtype == torch.float32:
            self.backend.product(a, self.matrix, out=out, alpha=alpha, beta=beta)
        else:
            super().add_product(a, out, alpha=alpha, beta=beta)
