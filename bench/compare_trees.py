"""Whether a change of the code changed what it does: this checkout against another one.

    python -m bench.compare_trees OLD_TREE [--what trajectories,time,memory] [--steps N]
        [--repeats N] [--formats NAME,..] [--shapes SHAPES,..] [--quick] [--json FILE]

OLD_TREE is a checkout of this project, of any layout, with its extension built. Each tree runs in
processes of its own (`bench/tree_worker.py`). It reports and does not judge: the exit status is 0
whatever differs.

trajectories: every preset, every option that changes an update, and every rule trains a few
    parameters from the same seeds, one thread. Weights and state are compared bit for bit. Where
    they differ, a row has the difference of a parameter's weights relative to how far the old tree
    moved them (of the parameter where it is largest), and of the state what differs by role: bytes
    of codes and remainders, the relative norm of the difference of other tensors; inf if it is not
    a number.
time: one step of the presets over lists of matrices, and of torch.optim.Muon in a process of this
    tree. They are timed in turn (`tools/benchmark/timing.py`). A call's time includes a message
    there and back, about 0.1 ms, of both trees alike. OMP_NUM_THREADS applies. --shapes takes
    ROWSxCOLUMNS, COUNTxROWSxCOLUMNS for that many matrices, and the names of `bench.shapes`.
memory: what a step holds at most above what is stored at its start.

The JSON file is {"machine": ..., "results": {"old": path, "new": path, "steps", "repeats",
"threads", "trajectories", "time", "memory"}}, the last three lists of `Trajectory`, `Timing` and
`Peak`, null if they were not asked for, as threads (of timing) without time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import pickle
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from bench.harness import FILE_WIDTH, interleaved, write_json
from bench.shapes import MODELS
from bench.tree_worker import TORCH_MUON
from lowbit_muon.tools.benchmark.report import significant
from lowbit_muon.tools.benchmark.timing import medians, spread

ROOT = Path(__file__).parents[1]
WHAT = ("trajectories", "time", "memory")
SAMPLE_SECONDS = 0.05  # of one sample: much more than a message takes

Shape = tuple[int, ...]

# Square, wide, tall, one row, one column, empty, 3-D and 4-D.
SMALL: tuple[Shape, ...] = (
    (48, 48), (32, 80), (80, 32), (1, 24), (24, 1), (0, 16), (6, 4, 3), (5, 3, 2, 4),
)  # fmt: skip
# Just above 2**20 elements, where formats that are not spectral are decoded panel by panel.
LONG: tuple[Shape, ...] = ((240, 4400), (4400, 240))
LARGE: tuple[Shape, ...] = ((1200, 1100),)
# For AdamW: 4096 elements are the fewest whose state bitsandbytes keeps in 8 bits.
AUX: tuple[Shape, ...] = ((17,), (100, 48))
# Of several matrices each: experts, and rows that are split.
EXPERTS: tuple[Shape, ...] = ((4, 24, 40), (2, 3, 12, 8), (24, 40))
FUSED: tuple[Shape, ...] = ((48, 40), (48, 90), (48, 2, 3))
SPLITS = (8, 24, 16)
# One with an encoder of its own, one with factors and panels, one with blocks.
OPTION_FORMATS = ("spectral4", "mulaw4", "linear8")
RULE_FORMAT = "spectral4"

SHAPE_LISTS = (
    "smollm2", "1024x4096", "1024x1024", "100x16x16", "100x64x64", "100x8x2048",
)  # fmt: skip
QUICK_SHAPE_LISTS = ("10x16x16",)
MEMORY_SHAPE, QUICK_MEMORY_SHAPE = (1024, 4096), (128, 512)

T = TypeVar("T")


class TreeError(RuntimeError):
    """A request that raised in a tree; the message ends in its traceback."""


_WORKER_ENVIRONMENT = {
    # Above all levels: torch's profiler would report each of its starts.
    "KINETO_LOG_LEVEL": "99",
    # glibc keeps freed memory. Else the places of blocks decide whether a step gives it back and
    # gets it again page by page: up to a tenth of its time, in one run or the other.
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
}


class Worker:
    """A process of one tree, which answers requests."""

    def __init__(self, name: str, tree: Path, threads: int | None = None) -> None:
        """Raises SystemExit for a path that is no tree with a built extension."""
        self.name = name
        refused = f"{name} tree: expected a checkout of lowbit_muon with its extension built, got "
        if not (tree / "lowbit_muon").is_dir():
            raise SystemExit(f"{refused}{tree}")
        paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("tree_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=tree,
            env={**_WORKER_ENVIRONMENT, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )
        try:
            self.found: dict[str, Any] = self.ask("look", threads=threads)
            package = Path(self.found["package"]).parent
            if package.parent.resolve() != tree.resolve():
                raise TreeError(f"lowbit_muon was found at {package}")
        except TreeError as error:
            self.close()
            raise SystemExit(f"{refused}{tree}: {str(error).splitlines()[-1]}") from error

    def send(self, request: str, **arguments: Any) -> None:
        """Make a request; one `receive` belongs to it."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `receive` says that it has ended
            pickle.dump((request, arguments), self._process.stdin)
            self._process.stdin.flush()

    def receive(self) -> Any:
        """The reply. Raises TreeError if the request did."""
        assert self._process.stdout is not None
        try:
            reply, error = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError):
            status = self._process.wait()
            raise TreeError(f"the process of the {self.name} tree ended with {status}") from None
        if error is not None:
            raise TreeError(error.strip())
        return reply

    def ask(self, request: str, **arguments: Any) -> Any:
        """The reply to a request."""
        self.send(request, **arguments)
        return self.receive()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def workers(old: Path, new: Path, threads: int | None = None) -> Iterator[tuple[Worker, Worker]]:
    """A process of each tree."""
    first = Worker("old", old, threads)
    try:
        second = Worker("new", new, threads)
        try:
            yield first, second
        finally:
            second.close()
    finally:
        first.close()


def presets(pair: tuple[Worker, Worker], chosen: Sequence[str]) -> list[str]:
    """The presets of both trees out of those chosen, or all.

    Raises SystemExit for a choice that one of them lacks.
    """
    found = [worker.found["presets"] for worker in pair]
    common = [name for name in found[0] if name in found[1]]
    unknown = sorted(set(chosen) - set(common))
    if unknown:
        raise SystemExit(f"--formats: expected presets of both trees, {common}, got {unknown}")
    return [name for name in common if not chosen or name in chosen]


# ---- Trajectories ----


@dataclass(frozen=True)
class Case:
    """One configuration that is trained."""

    format: str
    shapes: tuple[Shape, ...]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    aux_shapes: tuple[Shape, ...] = ()
    spoil: bool = False  # some gradients with nan, inf or too large a number

    @property
    def name(self) -> str:
        """All that is not the default."""
        parts = [self.format]
        if self.dtype != torch.float32:
            parts.append(str(self.dtype).removeprefix("torch."))
        if self.aux_shapes:
            parts.append("MuonWithAuxAdam")
        for option, value in self.options.items():
            parts.append(f"{option}={'tensor' if isinstance(value, Tensor) else value}")
        if self.spoil:
            parts.append("skipped gradients")
        return ", ".join(parts)

    def request(self, steps: int) -> dict[str, Any]:
        """The arguments of the workers' `train`."""
        return {
            "shapes": self.shapes,
            "steps": steps,
            "options": {"state_format": self.format, **self.options},
            "dtype": self.dtype,
            "aux_shapes": self.aux_shapes,
            "spoil": self.spoil,
        }


@dataclass(frozen=True)
class Trajectory:
    """How the two trees compare in one configuration."""

    name: str
    equal: bool  # bit for bit, weights and state
    weights: float | None = None  # difference relative to the whole change, unless it is equal
    shape: Shape | None = None  # of the parameter where that is largest
    state: dict[str, str] = field(default_factory=dict)  # role -> what differs
    error: str | None = None


def common_rules(pair: tuple[Worker, Worker]) -> list[str]:
    """The update rules that both trees have."""
    return [name for name in pair[0].found["rules"] if name in pair[1].found["rules"]]


def cases(names: Sequence[str], rules: Sequence[str], *, quick: bool) -> Iterator[Case]:
    """Every preset, then every option with some of them, and every rule with one.

    Large matrices are most of the time.
    """
    long, large = ((), ()) if quick else (LONG, LARGE)
    for name in names:
        yield Case(name, SMALL + long + large)
    for name in names:
        if name in OPTION_FORMATS:
            yield from _options(name, SMALL if name.startswith("spectral") else SMALL + long)
    if "muonq4" in names:
        yield Case("muonq4", SMALL + long, {"nesterov": False})
    yield Case("auto", SMALL)
    if RULE_FORMAT in names:
        for rule in rules:
            yield Case(RULE_FORMAT, SMALL + long, {"rule": rule})
            for rounding in ("stochastic_rounding", "compensation"):
                yield Case(RULE_FORMAT, SMALL, {"rule": rule, rounding: True}, torch.bfloat16)


def _options(name: str, shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """The options, with one format; long matrices where panels have a part in them."""
    bf16, fp16 = torch.bfloat16, torch.float16
    stochastic, compensated = {"stochastic_rounding": True}, {"compensation": True}
    options: dict[str, Any]
    for options in (
        {"nesterov": False},
        {"ns_input": "stored"},
        {"ns_steps": 3},
        {"weight_decay": 0.5},
        {"adjust_lr_fn": "match_rms_adamw"},
    ):
        yield Case(name, shapes, options)
    for options in (
        {"ns_steps": 8},
        {"ns_input": "stored", "ns_steps": 8},
        {"ns_coefficients": "polar_express"},
        {"lr": torch.tensor(0.02)},
        {"momentum": 0.8},
        {"eps": 10.0},
        {"seed": 7},
        {"backend": "reference"},
    ):
        yield Case(name, SMALL, options)
    yield Case(name, shapes, spoil=True)
    for dtype in (bf16, fp16, torch.float64):
        yield Case(name, shapes, dtype=dtype)
    yield Case(name, shapes, stochastic, bf16)
    for dtype in (bf16, fp16):
        yield Case(name, shapes, compensated, dtype)
    for several, own in (({"batch_experts": True}, EXPERTS), ({"row_splits": SPLITS}, FUSED)):
        yield Case(name, own, several)
        yield Case(name, own, several, spoil=True)
        for rounding in (stochastic, compensated):
            yield Case(name, own, {**several, **rounding}, bf16)
    for kind in ("adamw", "adamw8bit"):
        yield Case(name, SMALL, {"aux_adam": kind}, aux_shapes=AUX)
        yield Case(name, SMALL, {"aux_adam": kind}, aux_shapes=AUX, spoil=True)


def trajectory(case: Case, pair: tuple[Worker, Worker], steps: int) -> Trajectory:
    """Train in both trees at once and compare."""
    for worker in pair:
        worker.send("train", **case.request(steps))
    results, errors = [], []
    for worker in pair:
        try:
            results.append(worker.receive())
        except TreeError as error:
            errors.append(f"{worker.name}: {str(error).splitlines()[-1]}")
    if errors:
        return Trajectory(case.name, equal=False, error="; ".join(errors))
    old, new = results
    state = state_differences(old["state"], new["state"])
    different = [
        (relative_difference(a, b, moved), tuple(a.shape))
        for a, b, moved in zip(old["weights"], new["weights"], old["moved"], strict=True)
        if not same_bits(a, b)
    ]
    if not different:
        return Trajectory(case.name, equal=not state, state=state)
    return Trajectory(case.name, False, *max(different), state)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are of one dtype and shape and equal in every bit."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().reshape(-1).view(torch.uint8)


def relative_difference(old: Tensor, new: Tensor, reference: float) -> float:
    """||new - old||_F / reference; inf where that is not a number."""
    if old.shape != new.shape:
        return math.inf
    difference = float(torch.linalg.vector_norm(new.double() - old.double()))
    return difference / reference if reference > 0 and math.isfinite(difference) else math.inf


def state_differences(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]
) -> dict[str, str]:
    """What differs between two states, by role; keys of several matrices are one role."""
    different: dict[str, int] = defaultdict(int)
    total: dict[str, int] = defaultdict(int)
    largest: dict[str, float] = {}
    others: dict[str, str] = {}
    for before, after in zip(old, new, strict=True):
        for key in before.keys() | after.keys():
            role = key.rpartition(".")[2]
            if key not in before or key not in after:
                others[role] = f"only in the {'old' if key in before else 'new'} tree"
                continue
            a, b = before[key], after[key]
            if not isinstance(a, Tensor) or not isinstance(b, Tensor):
                if type(a) is not type(b) or a != b:
                    others[role] = f"{str(a)[:20]}, now {str(b)[:20]}"
            elif a.dtype != b.dtype or a.shape != b.shape:
                others[role] = f"{a.dtype} {tuple(a.shape)}, now {b.dtype} {tuple(b.shape)}"
            elif a.dtype in (torch.uint8, torch.int8):
                different[role] += int((a != b).sum())
                total[role] += a.numel()
            elif not same_bits(a, b):
                found = relative_difference(a, b, float(torch.linalg.vector_norm(a.double())))
                largest[role] = max(largest.get(role, 0.0), found)
    return {
        **{role: f"{n:,} of {total[role]:,} bytes" for role, n in different.items() if n},
        **{role: f"{value:.1e}" for role, value in largest.items()},
        **others,
    }


# ---- Time and memory ----


@dataclass(frozen=True)
class Timing:
    """One step of both trees and of torch.optim.Muon, in rounds."""

    shapes: str
    format: str
    seconds: dict[str, list[float]]  # "old", "new" and "torch", a sample for each round

    def ratio(self, baseline: str) -> float:
        """The new tree's median divided by another one."""
        return statistics.median(self.seconds["new"]) / statistics.median(self.seconds[baseline])


@dataclass(frozen=True)
class Peak:
    """The most bytes that one step of each tree holds above those at its start."""

    shape: Shape
    format: str
    old: int
    new: int


def parse_shapes(name: str) -> tuple[Shape, ...]:
    """The matrices of a list by its name. Raises SystemExit for any other."""
    if name in MODELS:
        return MODELS[name].matrices * MODELS[name].layers
    parts = name.split("x")
    if not 2 <= len(parts) <= 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise SystemExit(
            "--shapes: expected ROWSxCOLUMNS, COUNTxROWSxCOLUMNS or one of "
            f"{', '.join(MODELS)}, got {name!r}"
        )
    count, rows, columns = map(int, [*["1"] * (3 - len(parts)), *parts])
    return ((rows, columns),) * count


def timing(name: str, preset: str, pair: tuple[Worker, Worker], repeats: int) -> Timing:
    """Time a preset over a list of matrices, the trees in turn."""
    old, new = pair
    runs = {"old": (old, preset), "new": (new, preset), "torch": (new, TORCH_MUON)}
    for worker, optimizer in runs.values():
        worker.ask("prepare", optimizer=optimizer, shapes=parse_shapes(name))
    calls = {
        key: functools.partial(worker.ask, "run", optimizer=optimizer)
        for key, (worker, optimizer) in runs.items()
    }
    seconds = interleaved(calls, repeats, sample_seconds=SAMPLE_SECONDS)
    for worker in pair:
        worker.ask("forget")
    return Timing(name, preset, seconds)


def peak(shape: Shape, preset: str, pair: tuple[Worker, Worker]) -> Peak:
    """Memory of one step of a preset."""
    found = []
    for worker in pair:
        worker.ask("prepare", optimizer=preset, shapes=[shape])
        found.append(worker.ask("peak", optimizer=preset))
        worker.ask("forget")
    return Peak(shape, preset, *found)


# ---- What is shown ----


def trajectory_table(rows: Sequence[Trajectory], steps: int) -> Table:
    """A row for each configuration."""
    same = sum(row.equal for row in rows)
    table = _table(f"{steps} steps: {same} of {len(rows)} equal", "weights", "shape", "state")
    for row in rows:
        if row.error is not None:
            table.add_row(row.name, "not compared", "", row.error)
            continue
        state = ", ".join(f"{role}: {text}" for role, text in row.state.items())
        weights = "equal" if row.weights is None else f"{row.weights:.1e}"
        table.add_row(row.name, weights, "x".join(map(str, row.shape or ())), state or "equal")
    return table


def time_table(rows: Sequence[Timing], threads: int, repeats: int) -> Table:
    """Medians and their ratios."""
    title = f"one step, {threads} threads, medians of {repeats} rounds"
    headings = ("old ms", "new ms", "new / old", "spread", "torch ms", "new / torch")
    table = _table(title, "format", *headings)
    for row in rows:
        middle = {key: significant(1e3 * value) for key, value in medians(row.seconds).items()}
        width = spread(row.seconds["new"])
        table.add_row(
            row.shapes,
            row.format,
            middle["old"],
            middle["new"],
            f"{row.ratio('old'):.3f}",
            "" if width is None else f"{width:.0%}",
            middle["torch"],
            f"{row.ratio('torch'):.2f}",
        )
    return table


def memory_table(rows: Sequence[Peak]) -> Table:
    """MiB, and in units of the matrix in float32."""
    table = _table("most that a step holds", "format", "old MiB", "new MiB", "new / old", "x mn")
    for row in rows:
        table.add_row(
            "x".join(map(str, row.shape)),
            row.format,
            f"{row.old / 2**20:.2f}",
            f"{row.new / 2**20:.2f}",
            f"{row.new / row.old:.3f}",
            f"{row.new / (4 * math.prod(row.shape)):.2f}",
        )
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("what", overflow="fold")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="this checkout against another one")
    parser.add_argument("old_tree", type=Path, metavar="OLD_TREE")
    parser.add_argument("--what", type=_names, default=WHAT, help=f"out of {','.join(WHAT)}")
    parser.add_argument("--steps", type=int, help="of trajectories; default: 20, quick: 3")
    parser.add_argument("--repeats", type=int, help="rounds of timing; default: 7, quick: 2")
    parser.add_argument("--formats", type=_names, default=(), help="presets; default: all")
    parser.add_argument("--shapes", type=_names, help=f"default: {','.join(SHAPE_LISTS)}")
    parser.add_argument("--quick", action="store_true", help="small matrices, a few steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.what) - set(WHAT))
    if unknown:
        parser.error(f"--what: expected names out of {', '.join(WHAT)}, got {', '.join(unknown)}")
    quick = options.quick
    steps = (3 if quick else 20) if options.steps is None else options.steps
    repeats = (2 if quick else 7) if options.repeats is None else options.repeats
    for name, value in (("--steps", steps), ("--repeats", repeats)):
        if value < 1:
            parser.error(f"{name}: expected a whole number >= 1, got {value}")
    names = options.shapes or (QUICK_SHAPE_LISTS if quick else SHAPE_LISTS)
    for name in names:
        parse_shapes(name)
    old, new = options.old_tree.resolve(), ROOT
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    rows: dict[str, list[Any]] = {}

    def each(items: Iterable[T], what: str) -> Iterable[T]:
        return track(list(items), what, console=console, transient=True)

    if "trajectories" in options.what:
        with workers(old, new, threads=1) as pair:
            chosen = cases(presets(pair, options.formats), common_rules(pair), quick=quick)
            rows["trajectories"] = [
                trajectory(case, pair, steps) for case in each(chosen, "trajectories")
            ]
        console.print(trajectory_table(rows["trajectories"], steps))
        one_sided = set(pair[0].found["presets"]) ^ set(pair[1].found["presets"])
        if one_sided:
            console.print(f"presets of one tree only: {', '.join(sorted(one_sided))}")
    threads = None
    if {"time", "memory"} & set(options.what):
        with workers(old, new) as pair:
            found = presets(pair, options.formats)
            if "time" in options.what:
                threads = pair[1].found["threads"]
                timed = itertools.product(names, found)
                rows["time"] = [
                    timing(name, preset, pair, repeats) for name, preset in each(timed, "time")
                ]
                console.print(time_table(rows["time"], threads, repeats))
            if "memory" in options.what:
                shape = QUICK_MEMORY_SHAPE if quick else MEMORY_SHAPE
                rows["memory"] = [peak(shape, preset, pair) for preset in each(found, "memory")]
                console.print(memory_table(rows["memory"]))
    if options.json:
        results = {what: [asdict(row) for row in of] for what, of in rows.items()}
        run = {"old": str(old), "new": str(new), "steps": steps, "repeats": repeats}
        write_json(options.json, {**run, "threads": threads, **dict.fromkeys(WHAT), **results})


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.split(",")))


if __name__ == "__main__":
    main()
