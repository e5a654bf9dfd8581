"""A matrix stored in a `StateFormat`: real bytes, decoding, encoding.

The codes are oriented: a tall matrix is stored as its transpose, so that the short side is always
the rows. The low-rank factors keep the original orientation, as MuonQ's power iteration does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon import codec
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend, PackedCodes
from lowbit_muon.checks import check_matrix, check_tensor
from lowbit_muon.formats import StateFormat
from lowbit_muon.power_iteration import power_iteration, random_right_factor
from lowbit_muon.presets import resolve_format
from lowbit_muon.spectral import spectral_compand, spectral_expand

# A panel of rows of the residual: large enough for the matrix product, small beside the matrix.
PANEL_ROWS = 128
# Norms outside this range are scaled to one before a Gram matrix squares them in float32.
_SAFE_NORMS = (1e-12, 1e15)
# Spectral formats divide by the norm; momentum below this is stored as zero.
_SMALLEST_NORM = 1e-30
# Warm-started iterations reach this in a few optimizer steps; a one-off quantise does them at once.
_ONE_OFF_ITERATIONS = 8


def orient(matrix: Tensor) -> Tensor:
    """A view of the matrix with the short side first."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


@dataclass
class QuantizedMatrix:
    """One stored matrix.

    shape: (rows, columns) of the matrix itself. tensors: all storage, by role, with m <= n the
    sorted shape:
      dense [m, n];
      codes uint8 [m, bytes], scales float32 [m, blocks] or [1, 1];
      norm float64 [1]: Frobenius norm, for formats that store the matrix scaled to norm one;
      noise float64 [1]: squared Frobenius norm of the quantisation error of a spectral format's Y;
      left_codes, right_codes uint8 [rank, bytes] and left_scales, right_scales float32 [rank, 1]:
      the factors of rows and of columns.
    """

    state_format: StateFormat
    shape: tuple[int, int]
    tensors: dict[str, Tensor]

    @classmethod
    def zeros(
        cls, shape: tuple[int, int], state_format: StateFormat, *, seed: int, device: torch.device
    ) -> QuantizedMatrix:
        """A stored zero matrix; `seed` draws the start of the power iteration."""
        f = state_format
        m, n = sorted(shape)
        tensors: dict[str, Tensor] = {}
        if f.is_dense:
            dtype = torch.float32 if f.bits == 32 else torch.bfloat16
            tensors["dense"] = torch.zeros(m, n, dtype=dtype, device=device)
            return cls(f, shape, tensors)
        tensors["codes"], tensors["scales"] = codec.empty_codes(
            m, n, f.code_layout(), single_scale=f.granularity == "tensor", device=device
        )
        for role, present in (("norm", f.stores_norm), ("noise", f.spectral)):
            if present:
                tensors[role] = torch.zeros(1, dtype=torch.float64, device=device)
        matrix = cls(f, shape, tensors)
        if matrix.rank:
            for side, length in zip(("left", "right"), shape, strict=True):
                tensors[f"{side}_codes"], tensors[f"{side}_scales"] = codec.empty_codes(
                    matrix.rank, length, f.factor_layout(), single_scale=False, device=device
                )
            start = random_right_factor(shape[1], matrix.rank, seed, device)
            # Only its direction matters, and entries in [-1, 1] suit every codebook.
            matrix._store_factor("right", start / start.norm(dim=0, keepdim=True))
        return matrix

    @classmethod
    def from_tensors(
        cls, shape: tuple[int, int], state_format: StateFormat, tensors: Mapping[str, object]
    ) -> QuantizedMatrix:
        """Wrap stored tensors after checking roles, dtypes, shapes and that scales are finite.

        Raises ValueError naming the role.
        """
        layout_of = cls.zeros(shape, state_format, seed=0, device=torch.device("meta")).tensors
        missing, unknown = set(layout_of) - set(tensors), set(tensors) - set(layout_of)
        if missing or unknown:
            raise ValueError(
                f"momentum of format '{state_format.name}': missing {sorted(missing)}, "
                f"unknown {sorted(unknown)}"
            )
        checked = {}
        for role, expected in layout_of.items():
            value = check_tensor(role, tensors[role], expected.dtype, tuple(expected.shape))
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise ValueError(f"{role}: expected finite values, got inf or nan")
            if role.endswith(("scales", "norm", "noise")) and bool((value < 0).any()):
                raise ValueError(f"{role}: expected values >= 0, got {float(value.min())}")
            checked[role] = value
        return cls(state_format, shape, checked)

    @property
    def rank(self) -> int:
        """Rank of the low-rank part; 0 if there is none."""
        return self.state_format.rank(*self.shape)

    @property
    def nbytes(self) -> int:
        """Real storage, in bytes."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())

    @property
    def bits_per_element(self) -> float:
        """Real storage in bits for each element of the matrix."""
        return 8 * self.nbytes / max(1, self.shape[0] * self.shape[1])

    def dequantize(self, backend: Backend | None = None) -> Tensor:
        """The stored matrix, float32 [rows, columns]."""
        device = next(iter(self.tensors.values())).device
        backend = backend or get_backend("auto", device)
        m, n = sorted(self.shape)
        oriented = torch.empty(m, n, dtype=torch.float32, device=device)
        weight, codes = self.decode_parts(oriented, backend)
        backend.accumulate(oriented, buffer_weight=weight, codes=codes)
        return oriented if self.shape[0] <= self.shape[1] else oriented.mT.contiguous()

    def decode_parts(self, out: Tensor, backend: Backend) -> tuple[float, PackedCodes | None]:
        """Decode as far as matrix products are needed: M = weight*out + decode(codes).

        out: float32 [m, n], overwritten unless the weight is 0. The caller adds the codes in the
        same pass over memory in which it adds the gradient.
        """
        f, tensors = self.state_format, self.tensors
        if not out.numel():
            return 0.0, None
        if f.is_dense:
            out.copy_(tensors["dense"])
            return 1.0, None
        if f.spectral:
            return self._decode_spectral(out, backend), None
        if f.companded_scale or f.rotate:
            codec.load(out, tensors["codes"], tensors["scales"], f, backend)
            if self.rank:
                left, right = self.oriented_factors(backend)
                out.addmm_(left, right.mT)
            return (float(tensors["norm"]) if f.stores_norm else 1.0), None
        codes = codec.packed_codes(
            tensors["codes"], tensors["scales"], f.code_book(), f.code_layout(), out.shape[1]
        )
        if not self.rank:
            return 0.0, codes
        left, right = self.oriented_factors(backend)
        torch.mm(left, right.mT, out=out)
        return 1.0, codes

    def _decode_spectral(self, out: Tensor, backend: Backend) -> float:
        norm = float(self.tensors["norm"])
        if norm == 0:
            return 0.0
        companded = torch.empty_like(out)
        codec.load(
            companded, self.tensors["codes"], self.tensors["scales"], self.state_format, backend
        )
        noise = float(self.tensors["noise"])
        spectral_expand(companded, self.state_format.spectral_shift, noise=noise, out=out)
        decoded_norm = math.sqrt(backend.accumulate(out, buffer_weight=1.0))
        # Decoding noise would change the norm a little in every step, and that adds up.
        return norm / decoded_norm if decoded_norm > 0 else 0.0

    def oriented_factors(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """(L [m, rank], R [n, rank]) with L R^T the low-rank part of the oriented matrix."""
        left, right = (self._load_factor(side, backend) for side in ("left", "right"))
        return (left, right) if self.shape[0] <= self.shape[1] else (right, left)

    def store(self, oriented: Tensor, norm: float, backend: Backend, *, scale: float = 1.0) -> None:
        """Replace the stored matrix.

        oriented: float32 [m, n], scale * the matrix. norm: Frobenius norm of the matrix. The scale
        keeps scale * norm in the range that a float32 Gram matrix can square (`rescaling`).
        """
        f, tensors = self.state_format, self.tensors
        if not oriented.numel():
            return
        if f.stores_norm:
            norm = norm if norm >= _SMALLEST_NORM else 0.0
            tensors["norm"].fill_(norm)
            oriented = self._at_norm_one(oriented, norm * scale)
        elif scale != 1:
            oriented = oriented / scale
        if f.is_dense:
            tensors["dense"].copy_(oriented)
            return
        left, right = self._factorise(oriented, backend) if self.rank else (None, None)

        def panels() -> Iterable[tuple[slice, Tensor]]:
            # In panels of rows, so that a residual or a rotated copy never exists as a whole.
            for start in range(0, oriented.shape[0], PANEL_ROWS):
                rows = slice(start, start + PANEL_ROWS)
                if left is not None and right is not None:
                    yield rows, torch.addmm(oriented[rows], left[rows], right.mT, alpha=-1)
                else:
                    yield rows, oriented[rows].clone() if f.rotate else oriented[rows]

        noise = codec.store_panels(
            panels, tensors["codes"], tensors["scales"], f, backend, measure_noise=f.spectral
        )
        if f.spectral:
            tensors["noise"].fill_(noise)

    def _at_norm_one(self, oriented: Tensor, norm: float) -> Tensor:
        """What the codes are made of: the matrix divided by its norm, or its companded spectrum."""
        if norm == 0:
            return torch.zeros_like(oriented)
        if self.state_format.spectral:
            shift = self.state_format.spectral_shift
            return spectral_compand(oriented, norm, shift, out=torch.empty_like(oriented))
        return oriented if norm == 1 else oriented / norm

    def _factorise(self, oriented: Tensor, backend: Backend) -> tuple[Tensor, Tensor]:
        """One power iteration from the stored right factor; stores both.

        Returns, oriented, the factors whose product the residual is to be taken from.
        """
        wide = self.shape[0] <= self.shape[1]
        previous = self._load_factor("right", backend)
        left, right = power_iteration(oriented if wide else oriented.mT, previous)
        # A zero matrix has no directions; the last ones must survive it, without a contribution.
        if bool(right.any()):
            self._store_factor("right", right, backend)
        else:
            left = torch.zeros_like(left)
        self._store_factor("left", left, backend)
        if self.state_format.residual_after == "stored":
            return self.oriented_factors(backend)
        return (left, right) if wide else (right, left)

    def _store_factor(self, side: str, factor: Tensor, backend: Backend | None = None) -> None:
        packed, scales = self.tensors[f"{side}_codes"], self.tensors[f"{side}_scales"]
        if packed.is_meta:
            return
        backend = backend or get_backend("auto", packed.device)
        codec.store_factor(factor, packed, scales, self.state_format, backend)

    def _load_factor(self, side: str, backend: Backend) -> Tensor:
        length = self.shape[0] if side == "left" else self.shape[1]
        return codec.load_factor(
            self.tensors[f"{side}_codes"],
            self.tensors[f"{side}_scales"],
            length,
            self.state_format,
            backend,
        )


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
    chosen = get_backend(backend, matrix.device)
    buffer = orient(matrix.detach()).to(torch.float32, copy=True).contiguous()
    squares = chosen.accumulate(buffer, buffer_weight=1.0)
    if not math.isfinite(squares):
        raise ValueError("matrix: expected finite float32 values, got inf or nan")
    norm = math.sqrt(squares)
    scale = rescaling(norm)
    buffer.mul_(scale)
    rows, columns = matrix.shape
    quantized = QuantizedMatrix.zeros((rows, columns), f, seed=seed, device=matrix.device)
    for _ in range(_ONE_OFF_ITERATIONS - 1 if quantized.rank else 0):
        quantized.store(buffer, norm, chosen, scale=scale)
    quantized.store(buffer, norm, chosen, scale=scale)
    return quantized


def rescaling(norm: float) -> float:
    """Factor that brings a norm into the range that float32 can square; 1 if it is there."""
    smallest, largest = _SAFE_NORMS
    return 1.0 if norm < _SMALLEST_NORM or smallest <= norm <= largest else 1 / norm
