"""What training takes with each optimizer, and what to change where nothing fits."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.step.options import GROUP_DEFAULTS, apply_rule
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.memory import (
    MUON,
    AdamKind,
    Device,
    Routing,
    Shape,
    adam_state_bytes,
    adam_step_bytes,
    fetched_bytes,
    muon_state_bytes,
    muon_step_bytes,
    rule_state_bytes,
    torch_muon_step_bytes,
)

TORCH_MUON, ADAMW, ADAMW8BIT = "torch.optim.Muon", "torch.optim.AdamW", "AdamW8bit"
_ADAM_ROWS: tuple[tuple[str, AdamKind], ...] = ((ADAMW, "adamw"), (ADAMW8BIT, "adamw8bit"))
# Formats from the most exact to the least, by README's error of the update in closed loop on real
# momentum. muonq4 is another update rule, and what has not been measured is not ranked.
EXACTNESS = (
    "fp32", "bf16", "spectral8", "mulaw8", "spectral4", "linear8", "mulaw4", "spectral3", "nf4",
    "spectral2",
)  # fmt: skip
# Of the adapters that `smallest_change` proposes, a usual rank.
LORA_RANK = 16


@dataclass(frozen=True)
class Setup:
    """How a model is trained, whatever the optimizer.

    dtype: of weights, gradients and the moments of torch's optimizers, which are like the
    parameter. aux_adam: AdamW of what Muon does not take. activations: bytes, as the user says.
    lora: rank of PEFT's adapters, where nothing else is trained. rule, gradient_release, offload,
    compensation: of our Muon; the others have no such thing.
    """

    dtype: torch.dtype = torch.bfloat16
    device: Device = "cuda"
    aux_adam: AdamKind = "adamw8bit"
    activations: int = 0
    rule: UpdateRule = MUON
    gradient_release: bool = False
    offload: bool = False
    compensation: bool = False
    lora: int | None = None


@dataclass(frozen=True)
class Plan:
    """One row of the table; sizes in bytes.

    momentum_bits: stored bits for each element of what Muon's momentum is kept of, or of both of
    AdamW's moments. gradients: the most that there are at once. workspace: the most that a step
    holds above the rest. temporary: of it and activations together. host: what is offloaded.
    """

    name: str
    momentum_bits: float
    weights: int
    gradients: int
    state: int
    workspace: int
    temporary: int
    host: int = 0

    @property
    def total(self) -> int:
        """The most of a training step."""
        return self.weights + self.gradients + self.state + self.temporary


def adapters(routing: Routing, rank: int) -> Routing:
    """The two factors of each linear layer, as PEFT's target_modules="all-linear" adds them.

    Stacks of experts and convolutions have none. Raises UserError if nothing has.
    """
    muon: Counter[tuple[Shape, bool]] = Counter()
    for (shape, _), count in routing.muon.items():
        if len(shape) == 2:
            muon[(rank, shape[1]), False] += count
            muon[(shape[0], rank), False] += count
    if not muon:
        raise UserError("--lora: expected a model with linear layers for adapters, got none")
    return Routing(muon, Counter())


def trained(routing: Routing, setup: Setup) -> tuple[Routing, torch.dtype, int]:
    """What has gradients, their dtype, and the bytes of all weights."""
    weights = routing.elements * setup.dtype.itemsize
    if setup.lora is None:
        return routing, setup.dtype, weights
    # PEFT makes them float32 (autocast_adapter_dtype of get_peft_model).
    factors = adapters(routing, setup.lora)
    return factors, torch.float32, weights + 4 * factors.elements


Working = Callable[[str], None]  # called with what is planned next


def make_plans(routing: Routing, setup: Setup, working: Working = lambda _: None) -> list[Plan]:
    """Every optimizer and every format that the rule takes, by total."""
    ours = our_plans(routing, setup, PRESETS, working=working)
    plans = [*plans_of_others(routing, setup), *ours]
    return sorted(plans, key=lambda plan: plan.total)


def plans_of_others(routing: Routing, setup: Setup) -> Iterator[Plan]:
    """torch.optim.AdamW, bitsandbytes' AdamW8bit and torch.optim.Muon."""
    routing, dtype, weights = trained(routing, setup)
    gradients, everything = routing.elements * dtype.itemsize, routing.all_shapes

    def plan(name: str, bits: float, state: int, workspace: int) -> Plan:
        temporary = max(workspace, setup.activations)  # which are gone before the step
        return Plan(name, bits, weights, gradients, state, workspace, temporary)

    for name, kind in _ADAM_ROWS:
        state = adam_state_bytes(everything, dtype, kind)
        workspace = adam_step_bytes(everything, dtype, kind, setup.device)
        yield plan(name, 8 * state / routing.elements, state, workspace)
    yield plan(
        TORCH_MUON,
        8 * dtype.itemsize,
        dtype.itemsize * routing.muon_elements
        + adam_state_bytes(routing.aux, dtype, setup.aux_adam),
        max(
            max((torch_muon_step_bytes(shape, dtype) for shape, _ in routing.muon), default=0),
            adam_step_bytes(routing.aux, dtype, setup.aux_adam, setup.device),
        ),
    )


def our_plans(
    routing: Routing,
    setup: Setup,
    names: Iterable[str],
    at_most: float = math.inf,
    working: Working = lambda _: None,
) -> Iterator[Plan]:
    """Of these formats, those that the rule takes and that fit into `at_most` bytes."""
    for name in names:
        state_format = PRESETS[name]
        if refusal(setup.rule, state_format):
            continue
        held = _held(routing, setup, state_format)
        if held.total + setup.activations > at_most:
            continue  # without the time that its workspace takes
        working(name)
        plan = _stepped(held, routing, setup, state_format)
        if plan.total <= at_most:
            yield plan


def our_plan(routing: Routing, setup: Setup, state_format: StateFormat) -> Plan:
    """Of one format, which may be any that the rule takes."""
    return _stepped(_held(routing, setup, state_format), routing, setup, state_format)


def _held(routing: Routing, setup: Setup, state_format: StateFormat) -> Plan:
    """What is there between two steps."""
    routing, dtype, weights = trained(routing, setup)
    momentum = muon_state_bytes(routing, state_format)
    kept = momentum + rule_state_bytes(routing, setup.rule)
    state = adam_state_bytes(routing.aux, dtype, setup.aux_adam)
    if setup.compensation:
        state += routing.muon_elements
    return Plan(
        state_format.name,
        8 * momentum / max(1, routing.muon_elements),
        weights,
        _gradient_bytes(routing, dtype, setup.gradient_release),
        state + (0 if setup.offload else kept),
        0,
        0,
        kept if setup.offload else 0,
    )


def _stepped(held: Plan, routing: Routing, setup: Setup, state_format: StateFormat) -> Plan:
    """With what a step holds above it."""
    routing, dtype, _ = trained(routing, setup)
    workspace = _our_step_bytes(routing, state_format, dtype, setup)
    # A backward pass that steps has both at once.
    together = sum if setup.gradient_release else max
    return dataclasses.replace(
        held, workspace=workspace, temporary=together((workspace, setup.activations))
    )


def _gradient_bytes(routing: Routing, dtype: torch.dtype, release: bool) -> int:
    """With gradient release of the largest alone; of a tied embedding three times as many.

    The head's gradient waits until the embedding's comes, and torch adds them.
    """
    if not release:
        return dtype.itemsize * routing.elements
    largest = max(map(math.prod, routing.all_shapes))
    return dtype.itemsize * largest * (3 if routing.tied else 1)


def _our_step_bytes(
    routing: Routing, state_format: StateFormat, dtype: torch.dtype, setup: Setup
) -> int:
    """Of Muon and of AdamW, one after the other; with gradient release of one parameter alone."""
    if setup.gradient_release:
        routing = Routing(Counter(set(routing.muon)), Counter(set(routing.aux)))
        aux = max(
            (adam_step_bytes(Counter([shape]), dtype, setup.aux_adam, setup.device)
             for shape in routing.aux), default=0,
        )  # fmt: skip
    else:
        aux = adam_step_bytes(routing.aux, dtype, setup.aux_adam, setup.device)
    muon = muon_step_bytes(
        routing, state_format, dtype, setup.device, setup.rule, compensation=setup.compensation
    )
    if setup.offload:
        muon += fetched_bytes(routing, state_format, setup.rule)
    return max(aux, muon)


# What may be changed so that training fits, from what costs least to what costs most. One is
# proposed only where all before it together are not enough.
_CHANGES: tuple[dict[str, Any], ...] = (
    {"aux_adam": "adamw8bit"},
    {"gradient_release": True},
    {"compensation": False},
    {"offload": True},
    {"dtype": torch.bfloat16},
    {"lora": LORA_RANK, "compensation": False},
)


def smallest_change(
    routing: Routing, setup: Setup, memory: int, working: Working = lambda _: None
) -> tuple[Setup, Plan] | None:
    """The setup that changes least so that one of our formats fits, and the most exact that does.

    None if nothing fits.
    """
    changes = [change for change in _CHANGES if _changes(change, setup, routing)]
    for number in range(1, 2 ** len(changes)):
        chosen = (change for bit, change in enumerate(changes) if number >> bit & 1)
        changed = dataclasses.replace(setup, **functools.reduce(operator.or_, chosen))
        best = next(our_plans(routing, changed, EXACTNESS, memory, working), None)
        if best is not None:
            return changed, best
    return None


def _changes(change: dict[str, Any], setup: Setup, routing: Routing) -> bool:
    """Whether a change is one of this setup."""
    if "lora" in change:
        has_layers = any(len(shape) == 2 for shape, _ in routing.muon)
        return has_layers and (setup.lora is None or setup.lora > LORA_RANK)
    if "offload" in change and setup.device == "cpu":
        return False
    if "gradient_release" in change and setup.rule.needs("inputs"):
        return False
    return any(getattr(setup, name) != value for name, value in change.items())


def refusal(rule: UpdateRule, state_format: StateFormat) -> str:
    """What `Muon` says of a rule that does not go with a format; empty if it does."""
    chosen = {"rule": rule, "state_format": state_format}
    if state_format.normalize:
        chosen["nesterov"] = False
    try:
        apply_rule({**GROUP_DEFAULTS, **chosen}, chosen)
    except ValueError as error:
        return str(error)
    return ""
