"""The `doctor` command: what storing the momentum did, in a checkpoint or a running script."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from lowbit_muon import __version__
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.arguments import plot_path, whole_number
from lowbit_muon.tools.console import add_wide, plain_console
from lowbit_muon.tools.doctor.checkpoints import read_checkpoint
from lowbit_muon.tools.doctor.examine import Examined, diagnose_with_progress
from lowbit_muon.tools.doctor.replacement import differences, example_changes
from lowbit_muon.tools.doctor.report import plot_diagnoses, show, write_diagnoses
from lowbit_muon.tools.doctor.saved_state import describe, is_muon_state, is_torch_muon, rebuild
from lowbit_muon.tools.doctor.script import examine_script
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.output import check_outputs

DESCRIPTION = """Show, matrix by matrix, what storing Muon's momentum in few bits does to the
updates. TARGET is a checkpoint: of lowbit-muon finetune, a file of torch.save with an optimizer's
state_dict (bare, or as 'optimizer', 'optimizer_state_dict' or Lightning's 'optimizer_states'), a
checkpoint folder of transformers' Trainer or of Accelerate; states of torch.optim.Muon,
KellerJordan's and Moonlight's Muon are shown as our Muon would store them. Or it is a training
script, NAME.py, with our Muon or torch.optim.Muon: before its first step the command shows what the
run will need and, of torch.optim.Muon, the lines to change; the script is run until its optimizer
is about to take a step, when errors are exact, and stopped there."""
EPILOG = "example: lowbit-muon doctor train.py --steps 50 -- --batch-size 8"
STEPS = 10


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser], help: str) -> None:
    """Add `doctor` to the command line."""
    parser = commands.add_parser(
        "doctor",
        help=help,
        usage="lowbit-muon doctor TARGET [options] [-- ARGUMENT ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument(
        "target", type=Path, metavar="TARGET", help="a checkpoint's file or folder, or a .py script"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the diagnoses here")
    parser.add_argument(
        "--plot", type=plot_path, metavar="FILE", help="draw errors and ranks: .svg or .png"
    )
    parser.add_argument(
        "--worst",
        type=whole_number(),
        metavar="K",
        help="show only the K matrices of the largest errors",
    )
    parser.add_argument(
        "--format",
        choices=tuple(PRESETS),
        dest="state_format",
        help="show a checkpoint's momentum as it would be stored in this format",
    )
    parser.add_argument(
        "--steps",
        type=whole_number(),
        metavar="N",
        help=f"stop a script before its N-th step and diagnose it; before the first there is only "
        f"what the run will need (default: {STEPS})",
    )
    add_wide(parser)
    parser.set_defaults(run=run_doctor, takes_script_arguments=True)


def run_doctor(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    _check(arguments)
    console = plain_console()
    if _is_script(arguments.target):
        step = arguments.steps or STEPS
        found = examine_script(
            arguments.target, arguments.script_arguments, step, console, wide=arguments.wide
        )
    else:
        found = _examine_checkpoint(arguments, console)
    if arguments.steps != 1 and not any(examined.rows for examined in found):
        raise UserError("TARGET: expected a matrix with a momentum, got none")
    for examined in filter(lambda each: each.rows, found):
        show(examined, arguments.worst, console, wide=arguments.wide)
    if arguments.json is not None:
        write_diagnoses(arguments.json, str(arguments.target), __version__, found)
        console.print(f"--json: wrote {arguments.json}")
    if arguments.plot is not None:
        plot_diagnoses(arguments.plot, [row for examined in found for row in examined.rows])
        console.print(f"--plot: wrote {arguments.plot}")
    return 0


def _is_script(target: Path) -> bool:
    return target.suffix == ".py"


def _check(arguments: argparse.Namespace) -> None:
    """Raise UserError for whatever would stop the command after its work was done, too."""
    target: Path = arguments.target
    if _is_script(target):
        if not target.is_file():
            raise UserError(f"TARGET: expected a script that exists, got {target}")
        if arguments.steps == 1 and (arguments.plot or arguments.worst):
            option = "--plot" if arguments.plot else "--worst"
            raise UserError(f"{option}: expected --steps of 2 or more: there is no momentum before")
        unused = {"--format": arguments.state_format}
        kind = "a checkpoint"
    else:
        unused = {"--steps": arguments.steps, "arguments after --": arguments.script_arguments}
        kind = "a script (NAME.py)"
    for option, value in unused.items():
        if value:
            raise UserError(f"{option}: expected with {kind} only, got {target}")
    check_outputs([("--json", arguments.json), ("--plot", arguments.plot)], [target])


def _examine_checkpoint(arguments: argparse.Namespace, console: Console) -> list[Examined]:
    """The Muons of a checkpoint; other optimizers beside them are passed over."""
    checkpoint = read_checkpoint(arguments.target)
    found = []
    try:
        for state in filter(is_muon_state, checkpoint.optimizers):
            saved = rebuild(state, arguments.state_format)
            rows = diagnose_with_progress(saved.muon, console)
            changes = (*example_changes(), *differences()) if is_torch_muon(state) else ()
            for line in changes:
                console.print(line)
            found.append(Examined(saved.name, rows, saved.aux, saved.remarks, changes=changes))
    except UserError as error:
        raise UserError(f"{checkpoint.file}: {error}") from None
    except Exception as error:  # a state that was tampered with fails in as many ways as a file
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{checkpoint.file}: expected the state of a Muon, got {reason}") from None
    if not found:
        got = describe(checkpoint.optimizers[0]) if checkpoint.optimizers else "no optimizer"
        raise UserError(f"{checkpoint.file}: expected the state of a Muon, got {got}")
    return found
