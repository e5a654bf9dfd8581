"""What to do: the row to take, or what to change where nothing fits, as a command and as code."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence

import torch

from lowbit_muon.tools.plan.memory import MUON, Routing
from lowbit_muon.tools.plan.plans import (
    EXACTNESS,
    Plan,
    Setup,
    Working,
    our_plans,
    smallest_change,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
UNITS = {"B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("iB", 1024), ("", 1024), ("B", 1000))
}


def gibibytes(size: int) -> str:
    """A size in GiB: enough digits for small models, and six characters at most for large ones."""
    value = size / 2**30
    digits = 3 if value < 10 else 2 if value < 1000 else 0
    return f"{value:,.{digits}f}"


def most_exact(plans: Sequence[Plan], memory: int) -> Plan | None:
    """Of our formats that fit, the one whose momentum is the most exact."""
    found = {plan.name: plan for plan in plans if plan.total <= memory}
    return next((found[name] for name in EXACTNESS if name in found), None)


def verdict(plans: Sequence[Plan], memory: int) -> str:
    """What fits, in a sentence or two; plans by total."""
    smallest = plans[0]
    if smallest.total > memory:
        return (
            f"Nothing fits: the smallest, {smallest.name}, takes {gibibytes(smallest.total)} GiB, "
            f"{gibibytes(smallest.total - memory)} GiB too much."
        )
    sentence = f"Smallest: {smallest.name}, {gibibytes(smallest.total)} GiB."
    exact = most_exact(plans, memory)
    if exact is not None:
        sentence += (
            f" Most exact momentum of our formats that fits: {exact.name}, "
            f"{gibibytes(exact.total)} GiB, {gibibytes(memory - exact.total)} GiB left."
        )
    return sentence


@dataclasses.dataclass(frozen=True)
class Advice:
    """A setup that fits, and what it takes; `limit`: of the activations, if they must shrink."""

    setup: Setup
    plan: Plan
    limit: int | None = None


def advise(
    routing: Routing, setup: Setup, memory: int, working: Working = lambda _: None
) -> Advice | None:
    """What to change where nothing fits; None if nothing helps."""
    found = smallest_change(routing, setup, memory, working)
    if found is not None:
        return Advice(*found)
    without = dataclasses.replace(setup, activations=0)
    unchanged = next(our_plans(routing, without, EXACTNESS, memory, working), None)
    if unchanged is None:
        found = smallest_change(routing, without, memory, working)
    else:
        found = (without, unchanged)
    if not setup.activations or found is None:
        return None
    changed, plan = found
    limit = memory - plan.total  # beside a step's workspace, so that it does in any order
    return Advice(dataclasses.replace(changed, activations=limit), plan, limit)


def sentence(advice: Advice | None, setup: Setup, memory: int) -> str:
    """The advice in a sentence."""
    if advice is None:
        return (
            "Neither does anything with gradient release, offload, bf16 and LoRA together, as far "
            "as they apply."
        )
    if advice.limit is not None:
        return (
            f"{advice.plan.name} would fit with {gibibytes(advice.limit)} GiB of activations: "
            "measure them with activation checkpointing, or with fewer tokens at once."
        )
    before, after = flags(setup), flags(advice.setup)
    added = " ".join(flag for flag in after if flag not in before)
    dropped = " ".join(flag for flag in before if flag not in after)
    parts = [f"add {added}" if added else "", f"leave out {dropped}" if dropped else ""]
    plan = advice.plan
    return (
        f"Smallest change after which something fits: {' and '.join(filter(None, parts))}. "
        f"{plan.name} then takes {gibibytes(plan.total)} GiB, "
        f"{gibibytes(memory - plan.total)} GiB are left."
    )


def flags(setup: Setup) -> list[str]:
    """The options of `lowbit-muon plan` for a setup, each with its value."""
    usual = Setup()
    values = {
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == setup.dtype),
        "device": setup.device,
        "aux-adam": setup.aux_adam,
        "rule": setup.rule.name,
        "lora": setup.lora,
    }
    defaults = ("bf16", usual.device, usual.aux_adam, MUON.name, None)
    found = [
        f"--{name}={value}"
        for (name, value), default in zip(values.items(), defaults, strict=True)
        if value != default
    ]
    if setup.activations:
        found.append(f"--activations={exact_size(setup.activations)}")
    switches = ("gradient_release", "offload", "compensation")
    return found + [f"--{n.replace('_', '-')}" for n in switches if getattr(setup, n)]


def command(model: str, memory: int, setup: Setup) -> str:
    """A command line that plans a setup."""
    return shlex.join(
        ["lowbit-muon", "plan", model, f"--device-memory={exact_size(memory)}", *flags(setup)]
    )


def exact_size(size: int) -> str:
    """A size as `parse_size` reads it, without rounding and in the largest unit that does."""
    unit, factor = max(
        ((unit, factor) for unit, factor in UNITS.items() if size % factor == 0),
        key=lambda each: each[1],
    )
    return f"{size // factor}{unit}"


def script(setup: Setup, plan: Plan, *, converts: bool) -> Iterator[str]:
    """Lines of Python that train so. converts: the weights are to have another dtype than now."""
    if converts:
        yield f"model.to({setup.dtype})"
    if setup.lora is not None:
        config = f'peft.LoraConfig(r={setup.lora}, target_modules="all-linear")'
        yield f"model = peft.get_peft_model(model, {config})"
    options = {"state_format": plan.name, "aux_adam": setup.aux_adam}
    if setup.rule != MUON:
        options["rule"] = setup.rule.name
    given = [f'{name}="{value}"' for name, value in options.items()]
    given += [f"{name}=True" for name in ("offload", "compensation") if getattr(setup, name)]
    yield f"optimizer = MuonWithAuxAdam(model, {', '.join(given)})"
    if setup.rule.needs("inputs"):
        yield "attach_layer_inputs(model, optimizer)"
    if setup.gradient_release:
        yield "attach_gradient_release(model, optimizer)"
