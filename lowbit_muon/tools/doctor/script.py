"""A training script, run until its optimizer is about to take a step, and diagnosed there.

Muons are ours and torch's, which is diagnosed as ours with its momentum and its gradients. Before
its first step each says what the run will hold, so that it is known even if the run then fails.
"""

from __future__ import annotations

import contextlib
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.step_hooks import Arguments, when_gradients_are_there
from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.tools.console import printable
from lowbit_muon.tools.doctor.examine import Examined, diagnose_with_progress
from lowbit_muon.tools.doctor.needs import needs
from lowbit_muon.tools.doctor.replacement import changes, differences
from lowbit_muon.tools.doctor.report import show_needs
from lowbit_muon.tools.doctor.saved_state import (
    FULL_PRECISION_FORMAT,
    AuxState,
    aux_state_of,
    rebuild,
)
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.plans import TORCH_MUON, Plan


class ScriptStop(BaseException):
    """Ends the script from within; no Exception, so that its handlers of those let it pass."""


def examine_script(
    script: Path, arguments: Sequence[str], step: int, console: Console, *, wide: bool
) -> list[Examined]:
    """Run a script as `python script arguments` would and diagnose its Muons before a step.

    step: which of a Muon's steps; the first that gets there decides for all. The script is stopped
    there; before step 1 there is no momentum yet, and only the needs are known. If it ends before,
    what there is then is diagnosed, without gradients: those left are of a step that was taken.

    Raises UserError if there is nothing to diagnose or the script failed, with its traceback.
    """
    watch = _Watch(script, step, console, wide=wide)
    handle = register_optimizer_step_pre_hook(watch.before_step)
    how = ""
    try:
        with _as_main(script, arguments):
            runpy.run_path(str(script), run_name="__main__")
    except ScriptStop:
        pass
    except SystemExit as end:
        how = f" with exit status {end.code}" if end.code else ""
    except Exception as error:
        if not watch.found:  # otherwise it may be what handlers made of the stop
            _print_traceback(error, script)
            raise UserError(f"{script}: the script failed with {type(error).__name__}") from None
    finally:
        handle.remove()
    return watch.found or watch.after_end(script, how)


class _Watch:
    """Counts the steps of every Muon and diagnoses all before the one that was asked for."""

    def __init__(self, script: Path, step: int, console: Console, *, wide: bool) -> None:
        self.found: list[Examined] = []
        self._script = script
        self._step = step
        self._console = console
        self._wide = wide
        self._steps: dict[Optimizer, int] = {}  # begun so far
        self._needs: dict[Optimizer, tuple[Plan, ...]] = {}
        self._changes: dict[Optimizer, tuple[str, ...]] = {}

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """The hook: of every optimizer, AdamW's within ours too."""
        if not isinstance(optimizer, (Muon, torch.optim.Muon)):
            return None
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if self._steps[optimizer] == 1:
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            self._before_all(optimizer, has_closure=closure is not None)
        if self._steps[optimizer] < self._step:
            return None
        return when_gradients_are_there(args, kwargs, self._finish)

    def _before_all(self, optimizer: Optimizer, *, has_closure: bool) -> None:
        """Show what is known before any step."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        released = not has_closure and all(param.grad is None for param in params)
        with torch.no_grad():
            plans = needs(optimizer, released=released, other_format=FULL_PRECISION_FORMAT)
        self._needs[optimizer] = tuple(plans)
        if not isinstance(optimizer, Muon):
            self._changes[optimizer] = (*_changed_lines(self._script), *differences())
            for line in self._changes[optimizer]:
                self._console.print(printable(line))
        show_needs(plans, self._console, wide=self._wide)

    def _finish(self) -> None:
        if not self.found:  # a script that swallows the stop comes here again
            self.found = self._examine(f"Diagnosed before step {self._step}")
        raise ScriptStop

    def after_end(self, script: Path, how: str) -> list[Examined]:
        """For a script that ended by itself."""
        if not self._steps:
            raise UserError(
                f"{script}: expected steps of a lowbit_muon optimizer or torch.optim.Muon, got "
                f"none: the script ended"
                f"{how}"
            )
        for optimizer in self._steps:
            optimizer.zero_grad(set_to_none=True)
        steps = max(self._steps.values())
        return self._examine(f"The script ended after {steps} steps, before step {self._step}")

    def _examine(self, when: str) -> list[Examined]:
        found = []
        for optimizer in self._steps:
            rows: list[Diagnosis] = []
            aux, remarks = AuxState(0, 0), list[str]()
            if self._step > 1 and optimizer.state:
                muon, aux, remarks = _as_ours(optimizer)
                rows = diagnose_with_progress(muon, self._console)
                exact = sum(row.with_gradient for row in rows)
                kind = "exact for that step" if exact == len(rows) else _estimates(exact, len(rows))
                remarks = [f"{when}: errors are {kind}.", *remarks]
            name = type(optimizer).__name__ if isinstance(optimizer, Muon) else TORCH_MUON
            plans, changed = self._needs[optimizer], self._changes.get(optimizer, ())
            found.append(Examined(name, rows, aux, tuple(remarks), plans, changed))
        return found


def _as_ours(optimizer: Optimizer) -> tuple[Muon, AuxState, list[str]]:
    """An optimizer to diagnose; of torch's Muon one of ours with its momentum and gradients."""
    if isinstance(optimizer, Muon):
        return optimizer, aux_state_of(optimizer), []
    saved = rebuild(optimizer.state_dict(), None)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    theirs = [param for param in params if optimizer.state.get(param)]
    ours = [param for group in saved.muon.param_groups for param in group["params"]]
    for param, other in zip(ours, theirs, strict=True):
        if other.grad is not None:
            param.grad = other.grad.to(param.device, param.dtype)
    return saved.muon, saved.aux, list(saved.remarks)


def _changed_lines(script: Path) -> Iterator[str]:
    """The lines to change of the script and of what it imported from its own folder."""
    folder = script.resolve().parent
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    own = (Path(file).resolve() for file in files if file)
    beside = sorted({path for path in own if path.suffix == ".py" and path.is_relative_to(folder)})
    found = False
    for path in (script, *(path for path in beside if path != script.resolve())):
        with contextlib.suppress(OSError, SyntaxError, UnicodeDecodeError):
            for line in changes(path.read_text(encoding="utf-8"), str(path)):
                found = True
                yield line
    if not found:
        yield (
            f"No line of {script}, nor of what it imports from its folder, names torch.optim.Muon: "
            "look for it where the optimizer is made."
        )


def _estimates(exact: int, rows: int) -> str:
    """Gradient release frees gradients before the step; some parameters get none in a step."""
    if not exact:
        return "estimates, since no gradients were there"
    return f"exact for {exact} of {rows} matrices and estimates for those without a gradient"


@contextmanager
def _as_main(script: Path, arguments: Sequence[str]) -> Iterator[None]:
    """What a script finds in `sys` when Python runs it."""
    argv, path = sys.argv, list(sys.path)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.resolve().parent))
    try:
        yield
    finally:
        sys.argv, sys.path[:] = argv, path


def _print_traceback(error: Exception, script: Path) -> None:
    """Of the script alone, without what ran it."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename != str(script):
        frames = frames.tb_next
    traceback.print_exception(type(error), error, frames)
