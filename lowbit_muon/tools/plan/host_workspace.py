"""Memory of a Muon step on a CPU above weights, gradients and state.

Found as on a GPU (`device_workspace`), by running the step itself on tensors without data, with
what the C++ backend allocates in the place of what Triton's adapters do. To the most of that is
added the most that its products pack at once (csrc/cpu/product.cpp), which torch does not see.

tests/tools/test_plan_memory.py holds this to what torch's profiler and the C++ products measure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.operands import SCRATCH_FLOATS
from lowbit_muon.state.rounding import Compensation, Rounding
from lowbit_muon.state.stored import QuantizedMatrix, orient
from lowbit_muon.step.batches import HOST_ELEMENTS
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.update import Batch, StepOptions, update
from lowbit_muon.tools.plan.device_workspace import (
    META,
    LiveBytes,
    SizingBackend,
    extrapolated,
    planned_group,
)

FLOAT_BYTES = 4
# Of csrc/cpu: rows of a strip, steps and rows of a streamed block, words packed at once
# (kStrip, kWordSteps, kStreamBlock, kPackedWords); of its level amx, steps of a tile.
_STRIP, _STREAM, _PACKED_WORDS, _TILE = 16, 192, 2**20, 16
# Rows of the largest matrices that are inverted without spare memory (kSmallInverse).
_SMALL_INVERSE = 64


def muon_step_bytes(
    shape: Sequence[int],
    count: int,
    state_format: StateFormat,
    dtype: torch.dtype,
    rule: UpdateRule,
    *,
    stack: bool = False,
    compensation: bool = False,
) -> int:
    """Most bytes that a step of `count` parameters of a shape holds above weights, gradients and
    state.

    Small matrices are stepped in batches (`step.batches`), large ones one after another. stack: all
    but the last two dimensions count matrices (`batch_experts`). compensation: as for `Muon`.
    """
    rows, columns = (shape[-2], shape[-1]) if stack else (shape[0], math.prod(shape[1:]))
    m, n = sorted((rows, columns))
    if not m:
        return 0
    count *= math.prod(shape[:-2]) if stack else 1
    encoder = 3 * m * m if state_format.spectral else 0
    batch = min(count, max(1, HOST_ELEMENTS // (m * n + encoder)))
    compensated = compensation and dtype in (torch.bfloat16, torch.float16)
    one = partial(_batch_bytes, (rows, columns), state_format, dtype, rule, compensated)
    return extrapolated(one, batch)


def _batch_bytes(
    shape: tuple[int, int],
    f: StateFormat,
    dtype: torch.dtype,
    rule: UpdateRule,
    compensated: bool,
    count: int,
) -> int:
    """Of a step of one batch of matrices."""
    apart = rule.is_fused and dtype != torch.float32 and math.prod(shape) > SCRATCH_FLOATS
    weights_dtype = torch.float32 if apart else dtype
    params = [
        nn.Parameter(torch.empty(shape, dtype=weights_dtype, device=META)) for _ in range(count)
    ]
    grads = [torch.empty(shape, dtype=dtype, device=META) for _ in range(count)]
    kept = rule.state(shape)
    momenta = [
        QuantizedMatrix.zeros(shape, f, seed=0, device=META, rule_state=kept) for _ in params
    ]
    options = StepOptions.from_group(planned_group(params, f, rule))
    weights = [param.detach() for param in params]
    rounding: list[Rounding | None] = [None] * count
    if compensated and not apart:
        remainders = [torch.empty_like(w, dtype=torch.int8) for w in weights]
        rounding = [Compensation(orient(remainder)) for remainder in remainders]
    batch = Batch(weights, grads, momenta, rounding, steps=[0] * count, numbers=range(count))
    backend = _HostSizing()
    with torch.no_grad(), META, _HostBytes() as memory:
        memory.ignore([*params, *grads, *(t for each in momenta for t in each.tensors.values())])
        update(batch, options, backend)
    most = max(memory.peak, FLOAT_BYTES * _update_floats(shape, f, compensated) if apart else 0)
    return most + FLOAT_BYTES * backend.packed


def _update_floats(shape: tuple[int, int], f: StateFormat, compensated: bool) -> int:
    """Of the update of a large weight in half precision by Muon's own step.

    By parts, for each of which all panels of X are decoded again: a step without data would take
    minutes. The operator, X or a panel of it, low-rank factors, a part of the update and the two
    that torch converts to float32 to add it; or this part and the one before, and a companded copy
    of a panel.
    """
    m, n = sorted(shape)
    sizes = (SCRATCH_FLOATS, SCRATCH_FLOATS // 2)
    panel, part = (min(m, max(1, size // n)) * n for size in sizes)
    adds = part + _compensating_floats(part // n, n) if compensated else 3 * part
    adding = max(adds, 2 * part + (panel if f.companded_scale else 0))
    return m * m + (m * n if f.spectral else panel) + f.rank(m, n) * (m + n) + adding


def _compensating_floats(height: int, n: int) -> int:
    """Of adding such a part of an update to weights with remainders."""
    weight, remainder, update_part = (
        torch.empty(height, n, dtype=dtype, device=META)
        for dtype in (torch.bfloat16, torch.int8, torch.float32)
    )
    with _HostBytes() as memory:
        memory.ignore([weight, remainder, update_part])
        Compensation(remainder).update(weight, update_part, 1.0, 1.0)
    return memory.peak // FLOAT_BYTES


class _HostBytes(LiveBytes):
    """`LiveBytes` of a step that reads flags and factors: all is finite, no factor is zero."""

    # On CPUs a reduction to another dtype converts half precision as well.
    converts = (torch.float16, torch.bfloat16, torch.float32)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1.0
        return super().__torch_dispatch__(func, types, args, kwargs)


class _HostSizing(SizingBackend):
    """Allocates like the C++ adapter and computes nothing.

    packed: the most words of 4 bytes that a product packed so far.
    """

    # In torch's operations.
    scaled = Backend.scaled

    name = "host sizing"
    asynchronous = False

    def __init__(self) -> None:
        here = get_backend("auto", torch.device("cpu"))
        self.rounded_dtype, self.gram_aspect = here.rounded_dtype, here.gram_aspect
        self.fast_code_product = here.fast_code_product
        self._tiles = cpu.unavailable_reason() is None and cpu.isa() == "amx"
        self.packed = 0
        self._updated: set[torch.Size] = set()

    def product(self, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        """See `Backend.product`."""
        steps = self._steps(a.shape[-1], options)
        self._pack(a, _packed(a.shape[-2], b.shape[-1], steps))
        return super().product(a, b, **options)

    def symmetric_product(self, a: Tensor, b: Tensor | None = None, **options: Any) -> Tensor:
        """See `Backend.symmetric_product`."""
        unit = _TILE if self._tiles and options.get("rounded") else 1
        operands = 1 if b is None and unit == 1 else 2
        steps = self._steps(a.shape[-1], options)
        self._pack(a, _packed_symmetric(a.shape[-2], steps, operands, unit))
        return super().symmetric_product(a, b, **options)

    def _steps(self, depth: int, options: dict[str, Any]) -> int:
        """Words along k: floats, or two bfloat16, in whole tiles where there are any."""
        if not options.get("rounded") or self.rounded_dtype is None:
            return depth
        unit = _TILE if self._tiles else 1
        return -(-depth // (2 * unit)) * unit

    def _pack(self, a: Tensor, floats: int) -> None:
        together = min(math.prod(a.shape[:-2]), torch.get_num_threads())
        self.packed = max(self.packed, together * floats)

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        return codes.scales.new_empty(*codes.packed.shape[:-1], codes.packed.shape[-2])

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        return a.new_empty(*a.shape[:-1], codes.columns) if out is None else out

    def _add_inverses(
        self, x: Tensor, poles: Sequence[float], weights: Sequence[float], out: Tensor
    ) -> None:
        m, threads = x.shape[-1], torch.get_num_threads()
        several = math.prod(x.shape[:-2]) * len(poles)
        together = 1 if m > cpu.SIDE_BY_SIDE and threads > 2 else min(several, threads)
        x.new_empty(together, m * (-(-m // _STRIP) + 1) * _STRIP + _inverse_spare(m))

    def update_weight(self, weight: Tensor, update: Tensor, **options: Any) -> None:
        """See `Backend.update_weight`: torch's operations, of whose many parts one tells."""
        if weight.shape not in self._updated:
            self._updated.add(weight.shape)
            Backend.update_weight(self, weight, update, **options)


def _packed(rows: int, columns: int, steps: int) -> int:
    """Words that a product [rows, steps] x [steps, columns] packs: the smaller factor, and a block
    of the other for each thread."""
    small = -(-min(rows, columns) // _STRIP) * _STRIP
    large = -(-max(rows, columns) // _STRIP) * _STRIP
    return small * steps + torch.get_num_threads() * _STREAM * min(_STREAM, large)


def _packed_symmetric(size: int, steps: int, operands: int, unit: int) -> int:
    """Words that a symmetric product packs of one or two factors [size, steps], in whole units."""
    rows = -(-size // _STRIP) * _STRIP
    most = max(_STREAM, _PACKED_WORDS // (operands * rows))
    even = -(-steps // max(1, -(-steps // most)))
    return operands * rows * -(-even // unit) * unit


def _inverse_spare(m: int) -> int:
    """Floats that an inverse takes beside its matrix (csrc/cpu/inverse.cpp)."""
    if m <= _SMALL_INVERSE:
        return 0
    first = -(-(m // 2) // _STRIP) * _STRIP
    return first * (m - first) + max(_inverse_spare(first), _inverse_spare(m - first))
