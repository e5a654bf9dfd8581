"""The `plan` command: what training a model takes with each optimizer, and what fits."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.tools.console import make_table, plain_console, printable
from lowbit_muon.tools.output import check_outputs, write_json
from lowbit_muon.tools.plan.memory import (
    EXACTNESS,
    MUON,
    Plan,
    Routing,
    fitting,
    make_plans,
    refusal,
    route,
    rule_state_bytes,
)
from lowbit_muon.tools.plan.model_shapes import ModelShapes, read_model

DESCRIPTION = """Show the memory that training a model takes with torch.optim.Muon, AdamW, 8-bit
AdamW and each momentum format, and what fits. Nothing is loaded: a config.json or the headers of a
checkpoint say enough. Activations are not counted; give their size with --activations."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for unit, base in (("iB", 1024), ("B", 1000))
}
_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*")
_PLAN_FIELDS = ("momentum_bits", "weights", "gradients", "state", "workspace", "total")
_TABLE_WIDTH = 118  # where there is no terminal to ask


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24GB", "8192MiB" or "1.5 TB". Raises argparse.ArgumentTypeError."""
    match = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 24GiB, 24GB or 8192MiB, got {text[:80]!r}"
        )
    return round(float(match[1]) * units[match[2].lower()])


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> None:
    """Add `plan` to the command line."""
    parser = commands.add_parser("plan", help=help, description=DESCRIPTION)
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a Hugging Face config.json, a .safetensors file or index, or a folder with them",
    )
    parser.add_argument(
        "--device-memory",
        type=parse_size,
        required=True,
        metavar="SIZE",
        help="what may be used, such as 24GiB, 24GB or 8192MiB",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="weights and gradients (bf16)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="how steps are taken (cuda)"
    )
    parser.add_argument(
        "--aux",
        choices=("adamw8bit", "adamw"),
        default="adamw8bit",
        help="AdamW beside our Muon, for embeddings, heads, norms, biases (adamw8bit)",
    )
    parser.add_argument(
        "--rule",
        choices=tuple(RULES),
        default=MUON.name,
        metavar="NAME",
        help="update rule of our Muon, as in lowbit_muon.RULES (muon)",
    )
    parser.add_argument(
        "--activations", type=parse_size, default=0, metavar="SIZE", help="most of them (0)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    check_outputs([("--json", arguments.json)], [arguments.model])
    shapes = read_model(arguments.model)
    routing = route(shapes.model)
    plans = make_plans(
        routing,
        DTYPES[arguments.dtype],
        arguments.device,
        arguments.aux,
        arguments.activations,
        RULES[arguments.rule],
    )
    memory: int = arguments.device_memory
    console = plain_console()
    if not console.is_terminal:
        console.width = _TABLE_WIDTH
    _show_model(shapes, routing, arguments, console)
    console.print(_table(plans, memory, arguments.rule))
    console.print(verdict(plans, memory))
    console.print(_notes(arguments))
    for line in _rule_notes(routing, RULES[arguments.rule]):
        console.print(line)
    if arguments.json is not None:
        write_json(arguments.json, _as_json(shapes, routing, plans, arguments))
    return 0


def _show_model(
    shapes: ModelShapes, routing: Routing, arguments: argparse.Namespace, console: Console
) -> None:
    console.print(
        f"{printable(shapes.source)}: {shapes.elements:,} parameters in {arguments.dtype}"
    )
    console.print(
        f"Muon takes {routing.muon_elements:,} of them in {sum(routing.muon.values()):,} tensors, "
        f"AdamW the other {routing.aux_elements:,}"
    )


def _table(plans: Sequence[Plan], device_memory: int, rule: str) -> Table:
    table = make_table(
        f"one training step, our formats with rule {rule}, in GiB; "
        f"{gibibytes(device_memory)} to fit in",
        ("optimizer", "bits", "weights", "gradients", "state", "workspace", "total", "fits"),
    )
    for plan in plans:
        sizes = (plan.weights, plan.gradients, plan.state, plan.workspace, plan.total)
        table.add_row(
            plan.name,
            f"{plan.momentum_bits:.2f}",
            *(gibibytes(size) for size in sizes),
            "yes" if plan.total <= device_memory else "no",
        )
    return table


def gibibytes(size: int) -> str:
    """A size in GiB, with enough digits for small models."""
    return f"{size / 2**30:,.3f}" if size < 10 * 2**30 else f"{size / 2**30:,.2f}"


def verdict(plans: Sequence[Plan], device_memory: int) -> str:
    """What fits, in a sentence or two."""
    found = {plan.name: plan for plan in fitting(plans, device_memory)}
    if not found:
        least = plans[0]
        return (
            f"Nothing fits: the smallest, {least.name}, takes {gibibytes(least.total)} GiB, "
            f"{gibibytes(least.total - device_memory)} GiB too much."
        )
    smallest = next(iter(found.values()))
    sentence = f"Smallest: {smallest.name}, {gibibytes(smallest.total)} GiB."
    exact = next((found[name] for name in EXACTNESS if name in found), None)
    if exact is not None:
        sentence += (
            f" Most exact momentum of our formats that fits: {exact.name}, "
            f"{gibibytes(exact.total)} GiB, {gibibytes(device_memory - exact.total)} GiB left."
        )
    return sentence


def _notes(arguments: argparse.Namespace) -> str:
    if arguments.activations:
        activations = (
            f"Activations: {gibibytes(arguments.activations)} GiB as given; they are released "
            "before the step, so the larger of them and the workspace is in the total."
        )
    else:
        activations = "Activations are NOT counted: add them with --activations SIZE."
    workspace = (
        "Workspace: of the C++ backend, by a step without data; tests hold it to measured peaks."
        if arguments.device == "cpu"
        else "Workspace on a GPU is an estimate from the code's own allocations; not counted are "
        "the CUDA context, libraries' workspaces and the allocator's fragmentation."
    )
    return (
        f"{activations}\n{workspace}\n"
        "bits: stored for an element of the momentum (of both moments for AdamW); our formats, "
        f"by name alone, with {arguments.aux} for the rest."
    )


def _rule_notes(routing: Routing, rule: UpdateRule) -> Iterator[str]:
    kept = rule_state_bytes(routing, rule)
    if kept:
        yield f"state: {gibibytes(kept)} GiB of it are what {rule.name} keeps beside the momentum."
    for name, reason in _refusals(rule).items():
        yield f"{name} is left out: {reason}"


def _refusals(rule: UpdateRule) -> dict[str, str]:
    """Why formats have no row, by name."""
    found = {name: refusal(rule, state_format) for name, state_format in PRESETS.items()}
    return {name: reason for name, reason in found.items() if reason}


def _as_json(
    shapes: ModelShapes, routing: Routing, plans: Sequence[Plan], arguments: argparse.Namespace
) -> dict[str, Any]:
    """Sizes in bytes."""
    return {
        "model": shapes.source,
        "parameters": shapes.elements,
        "muon_elements": routing.muon_elements,
        "aux_elements": routing.aux_elements,
        "device_memory": arguments.device_memory,
        "activations": arguments.activations,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "aux": arguments.aux,
        "rule": arguments.rule,
        "rule_state": rule_state_bytes(routing, RULES[arguments.rule]),
        "refused": _refusals(RULES[arguments.rule]),
        "plans": [
            {
                "optimizer": plan.name,
                **{name: getattr(plan, name) for name in _PLAN_FIELDS},
                "fits": plan.total <= arguments.device_memory,
            }
            for plan in plans
        ],
    }
