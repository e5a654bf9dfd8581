"""Time, state and peak memory of one optimizer step over the matrices of a model, layer by layer.

    python -m bench.step [--quick] [--model NAME] [--layers N] [--repeats N] [--json FILE]
    python -m bench.step --shape 1024 4096        one matrix instead
    python -m bench.step --rules normuon lion     these update rules instead of other formats

Beside ours: torch.optim.Muon as shipped (bfloat16 Newton-Schulz), full-precision Muon with the same
iteration in float32, and every optimizer of `bench.peers` that is installed. Everything passes a
gate first: ours those of `lowbit-muon bench`, other Muons the direction of their first update;
AdamW has none, since nothing but its own arithmetic says where it should go. What is missing or
fails is a row with the reason.

A torch without native bfloat16 products is what most CPUs have; on one that has them,
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI shows the others. Peak memory is what a step allocates above
parameters, gradients and state: what torch's profiler counts and, added to it, the most that the
C++ products held at once.

The JSON file is {"machine": ..., "results": {"title", "shapes": [[rows, columns], ...], "repeats",
"onednn_max_cpu_isa", "rows"}}. Rows are those of `tools.benchmark.report.write_results`, with
two differences: a row is one step over all of "shapes", so its shape is null unless there is one
matrix; and the error of a Muon peer is the sine of the angle between its first update and the polar
factor (`peers.check_direction`). Ours are named "step" or "step, stored codes", with the format.
The ratio is to torch.optim.Muon; against the float32 iteration divide by the median of its row.
What takes five times as long as that iteration and two seconds is timed once: one number in
"seconds".
"""

from __future__ import annotations

import argparse
import os
import statistics
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.harness import interleaved, write_json
from bench.peers import GATE_SHAPES, LR, MOMENTUM, PEERS, Peer, check_direction, contained
from bench.shapes import MODELS
from lowbit_muon import RULES, Muon
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.backends.cpu.adapter import take_most_workspace
from lowbit_muon.tools.benchmark.cases import Problem, UnavailableError, make_cases
from lowbit_muon.tools.benchmark.gates import Passed, newton_schulz
from lowbit_muon.tools.benchmark.measure import DETAIL_CHARACTERS, Result, Status
from lowbit_muon.tools.benchmark.momentum import decaying_matrix
from lowbit_muon.tools.benchmark.report import label
from lowbit_muon.tools.benchmark.timing import spread

SHIPPED, FULL = "torch.optim.Muon", "fp32 Newton-Schulz"
FORMATS = ("fp32", "mulaw4", "spectral4", "spectral3", "muonq4", "linear8")
RULE_FORMATS = ("fp32", "spectral4")  # of which `--rules` has every rule
STORED = ("spectral4",)  # also with ns_input="stored"
WEIGHT_DECAY = 0.1  # torch.optim.Muon's default
# Seconds, and times FULL, beyond which one step is enough: such a ratio is far from any noise.
SLOW_SECONDS, SLOW_RATIO = 2.0, 5.0

Shapes = Sequence[tuple[int, int]]


class FullPrecisionMuon(torch.optim.Optimizer):
    """torch.optim.Muon's step with its Newton-Schulz iteration in float32."""

    def __init__(self, params: Any, lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

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


BASELINES = (
    Peer(SHIPPED, "torch", "torch.optim:Muon", {"momentum": MOMENTUM}),
    Peer(FULL, "bench", f"{__name__}:FullPrecisionMuon", {"momentum": MOMENTUM}),
)


@dataclass(frozen=True)
class Variant:
    """One row: an optimizer, and the gate in front of it."""

    name: str
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    check: Callable[[], Passed | None]  # raises what keeps it from being timed
    format: str | None = None


@dataclass(frozen=True)
class Prepared:
    """An optimizer after its gate and two steps."""

    step: Callable[[], None]
    seconds: float  # of the second step
    passed: Passed | None
    state_bytes: int


def variants(
    peers: Iterable[Peer], *, quick: bool = False, rules: Sequence[str] = ()
) -> Iterator[Variant]:
    """The baselines, ours, and the others; with `rules` ours under those, in `RULE_FORMATS`."""
    for peer in BASELINES:
        yield _peer_variant(peer, quick)
    if rules:
        for name in RULE_FORMATS:
            for rule in ("muon", *rules):
                yield _our_variant(f"step, {rule}", name, rule=rule)
        return
    for name in FORMATS:
        yield _our_variant("step", name)
    for name in STORED:
        yield _our_variant("step, stored codes", name, ns_input="stored")
    for peer in peers:
        yield _peer_variant(peer, quick)


def _peer_variant(peer: Peer, quick: bool) -> Variant:
    def check() -> Passed | None:
        if quick and peer.compiled:
            raise UnavailableError("compiled for 9 to 140 s before its first step: not in --quick")
        return check_direction(peer) if peer.muon else None

    return Variant(peer.name, lambda params: peer.make(params, WEIGHT_DECAY), check)


def _our_variant(name: str, state_format: str, **options: Any) -> Variant:
    def make(params: list[nn.Parameter]) -> Muon:
        nesterov = False if state_format == "muonq4" else None  # which goes without
        return Muon(params, lr=LR, state_format=state_format, nesterov=nesterov, **options)

    return Variant(name, make, lambda: check_ours(state_format), state_format)


def check_ours(state_format: str) -> Passed:
    """The gate of `lowbit-muon bench` for a step, wide and tall; the larger of their errors."""
    device = torch.device("cpu")
    passed = [
        case.prepare().passed
        for shape in GATE_SHAPES
        for case in make_cases(Problem(shape, "fp32", device), [state_format])
        if case.name == "step"
    ]
    return max((found for found in passed if found), key=lambda found: found.error)


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


def prepare(variant: Variant, params: Sequence[nn.Parameter], grads: Sequence[Tensor]) -> Prepared:
    """Let a variant pass its gate and warm up: packages compile in the first step.

    All share the parameters, whose values no time depends on, and the gradients. An optimizer that
    writes over gradients gets copies of its own.
    """
    with contained():
        passed = variant.check()
        optimizer = variant.make(list(params))
        own = [grad.clone() for grad in grads]
        step = stepper(optimizer, params, own)
        step()
        if all(map(torch.equal, own, grads)):
            step = stepper(optimizer, params, grads)
        (seconds,) = interleaved({"": step}, repeats=1, warmup=0)[""]
    return Prepared(step, seconds, passed, state_bytes(optimizer, params, own))


def stepper(
    optimizer: torch.optim.Optimizer, params: Sequence[nn.Parameter], grads: Sequence[Tensor]
) -> Callable[[], None]:
    """A step that starts from the gradients each time: heavyball takes them off the parameters."""

    def step() -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()

    return step


def state_bytes(
    optimizer: torch.optim.Optimizer,
    params: Iterable[Tensor] = (),
    grads: Iterable[Tensor] = (),
) -> int:
    """Real storage of what an optimizer holds beside parameters and gradients, each once.

    State may be nested, lie in attributes, or in tensors that are made of others.
    """
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*params, *grads)}
    attributes = {
        key: value for key, value in vars(optimizer).items() if key not in ("param_groups", "state")
    }
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in _tensors([*optimizer.state.values(), attributes], {})
    }
    return sum(size for address, size in storages.items() if address not in shared)


def _tensors(value: Any, seen: dict[int, Any]) -> Iterator[Tensor]:
    """Every plain tensor that can be reached from a value by containers and attributes.

    seen: what was visited by its id; it keeps the objects, so that no id is given away again.
    """
    if id(value) in seen or isinstance(value, type | ModuleType | FunctionType):
        return
    seen[id(value)] = value
    if isinstance(value, Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            yield value
            return
        # A tensor made of others, as torchao's states: its own storage is empty, and torch's
        # protocol for such classes names its parts.
        names, _ = value.__tensor_flatten__()
        children = [getattr(value, name) for name in names]
    elif isinstance(value, dict):
        children = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        children = list(value)
    else:
        children = list(getattr(value, "__dict__", {}).values())
    for child in children:
        yield from _tensors(child, seen)


def peak_bytes(step: Callable[[], object]) -> int:
    """Largest total of allocations that are alive at once during a call."""
    take_most_workspace()
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        step()
    # Events come in order of time; each allocation and release is one of its own.
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak + take_most_workspace()


def measure(shapes: Shapes, chosen: Iterable[Variant], repeats: int) -> list[Result]:
    """One row for each variant; those that cannot be timed say why."""
    params = parameters(shapes)
    grads = [param.grad for param in params if param.grad is not None]
    chosen = list(chosen)
    prepared: dict[Variant, Prepared] = {}
    reasons: dict[Variant, tuple[Status, str]] = {}
    for variant in chosen:
        try:
            prepared[variant] = prepare(variant, params, grads)
        except UnavailableError as error:
            reasons[variant] = "skipped", str(error)
        except Exception as error:  # one that is broken hides no other
            reasons[variant] = "error", f"{type(error).__name__}: {error}"
    with contained():
        seconds = _rounds(prepared, repeats)
        peaks = {variant: peak_bytes(found.step) for variant, found in prepared.items()}
    shipped = next((seconds[variant] for variant in prepared if variant.name == SHIPPED), None)
    baseline = None if shipped is None else statistics.median(shipped)
    return [
        _untimed(variant, shapes, *reasons[variant])
        if variant in reasons
        else _timed(variant, shapes, prepared[variant], seconds[variant], peaks[variant], baseline)
        for variant in chosen
    ]


def _rounds(prepared: dict[Variant, Prepared], repeats: int) -> dict[Variant, list[float]]:
    """Seconds of each, in turn; of what is far slower than the others, its second step."""
    full = [found.seconds for variant, found in prepared.items() if variant.name == FULL]
    limit = max(SLOW_SECONDS, SLOW_RATIO * full[0]) if full else float("inf")
    keys = {str(index): variant for index, variant in enumerate(prepared)}
    calls = {key: prepared[v].step for key, v in keys.items() if prepared[v].seconds <= limit}
    timed = interleaved(calls, repeats, warmup=0)
    return {v: timed.get(key, [prepared[v].seconds]) for key, v in keys.items()}


def _largest(shapes: Shapes) -> tuple[int, int]:
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def _untimed(variant: Variant, shapes: Shapes, status: Status, detail: str) -> Result:
    detail = textwrap.shorten(detail, DETAIL_CHARACTERS, placeholder=" ...")
    shape = _largest(shapes)
    return Result(variant.name, shape, variant.format, "cpu", "fp32", status, detail)


def _timed(
    variant: Variant,
    shapes: Shapes,
    prepared: Prepared,
    seconds: list[float],
    peak: int,
    baseline: float | None,  # median seconds of SHIPPED
) -> Result:
    median, passed = statistics.median(seconds), prepared.passed
    return Result(
        variant.name,
        _largest(shapes),
        variant.format,
        "cpu",
        "fp32",
        "measured",
        seconds=seconds,
        median=median,
        spread=spread(seconds),
        baseline=None if variant.name == SHIPPED else SHIPPED,
        ratio=None if variant.name == SHIPPED or baseline is None else median / baseline,
        error=None if passed is None else passed.error,
        allowed_error=None if passed is None else passed.allowed,
        state_bytes=prepared.state_bytes,
        bits_per_element=8 * prepared.state_bytes / sum(rows * cols for rows, cols in shapes),
        peak_bytes=peak,
        threads=torch.get_num_threads(),
        isa=cpu.isa() if variant.format and cpu.unavailable_reason() is None else None,
    )


def document(results: Sequence[Result], shapes: Shapes, title: str, repeats: int) -> dict[str, Any]:
    """What the JSON file has under "results"; see the module's description."""
    shape = list(shapes[0]) if len(shapes) == 1 else None
    return {
        "title": title,
        "shapes": [list(shape) for shape in shapes],
        "repeats": repeats,
        "onednn_max_cpu_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "default"),
        "rows": [{**result.to_dict(), "shape": shape} for result in results],
    }


def show(results: Sequence[Result], shapes: Shapes, title: str, console: Console) -> None:
    """The results as a table, and why some are not in it."""
    middle = {label(result): result.median for result in results}
    rows, columns = _largest(shapes)
    table = Table(title=title, box=None, pad_edge=False)
    table.add_column("optimizer", no_wrap=True)
    for heading in ("seconds", "x shipped", "x fp32", "state MiB", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        if result.median is None:
            continue
        against = (middle.get(name) for name in (SHIPPED, FULL))
        table.add_row(
            label(result),
            f"{result.median:.3f}",
            *("" if base is None else f"{result.median / base:.2f}" for base in against),
            f"{(result.state_bytes or 0) / 2**20:.1f}",
            f"{(result.peak_bytes or 0) / (4 * rows * columns):.1f}",
        )
    console.print(table)
    console.print(f"x shipped: to {SHIPPED}; x fp32: to {FULL}; below 1 is faster")
    console.print("peak: allocations of one step, in units of the largest matrix in float32")
    for result in results:
        if result.median is None:
            console.print(f"{label(result)}: {result.status}: {result.detail}", markup=False)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="time of one optimizer step over a model's layers")
    parser.add_argument(
        "--quick", action="store_true", help="one layer, three rounds, nothing compiled"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--model", choices=MODELS, default="smollm2", help="default: smollm2")
    what.add_argument("--shape", type=int, nargs=2, metavar=("ROWS", "COLUMNS"))
    parser.add_argument("--rules", nargs="+", choices=RULES, metavar="RULE", default=[])
    parser.add_argument("--layers", type=int, help="default: 4 of smollm2, one of the others")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-peers", action="store_true", help="ours and torch's only")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    layer = MODELS[options.model]
    layers = options.layers or layer.layers
    layers, repeats = (1, 3) if options.quick else (layers, options.repeats)
    if options.shape:
        shapes: Shapes = [(options.shape[0], options.shape[1])]
        title = f"one step of one matrix {options.shape[0]}x{options.shape[1]}"
    else:
        shapes = layer.matrices * layers
        title = f"one step over {len(shapes)} matrices of {layer.title}"
    peers = () if options.no_peers else PEERS
    chosen = variants(peers, quick=options.quick, rules=options.rules)
    results = measure(shapes, chosen, repeats)
    console = Console()
    show(results, shapes, title, console)
    if options.json:
        write_json(options.json, document(results, shapes, title, repeats))


if __name__ == "__main__":
    main()
