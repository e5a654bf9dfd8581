"""What training with an optimizer will hold, before its first step: by the sizes of `plan`."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from torch.optim import Optimizer

from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.state.parameter import matrix_views, resolve_group_format
from lowbit_muon.state.placement import shape_only
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.tools.console import MIB, Column, make_table
from lowbit_muon.tools.plan.memory import Routing
from lowbit_muon.tools.plan.plans import TORCH_MUON, Plan, Setup, our_plan, plans_of_others

Group = dict[str, Any]

EXPLANATION = """\
weights, gradients, state: bytes of what the optimizer steps; workspace: the most that a step \
holds above them; all as `lowbit-muon plan` finds them. Activations and other optimizers are not \
counted."""


def needs(optimizer: Optimizer, *, released: bool, other_format: str) -> list[Plan]:
    """What an optimizer will hold from its first step on, as it is and, of torch's Muon, as ours.

    released: gradients are released in the backward pass. other_format: of our Muon in the place of
    torch's.
    """
    if isinstance(optimizer, Muon):
        return [_together(type(optimizer).__name__, _own_plans(optimizer, released), released)]
    theirs, ours = [], []
    for group in optimizer.param_groups:
        for setup, params in _alike(group["params"], Setup(gradient_release=released)):
            routing = Routing(Counter((tuple(p.shape), False) for p in params), Counter())
            theirs += [p for p in plans_of_others(routing, setup) if p.name == TORCH_MUON]
            ours.append(our_plan(routing, setup, PRESETS[other_format]))
    return [_together(TORCH_MUON, theirs, released), _together(other_format, ours, released)]


def _own_plans(optimizer: Muon, released: bool) -> list[Plan]:
    """Of each Muon group, and of all that AdamW takes together."""
    plans = []
    aux: dict[Setup, Counter[tuple[int, ...]]] = {}
    for group in optimizer.param_groups:
        if not group.get("use_muon", True):
            usual = Setup(gradient_release=released, aux_adam=group["aux_adam"])
            for setup, params in _alike(group["params"], usual):
                aux.setdefault(setup, Counter()).update(tuple(p.shape) for p in params)
            continue
        usual = Setup(
            rule=resolve_rule(group["rule"]),
            gradient_release=released,
            offload=group["offload"],
            compensation=group["compensation"],
        )
        for setup, params in _alike(group["params"], usual):
            shapes = Counter(shape for param in params for shape in _matrices(param, group))
            plans.append(
                our_plan(Routing(shapes, Counter()), setup, _largest_format(group, shapes))
            )
    fp32 = PRESETS["fp32"]  # of no matrix
    return plans + [
        our_plan(Routing(Counter(), shapes), setup, fp32) for setup, shapes in aux.items()
    ]


def _alike(params: Sequence[Tensor], usual: Setup) -> list[tuple[Setup, list[Tensor]]]:
    """The parameters by setup: `usual`, with their dtype and device."""
    found: dict[Setup, list[Tensor]] = {}
    for param in params:
        on_cpu = param.device.type == "cpu"
        setup = dataclasses.replace(
            usual,
            dtype=param.dtype,
            device="cpu" if on_cpu else "cuda",
            offload=usual.offload and not on_cpu,
            compensation=usual.compensation and param.dtype != torch.float32,
        )
        found.setdefault(setup, []).append(param)
    return list(found.items())


def _matrices(param: Tensor, group: Group) -> list[tuple[tuple[int, ...], bool]]:
    """As `Routing.muon` has them: a parameter, or the matrices that its rows are split into."""
    if group["row_splits"] is None:
        return [(tuple(param.shape), group["batch_experts"] and param.ndim > 2)]
    return [(view.shape, False) for view in matrix_views(shape_only(param), group)]


def _largest_format(group: Group, shapes: Counter[tuple[tuple[int, ...], bool]]) -> StateFormat:
    """The group's format; of an automatic choice, the one that would take most."""
    found = resolve_group_format(group)
    if not isinstance(found, AutoFormat):
        return found
    return max(found.formats, key=lambda each: each.bits)


def _together(name: str, plans: Sequence[Plan], released: bool) -> Plan:
    """One row of parts that are stepped one after the other."""
    gradients = [plan.gradients for plan in plans]
    return Plan(
        name,
        math.nan,  # of several formats
        sum(plan.weights for plan in plans),
        max(gradients, default=0) if released else sum(gradients),
        sum(plan.state for plan in plans),
        max((plan.workspace for plan in plans), default=0),
        max((plan.temporary for plan in plans), default=0),
        sum(plan.host for plan in plans),
    )


def needs_table(plans: Sequence[Plan], *, wide: bool) -> Table:
    """A row for each plan, in MiB."""
    columns = (
        Column("before the first step", text=True), Column("weights"), Column("gradients"),
        Column("state"), Column("workspace"), Column("at most"), Column("on the host", wide=True),
    )  # fmt: skip
    rows = [
        (
            plan.name,
            *(
                f"{size / MIB:,.1f}"
                for size in (
                    plan.weights, plan.gradients, plan.state, plan.workspace, plan.total, plan.host
                )
            ),
        )
        for plan in plans
    ]  # fmt: skip
    return make_table("what a run will need, in MiB", columns, rows, wide=wide)
