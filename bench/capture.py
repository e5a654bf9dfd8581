"""Gradients of a training run, step by step, for `bench.fidelity` and `bench.predictors`.

    python -m bench.capture [--width 64] [--skip 100] [--steps 80] [--out FILE]

Trains `bench.training`'s byte-level GPT, of any width, with full-precision Muon at the rate and
schedule found best there, and keeps two matrices' gradients in bfloat16 from step `skip` on. The
recording in the repository is what the defaults make; 256 wide is sixteen times its size and takes
a minute or two.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.training.methods import BASELINE, METHODS, make_optimizer
from bench.training.models import CONTEXT, make_model
from bench.training.run import SEQUENCES, factor, set_learning_rates
from bench.training.text import corpus
from lowbit_muon.state.stored import orient

SHIPPED = Path(__file__).with_name("data") / "gpt64.safetensors"
# A square matrix and a wide one, in the middle of the network.
MATRICES = ("blocks.2.query.weight", "blocks.2.up.weight")
# The plan of `bench.training` for fp32 Muon.
RATE, STEPS, SEED, HELD_OUT_BYTES = 1e-2, 500, 0, 65536


def record(width: int, skip: int, steps: int, console: Console) -> dict[str, Tensor]:
    """name -> gradients [steps, short side, long side], bfloat16."""
    text, _ = corpus(HELD_OUT_BYTES, CONTEXT)
    model = make_model("gpt", SEED, width)
    optimizer = make_optimizer(model, METHODS[BASELINE], RATE, SEED)
    parameters = {name: model.get_parameter(name) for name in MATRICES}
    kept: dict[str, list[Tensor]] = {name: [] for name in MATRICES}
    for step in track(range(skip + steps), f"{width} wide", console=console, transient=True):
        set_learning_rates(optimizer, RATE, factor(step, STEPS))
        model.loss(text.batch(step, SEQUENCES, SEED)).backward()
        if step >= skip:
            for name, parameter in parameters.items():
                assert parameter.grad is not None
                kept[name].append(orient(parameter.grad).to(torch.bfloat16, copy=True))
        optimizer.step()
        optimizer.zero_grad()
    return {name: torch.stack(grads) for name, grads in kept.items()}


def load(path: Path = SHIPPED) -> dict[str, Tensor]:
    """A recording as float32."""
    return {name: grads.float() for name, grads in load_file(path).items()}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="record gradients of a small GPT's training")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--skip", type=int, default=100, help="steps before the first recorded one")
    parser.add_argument("--steps", type=int, default=80, help="recorded steps")
    parser.add_argument("--out", type=Path, default=SHIPPED)
    options = parser.parse_args(arguments)
    found = record(options.width, options.skip, options.steps, Console())
    options.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"model": "bench.training's gpt", "width": options.width, "skip": options.skip}
    save_file(found, options.out, metadata={key: str(value) for key, value in about.items()})


if __name__ == "__main__":
    main()
