"""A matrix stored in a `StateFormat`: real bytes, decoding, encoding.

The codes are oriented: a tall matrix is stored as its transpose, so that the short side is always
the rows. The low-rank factors keep the original orientation, as MuonQ's power iteration does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend, PackedCodes, reads_integer_codes
from lowbit_muon.backends.tensors import accumulation_dtype, check_matrix, check_tensor
from lowbit_muon.formats.presets import resolve_format
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.power_iteration import power_iteration, random_right_factor
from lowbit_muon.linalg.root_iteration import full_precision_products
from lowbit_muon.linalg.spectral import encoding_operator, spectral_expand, spectral_expand_codes
from lowbit_muon.state import codec
from lowbit_muon.state.rows import DenseRows, RowSource

# Norms outside this range are scaled to one before a Gram matrix squares them in float32.
_SAFE_NORMS = (1e-12, 1e15)
# Spectral formats divide by the norm; momentum below this is stored as zero.
SMALLEST_NORM = 1e-30
# Warm-started iterations reach this in a few optimizer steps; a one-off quantise does them at once.
_ONE_OFF_ITERATIONS = 8

# Of a stored matrix's tensors; see `QuantizedMatrix`.
ROLES = (
    "dense", "codes", "scales", "norm", "noise", "left_codes", "left_scales", "right_codes",
    "right_scales",
)  # fmt: skip


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
      noise float64 [1]: squared Frobenius norm of the quantisation error of a spectral format's Y
      (both float32 on devices without float64);
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
                tensors[role] = torch.zeros(1, dtype=accumulation_dtype(device), device=device)
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
            value, dtype = tensors[role], expected.dtype
            if dtype == torch.float64 and isinstance(value, Tensor):
                # it may have been saved on a device without float64
                dtype = accumulation_dtype(value.device)
                if value.dtype in (torch.float32, torch.float64):
                    value = value.to(dtype)
            value = check_tensor(role, value, dtype, tuple(expected.shape))
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

    def dequantize(self, backend: Backend | None = None) -> Tensor:
        """The stored matrix, float32 [rows, columns]."""
        backend = backend or get_backend("auto", self.device)
        m, n = sorted(self.shape)
        oriented = torch.empty(m, n, dtype=torch.float32, device=self.device)
        if self.state_format.spectral:
            self.decode_spectral(oriented, backend)
        else:
            self.decoder(backend).load(slice(0, m), oriented)
        return oriented if self.shape[0] <= self.shape[1] else oriented.mT.contiguous()

    def decoder(self, backend: Backend) -> RowDecoder:
        """Decodes any rows of a format that is not spectral."""
        f, tensors = self.state_format, self.tensors
        return RowDecoder(
            state_format=f,
            columns=max(self.shape),
            backend=backend,
            stored=tensors["dense" if f.is_dense else "codes"],
            scales=None if f.is_dense else tensors["scales"].clone(),
            norm=float(tensors["norm"]) if f.stores_norm else 1.0,
            factors=self.oriented_factors(backend) if self.rank else None,
        )

    def codes(self) -> PackedCodes:
        """The codes of a format that is not dense."""
        f = self.state_format
        return codec.packed_codes(
            self.tensors["codes"],
            self.tensors["scales"],
            f.code_book(),
            f.code_layout(),
            max(self.shape),
        )

    def decode_spectral(self, out: Tensor, backend: Backend) -> None:
        """Decode a spectral format into float32 out [m, n]."""
        f, codes = self.state_format, self.codes()
        norm, noise = float(self.tensors["norm"]), float(self.tensors["noise"])
        if norm == 0 or not out.numel():
            out.zero_()
            return
        if reads_integer_codes(codes):
            spectral_expand_codes(codes, f.spectral_shift, noise=noise, backend=backend, out=out)
        else:
            companded = torch.empty_like(out)
            backend.accumulate(companded, codes=codes)
            spectral_expand(companded, f.spectral_shift, noise=noise, out=out)
        if f.rotate:
            backend.rotate(out, inverse=True)
        decoded_norm = math.sqrt(backend.accumulate(out, buffer_weight=1.0))
        # Decoding noise would change the norm a little in every step, and that adds up.
        out.mul_(norm / decoded_norm if decoded_norm > 0 else 0.0)

    def oriented_factors(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """(L [m, rank], R [n, rank]) with L R^T the low-rank part of the oriented matrix."""
        left, right = (self._load_factor(side, backend) for side in ("left", "right"))
        return (left, right) if self.shape[0] <= self.shape[1] else (right, left)

    def store(self, source: RowSource, norm: float, *, scale: float = 1.0) -> None:
        """Replace the stored matrix.

        source: scale * the matrix, [m, n]; it may decode what is being replaced. norm: Frobenius
        norm of the matrix. The scale keeps scale * norm in the range that a float32 Gram matrix
        can square (`rescaling`).
        """
        f, tensors, backend = self.state_format, self.tensors, source.backend
        if not math.prod(source.shape):
            return
        divisor = scale
        if f.stores_norm:
            norm = norm if norm >= SMALLEST_NORM else 0.0
            tensors["norm"].fill_(norm)
            divisor *= norm
        if f.is_dense:
            for rows, panel in source.panels():
                tensors["dense"][rows] = panel.div_(divisor)
            source.release()
            return
        operator = self._encoding_operator(source, divisor) if f.spectral and divisor else None
        factors = self._factorise(source, divisor) if self.rank else None

        def panels() -> Iterator[tuple[slice, Tensor]]:
            # In panels of rows, so that neither Y nor a residual ever exists as a whole.
            for rows in source.slices():
                if operator is not None:
                    panel = source.panel_memory(rows)
                    source.add_product(operator[rows], panel, alpha=1.0, beta=0.0)
                elif divisor == 0:
                    panel = source.panel(rows).zero_()
                else:
                    panel = source.panel(rows)
                    if divisor != 1:
                        panel.div_(divisor)
                if factors is not None:
                    left, right = factors
                    backend.product(left[rows], right.mT, out=panel, alpha=-1.0, beta=1.0)
                yield rows, panel

        noise = codec.store_panels(
            panels, tensors["codes"], tensors["scales"], f, backend, measure_noise=f.spectral
        )
        if f.spectral:
            tensors["noise"].fill_(noise)
        source.release()

    def _encoding_operator(self, source: RowSource, norm: float) -> Tensor:
        """C / norm with Y = C X / norm, for a source of this norm."""
        with full_precision_products():
            gram_matrix = source.gram().div_(norm).div_(norm)
            return encoding_operator(gram_matrix, self.state_format.spectral_shift).div_(norm)

    def _factorise(self, source: RowSource, divisor: float) -> tuple[Tensor, Tensor]:
        """One power iteration from the stored right factor; stores both.

        Returns, oriented, the factors whose product the residual is to be taken from.
        """
        wide = self.shape[0] <= self.shape[1]
        backend = source.backend
        products = (source.times, source.transposed_times)
        previous = self._load_factor("right", backend)
        left, right = power_iteration(*(products if wide else products[::-1]), previous)
        right = right / divisor if divisor else torch.zeros_like(right)
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


@dataclass(frozen=True)
class RowDecoder:
    """Decodes rows of a stored matrix that is not spectral.

    It keeps what all rows share (scales, factors, norm), so that rows can still be decoded while
    others are being replaced.
    """

    state_format: StateFormat
    columns: int
    backend: Backend
    stored: Tensor  # packed codes, or the dense matrix
    scales: Tensor | None
    norm: float
    factors: tuple[Tensor, Tensor] | None

    def load(
        self,
        rows: slice,
        out: Tensor,
        *,
        weight: float = 1.0,
        addend: Tensor | None = None,
        addend_weight: float = 1.0,
    ) -> float:
        """out <- weight * M[rows] + addend_weight * addend; returns its sum of squares.

        out: float32 [rows, n]; addend: [rows, n] as `Backend.accumulate` takes gradients.
        """
        f, codes = self.state_format, None
        buffer_weight = weight * self.norm
        if not out.numel():
            return 0.0
        if f.is_dense:
            out.copy_(self.stored[rows])
        elif f.companded_scale or f.rotate:
            codec.load(out, self.stored[rows], self._row_scales(rows), f, self.backend)
            self._add_factors(rows, out, beta=1.0)
        else:
            codes = codec.packed_codes(
                self.stored[rows],
                self._row_scales(rows),
                f.code_book(),
                f.code_layout(),
                self.columns,
            )
            if self.factors is None:
                buffer_weight = 0.0
            self._add_factors(rows, out, beta=0.0)
        return self.backend.accumulate(
            out,
            buffer_weight=buffer_weight,
            codes=codes,
            code_weight=weight,
            grad=addend,
            grad_weight=addend_weight,
        )

    def _row_scales(self, rows: slice) -> Tensor:
        assert self.scales is not None
        return self.scales if self.state_format.granularity == "tensor" else self.scales[rows]

    def _add_factors(self, rows: slice, out: Tensor, *, beta: float) -> None:
        if self.factors is not None:
            left, right = self.factors
            self.backend.product(left[rows], right.mT, out=out, beta=beta)


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
    source = DenseRows(buffer.mul_(scale), chosen)
    rows, columns = matrix.shape
    quantized = QuantizedMatrix.zeros((rows, columns), f, seed=seed, device=matrix.device)
    for _ in range(_ONE_OFF_ITERATIONS if quantized.rank else 1):
        quantized.store(source, norm, scale=scale)
    return quantized


def rescaling(norm: float) -> float:
    """Factor that brings a norm into the range that float32 can square; 1 if it is there."""
    smallest, largest = _SAFE_NORMS
    return 1.0 if norm < SMALLEST_NORM or smallest <= norm <= largest else 1 / norm
