"""Products that read a stored momentum's codes: its Gram matrix, dense times coded, the reverse.

X = alpha * decode(q) + gamma * addend, [m, n] with the short side first (a tall matrix is stored as
its transpose; `addend` is given as [rows, columns] of the matrix itself). X never exists as a
whole, unless its format's decoder makes it (spectral formats).

What the entries of X are multiplied as:

f32
    float32, decoded by panels of rows: for every format and with an addend.
s8
    the codes' own levels, whole numbers of at most 127: the Gram matrix is summed in exact int32,
    and for A X each row of A is split into two int8 limbs (15 bits and a sign). Scales of a row
    fold out of the sums; block scales are applied to the sum of each block, as MixPE does after
    each group (arXiv 2411.16158). Codes alone, no addend.
f16, bf16
    X divided by its largest magnitude and rounded to half precision, for the tensor cores of GPUs:
    Gram matrices of any X, summed in float32. Backends for CPUs have no such products.
auto
    of a Gram matrix: s8 where it can read the codes, since its sums are exact, else f32; of A X and
    X V: f32.

The optimizer decodes spectral formats by the s8 products, and steps codes alone by them where
`ns_input="stored"`; all others are decoded to float32 by panels or as a whole (`state.operands`).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import Terms, check_integer_codes
from lowbit_muon.backends.tensors import check_matrix, is_real_number
from lowbit_muon.linalg.spectral import decoding_operator
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.codecs.low_rank import LowRank
from lowbit_muon.state.codecs.spectral import Spectral
from lowbit_muon.state.operands import Dense, Panels
from lowbit_muon.state.stored import QuantizedMatrix, StoredBatch, orient

Panel = Literal["auto", "f32", "s8", "f16", "bf16"]
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
    panels = ("auto", "f32", "s8", *_HALF_PANELS)
    kernels = _check(q, panel, panels, addend, alpha, gamma, backend)
    if not min(q.shape):
        return torch.zeros(min(q.shape), min(q.shape), dtype=torch.float32, device=q.device)
    if panel == "auto":
        panel = "s8" if addend is None and _integer_reason(q, blocks=True) is None else "f32"
    if panel == "s8":
        _expect_integer_codes(q, blocks=True)
        return _integer_gram(q, kernels).mul_(alpha * alpha)
    x = _operand(q, addend, alpha, gamma, kernels)
    if panel in _HALF_PANELS:
        return _half_gram(x.dense(), _HALF_PANELS[panel], kernels)
    return x.gram()[0]


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
        return out.copy_(_integer_product(a * alpha, q, kernels))
    return _operand(q, addend, alpha, gamma, kernels).multiply(a.unsqueeze(0), out.unsqueeze(0))[0]


@torch.no_grad()
def lut_times(
    q: QuantizedMatrix,
    v: Tensor,  # float32 [n, k], any strides
    *,
    panel: Panel = "auto",
    addend: Tensor | None = None,  # [rows, columns], any float dtype and strides
    alpha: float = 1.0,
    gamma: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """X V, float32 [m, k], for a dense V; panel "f32" or "s8" (V in two limbs; "auto": "f32").

    Raises TypeError or ValueError naming the parameter, also for a panel that cannot read `q`.
    """
    kernels = _check(q, panel, ("auto", "f32", "s8"), addend, alpha, gamma, backend)
    m, n = sorted(q.shape)
    check_matrix("v", v)
    _check_float32("v", v, (n, v.shape[1]))
    if not m or not v.numel():
        return torch.zeros(m, v.shape[1], dtype=torch.float32, device=q.device)
    if panel == "s8":
        return _integer_times(q, v * alpha, kernels)
    return _operand(q, addend, alpha, gamma, kernels).times(v.unsqueeze(0))[0]


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


def _operand(
    q: QuantizedMatrix, addend: Tensor | None, alpha: float, gamma: float, backend: Backend
) -> Dense | Panels:
    """X in float32."""
    if addend is not None:
        addend = addend.float() if addend.dtype == torch.float64 else addend
        addend = orient(addend).unsqueeze(0)
    stored = StoredBatch([q], backend)
    terms = Terms(alpha, grad=addend, grad_weight=gamma)
    if stored.codec.by_rows:
        return Panels(stored, terms)
    return Dense(stored.add(terms)[0], backend)


def _half_gram(x: Tensor, dtype: torch.dtype, backend: Backend) -> Tensor:
    """X X^T, float32 [m, m], with X rounded to half precision; x: float32 [1, m, n]."""
    if not backend.asynchronous:
        raise ValueError(
            "panel: expected one of 'auto', 'f32', 's8' with backend "
            f"'{backend.name}', which has no products in half precision, got {dtype}"
        )
    largest = x.abs().amax().view(1)
    half = torch.empty(x.shape, dtype=dtype, device=x.device)
    backend.scaled(x, torch.where(largest > 0, 1 / largest, 0.0), out=half)
    gram = torch.empty(1, x.shape[1], x.shape[1], dtype=torch.float32, device=x.device)
    return backend.symmetric_product(half, out=gram)[0].mul_(largest.square())


def _integer_gram(q: QuantizedMatrix, backend: Backend) -> Tensor:
    """M M^T from integer sums."""
    stored, gram = StoredBatch([q], backend), backend.code_gram(q.codes())
    if isinstance(stored.codec, Spectral):
        operator = _decoding_operator(stored, gram)
        return backend.symmetric_product(backend.symmetric_product(operator, gram), operator)
    if isinstance(stored.codec, LowRank):
        # (E + P R^T)(E + P R^T)^T with E the coded part
        left, right = (factor[0] for factor in stored.codec.factors(stored))
        rows = right.mT.clone(memory_format=torch.contiguous_format)
        if q.state_format.rotate:
            backend.rotate(rows)  # like the codes
        cross = _coded_part(stored).times(rows.mT.unsqueeze(0))[0] @ left.mT
        gram += cross + cross.mT + left @ (right.mT @ right) @ left.mT
    return gram


def _integer_product(a: Tensor, q: QuantizedMatrix, backend: Backend) -> Tensor:
    """A M, with A rounded to two limbs beside the codes."""
    _expect_integer_codes(q, blocks=False)
    stored, codes = StoredBatch([q], backend), q.codes()
    coded = a
    if isinstance(stored.codec, Spectral):
        coded = backend.product(a, _decoding_operator(stored, backend.code_gram(codes)))
    result = backend.code_product(coded, codes)
    if q.state_format.rotate:
        backend.rotate(result, inverse=True)
    if isinstance(stored.codec, LowRank):
        left, right = (factor[0] for factor in stored.codec.factors(stored))
        backend.product(backend.product(a, left), right.mT, out=result, beta=1.0)
    return result


def _integer_times(q: QuantizedMatrix, v: Tensor, backend: Backend) -> Tensor:
    """M V, with V rounded to two limbs beside the codes."""
    _expect_integer_codes(q, blocks=False)
    stored, codes = StoredBatch([q], backend), q.codes()
    coded = v
    if q.state_format.rotate:  # orthogonal: V like the codes
        rows = v.mT.clone(memory_format=torch.contiguous_format)
        backend.rotate(rows)
        coded = rows.mT
    result = backend.code_times(codes, coded)
    if isinstance(stored.codec, Spectral):
        result = backend.product(_decoding_operator(stored, backend.code_gram(codes)), result)
    if isinstance(stored.codec, LowRank):
        left, right = (factor[0] for factor in stored.codec.factors(stored))
        backend.product(left, backend.product(right.mT, v), out=result, beta=1.0)
    return result


def _decoding_operator(stored: StoredBatch, gram: Tensor) -> Tensor:
    """A [m, m] with M = A Y, from Y Y^T."""
    norm, noise = stored["norm"][:, 0], stored["noise"][:, 0]
    codec = stored.codec
    assert isinstance(codec, Spectral)
    operator = decoding_operator(
        gram.unsqueeze(0), norm, noise, codec.shift, codec.n, stored.backend
    )
    return operator[0]


def _coded_part(stored: StoredBatch) -> Dense:
    """levels[code] * scale, without rotation or low-rank part."""
    assert isinstance(stored.codec, Coded)
    values = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    stored.backend.accumulate(values, Terms(codes=stored.codec.codes(stored)))
    return Dense(values, stored.backend)
