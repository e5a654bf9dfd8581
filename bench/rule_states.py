"""What keeping a rule's other states in 8 bits does to its updates, next to a momentum in 4 bits.

    python -m bench.rule_states [--json FILE] [--recording FILE]

Each rule that leaves the choice takes the gradients of a recorded run (`bench.capture`) three times
more: with what it keeps beside the momentum in 8 bits, with the momentum in `spectral4`, and with
both. All is stored in every step, so that errors add up; weights move, but nothing depends on them.
Printed is the norm of the differences to updates with all in float32, relative to those, over the
last 20 steps and all matrices. A diagnostic: `bench.training` says what it costs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.capture import SHIPPED
from bench.closed_loop import MEMORY
from bench.harness import write_json
from lowbit_muon import RULES, Muon, UpdateRule

# What is kept how: (bits of the other states, format of the momentum).
WAYS = {"8 bits": (8, "fp32"), "spectral4": (32, "spectral4"), "both": (8, "spectral4")}


def rules() -> list[str]:
    """Those that keep something in 8 bits, or in 32 if they are told to."""
    return [name for name, rule in RULES.items() if rule.with_state_bits(32) != rule]


def updates(rule: UpdateRule, state_format: str, grads: Tensor) -> tuple[Tensor, int]:
    """(the last updates [MEMORY, m, n], bytes of state) for gradients [steps, m, n]."""
    param = nn.Parameter(torch.zeros(grads.shape[1:]))
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, rule=rule, state_format=state_format)
    found = []
    for grad in grads.float():
        before = param.detach().clone()
        param.grad = grad
        optimizer.step()
        found.append(before - param.detach())
    return torch.stack(found[-MEMORY:]), optimizer.state_bytes()


def compare(name: str, recording: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors by way of `WAYS`, and bits an element of the last matrix's state."""
    errors, sizes, row = dict.fromkeys(WAYS, 0.0), 0.0, {}
    for grads in recording.values():
        exact, _ = updates(RULES[name].with_state_bits(32), "fp32", grads)
        sizes += float(exact.square().sum())
        for way, (bits, state_format) in WAYS.items():
            made, nbytes = updates(RULES[name].with_state_bits(bits), state_format, grads)
            errors[way] += float((made - exact).square().sum())
            row[f"bits, {way}"] = 8 * nbytes / grads[0].numel()
    return row | {way: (error / sizes) ** 0.5 for way, error in errors.items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--recording", type=Path, metavar="FILE", default=SHIPPED)
    options = parser.parse_args(arguments)
    console = Console()
    recording = load_file(options.recording)
    found = {
        name: compare(name, recording)
        for name in track(rules(), "rules", console=console, transient=True)
    }
    table = Table(title="relative error of the updates, stored in every step")
    for heading in ("rule", *WAYS):
        table.add_column(heading, justify="left" if heading == "rule" else "right")
    for name, row in found.items():
        table.add_row(name, *(f"{row[way]:.3f}" for way in WAYS))
    console.print(table)
    if options.json:
        write_json(options.json, found)


if __name__ == "__main__":
    main()
