"""Bytes that training takes with each optimizer: weights, gradients, state, step workspace."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.options import GROUP_DEFAULTS, apply_rule
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan import device_workspace, host_workspace

Shape = tuple[int, ...]
Device = Literal["cuda", "cpu"]
AdamKind = Literal["adamw", "adamw8bit"]

MUON = RULES["muon"]
TORCH_MUON, ADAMW, ADAMW8BIT = "torch.optim.Muon", "torch.optim.AdamW", "AdamW8bit"
# Formats from the most exact to the least, by README's error of the update in closed loop on real
# momentum. muonq4 is another update rule, and what has not been measured is not ranked.
EXACTNESS = (
    "fp32", "bf16", "spectral8", "mulaw8", "spectral4", "linear8", "mulaw4", "spectral3", "nf4",
    "spectral2",
)  # fmt: skip
# bitsandbytes 0.50, optim/optimizer.py, Optimizer2State.init_state: smaller tensors keep two
# float32 moments; larger ones two bytes an element, two float32 maxima for 256, and all share two
# maps of 256 float32.
_8BIT_ELEMENTS, _8BIT_BLOCK, _8BIT_MAPS = 4096, 256, 2 * 256 * 4
# Its CPU step is in torch operations. Measured with torch's profiler
# (test_plan_memory.py): bytes an element of the parameter that is being stepped, by dtype.
_8BIT_CPU_BYTES = {torch.float32: 20, torch.bfloat16: 24}


@dataclass(frozen=True)
class Routing:
    """Which parameters Muon takes and which AdamW, by shape, with how many there are.

    muon: (shape, whether all but the last two dimensions count matrices).
    """

    muon: Counter[tuple[Shape, bool]]
    aux: Counter[Shape]

    @property
    def muon_elements(self) -> int:
        return sum(math.prod(shape) * count for (shape, _), count in self.muon.items())

    @property
    def aux_elements(self) -> int:
        return sum(math.prod(shape) * count for shape, count in self.aux.items())

    @property
    def all_shapes(self) -> Counter[Shape]:
        """Of every parameter."""
        shapes = Counter(self.aux)
        for (shape, _), count in self.muon.items():
            shapes[shape] += count
        return shapes


def route(model: nn.Module) -> Routing:
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
    return Routing(muon, aux)


@dataclass(frozen=True)
class Plan:
    """One row of the table; sizes in bytes.

    momentum_bits: stored bits for each element of what Muon's momentum is kept of, or of both of
    AdamW's moments. workspace: the most that a step holds above the rest. activations: what the
    user says that they take; they are gone before the step, so the larger of the two counts.
    """

    name: str
    momentum_bits: float
    weights: int
    gradients: int
    state: int
    workspace: int
    activations: int

    @property
    def total(self) -> int:
        """The most of a training step."""
        temporary = max(self.workspace, self.activations)
        return self.weights + self.gradients + self.state + temporary


def make_plans(
    routing: Routing,
    dtype: torch.dtype,
    device: Device,
    aux: AdamKind,
    activations: int = 0,
    rule: UpdateRule = MUON,
) -> list[Plan]:
    """Every optimizer and every format that the rule takes, by total.

    dtype: of weights, gradients and the moments of torch's optimizers, which are like the
    parameter. aux: AdamW of what our Muon does not take; torch.optim.Muon goes with torch's.
    rule: of our Muon.
    """
    elements = routing.muon_elements + routing.aux_elements
    size = elements * dtype.itemsize

    def plan(name: str, bits: float, state: int, workspace: int) -> Plan:
        return Plan(name, bits, size, size, state, workspace, activations)

    everything = routing.all_shapes
    adam_bits = {
        kind: 8 * adam_state_bytes(everything, dtype, kind) / elements
        for kind in ("adamw", "adamw8bit")
    }
    plans = [
        plan(
            name,
            adam_bits[kind],
            adam_state_bytes(everything, dtype, kind),
            adam_step_bytes(everything, dtype, kind, device),
        )
        for name, kind in _ADAM_ROWS
    ]
    plans.append(
        plan(
            f"{TORCH_MUON} + AdamW",
            8 * dtype.itemsize,
            dtype.itemsize * routing.muon_elements + adam_state_bytes(routing.aux, dtype, "adamw"),
            max(
                max(torch_muon_step_bytes(shape, dtype) for shape, _ in routing.muon),
                adam_step_bytes(routing.aux, dtype, "adamw", device),
            ),
        )
    )
    other_state = adam_state_bytes(routing.aux, dtype, aux) + rule_state_bytes(routing, rule)
    aux_step = adam_step_bytes(routing.aux, dtype, aux, device)
    for name, state_format in PRESETS.items():
        if refusal(rule, state_format):
            continue
        state = muon_state_bytes(routing, state_format)
        plans.append(
            plan(
                name,
                8 * state / routing.muon_elements,
                state + other_state,
                max(aux_step, muon_step_bytes(routing, state_format, dtype, device, rule)),
            )
        )
    return sorted(plans, key=lambda plan: plan.total)


def refusal(rule: UpdateRule, state_format: StateFormat) -> str:
    """What `Muon` says of a rule that does not go with a format; empty if it does."""
    chosen = {"rule": rule, "state_format": state_format, "nesterov": not state_format.normalize}
    try:
        apply_rule({**GROUP_DEFAULTS, **chosen}, (), GROUP_DEFAULTS)
    except ValueError as error:
        return str(error)
    return ""


_ADAM_ROWS: tuple[tuple[str, AdamKind], ...] = ((ADAMW, "adamw"), (ADAMW8BIT, "adamw8bit"))


def muon_state_bytes(routing: Routing, state_format: StateFormat) -> int:
    """Stored momenta of all matrices that Muon takes, from the format's real layout."""
    return sum(
        count * _matrices(shape, stack)[0] * _stored_bytes(_matrices(shape, stack)[1], state_format)
        for (shape, stack), count in routing.muon.items()
    )


def rule_state_bytes(routing: Routing, rule: UpdateRule) -> int:
    """What the rule keeps of all these matrices beside their momenta."""
    total = 0
    for (shape, stack), count in routing.muon.items():
        matrices, one = _matrices(shape, stack)
        kept = rule.state(one).values()
        sizes = (math.prod(each.shape) * each.dtype.itemsize for each in kept)
        total += count * matrices * sum(sizes)
    return total


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
) -> int:
    """The most that our Muon holds in a step above weights, gradients and state."""
    workspace = host_workspace if device == "cpu" else device_workspace
    return max(
        workspace.muon_step_bytes(shape, count, state_format, dtype, rule, stack=stack)
        for (shape, stack), count in routing.muon.items()
    )


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


def fitting(plans: Sequence[Plan], device_memory: int) -> Iterator[Plan]:
    """The plans that fit, smallest first."""
    return (plan for plan in plans if plan.total <= device_memory)
