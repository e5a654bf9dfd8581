"""Products that read a stored momentum's codes: its Gram matrix, dense times coded, thin ones.

X = alpha * decode(q) + gamma * addend, [m, n] with the short side first (a tall matrix is stored as
its transpose; `addend` and weights are given as [rows, columns] of the matrix itself). X never
exists as a whole, unless its format's decoder makes it (spectral formats with an addend).

What the entries of X are multiplied as:

f32  float32, decoded by panels of rows: for every format and with an addend.
s8   the codes' own levels, whole numbers of at most 127: the Gram matrix is summed in exact int32,
     and for A X each row of A is split into two int8 limbs (15 bits and a sign). Scales of a row
     fold out of the sums; block scales are applied to the sum of each block, as MixPE does after
     each group (arXiv 2411.16158). Codes alone, no addend.
s16  rows of X rounded to 1/2896 of their largest magnitude: Gram matrices of any X.
f16, bf16
     X divided by its largest magnitude and rounded to half precision, for the tensor cores of GPUs:
     Gram matrices of any X, summed in float32. Backends for CPUs have no such products.
auto of a Gram matrix: s8 where it can read the codes, since its sums are exact, else f32; of A X:
     f32. s16 is never chosen: bench.lut_gemm shows what it costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import (
    Backend,
    PackedCodes,
    check_integer_codes,
    is_device_backend,
)
from lowbit_muon.backends.tensors import accumulation_dtype, check_matrix, is_real_number
from lowbit_muon.linalg.products import symmetric_mm
from lowbit_muon.linalg.spectral import unbiased_shift
from lowbit_muon.state.momentum_state import StoredSum
from lowbit_muon.state.rows import SCRATCH_FLOATS, DenseRows, RowSource
from lowbit_muon.state.stored import QuantizedMatrix, orient

Panel = Literal["auto", "f32", "s16", "s8", "f16", "bf16"]
_HALF_PANELS = {"f16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def lut_gram(
    q: QuantizedMatrix,
    *,
    panel: Panel = "auto",
    addend: Tensor | None = None,  # [rows, columns], any float dtype and strides
    alpha: float = 1.0,
    gamma: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """X X^T, float32 [m, m], low-rank part included; for the other arguments see the module.

    Raises TypeError or ValueError naming the parameter, also for a panel that cannot read `q`.
    """
    panels = ("auto", "f32", "s16", "s8", *_HALF_PANELS)
    kernels = _check(q, panel, panels, addend, alpha, gamma, backend)
    if not min(q.shape):
        return torch.zeros(min(q.shape), min(q.shape), dtype=torch.float32, device=q.device)
    if panel == "auto":
        panel = "s8" if addend is None and _integer_reason(q, blocks=True) is None else "f32"
    if panel == "s8":
        _expect_integer_codes(q, blocks=True)
        return _integer_gram(q, kernels).mul_(alpha * alpha)
    source = _source(q, addend, alpha, gamma, kernels)
    if panel == "s16":
        return kernels.rounded_gram(source.dense())
    if panel in _HALF_PANELS:
        return _half_gram(source.dense(), _HALF_PANELS[panel], kernels)
    return source.gram()


@torch.no_grad()
def lut_matmul(
    a: Tensor,  # float32 [k, m], any strides
    q: QuantizedMatrix,
    *,
    panel: Panel = "auto",
    addend: Tensor | None = None,  # [rows, columns], any float dtype and strides
    alpha: float = 1.0,
    gamma: float = 1.0,
    out: Tensor | None = None,  # float32 [k, n]
    backend: str = "auto",
) -> Tensor:
    """A X, float32 [k, n], for a dense A; panel "f32" or "s8" (A in two limbs; "auto": "f32").

    Raises TypeError or ValueError naming the parameter, also for a panel that cannot read `q`.
    """
    kernels = _check(q, panel, ("auto", "f32", "s8"), addend, alpha, gamma, backend)
    m, n = sorted(q.shape)
    check_matrix("a", a)
    _check_float32("a", a, (a.shape[0], m))
    if out is None:
        out = torch.empty(a.shape[0], n, dtype=torch.float32, device=a.device)
    _check_float32("out", out, (a.shape[0], n))
    if not out.numel() or not m:
        return out.zero_()
    if panel == "s8":
        return out.copy_(_integer_multiplier(q, kernels)(a * alpha))
    _source(q, addend, alpha, gamma, kernels).add_product(a, out, alpha=1.0, beta=0.0)
    return out


@torch.no_grad()
def lut_update(
    weight: Tensor,  # any float dtype [rows, columns], changed in place
    a: Tensor,  # float32 [m, m], any strides
    q: QuantizedMatrix,
    *,
    decay: float,
    step_size: float,
    panel: Panel = "auto",
    addend: Tensor | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """W <- decay * W - step_size * (A X, in W's orientation), without A X in memory.

    With decay = 1 - lr*wd and step_size = lr*update_scale this is Muon's weight update. A weight of
    half precision is rounded once for each factor. panel: as for `lut_matmul`. Raises TypeError or
    ValueError naming the parameter.
    """
    kernels = _check(q, panel, ("auto", "f32", "s8"), addend, alpha, gamma, backend)
    check_matrix("weight", weight)
    if tuple(weight.shape) != q.shape:
        raise ValueError(f"weight: expected shape {q.shape}, got {tuple(weight.shape)}")
    m = min(q.shape)
    _check_float32("a", a, (m, m))
    for name, value in (("decay", decay), ("step_size", step_size)):
        if not is_real_number(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if not m:
        return weight
    oriented = orient(weight)
    if panel == "s8" and _updates_in_place(oriented, q, kernels):
        _expect_integer_codes(q, blocks=False)
        kernels.code_product(a * (-step_size * alpha), q.codes(), out=oriented, beta=decay)
    elif panel == "s8":
        multiply = _integer_multiplier(q, kernels)
        height = max(1, SCRATCH_FLOATS // max(q.shape))
        for part, rows in zip(oriented.split(height), a.split(height), strict=True):
            part.mul_(decay).add_(multiply(rows), alpha=-step_size * alpha)
    else:
        source = _source(q, addend, alpha, gamma, kernels)
        source.add_product(a, oriented, alpha=-step_size, beta=decay)
    return weight


@torch.no_grad()
def lut_matvec_block(
    q: QuantizedMatrix,
    v: Tensor,  # float32 [n, r], any strides
    *,
    addend: Tensor | None = None,
    alpha: float = 1.0,
    gamma: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """X V, float32 [m, r], for the thin V of a power iteration.

    Raises TypeError or ValueError naming the parameter.
    """
    kernels = _check(q, "f32", ("f32",), addend, alpha, gamma, backend)
    check_matrix("v", v)
    _check_float32("v", v, (max(q.shape), v.shape[1]))
    return _source(q, addend, alpha, gamma, kernels).times(v)


def _check(
    q: QuantizedMatrix,
    panel: str,
    panels: tuple[str, ...],
    addend: Tensor | None,
    alpha: float,
    gamma: float,
    backend: str,
) -> Backend:
    """The backend, after checks of what all operations share."""
    if not isinstance(q, QuantizedMatrix):
        raise TypeError(f"q: expected a QuantizedMatrix, got {type(q).__name__}")
    if panel not in panels:
        raise ValueError(f"panel: expected one of {panels}, got {panel!r}")
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        if not is_real_number(value):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    if addend is not None:
        check_matrix("addend", addend)
        if tuple(addend.shape) != q.shape:
            raise ValueError(f"addend: expected shape {q.shape}, got {tuple(addend.shape)}")
        if panel == "s8":
            raise ValueError("panel: 's8' reads codes alone; take 'f32' with an addend")
    return get_backend(backend, q.device)


def _check_float32(name: str, x: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype != torch.float32:
        raise TypeError(f"{name}: expected torch.float32, got {x.dtype}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def _integer_reason(q: QuantizedMatrix, *, blocks: bool) -> str | None:
    """Why integer products cannot read `q`, or None if they can."""
    f = q.state_format
    if f.is_dense or f.companded_scale or (f.spectral and f.granularity == "block"):
        return f"format '{f.name}' is not one of levels and scales"
    try:
        check_integer_codes(q.codes(), blocks=blocks)
    except ValueError as error:
        return str(error)
    return None


def _expect_integer_codes(q: QuantizedMatrix, *, blocks: bool) -> None:
    reason = _integer_reason(q, blocks=blocks)
    if reason is not None:
        raise ValueError(f"panel: 's8' cannot read q: {reason}")


def _source(
    q: QuantizedMatrix, addend: Tensor | None, alpha: float, gamma: float, backend: Backend
) -> RowSource:
    """X in float32."""
    if addend is not None:
        addend = orient(addend.float() if addend.dtype == torch.float64 else addend)
    if not q.state_format.spectral:
        return StoredSum(q, backend, alpha=alpha, addend=addend, gamma=gamma)
    m, n = sorted(q.shape)
    x = torch.empty(m, n, dtype=torch.float32, device=q.device)
    q.decode_spectral(x, backend)
    backend.accumulate(x, buffer_weight=alpha, grad=addend, grad_weight=gamma)
    return DenseRows(x, backend)


def _half_gram(x: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """X X^T, float32, with X rounded to half precision; x: float32 [m, n]."""
    if not is_device_backend(backend):
        raise ValueError(
            "panel: expected one of 'auto', 'f32', 's16', 's8' with backend "
            f"'{backend.name}', which has no products in half precision, got {dtype}"
        )
    largest = x.abs().amax().view(1)
    half = torch.empty(1, *x.shape, dtype=dtype, device=x.device)
    backend.scaled(x[None], torch.where(largest > 0, 1 / largest, 0.0), out=half)
    gram = torch.empty(x.shape[0], x.shape[0], dtype=torch.float32, device=x.device)
    return backend.symmetric_product(half[0], out=gram).mul_(largest.square())


def _integer_gram(q: QuantizedMatrix, backend: Backend) -> Tensor:
    """M M^T from integer sums."""
    gram = backend.code_gram(q.codes())
    if q.state_format.spectral:
        operator, factor = _spectral_operator(q, gram)
        return symmetric_mm(symmetric_mm(operator, gram), operator).mul_(factor * factor)
    if q.rank:
        # (E + P R^T)(E + P R^T)^T with E the coded part
        left, coded_right, right_gram = _low_rank_terms(q, backend)
        cross = coded_right @ left.mT
        gram += cross + cross.mT + left @ right_gram @ left.mT
    return gram


def _updates_in_place(weight: Tensor, q: QuantizedMatrix, backend: Backend) -> bool:
    """Whether the product of codes can have the weight, oriented, as its addend and result."""
    f = q.state_format
    codes_alone = not (f.spectral or f.rotate or q.rank)
    halves = (torch.bfloat16, torch.float16) if is_device_backend(backend) else ()
    dtype_fits = weight.dtype in (torch.float32, *halves)
    return codes_alone and dtype_fits and weight.is_contiguous()


def _integer_multiplier(q: QuantizedMatrix, backend: Backend) -> Callable[[Tensor], Tensor]:
    """A -> A M, with A rounded to two limbs beside the codes."""
    _expect_integer_codes(q, blocks=False)
    codes = q.codes()
    operator = None
    if q.state_format.spectral:
        cubic, factor = _spectral_operator(q, backend.code_gram(codes))
        operator = cubic.mul_(factor)
    factors = q.oriented_factors(backend) if q.rank else None

    def multiply(a: Tensor) -> Tensor:
        coded = a if operator is None else backend.product(a, operator)
        result = backend.code_product(coded, codes)
        if q.state_format.rotate:
            backend.rotate(result, inverse=True)
        if factors is not None:
            left, right = factors
            backend.product(backend.product(a, left), right.mT, out=result, beta=1.0)
        return result

    return multiply


def _spectral_operator(q: QuantizedMatrix, gram: Tensor) -> tuple[Tensor, float]:
    """(K + cI, nu) with M = nu * (K + cI) Y; nu keeps the norm, by traces of powers of K."""
    noise, norm = float(q.tensors["noise"]), float(q.tensors["norm"])
    operator = gram.clone()
    operator.diagonal().add_(unbiased_shift(q.state_format.spectral_shift, noise, *sorted(q.shape)))
    wide = accumulation_dtype(gram.device)
    decoded = float((operator.to(wide) * symmetric_mm(operator, gram)).sum())
    return operator, norm / math.sqrt(decoded) if decoded > 0 else 0.0


def _low_rank_terms(q: QuantizedMatrix, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
    """(P, E R, R^T R) for the coded part E and the factors P R^T."""
    left, right = q.oriented_factors(backend)
    rows = right.mT.clone(memory_format=torch.contiguous_format)
    if q.state_format.rotate:
        backend.rotate(rows)  # like the codes
    coded = _CodesAlone(q.codes(), backend)
    return left, coded.times(rows.mT), right.mT @ right


class _CodesAlone(RowSource):
    """levels[code] * scale, without rotation or low-rank part."""

    def __init__(self, codes: PackedCodes, backend: Backend) -> None:
        super().__init__((codes.packed.shape[0], codes.columns), backend, codes.packed.device)
        self._codes = codes

    def load(self, rows: slice, out: Tensor) -> None:
        """See `RowSource.load`."""
        self.backend.accumulate(out, codes=self._codes.row_slice(rows))
