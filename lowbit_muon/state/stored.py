"""Stored matrices: one of them for users (`QuantizedMatrix`), a batch for a step (`StoredBatch`).

The codes are oriented: a tall matrix is stored as its transpose, so that the short side is always
the rows. The low-rank factors keep the original orientation, as MuonQ's power iteration does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.tensors import accumulation_dtype, check_matrix, check_tensor
from lowbit_muon.formats.presets import resolve_format
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.codec import SMALLEST_NORM, Codec, Stored
from lowbit_muon.state.codecs import codec_of
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.codecs.low_rank import LowRank
from lowbit_muon.state.operands import Dense

# Norms outside this range are scaled to one before a Gram matrix squares them in float32.
_SAFE_NORMS = (1e-12, 1e15)
# Warm-started iterations reach this in a few optimizer steps; a one-off quantise does them at once.
_ONE_OFF_ITERATIONS = 8

_NEVER_NEGATIVE = ("scales", "norm", "noise")

# Of a stored matrix's tensors; see `QuantizedMatrix`.
ROLES = (
    "dense", "codes", "scales", "norm", "noise", "left_codes", "left_scales", "right_codes",
    "right_scales",
)  # fmt: skip

# Before the roles of what an update rule keeps of a matrix beside its momentum.
RULE_PREFIX = "rule."


class Kept(NamedTuple):
    """A tensor that an update rule keeps of a matrix; zeros at first."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32


RuleState = dict[str, Kept]  # by name, without the prefix


def orient(matrix: Tensor) -> Tensor:
    """A view of the matrix with the short side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


class StoredBatch(Stored):
    """Stored matrices of one shape and format, as one step reads and replaces them.

    accepted: bool [b], which of them are replaced; None for all.
    """

    def __init__(self, matrices: Sequence[QuantizedMatrix], backend: Backend) -> None:
        first = matrices[0]
        self.matrices = matrices
        self.backend = backend
        self.device = next(iter(first.tensors.values())).device
        self.codec: Codec = codec_of(first.state_format, first.shape)
        self.shape = (len(matrices), self.codec.m, self.codec.n)
        self.accepted: Tensor | None = None
        self._read: dict[str, Tensor] = {}
        self._new: dict[str, Tensor] = {}

    def each(self, role: str) -> list[Tensor]:
        """See `Stored.each`."""
        return [matrix.tensors[role] for matrix in self.matrices]

    def __getitem__(self, role: str) -> Tensor:
        """See `Stored.__getitem__`; a view if there is one matrix."""
        if role not in self._read:
            tensors = self.each(role)
            self._read[role] = (
                tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
            )
        return self._read[role]

    def blank(self, role: str) -> Tensor:
        """See `Stored.blank`; the stored tensor itself, if it may be replaced at once."""
        if self.accepted is None and len(self.matrices) == 1:
            return self[role]
        if role not in self._new:
            self._new[role] = torch.empty_like(self[role])
        return self._new[role]

    def write(self, role: str, rows: slice, values: Tensor) -> None:
        """See `Stored.write`."""
        for index, stored in enumerate(self.each(role)):
            part, new = stored[rows], values[index]
            if self.accepted is not None:
                new = torch.where(self.accepted[index], new.to(part.dtype), part)
            part.copy_(new)

    def commit(self) -> None:
        """Replace what is stored by what was written to `blank`, where accepted."""
        old: list[Tensor] = []
        new: list[Tensor] = []
        for role, values in self._new.items():
            if self.accepted is not None:
                mask = self.accepted.view(-1, *[1] * (values.ndim - 1))
                values = torch.where(mask, values, self[role], out=self[role])
            old += self.each(role)
            new += values.unbind()
        if old and (self.accepted is None or len(self.matrices) > 1):
            torch._foreach_copy_(old, new)
        self._new.clear()
        self._read.clear()

    def replace(self, role: str, values: Tensor, accepted: Tensor) -> None:
        """Replace the tensors of a role by values [b, ..], where accepted (bool [b])."""
        mask = accepted.view(-1, *[1] * (values.ndim - 1))
        new = torch.where(mask, values, self[role])
        torch._foreach_copy_(self.each(role), list(new.unbind()))
        self._read.pop(role)

    def add(self, terms: Terms) -> tuple[Tensor, Tensor]:
        """(X, ||X||_F^2) of X = buffer_weight * M + grad_weight * grad, decoded as a whole.

        terms: with grad [b, m, n]. X: float32 [b, m, n]; the squares: float64 [b].
        """
        x = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        if not x.numel():
            return x, x.sum(dim=(1, 2), dtype=accumulation_dtype(self.device))
        return x, self.codec.decoder(self).add(x, terms, slice(0, self.shape[1]))

    def add_and_encode(
        self, terms: Terms, ahead: tuple[float, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over plain codes and gradients (`Backend.update_codes`), for `commit`.

        Returns Z = w X + v grad for (w, v) = ahead, ||X||_F^2 and ||Z||_F^2; see `add`.
        """
        assert isinstance(self.codec, Coded)
        assert not isinstance(terms.buffer_weight, Tensor)
        for role in ("codes", "scales"):  # not those that are being read
            self._new[role] = torch.empty_like(self[role])
        z = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        squares, z_squares = self.backend.update_codes(
            Terms(0.0, self.codec.codes(self), terms.buffer_weight, terms.grad, terms.grad_weight),
            packed=self._new["codes"],
            scales=self._new["scales"],
            out=z,
            out_weights=ahead,
        )
        return z, squares.sum(dim=-1), z_squares.sum(dim=-1)


@dataclass
class QuantizedMatrix:
    """One stored matrix.

    shape: (rows, columns) of the matrix itself. tensors: all storage, by role, with m <= n the
    sorted shape; which of them there are depends on the format (`lowbit_muon.state.codecs`):

    - dense [m, n];
    - codes uint8 [m, bytes], scales float32 [m, blocks] or [1, 1];
    - norm float64 [1]: Frobenius norm, for formats that store the matrix scaled to norm one;
    - noise float64 [1]: squared Frobenius norm of the quantisation error of a spectral format's Y
      (both float32 on devices without float64);
    - left_codes, right_codes uint8 [rank, bytes] and left_scales, right_scales float32 [rank, 1]:
      the factors of rows and of columns;
    - `rule.*`: what an update rule keeps beside the momentum (`Stage.state`).
    """

    state_format: StateFormat
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @classmethod
    def zeros(
        cls,
        shape: tuple[int, int],
        state_format: StateFormat,
        *,
        seed: int,
        device: torch.device,
        backend: str = "auto",
        rule_state: RuleState | None = None,
    ) -> QuantizedMatrix:
        """A stored zero matrix; `seed` draws the start of the power iteration."""
        codec = codec_of(state_format, shape)
        tensors = codec.empty(device, seed)
        for name, kept in (rule_state or {}).items():
            tensors[RULE_PREFIX + name] = torch.zeros(kept.shape, dtype=kept.dtype, device=device)
        matrix = cls(state_format, shape, tensors)
        if isinstance(codec, LowRank) and device.type != "meta":
            codec.start(StoredBatch([matrix], get_backend(backend, device)), seed)
        return matrix

    @classmethod
    def from_tensors(
        cls,
        shape: tuple[int, int],
        state_format: StateFormat,
        tensors: Mapping[str, object],
        rule_state: RuleState | None = None,
    ) -> QuantizedMatrix:
        """Wrap stored tensors after checking roles, dtypes, shapes and that scales are finite.

        Raises ValueError naming the role.
        """
        meta = torch.device("meta")
        layout_of = cls.zeros(
            shape, state_format, seed=0, device=meta, rule_state=rule_state
        ).tensors
        missing, unknown = set(layout_of) - set(tensors), set(tensors) - set(layout_of)
        if missing or unknown:
            raise ValueError(
                f"momentum of format '{state_format.name}': missing {sorted(missing)}, "
                f"unknown {sorted(unknown)}"
            )
        checked = {}
        for role, expected in layout_of.items():
            value, dtype = tensors[role], expected.dtype
            if dtype == torch.float64 and isinstance(value, Tensor):
                # it may have been saved on a device without float64
                dtype = accumulation_dtype(value.device)
                if value.dtype in (torch.float32, torch.float64):
                    value = value.to(dtype)
            value = check_tensor(role, value, dtype, tuple(expected.shape))
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{role}: expected finite values, got inf or nan")
            if role.endswith(_NEVER_NEGATIVE) and bool((value < 0).any()):
                raise ValueError(f"{role}: expected values >= 0, got {float(value.min())}")
            checked[role] = value
        return cls(state_format, shape, checked)

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 if there is none."""
        return self.state_format.rank(*self.shape)

    @property
    def device(self) -> torch.device:
        """Where the matrix is stored."""
        return next(iter(self.tensors.values())).device

    @property
    def nbytes(self) -> int:
        """Real storage, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @property
    def bits_per_element(self) -> float:
        """Real storage in bits for each element of the matrix."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, backend: str = "auto") -> Tensor:
        """The stored matrix, float32 [rows, columns]."""
        stored = StoredBatch([self], get_backend(backend, self.device))
        oriented = stored.add(Terms(1.0))[0][0]
        return oriented if self.shape[0] <= self.shape[1] else oriented.mT.contiguous()

    def codes(self) -> PackedCodes:
        """The codes of a format that is not dense."""
        codec = codec_of(self.state_format, self.shape)
        if not isinstance(codec, Coded):
            raise ValueError(f"codes: expected a format with codes, got '{self.state_format.name}'")
        scales = self.tensors["scales"].expand(codec.m, -1)
        return PackedCodes(self.tensors["codes"], scales, codec.book, codec.layout, codec.n)


def quantize(
    matrix: Tensor,
    state_format: str | StateFormat = "spectral4",
    *,
    seed: int = 0,
    backend: str = "auto",
) -> QuantizedMatrix:
    """Quantise one matrix [rows, columns] of any float dtype, non-contiguous or not.

    seed: start of the power iteration of formats with low-rank factors, which runs several times
    here, since there is no last step to start from.

    Raises TypeError or ValueError for anything but a finite 2-D floating point tensor.
    """
    check_matrix("matrix", matrix)
    f = resolve_format(state_format)
    kernels = get_backend(backend, matrix.device)
    buffer = orient(matrix.detach()).to(torch.float32, copy=True).contiguous().unsqueeze(0)
    squares = kernels.accumulate(buffer, Terms(1.0)).sum(dim=-1)
    if not bool(squares.isfinite()):
        raise ValueError("matrix: expected finite float32 values, got inf or nan")
    norm = squares.sqrt()
    scale = rescaling(norm)
    if scale is not None:
        buffer.mul_(scale.float().view(-1, 1, 1))
    rows, columns = matrix.shape
    quantized = QuantizedMatrix.zeros(
        (rows, columns), f, seed=seed, device=matrix.device, backend=backend
    )
    if buffer.numel():
        stored = StoredBatch([quantized], kernels)
        for _ in range(_ONE_OFF_ITERATIONS if quantized.rank else 1):
            stored.codec.encode(stored, Dense(buffer, kernels), norm, scale, torch.float32)
            stored.commit()
    return quantized


def rescaling(norm: Tensor) -> Tensor | None:
    """Factors that bring norms, float64 [b], into the range that float32 can square.

    None if all of them are there.
    """
    smallest, largest = _SAFE_NORMS
    safe = (norm < SMALLEST_NORM) | ((norm >= smallest) & (norm <= largest))
    return None if bool(safe.all()) else torch.where(safe, 1.0, 1 / norm)
