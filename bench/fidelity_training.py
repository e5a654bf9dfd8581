"""How far each state format moves the update, on the momentum of the real fine-tune.

    python -m bench.fidelity_training [--quick] [--steps N] [--layers 2,14,27] [--json FILE]

Trains SmolLM2-135M with fp32 Muon as `lowbit-muon finetune` does and, beside it, runs the momentum
of every matrix of some layers through each format. Errors are relative, in the Frobenius norm,
averaged over the matrices after the last step:

    momentum   of the exact momentum, quantised once
    update     of its orthogonalisation (five Newton-Schulz steps), quantised once
    closed     of the update that the optimizer would take after storing its momentum in this
               format in every step, so that errors add up; with the cosine
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.closed_loop import relative_error
from bench.harness import write_json
from bench.peer_formats import MUONQ_TORCH_MOMENTUM
from lowbit_muon import PRESETS, QuantizedMatrix, orthogonalize, quantize
from lowbit_muon.backends import get_backend
from lowbit_muon.state.stored import orient
from lowbit_muon.step.options import GROUP_DEFAULTS
from lowbit_muon.step.update import Batch, StepOptions, update
from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.finetune.training import FinetuneRun

EXACT, BASELINE = "fp32", "muonq4"
FORMATS = {
    **{f"spectral{bits}": PRESETS[f"spectral{bits}"] for bits in (8, 4, 3, 2)},
    "mulaw4": PRESETS["mulaw4"],
    BASELINE: PRESETS[BASELINE],
    MUONQ_TORCH_MOMENTUM.name: MUONQ_TORCH_MOMENTUM,
    **{name: PRESETS[name] for name in ("nf4", "linear8", "mulaw8")},
}
# With lr -1 a step adds the update to weights of zeros.
OPTIONS = {**GROUP_DEFAULTS, "lr": -1.0, "weight_decay": 0.0, "ns_dtype": "float32"}


class Watched:
    """One parameter, its exact momentum and its momentum in every format."""

    def __init__(self, parameter: Tensor) -> None:
        self.parameter = parameter
        shape = (parameter.shape[0], parameter.shape[1])
        self.stored = {
            name: QuantizedMatrix.zeros(shape, state_format, seed=0, device=parameter.device)
            for name, state_format in {EXACT: PRESETS[EXACT], **FORMATS}.items()
        }
        self.updates: dict[str, Tensor] = {}

    def update(self) -> None:
        """One step in every format, from the parameter's gradient; the parameter is kept."""
        grad = self.parameter.grad
        assert grad is not None
        backend = get_backend("auto", grad.device)
        for name, momentum in self.stored.items():
            found = torch.zeros_like(grad, dtype=torch.float32)
            # As MuonQ is published, with its own normalisation and without Nesterov.
            options = StepOptions.from_group({**OPTIONS, "nesterov": name != BASELINE})
            update(Batch([found], [grad], [momentum], [None]), options, backend)
            self.updates[name] = found

    def errors(self) -> dict[str, dict[str, float]]:
        """The four figures of each format."""
        exact, step = orient(self.stored[EXACT].dequantize()), self.updates[EXACT]
        direction = orthogonalize(exact)
        found = {}
        for name, state_format in FORMATS.items():
            once, closed = quantize(exact, state_format).dequantize(), self.updates[name]
            found[name] = {
                "momentum": relative_error(once, exact),
                "update": relative_error(orthogonalize(once), direction),
                "closed": relative_error(closed, step),
                "cosine": float((closed * step).sum() / (closed.norm() * step.norm())),
            }
        return found


def measure(steps: int, layers: list[int], console: Console) -> dict[str, dict[str, float]]:
    """Means over the matrices, and bits per element, of each format."""
    settings = FinetuneSettings(
        format=EXACT, steps=steps, eval_before=False, sample_tokens=0, save_every=0
    )
    with tempfile.TemporaryDirectory() as folder:
        run = FinetuneRun(settings, Path(folder), console)
        prefixes = tuple(f"layers.{layer}." for layer in layers)
        watched = [
            Watched(parameter)
            for name, parameter in run.model.named_parameters()
            if name.removeprefix("model.").startswith(prefixes) and parameter.ndim == 2
        ]

        def before_step(*_: object) -> None:
            for matrix in watched:
                matrix.update()

        run.optimizer.register_step_pre_hook(before_step)
        for index in range(steps):
            console.print(f"step {index + 1} of {steps}: loss {run.step():.3f}")
    collected = [matrix.errors() for matrix in watched]
    elements = sum(matrix.parameter.numel() for matrix in watched)
    return {
        name: {
            "bits": 8 * sum(matrix.stored[name].nbytes for matrix in watched) / elements,
            **{
                figure: statistics.fmean(errors[name][figure] for errors in collected)
                for figure in collected[0][name]
            },
        }
        for name in FORMATS
    }


def show(results: dict[str, dict[str, float]], console: Console) -> None:
    """The results as a table."""
    table = Table(title="relative error on the momentum of the SmolLM2-135M fine-tune")
    headings = ("format", "bits", "momentum", "update", f"x {BASELINE}", "closed", "cosine")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "format" else "right")
    for name, row in results.items():
        table.add_row(
            name,
            f"{row['bits']:.2f}",
            f"{row['momentum']:.3f}",
            f"{row['update']:.3f}",
            f"{row['update'] / results[BASELINE]['update']:.2f}",
            f"{row['closed']:.3f}",
            f"{row['cosine']:.3f}",
        )
    console.print(table)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="error of each state format on real momentum")
    parser.add_argument("--quick", action="store_true", help="two steps, one layer")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--layers", default="2,14,27")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.layers = 2, "14"
    console = Console()
    results: dict[str, Any] = measure(
        options.steps, [int(layer) for layer in options.layers.split(",")], console
    )
    show(results, console)
    if options.json:
        write_json(options.json, {"steps": options.steps, "layers": options.layers, **results})


if __name__ == "__main__":
    main()
