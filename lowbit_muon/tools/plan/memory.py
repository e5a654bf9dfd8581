"""Bytes of weights, optimizer state and a step's workspace, by shapes and formats."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.rules.inputs import InputWhitened
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan import device_workspace, host_workspace

Shape = tuple[int, ...]
Device = Literal["cuda", "cpu"]
AdamKind = Literal["adamw", "adamw8bit"]

MUON = RULES["muon"]
# bitsandbytes 0.50, optim/optimizer.py, Optimizer2State.init_state: smaller tensors keep two
# float32 moments; larger ones two bytes an element, two float32 maxima for 256, and all share two
# maps of 256 float32.
_8BIT_ELEMENTS, _8BIT_BLOCK, _8BIT_MAPS = 4096, 256, 2 * 256 * 4
# Its CPU step is in torch operations. Measured with torch's profiler
# (test_plan_memory.py): bytes an element of the parameter that is being stepped, by dtype; float16
# is taken to be like bfloat16.
_8BIT_CPU_BYTES = {torch.float32: 20, torch.bfloat16: 24, torch.float16: 24}


@dataclass(frozen=True)
class Routing:
    """Which parameters Muon takes and which AdamW, by shape, with how many there are.

    muon: (shape, whether all but the last two dimensions count matrices). tied: whether layers
    share a parameter, as an embedding and the output do.
    """

    muon: Counter[tuple[Shape, bool]]
    aux: Counter[Shape]
    tied: bool = False

    @property
    def muon_elements(self) -> int:
        return sum(math.prod(shape) * count for (shape, _), count in self.muon.items())

    @property
    def aux_elements(self) -> int:
        return sum(math.prod(shape) * count for shape, count in self.aux.items())

    @property
    def elements(self) -> int:
        return self.muon_elements + self.aux_elements

    @property
    def all_shapes(self) -> Counter[Shape]:
        """Of every parameter."""
        shapes = Counter(self.aux)
        for (shape, _), count in self.muon.items():
            shapes[shape] += count
        return shapes


def route(model: nn.Module, *, tied: bool = False) -> Routing:
    """As `muon_param_groups` divides the parameters. Raises UserError if it finds no matrices."""
    try:
        groups = muon_param_groups(model)
    except ValueError as error:
        raise UserError(f"MODEL: {error}") from None
    muon: Counter[tuple[Shape, bool]] = Counter()
    aux: Counter[Shape] = Counter()
    for group in groups:
        for param in group["params"]:
            if group["use_muon"]:
                muon[tuple(param.shape), group["batch_experts"]] += 1
            else:
                aux[tuple(param.shape)] += 1
    return Routing(muon, aux, tied)


def muon_state_bytes(routing: Routing, state_format: StateFormat) -> int:
    """Stored momenta of all matrices that Muon takes, from the format's real layout."""
    return sum(
        count * _matrices(shape, stack)[0] * _stored_bytes(_matrices(shape, stack)[1], state_format)
        for (shape, stack), count in routing.muon.items()
    )


def rule_state_bytes(routing: Routing, rule: UpdateRule) -> int:
    """What the rule keeps of all these matrices beside their momenta."""
    return sum(
        count * _matrices(shape, stack)[0] * _kept_bytes(_matrices(shape, stack)[1], rule)
        for (shape, stack), count in routing.muon.items()
    )


def layer_input_bytes(routing: Routing, rule: UpdateRule) -> int:
    """x^T x of what all layers read that the rule whitens by, in float32; 0 for other rules."""
    if not isinstance(rule.gradient, InputWhitened):
        return 0
    shapes = {each: _matrices(*each)[1] for each in routing.muon}
    return sum(
        4 * shapes[each][1] ** 2 * count
        for each, count in routing.muon.items()
        if rule.gradient.state(shapes[each])
    )


def _kept_bytes(shape: tuple[int, int], rule: UpdateRule) -> int:
    kept = rule.state(shape).values()
    return sum(math.prod(each.shape) * each.dtype.itemsize for each in kept)


def _matrices(shape: Shape, stack: bool) -> tuple[int, tuple[int, int]]:
    """(how many, their rows and columns) of one parameter, as `parameter_state` takes it."""
    if stack:
        return math.prod(shape[:-2]), (shape[-2], shape[-1])
    return 1, (shape[0], math.prod(shape[1:]))


@functools.lru_cache(maxsize=1024)
def _stored_bytes(shape: tuple[int, int], state_format: StateFormat) -> int:
    return QuantizedMatrix.zeros(shape, state_format, seed=0, device=device_workspace.META).nbytes


def muon_step_bytes(
    routing: Routing,
    state_format: StateFormat,
    dtype: torch.dtype,
    device: Device,
    rule: UpdateRule = MUON,
    *,
    compensation: bool = False,
) -> int:
    """The most that our Muon holds in a step above weights, gradients and state."""
    return max(
        (
            _step_bytes(device, shape, count, state_format, dtype, rule, stack, compensation)
            for (shape, stack), count in routing.muon.items()
        ),
        default=0,
    )


@functools.lru_cache(maxsize=4096)
def _step_bytes(
    device: Device,
    shape: Shape,
    count: int,
    state_format: StateFormat,
    dtype: torch.dtype,
    rule: UpdateRule,
    stack: bool,
    compensation: bool,
) -> int:
    """Of all parameters of one shape, once for all setups that have them."""
    workspace = host_workspace if device == "cpu" else device_workspace
    return workspace.muon_step_bytes(
        shape, count, state_format, dtype, rule, stack=stack, compensation=compensation
    )


def fetched_bytes(routing: Routing, state_format: StateFormat, rule: UpdateRule = MUON) -> int:
    """Offloaded momenta that are on the device at once: a batch and the next (`state.offload`)."""
    total = most = 0
    for (shape, stack), count in routing.muon.items():
        matrices, one = _matrices(shape, stack)
        stored = _stored_bytes(one, state_format) + _kept_bytes(one, rule)
        number = count * matrices
        total += stored * number
        most = max(most, stored * min(number, device_workspace.batch_size(one, state_format)))
    return min(total, 2 * most)


def torch_muon_step_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Of torch.optim.Muon (torch 2.13, optim/_muon.py), one matrix after another.

    Nesterov's update in the gradient's dtype, X in bfloat16 before and after an iteration, A and
    b A + c A^2. Taken for stacks as well, which torch.optim.Muon would not step.
    """
    _, (rows, columns) = _matrices(tuple(shape), len(shape) > 2)
    m = min(rows, columns)
    return rows * columns * (dtype.itemsize + 2 + 2) + 2 * 2 * m * m


def adam_state_bytes(shapes: Counter[Shape], dtype: torch.dtype, kind: AdamKind) -> int:
    """Two moments: of torch like the parameter, of bitsandbytes in 8 bits where it does so."""
    total, shared = 0, 0
    for shape, count in shapes.items():
        elements = math.prod(shape)
        if kind == "adamw":
            total += count * 2 * dtype.itemsize * elements
        elif elements < _8BIT_ELEMENTS:
            total += count * 2 * 4 * elements
        else:
            total += count * 2 * (elements + 4 * -(-elements // _8BIT_BLOCK))
            shared = _8BIT_MAPS
    return total + shared


def adam_step_bytes(
    shapes: Counter[Shape], dtype: torch.dtype, kind: AdamKind, device: Device
) -> int:
    """Workspace of an AdamW step.

    torch on a GPU (optim/adam.py, _multi_tensor_adam): the square roots of all second moments at
    once; on a CPU (_single_tensor_adam): two copies of one. bitsandbytes' kernels on a GPU: none.
    """
    if not shapes:
        return 0
    largest = max(math.prod(shape) for shape in shapes)
    if kind == "adamw":
        if device == "cpu":
            return 2 * dtype.itemsize * largest
        return dtype.itemsize * sum(math.prod(s) * count for s, count in shapes.items())
    if device == "cpu":
        return _8BIT_CPU_BYTES[dtype] * largest if largest >= _8BIT_ELEMENTS else 0
    return 0
