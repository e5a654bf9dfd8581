"""The `bench` command: its arguments, and what it shows while it works."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Collection
from pathlib import Path

import torch
from rich.console import Console

from lowbit_muon.backends import BACKEND_NAMES, get_backend
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.arguments import MOST_THREADS, plot_path, positive_number, whole_number
from lowbit_muon.tools.benchmark.cases import DTYPES, PARTS, Problem
from lowbit_muon.tools.benchmark.measure import Result, measure, share_deadline
from lowbit_muon.tools.benchmark.report import (
    notes,
    plot_results,
    results_table,
    write_csv,
    write_results,
)
from lowbit_muon.tools.console import Progress, add_wide, plain_console, show_table
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.output import check_outputs

DESCRIPTION = """Time one optimizer step and its parts (quantize, dequantize, the Gram matrix from
the codes, orthogonalize) on one matrix at a time, in turn with torch's copy, torch.mm,
torch.optim.Muon and AdamW, and with what this machine copies from memory and multiplies at most:
GB/s and GFLOP/s are of the bytes and operations that a call cannot do without
(lowbit_muon/tools/benchmark/counts.py). Everything of ours is held to its definition first; what
fails is a row with the reason, and exit status 1. Formats with low-rank factors quantize with eight
power iterations, a step with one. Caches are warm. Only ratios are worth quoting."""
EPILOG = "example: lowbit-muon bench --shapes 1024x4096 --dtype bf16 --parts step --threads 2"
SHAPES = "576x1536,1024x4096"
FORMATS = "spectral4,mulaw4,linear8,fp32"
REPEATS, WARMUP = 9, 1
MOST_REPEATS = 10**6
MOST_ELEMENTS = 2**32  # of a matrix; dozens of that size lie in memory at once


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> None:
    """Add `bench` to the command line."""
    parser = commands.add_parser(
        "bench",
        help=help,
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "--shapes",
        type=parse_shapes,
        default=SHAPES,
        metavar="MxN,...",
        help=f"rows x columns, with commas between (default: {SHAPES})",
    )
    parser.add_argument(
        "--format",
        type=parse_formats,
        default=FORMATS,
        metavar="NAME,...",
        dest="formats",
        help=f"state formats out of {', '.join(PRESETS)} (default: {FORMATS})",
    )
    parser.add_argument(
        "--parts",
        type=parse_parts,
        default=",".join(PARTS),
        metavar="NAME,...",
        help=f"out of {', '.join(PARTS)}, each with what it is compared with (default: all)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of weights and gradients (default: fp32)"
    )
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), help="default: cuda where there is one, else cpu"
    )
    parser.add_argument(
        "--backend", choices=BACKEND_NAMES, default="auto", help="of our kernels (default: auto)"
    )
    parser.add_argument(
        "--repeats",
        type=whole_number(most=MOST_REPEATS),
        default=REPEATS,
        metavar="N",
        help=f"rounds that count, after {WARMUP} of warm-up (default: {REPEATS})",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        metavar="S",
        help="start no round after about so long, shared by the shapes; one round is always made",
    )
    parser.add_argument(
        "--threads", type=whole_number(most=MOST_THREADS), metavar="N", help="default: torch's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a line for each row here")
    parser.add_argument(
        "--plot",
        type=plot_path,
        metavar="FILE",
        help="draw the medians, all in units of torch.optim.Muon's step: .svg or .png",
    )
    add_wide(parser)
    parser.set_defaults(run=run_bench)


def parse_shapes(text: str) -> list[tuple[int, int]]:
    """ "16x24,8x8" as [(16, 24), (8, 8)], each once."""
    shapes: dict[tuple[int, int], None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d{,9})x([1-9]\d{,9})", part.strip(), re.ASCII)
        if match is None or int(match[1]) * int(match[2]) > MOST_ELEMENTS:
            raise argparse.ArgumentTypeError(
                "expected ROWSxCOLUMNS, whole numbers >= 1, with commas between, of at most "
                f"{MOST_ELEMENTS} elements, got {part[:80]!r}"
            )
        shapes[int(match[1]), int(match[2])] = None
    return list(shapes)


def parse_formats(text: str) -> list[str]:
    """Names of presets, each once."""
    return _names(text, PRESETS)


def parse_parts(text: str) -> list[str]:
    """Names of parts, each once."""
    return _names(text, PARTS)


def _names(text: str, known: Collection[str]) -> list[str]:
    names = [part.strip() for part in text.split(",")]
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"expected names out of {', '.join(known)}, with commas between, got {name!r}"
            )
    return list(dict.fromkeys(names))


def run_bench(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status: 1 if a row is an error, 2 for a wrong argument."""
    device = _checked_device(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    console = plain_console()
    kernels = get_backend(arguments.backend, device)
    console.print(f"backend '{kernels.name}', {torch.get_num_threads()} threads")
    results = _measure_all(arguments, device, console)
    for option, path in _outputs(arguments):
        if path is not None:
            console.print(f"{option}: wrote {path}")
    return 1 if any(result.status == "error" for result in results) else 0


def _outputs(arguments: argparse.Namespace) -> list[tuple[str, Path | None]]:
    return [("--json", arguments.json), ("--csv", arguments.csv), ("--plot", arguments.plot)]


def _checked_device(arguments: argparse.Namespace) -> torch.device:
    """The device; raises UserError for whatever would stop the run after it was timed, too."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: expected 'cpu', since torch finds no GPU here, got 'cuda'")
    check_outputs(_outputs(arguments))
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        get_backend(arguments.backend, device)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--{error}") from None
    return device


def _measure_all(
    arguments: argparse.Namespace, device: torch.device, console: Console
) -> list[Result]:
    """Measures, shows and saves shape by shape: an interruption loses one at most."""
    shapes, results = arguments.shapes, []
    end = None if arguments.seconds is None else time.perf_counter() + arguments.seconds
    for index, shape in enumerate(shapes):
        rounds = f"{shape[0]}x{shape[1]}, rounds:"
        with Progress(console, rounds, WARMUP + arguments.repeats) as progress:
            rows = measure(
                Problem(shape, arguments.dtype, device, arguments.backend),
                arguments.formats,
                arguments.repeats,
                parts=arguments.parts,
                warmup=WARMUP,
                deadline=share_deadline(end, len(shapes) - index),
                on_round=progress.advance,
                on_case=progress.note,
            )
        results += rows
        table = results_table(rows, wide=arguments.wide)
        show_table(console, table, wide=arguments.wide)
        for line in notes(rows):
            console.print(line)
        if arguments.json is not None:
            write_results(arguments.json, results)
        if arguments.csv is not None:
            write_csv(arguments.csv, results)
        if arguments.plot is not None:
            plot_results(arguments.plot, results)
    return results
