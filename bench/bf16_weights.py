"""What becomes of small updates of bfloat16 weights: a fine-tune of SmolLM2-135M in four ways.

    python -m bench.bf16_weights [--quick] [--json FILE]

Weights in float32, with products in bfloat16 all the same; in bfloat16 with updates rounded to
nearest; with stochastic rounding; with compensation. Muon takes the matrices (`linear8`, whose step
is the shortest); AdamW, which rounds to nearest in all three, the embedding and the norms. Reported
are the held-out loss and the share of Muon's weights that are at the end what they were at the
start. Runs go to the JSON file as they end; the same command continues an interrupted benchmark.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness import write_json
from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.finetune.training import FinetuneRun

# name -> the weights' dtype, options of Muon's groups
WAYS: dict[str, tuple[torch.dtype, dict[str, bool]]] = {
    "float32": (torch.float32, {}),
    "to nearest": (torch.bfloat16, {}),
    "stochastic rounding": (torch.bfloat16, {"stochastic_rounding": True}),
    "compensation": (torch.bfloat16, {"compensation": True}),
}
RATES = (5e-5, 2e-4)  # Trainer's default and the one recommended here


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="bfloat16 weights and small updates")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one rate, three steps")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--held-out-tokens", type=int, default=32768)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    parser.add_argument("--json", type=Path, help="read and continue the results here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.model, options.rates, options.seeds = "tiny", RATES[-1:], 1
        options.steps, options.held_out_tokens = 3, 1024
    console = Console()
    rows: list[dict[str, Any]] = []
    if options.json and options.json.exists():
        rows = json.loads(options.json.read_text())["results"]
    for seed in range(options.seeds):
        for rate in options.rates:
            for way in WAYS:
                settings = FinetuneSettings(
                    model=options.model, lr=rate, seed=seed, steps=options.steps,
                    held_out_tokens=options.held_out_tokens, save_every=0, sample_tokens=0,
                    eval_before=False, precision="bf16", format="linear8",
                )  # fmt: skip
                plan = {
                    "way": way, "lr": rate, "seed": seed, "steps": options.steps,
                    "model": options.model, "held_out_tokens": options.held_out_tokens,
                }  # fmt: skip
                if any(plan.items() <= row.items() for row in rows):
                    continue
                rows.append({**plan, **fine_tune(settings, way, console)})
                if options.json:
                    write_json(options.json, rows)
    table = Table(*HEADINGS)
    for line in lines(rows):
        table.add_row(*line)
    console.print(table)


def fine_tune(settings: FinetuneSettings, way: str, console: Console) -> dict[str, float]:
    """Held-out loss after the steps, and the share of Muon's weights that have not changed."""
    dtype, own = WAYS[way]
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneRun(settings, Path(folder), console)
        run.model.to(dtype)
        muon = [group for group in run.optimizer.param_groups if group["use_muon"]]
        for group in muon:
            group.update(own)
        weights: list[Tensor] = [param for group in muon for param in group["params"]]
        before = [weight.detach().clone() for weight in weights]
        result = run.train()
    same = sum(
        int((weight == old).sum()) for weight, old in zip(weights, before, strict=True)
    ) / sum(old.numel() for old in before)
    return {"held_out_loss": result["held_out_after"], "unchanged": same}


HEADINGS = ("lr", "weights", "held-out loss by seed", "of Muon's weights unchanged")


def lines(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Cells for each rate and way: losses by seed, and the mean share of unchanged weights."""
    for lr, way in dict.fromkeys((row["lr"], row["way"]) for row in rows):
        found = [row for row in rows if (row["lr"], row["way"]) == (lr, way)]
        losses = ", ".join(f"{row['held_out_loss']:.4f}" for row in found)
        unchanged = statistics.fmean(row["unchanged"] for row in found)
        yield [f"{lr:g}", way, losses, f"{unchanged:.1%}"]


if __name__ == "__main__":
    main()
