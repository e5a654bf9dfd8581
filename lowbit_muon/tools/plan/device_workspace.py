"""Memory of a Muon step on a GPU, found by running the step itself on tensors without data.

Nothing is computed: parameters, gradients and state lie on torch's "meta" device, where operations
only allocate, and the kernels are replaced by `SizingBackend`, which allocates what the Triton
adapters allocate (results, int8 limbs, decoded columns). A dispatch mode adds up the storages that
are alive. What it cannot see: workspaces inside cuBLAS and cuSOLVER, and the allocator's rounding
and fragmentation. So this is an estimate; no GPU has confirmed it.
"""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.formats.codebook import Codebook, CodeLayout
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.state.parameter import ParameterStep, matrix_views, write_matrix
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.batches import DEVICE_ELEMENTS, step_parameters
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.stage import Stage
from lowbit_muon.step.update import StepOptions

META = torch.device("meta")
# Of the Triton kernels of integer products (backends/triton/kernels/{gram,limbs,levels}.py, which a
# machine without Triton cannot import; a test compares them): columns of a chunk that is read as
# codes, by bits, and what limbs and decoded columns are rounded up to.
CHUNK_COLUMNS = {2: 256, 3: 512, 4: 128}
LIMB_COLUMNS, LEVEL_COLUMNS = 64, 128
_MOST_TRACED = 64  # parameters of a batch
# What stages call the rounds of what they repeat, and how many are enough to see their memory.
_ROUNDS, _MOST_ROUNDS = {"rounds", "power_rounds"}, 2
_REDUCTIONS = (torch.ops.aten.sum, torch.ops.aten.linalg_vector_norm)


class LiveBytes(TorchDispatchMode):
    """Adds up the "meta" storages that operations create while they are alive.

    live, peak: bytes now, and the most so far. converts: dtypes of which a reduction to another one
    converts its argument first, whatever that other one is.
    """

    # ATen/native/ReduceOpsUtils.h, make_reduction: on a GPU all pairs of dtypes but half precision
    # to float32 go through `self.to(dtype)`.
    converts: tuple[torch.dtype, ...] = (torch.float32,)

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Sequence[Tensor]) -> None:
        """Do not count storages that existed before."""
        self._known.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.is_meta:
                self._count(leaf.untyped_storage())
        self.peak = max(self.peak, self.live + self._hidden_bytes(func, args, kwargs))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _hidden_bytes(self, func: Any, args: Any, kwargs: dict[str, Any]) -> int:
        """The converted copy that a reduction to another dtype makes of its argument."""
        dtype = kwargs.get("dtype")
        if dtype is None or func.overloadpacket not in _REDUCTIONS or args[0].dtype == dtype:
            return 0
        if dtype == torch.float32 and args[0].dtype not in self.converts:
            return 0
        return args[0].numel() * dtype.itemsize


class SizingBackend(Backend):
    """A backend that allocates like the Triton adapters and computes nothing."""

    name = "sizing"
    asynchronous = True

    def quantize(
        self, x: Tensor, codebook: Codebook, layout: CodeLayout, *, packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `Backend.quantize`."""
        if scales is None:
            scales = x.new_empty(*x.shape[:-1], layout.blocks(x.shape[-1]))
        return self.encode(x, scales, codebook, layout, packed=packed), scales

    def encode(
        self, x: Tensor, scales: Tensor, codebook: Codebook, layout: CodeLayout, *,
        packed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Backend.encode`."""
        size = (*x.shape[:-1], layout.row_bytes(x.shape[-1]))
        return x.new_empty(size, dtype=torch.uint8) if packed is None else packed

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        """See `Backend.accumulate`."""
        return buffer.new_empty(buffer.shape[:-1], dtype=torch.float64)

    def update_codes(
        self, terms: Terms, *, packed: Tensor, scales: Tensor, out: Tensor | None = None,
        out_weights: tuple[float, float] = (1.0, 0.0),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """See `Backend.update_codes`."""
        squares = packed.new_empty(2, *packed.shape[:-1], dtype=torch.float64)
        return squares[0], squares[1]

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        """See `Backend.rotate`."""

    def code_gram(self, codes: PackedCodes) -> Tensor:
        """See `Backend.code_gram`."""
        one_scale = codes.layout.effective_block(codes.columns) == codes.columns
        out = codes.scales.new_empty(*codes.packed.shape[:-1], codes.packed.shape[-2])
        _decoded_levels(codes, _packed_columns(codes) if one_scale else 0)
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        """See `Backend.code_product`."""
        if out is None:
            out = a.new_empty(*a.shape[:-1], codes.columns)
        padded = -(-a.shape[-1] // LIMB_COLUMNS) * LIMB_COLUMNS
        limbs = a.new_empty(2, *a.shape[:-1], padded, dtype=torch.int8)
        _decoded_levels(codes, _packed_columns(codes))
        del limbs
        return out

    def product(
        self, a: Tensor, b: Tensor, *, out: Tensor | None = None, addend: Tensor | None = None,
        alpha: float | Tensor = 1.0, beta: float = 0.0, active: Tensor | None = None,
        rounded: bool = False, diagonal: int | None = None,
    ) -> Tensor:  # fmt: skip
        """See `Backend.product`."""
        return a.new_empty(*a.shape[:-1], b.shape[-1]) if out is None else out

    def symmetric_product(
        self, a: Tensor, b: Tensor | None = None, *, addend: Tensor | None = None,
        alpha: float = 1.0, beta: float = 1.0, other: Tensor | None = None, gamma: float = 1.0,
        identity: float = 0.0, out: Tensor | None = None, active: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:  # fmt: skip
        """See `Backend.symmetric_product`."""
        return a.new_empty(*a.shape[:-1], a.shape[-2]) if out is None else out

    def combined(
        self, coefficients: Sequence[Sequence[float]], terms: Sequence[Tensor], *,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """See `Backend.combined`."""
        return [torch.empty_like(terms[0]) for _ in coefficients] if out is None else list(out)

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        """See `Backend.scaled`."""
        return out

    def update_weight(
        self, weight: Tensor, update: Tensor, *, decay: Tensor, step_size: Tensor,
        seed: Tensor | None = None, cautious: bool = False,
    ) -> None:  # fmt: skip
        """See `Backend.update_weight`."""


def _packed_columns(codes: PackedCodes) -> int:
    """Columns that the kernels read as codes; the others are decoded to int8 first."""
    chunk = CHUNK_COLUMNS.get(codes.layout.bits)
    return 0 if chunk is None else codes.columns // chunk * chunk


def _decoded_levels(codes: PackedCodes, first: int) -> Tensor:
    """int8 [.., m, n'] for the columns from `first` on."""
    padded = -(-(codes.columns - first) // LEVEL_COLUMNS) * LEVEL_COLUMNS
    return codes.packed.new_empty(*codes.packed.shape[:-1], padded, dtype=torch.int8)


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
    """Most bytes that a step of `count` parameters of one shape holds above weights, gradients and
    state.

    stack: all but the last two dimensions count matrices (`batch_experts`). compensation: as for
    `Muon`.
    """
    matrices = math.prod(shape[:-2]) if stack else 1
    elements = max(1, math.prod(shape) // matrices)
    # No batch is larger, so parameters beyond these only repeat it (`step.batches`).
    count = min(count, math.ceil(max(1, DEVICE_ELEMENTS // elements) / matrices))
    options = {"batch_experts": stack, "compensation": compensation}
    size = partial(_step_bytes, shape, state_format, dtype, rule, options)
    return extrapolated(size, count)


def batch_size(shape: tuple[int, int], state_format: StateFormat) -> int:
    """Matrices that one batch takes at most (`step.batches`)."""
    m, n = sorted(shape)
    return max(1, DEVICE_ELEMENTS // (m * n + (3 * m * m if state_format.spectral else 0)))


def extrapolated(size: Callable[[int], int], count: int) -> int:
    """size(count) of a batch, of which each more takes as much as the one before."""
    if count <= _MOST_TRACED:
        return size(count)
    most, half = size(_MOST_TRACED), size(_MOST_TRACED // 2)
    return most + (count - _MOST_TRACED) * (most - half) // (_MOST_TRACED // 2)


def planned_group(
    params: Sequence[nn.Parameter], state_format: StateFormat, rule: UpdateRule, **options: Any
) -> dict[str, Any]:
    """The parameters as a group of our Muon, with what its rule and format bring."""
    group = {"params": list(params), **options}
    nesterov = False if state_format.normalize else None
    muon = Muon([group], rule=_shortened(rule), state_format=state_format, nesterov=nesterov)
    return muon.param_groups[0]


def _shortened(rule: UpdateRule) -> UpdateRule:
    """The rule with fewer rounds of what its stages repeat, which takes as much memory in each."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if isinstance(value, Stage):
            changes[field.name] = _shortened_stage(value)
        elif field.name in ("precondition", "scaling"):
            changes[field.name] = tuple(map(_shortened_stage, value))
    return dataclasses.replace(rule, **changes)


def _shortened_stage(stage: Stage) -> Stage:
    names = {field.name for field in dataclasses.fields(stage)} & _ROUNDS
    return dataclasses.replace(stage, **{n: min(_MOST_ROUNDS, getattr(stage, n)) for n in names})


def _step_bytes(
    shape: Sequence[int],
    state_format: StateFormat,
    dtype: torch.dtype,
    rule: UpdateRule,
    options: dict[str, bool],
    count: int,
) -> int:
    """Of a step of so many parameters, with these options of their group."""
    params = [nn.Parameter(torch.empty(*shape, dtype=dtype, device=META)) for _ in range(count)]
    group, backend = planned_group(params, state_format, rule, **options), SizingBackend()
    steps: list[ParameterStep] = []
    existing: list[Tensor] = []
    for number, param in enumerate(params):
        views = matrix_views(param, group)
        state: dict[str, Any] = {"step": 0, "skipped": 0}
        for view in views:
            kept = rule.state(view.shape)
            matrix = QuantizedMatrix.zeros(
                view.shape, state_format, seed=0, device=META, rule_state=kept
            )
            write_matrix(state, view, matrix)
        if options.get("compensation"):
            state["remainder"] = torch.empty(shape, dtype=torch.int8, device=META)
        grad = torch.empty_like(param)
        steps.append(ParameterStep(param, grad, state, views, number, state_format, backend))
        existing += [param, grad, *(v for v in state.values() if isinstance(v, Tensor))]
    with torch.no_grad(), LiveBytes() as memory:
        memory.ignore(existing)
        step_parameters(steps, StepOptions.from_group(group), group)
    return memory.peak
