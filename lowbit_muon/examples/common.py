"""What the examples share: the data that they read or draw, and how they show a comparison."""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowbit_muon import Muon
from lowbit_muon.tools.finetune.text import read_text
from lowbit_muon.tools.progress import LogLines

# state_format of Muon's momentum, or AdamW for everything.
METHODS = ("fp32", "spectral4", "adamw")
LABELS = {"fp32": "Muon, fp32", "spectral4": "Muon, 4 bits", "adamw": "AdamW"}
COLOURS = {"fp32": "black", "spectral4": "#0072B2", "adamw": "#E69F00"}  # of Okabe and Ito
KINDS = 8  # of shapes that `drawings` knows


@dataclass(frozen=True)
class Run:
    """The training loss of each step, and the bytes of the optimizer's state after the last."""

    losses: list[float]
    state_bytes: int

    @property
    def final_loss(self) -> float:
        """Mean of the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])


# (method, learning rate, steps, seed) -> Run
Train = Callable[[str, float, int, int], Run]


def trapezoid(step: int, steps: int) -> float:
    """Factor of the learning rate in step 0, 1, ...: ten steps up, then 1, the last 40% down."""
    return min(1.0, (step + 1) / 10, (steps - step) / (0.4 * steps))


def counts(steps: int, method: str) -> Iterator[int]:
    """0, 1, ... below `steps`, with a line of progress every so often."""
    lines = LogLines(functools.partial(print, flush=True))
    for step in range(steps):
        lines.offer(f"{LABELS[method]}: step {step} of {steps}")
        yield step


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state."""
    if isinstance(optimizer, Muon):
        return optimizer.state_bytes()
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


@functools.cache
def bible() -> Tensor:
    """The excerpt of the King James Bible that comes with the package; bytes, int64 [n]."""
    return torch.tensor(list(read_text("").encode()), dtype=torch.int64)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Pieces of a text, from anywhere in it; int64 [count, length]."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def drawings(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """White shapes on black, each anywhere, of any size and angle, and the kind of each.

    float32 [count, 1, size, size] of -1 and 1; int64 [count], below KINDS.
    """
    kind = torch.randint(KINDS, (count,), generator=generator)
    places = torch.rand(4, count, 1, 1, generator=generator)
    radius, angle = 0.4 + 0.3 * places[2], 2 * torch.pi * places[3]
    axis = torch.linspace(-1, 1, size)
    right = (axis[None, :] - 0.5 * (places[0] - 0.5)) / radius
    down = (axis[:, None] - 0.5 * (places[1] - 0.5)) / radius
    x, y = (angle.cos() * right + angle.sin() * down, angle.cos() * down - angle.sin() * right)
    x_size, y_size, distance = x.abs(), y.abs(), torch.hypot(x, y)
    square = torch.maximum(x_size, y_size)
    shapes = (
        distance < 1,
        (distance < 1) & (distance > 0.6),
        square < 0.9,
        (square < 0.9) & (square > 0.55),
        (square < 1) & (torch.minimum(x_size, y_size) < 0.3),
        (x_size < 1) & (y_size < 0.4),
        (y < 0.6) & (y > 2 * x_size - 1),  # a triangle
        (distance < 1) & (y > 0),
    )
    images = torch.stack(shapes)[kind, torch.arange(count)]
    return 2.0 * images[:, None] - 1, kind


def compare(title: str, train: Train, rates: Mapping[str, float], steps: int) -> None:
    """The command line of an example: train by each method, print a table, draw a picture."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0, help="of weights and data")
    parser.add_argument("--plot", type=Path, help="loss over steps, SVG or PNG; needs matplotlib")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps: expected a whole number above 0, got {options.steps}")
    torch.set_num_threads(1)  # as small as the models are, more threads gain nothing
    runs = {name: train(name, rates[name], options.steps, options.seed) for name in METHODS}
    print(table(title, runs, rates))
    if options.plot:
        plot(options.plot, title, runs)


def table(title: str, runs: Mapping[str, Run], rates: Mapping[str, float]) -> str:
    """A line for each method: its rate, the loss at the end, and the state."""
    lines = [title, f"{'':14}{'rate':>8}{'loss':>9}{'state KiB':>12}"]
    for name, run in runs.items():
        kib = run.state_bytes / 1024
        lines.append(f"{LABELS[name]:14}{rates[name]:8g}{run.final_loss:9.4f}{kib:12,.1f}")
    return "\n".join(lines)


def plot(path: Path, title: str, runs: Mapping[str, Run]) -> None:
    """Loss over steps, a running mean of a twentieth of them, with bytes of state in the legend."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        width = max(1, len(run.losses) // 20)
        smooth = torch.tensor(run.losses).unfold(0, width, 1).mean(dim=1)
        label = f"{LABELS[name]}: {run.state_bytes / 1024:,.0f} KiB of state"
        x = range(width, len(run.losses) + 1)
        axes.plot(x, smooth.tolist(), label=label, color=COLOURS[name], linewidth=1.2)
    axes.set(xlabel="step", ylabel="training loss", title=title)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Letters stay letters, and nothing in the file depends on the day: equal runs, equal files.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "lowbit_muon"}):
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, metadata=metadata)
