"""Time and peak memory of one optimizer step over matrices of SmolLM2-135M, layer by layer.

    python -m bench.step [--quick] [--layers N] [--repeats N] [--json FILE]
    python -m bench.step --shape 1024 4096        one matrix instead

Peers: torch.optim.Muon as shipped (bfloat16 Newton-Schulz) and full-precision Muon with the same
iteration in float32. A torch without native bfloat16 products is what most CPUs have; on one that
has them, ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI shows the others. Peak memory is what a step
allocates above parameters, gradients and state: what torch's profiler counts and, added to it, the
most that the C++ products held at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness import interleaved, medians, write_json
from lowbit_muon import Muon
from lowbit_muon.backends.cpu import take_most_workspace
from lowbit_muon.benchmark.momentum import decaying_matrix

# One layer of SmolLM2-135M (config.json of HuggingFaceTB/SmolLM2-135M): q, k, v, o, gate, up, down.
LAYER_SHAPES = (
    (576, 576),
    (192, 576),
    (192, 576),
    (576, 576),
    (1536, 576),
    (1536, 576),
    (576, 1536),
)
LAYERS = 4  # of 30 (210 matrices): with all of them five rounds take more than 400 s on two cores
SHIPPED, FULL = "torch.optim.Muon", "fp32 Newton-Schulz"
FORMATS = ("fp32", "mulaw4", "spectral4", "spectral3", "muonq4", "linear8")
STORED = ("spectral4",)  # also with ns_input="stored"


class FullPrecisionMuon(torch.optim.Optimizer):
    """torch.optim.Muon's step with its Newton-Schulz iteration in float32."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step with Nesterov momentum."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                momentum: Tensor = state["momentum_buffer"]
                momentum.lerp_(param.grad, 1 - group["momentum"])
                update = newton_schulz(param.grad.lerp(momentum, group["momentum"]))
                param.mul_(1 - group["lr"] * group["weight_decay"])
                ratio = max(1.0, param.shape[0] / param.shape[1]) ** 0.5
                param.add_(update, alpha=-group["lr"] * ratio)


def newton_schulz(x: Tensor) -> Tensor:
    """Five steps of Muon's iteration, as torch.optim.Muon writes them, in float32."""
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.addmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x


Shapes = Sequence[tuple[int, int]]


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Parameters with gradients whose spectrum falls as a momentum's does."""
    generator = torch.Generator().manual_seed(0)
    grads = {shape: decaying_matrix(*shape, generator) for shape in sorted(set(shapes))}
    result = []
    for shape in shapes:
        param = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        # Each matrix has its own gradient: no cache is shared between them.
        param.grad = grads[shape] * torch.empty(shape).uniform_(0.5, 1.5, generator=generator)
        result.append(param)
    return result


def optimizers(shapes: Shapes) -> dict[str, torch.optim.Optimizer]:
    """Every variant on parameters of its own."""
    made: dict[str, torch.optim.Optimizer] = {
        SHIPPED: torch.optim.Muon(parameters(shapes)),
        FULL: FullPrecisionMuon(parameters(shapes)),
    }
    for name in FORMATS:
        made[name] = Muon(parameters(shapes), state_format=name, nesterov=name != "muonq4")
    for name in STORED:
        made[f"{name}, stored"] = Muon(parameters(shapes), state_format=name, ns_input="stored")
    return made


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Real storage of an optimizer's state."""
    return sum(
        value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest total of allocations that are alive at once during a call."""
    take_most_workspace()
    with torch.profiler.profile(profile_memory=True) as profile:
        step()
    # Events come in order of time; each allocation and release is one of its own.
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + take_most_workspace()


def check() -> None:
    """Raise unless ours is nearer to the float32 step than torch.optim.Muon as shipped is."""
    steps = {}
    for name, make in (
        (FULL, FullPrecisionMuon),
        (SHIPPED, torch.optim.Muon),
        ("ours", lambda params: Muon(params, state_format="fp32")),
    ):
        params = parameters(LAYER_SHAPES)
        make(params).step()
        steps[name] = [param.detach() for param in params]
    for full, shipped, ours in zip(*steps.values(), strict=True):
        if not (ours - full).norm() < (shipped - full).norm():
            raise SystemExit(f"our fp32 step of a {tuple(full.shape)} matrix is not precise")


def measure(shapes: Shapes, repeats: int) -> list[dict[str, Any]]:
    """One row for each optimizer."""
    made = optimizers(shapes)
    seconds = medians(interleaved({name: o.step for name, o in made.items()}, repeats))
    largest = 4 * max(rows * columns for rows, columns in shapes)
    rows = []
    for name, optimizer in made.items():
        rows.append(
            {
                "optimizer": name,
                "seconds": seconds[name],
                "against shipped": seconds[name] / seconds[SHIPPED],
                "against full": seconds[name] / seconds[FULL],
                "state bytes": state_bytes(optimizer),
                "peak bytes": (peak := peak_bytes(optimizer.step)),
                "peak / largest matrix": peak / largest,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """The results as a table."""
    table = Table(title=title)
    for heading in ("optimizer", "seconds", f"x {SHIPPED}", f"x {FULL}", "state MiB", "peak"):
        table.add_column(heading, justify="left" if heading == "optimizer" else "right")
    for row in rows:
        table.add_row(
            row["optimizer"],
            f"{row['seconds']:.3f}",
            f"{row['against shipped']:.2f}",
            f"{row['against full']:.2f}",
            f"{row['state bytes'] / 2**20:.1f}",
            f"{row['peak / largest matrix']:.1f}",
        )
    console.print(table)
    console.print("peak: allocations of one step, in units of the largest matrix in float32")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="time of one optimizer step over SmolLM2-135M")
    parser.add_argument("--quick", action="store_true", help="two layers, three rounds")
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--shape", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    layers, repeats = (2, 3) if options.quick else (options.layers, options.repeats)
    if options.shape:
        shapes: Shapes = [(options.shape[0], options.shape[1])]
        title = f"one step of one matrix {options.shape[0]}x{options.shape[1]}"
    else:
        shapes = LAYER_SHAPES * layers
        title = f"one step over {len(shapes)} matrices of SmolLM2-135M"
    check()
    rows = measure(shapes, repeats)
    show(rows, title, Console())
    if options.json:
        write_json(
            options.json,
            {
                "title": title,
                "repeats": repeats,
                "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
                "rows": rows,
            },
        )


if __name__ == "__main__":
    main()
