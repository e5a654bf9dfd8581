"""What preconditioned rules take: bytes an element and time of a step, beside AdamW and Muon.

    python -m bench.preconditioned [--quick] [--repeats N] [--json FILE]

The matrices of one layer of SmolLM2-135M, gradients whose spectrum falls as a momentum's does. A
sample is the mean of ten steps, since bases are found anew every ten, by each parameter in a step
of its own; the first step, which finds all, is not in it, nor are Conda's decompositions, which
come every 2000 steps. Each rule is there with all states in float32, and with its momentum in
`spectral4` and the others in 8 bits.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from bench.harness import interleaved, medians, write_json
from bench.shapes import MODELS, Shape
from bench.step import parameters, state_bytes
from lowbit_muon import RULES, Muon

PRECONDITIONED = ("soap", "soap_muon", "conda", "cosmos", "aro", "mousse")
STEPS = 10
QUICK: tuple[Shape, ...] = ((24, 40), (40, 24))


def optimizers() -> dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]]:
    """By name: AdamW, Muon, and the rules in both ways."""

    def ours(rule: str, bits: int, state_format: str) -> Any:
        chosen = RULES[rule].with_state_bits(bits)
        return lambda params: Muon(params, lr=1e-3, rule=chosen, state_format=state_format)

    found: dict[str, Any] = {"adamw": lambda params: torch.optim.AdamW(params)}
    for rule in ("muon", *PRECONDITIONED):
        found[f"{rule}, float32"] = ours(rule, 32, "fp32")
        found[f"{rule}, spectral4"] = ours(rule, 8, "spectral4")
    return found


def measure(shapes: Sequence[Shape], repeats: int) -> dict[str, dict[str, float]]:
    """name -> seconds of a step, its ratio to that of Muon in float32, bytes an element."""
    cases, bytes_of = {}, {}
    for name, make in optimizers().items():
        params = parameters(shapes)
        optimizer = make(params)
        optimizer.step()
        bytes_of[name] = state_bytes(
            optimizer, params, [p.grad for p in params if p.grad is not None]
        )

        def steps(optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(STEPS):
                optimizer.step()

        cases[name] = steps
    found = medians(interleaved(cases, repeats, warmup=1))
    elements = sum(rows * columns for rows, columns in shapes)
    return {
        name: {
            "seconds": seconds / STEPS,
            "ratio": seconds / found["muon, float32"],
            "bytes": bytes_of[name] / elements,
        }
        for name, seconds in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--quick", action="store_true", help="two small matrices")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds that count")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = measure(QUICK if options.quick else MODELS["smollm2"].matrices, options.repeats)
    table = Table(title="a step of one layer of SmolLM2-135M")
    for heading in ("", "ms", "x Muon, float32", "bytes an element"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, row in rows.items():
        figures = f"{1e3 * row['seconds']:.1f}", f"{row['ratio']:.2f}", f"{row['bytes']:.2f}"
        table.add_row(name, *figures)
    Console().print(table)
    if options.json:
        write_json(options.json, rows)


if __name__ == "__main__":
    main()
