"""The `lowbit-muon` command."""

from __future__ import annotations

import argparse
import importlib
import io
import signal
import sys
from collections.abc import Container, Sequence

from lowbit_muon import __version__
from lowbit_muon.tools.commands import COMMANDS
from lowbit_muon.tools.console import discard_output, printable
from lowbit_muon.tools.errors import UserError


def make_parser(chosen: Container[str] = COMMANDS) -> argparse.ArgumentParser:
    """The command line, with the options of the chosen commands: others are not even imported."""
    parser = argparse.ArgumentParser(prog="lowbit-muon", description="Muon with low-bit momentum.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        if name in chosen:
            module = importlib.import_module(f"lowbit_muon.tools.{command.module}")
            module.add_command(commands, command.help)
        else:
            commands.add_parser(name, help=command.help)
    return parser


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
    own, script_arguments = split_at_dashes(sys.argv[1:] if argv is None else argv)
    parser = make_parser(own[:1])
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
