"""The `plan` command: what training a model takes with each optimizer, and what fits."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.step.rules.inputs import InputWhitened
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.tools.arguments import whole_number
from lowbit_muon.tools.console import (
    TABLE_WIDTH,
    Column,
    add_wide,
    make_table,
    plain_console,
    printable,
    show_table,
)
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.output import check_outputs, write_json
from lowbit_muon.tools.plan.advice import (
    DTYPES,
    UNITS,
    Advice,
    advise,
    command,
    gibibytes,
    most_exact,
    script,
    sentence,
    verdict,
)
from lowbit_muon.tools.plan.memory import (
    MUON,
    Routing,
    layer_input_bytes,
    route,
    rule_state_bytes,
)
from lowbit_muon.tools.plan.model_shapes import ModelShapes, read_model
from lowbit_muon.tools.plan.plans import Plan, Setup, make_plans, refusal, trained
from lowbit_muon.tools.progress import LogLines

DESCRIPTION = """Show the memory that training a model takes with torch.optim.Muon, AdamW, 8-bit
AdamW and each momentum format, and what fits; if nothing does, the smallest change after which
something does, with exit status 1. Nothing is loaded: a config.json or the headers of a checkpoint
say enough. Activations are not counted; give their size with --activations, as measured with
activation checkpointing if you train with it. Sizes: 24GiB and 24G are 24 * 2^30 bytes (so are
nvidia-smi's), 24GB is 24 * 10^9; a size needs its unit."""

_SIZE = re.compile(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z]*)\s*")
_PLAN_FIELDS = (
    "momentum_bits", "weights", "gradients", "state", "workspace", "total", "host",
)  # fmt: skip
_OPTIONS = (
    "activations", "dtype", "device", "aux_adam", "gradient_release", "offload",
    "compensation", "lora",
)  # fmt: skip


def parse_size(text: str) -> int:
    """Bytes of "24GiB", "24G", "24GB", "8192MiB" or "1.5 TB"; G is 2^30, as for GNU's tools.

    Raises argparse.ArgumentTypeError, for a number without a unit, too.
    """
    match = _SIZE.fullmatch(text)
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise argparse.ArgumentTypeError(
            "expected a size with its unit, such as 24GiB or 24G (2^30 bytes each), 24GB (10^9) "
            f"or 8192MiB, got {text[:80]!r}"
        )
    return round(float(match[1]) * units[match[2].lower()])


def parse_rule(text: str) -> UpdateRule:
    """The rule of a name. Raises argparse.ArgumentTypeError."""
    try:
        return resolve_rule(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("rule: ")) from None


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
        help="what may be used, such as 24GiB, 24G (the same) or 24GB (a little less)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="weights and gradients (bf16)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="how steps are taken (cuda)"
    )
    parser.add_argument(
        "--aux-adam",
        choices=("adamw8bit", "adamw"),
        default="adamw8bit",
        help="AdamW beside Muon, torch's and ours: embeddings, heads, norms, biases (adamw8bit)",
    )
    parser.add_argument(
        "--rule",
        type=parse_rule,
        default=MUON,
        metavar="NAME",
        help="update rule of our Muon, as in lowbit_muon.RULES, or newton_muon() (muon)",
    )
    parser.add_argument(
        "--activations", type=parse_size, default=0, metavar="SIZE", help="most of them (0)"
    )
    parser.add_argument(
        "--gradient-release", action="store_true", help="as by attach_gradient_release"
    )
    parser.add_argument("--offload", action="store_true", help="momentum in host memory (GPUs)")
    parser.add_argument(
        "--compensation", action="store_true", help="8 more bits for bf16 weights, a byte each"
    )
    parser.add_argument(
        "--lora",
        type=whole_number(2, 2**16),
        metavar="RANK",
        help="train adapters of this rank on all linear layers, in fp32, and nothing else",
    )
    add_wide(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    parser.set_defaults(run=run_plan)


def run_plan(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 if nothing fits."""
    check_outputs([("--json", arguments.json)], [arguments.model])
    setup, memory = _setup(arguments), arguments.device_memory
    console = plain_console()
    if not console.is_terminal:
        console.width = TABLE_WIDTH
    show = functools.partial(console.print, soft_wrap=False)
    log = LogLines(show)
    shapes = read_model(arguments.model)
    log.offer(f"read {printable(shapes.source)}")
    routing = route(shapes.model, tied=shapes.tied)
    _check_layers(routing, setup.rule)

    def working(name: str) -> None:
        log.offer(f"looking for the most that a step with {name} holds")

    plans = make_plans(routing, setup, working)
    taken = trained(routing, setup)[0]
    whose = "of them" if setup.lora is None else "beside them, adapters,"
    rest = f"AdamW the other {routing.aux_elements:,}" if setup.lora is None else "they stay"
    show(
        f"{printable(shapes.source)}: {shapes.elements:,} parameters in {arguments.dtype}. Muon "
        f"takes {taken.muon_elements:,} {whose} in {sum(taken.muon.values()):,} tensors, {rest}."
    )
    table = plans_table(plans, memory, setup.rule.name, wide=arguments.wide)
    show_table(console, table, wide=arguments.wide)
    show(verdict(plans, memory))
    fits = plans[0].total <= memory
    advice = None if fits else advise(routing, setup, memory, working)
    if not fits:
        show(sentence(advice, setup, memory))
    best = most_exact(plans, memory)
    if best is not None:
        _show_lines(console, script(setup, best, converts=False))
    if advice is not None:
        _show_lines(console, [command(str(arguments.model), memory, advice.setup)])
        converts = advice.setup.dtype != setup.dtype
        _show_lines(console, script(advice.setup, advice.plan, converts=converts))
    for note in (*_notes(setup, arguments.aux_adam), *_rule_notes(taken, setup.rule)):
        show(note)
    if arguments.json is not None:
        write_json(arguments.json, _as_json(shapes, taken, plans, advice, arguments))
    return 0 if fits else 1


def _check_layers(routing: Routing, rule: UpdateRule) -> None:
    """Raise UserError for matrices that `attach_layer_inputs` would refuse."""
    others = [shape for shape, _ in routing.muon if len(shape) != 2]
    if rule.needs("inputs") and others:
        raise UserError(
            f"--rule: expected a rule that does not look at what layers read, got {rule.name}, "
            f"since a parameter of size {others[0]} is no linear layer's"
        )


def _setup(arguments: argparse.Namespace) -> Setup:
    """What the options say. Raises UserError for one that would make no difference."""
    if arguments.offload and arguments.device == "cpu":
        raise UserError("--offload: expected --device cuda, got cpu, which has no other memory")
    if arguments.compensation and (arguments.dtype == "fp32" or arguments.lora is not None):
        got = "--lora, which trains fp32" if arguments.lora is not None else "--dtype fp32"
        raise UserError(f"--compensation: expected bf16 weights that are trained, got {got}")
    if arguments.gradient_release and arguments.rule.needs("inputs"):
        raise UserError(
            "--gradient-release: expected a rule that does not look at what layers read, got "
            f"{arguments.rule.name}"
        )
    return Setup(
        DTYPES[arguments.dtype],
        arguments.device,
        arguments.aux_adam,
        arguments.activations,
        arguments.rule,
        arguments.gradient_release,
        arguments.offload,
        arguments.compensation,
        arguments.lora,
    )


def _show_lines(console: Console, lines: Iterable[str]) -> None:
    """Lines to copy: never broken."""
    for line in lines:
        console.print(f"  {printable(line)}", soft_wrap=True)


def plans_table(plans: Sequence[Plan], device_memory: int, rule: str, *, wide: bool) -> Table:
    """A row for each plan, and whether it fits."""
    columns = (
        Column("optimizer", text=True), Column("bits", wide=True), Column("weights"),
        Column("gradients"), Column("state"), Column("workspace"), Column("total"), Column("fits"),
        Column("on the host", wide=True),
    )  # fmt: skip
    rows = [
        (
            plan.name,
            f"{plan.momentum_bits:.2f}",
            *map(gibibytes, (plan.weights, plan.gradients, plan.state, plan.workspace, plan.total)),
            "yes" if plan.total <= device_memory else "no",
            gibibytes(plan.host),
        )
        for plan in plans
    ]
    title = (
        f"one training step, our formats with rule {rule}, in GiB; "
        f"{gibibytes(device_memory)} to fit in"
    )
    return make_table(title, columns, rows, wide=wide)


def _notes(setup: Setup, aux_adam: str) -> Iterator[str]:
    yield f"Muons, torch's and ours (by the format's name alone), have {aux_adam} for the rest."
    if not setup.activations:
        yield "Activations are NOT counted: add them with --activations SIZE."
    elif setup.gradient_release:
        yield (
            f"Activations: {gibibytes(setup.activations)} GiB as given. With gradient release our "
            "formats step in the backward pass: theirs are added to the workspace."
        )
    else:
        yield (
            f"Activations: {gibibytes(setup.activations)} GiB as given; they are released before "
            "the step, so the larger of them and the workspace is in the total."
        )
    yield (
        "Workspace: of the C++ backend, by a step without data; tests hold it to measured peaks."
        if setup.device == "cpu"
        else "Workspace on a GPU is an estimate from the code's own allocations; not counted are "
        "the CUDA context, libraries' workspaces and the allocator's fragmentation."
    )
    names = ("gradient_release", "offload", "compensation")
    ours = [f"--{name.replace('_', '-')}" for name in names if getattr(setup, name)]
    if ours:
        yield f"{', '.join(ours)}: in the rows of our formats, which alone have it."


def _rule_notes(routing: Routing, rule: UpdateRule) -> Iterator[str]:
    kept = rule_state_bytes(routing, rule)
    if kept:
        yield f"state: {gibibytes(kept)} GiB of it are what {rule.name} keeps beside the momentum."
    inputs = layer_input_bytes(routing, rule)
    if isinstance(rule.gradient, InputWhitened):
        yield (
            f"Not counted: what layers read, x^T x in float32 from forward pass to step, and its "
            f"decompositions. Layers take turns of {rule.gradient.every} steps, in each of which "
            f"the former is about {gibibytes(inputs // rule.gradient.every)} GiB."
        )
    for name, reason in _refusals(rule).items():
        yield f"{name} is left out: {reason}"


def _refusals(rule: UpdateRule) -> dict[str, str]:
    """Why formats have no row, by name."""
    found = {name: refusal(rule, state_format) for name, state_format in PRESETS.items()}
    return {name: reason for name, reason in found.items() if reason}


def _as_json(
    shapes: ModelShapes,
    routing: Routing,
    plans: Sequence[Plan],
    advice: Advice | None,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Sizes in bytes."""
    memory = arguments.device_memory
    return {
        "model": shapes.source,
        "parameters": shapes.elements,
        "muon_elements": routing.muon_elements,
        "aux_elements": routing.aux_elements,
        "device_memory": memory,
        **{name: getattr(arguments, name) for name in _OPTIONS},
        "rule": arguments.rule.name,
        "rule_state": rule_state_bytes(routing, arguments.rule),
        "refused": _refusals(arguments.rule),
        "plans": [
            {
                "optimizer": plan.name,
                **{name: getattr(plan, name) for name in _PLAN_FIELDS},
                "fits": plan.total <= memory,
            }
            for plan in plans
        ],
        "change": None
        if advice is None
        else {
            "command": command(str(arguments.model), memory, advice.setup),
            "optimizer": advice.plan.name,
            "total": advice.plan.total,
        },
    }
