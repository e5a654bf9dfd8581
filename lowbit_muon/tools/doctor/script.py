"""A training script, run until its optimizer is about to take a step, and diagnosed there."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.step_hooks import Arguments, when_gradients_are_there
from lowbit_muon.tools.doctor.examine import Examined, diagnose_with_progress
from lowbit_muon.tools.doctor.saved_state import aux_state_of
from lowbit_muon.tools.errors import UserError


class ScriptStop(BaseException):
    """Ends the script from within; no Exception, so that its handlers of those let it pass."""


def examine_script(
    script: Path, arguments: Sequence[str], step: int, console: Console
) -> list[Examined]:
    """Run a script as `python script arguments` would and diagnose its Muons before a step.

    step: which of a Muon's steps; the first that gets there decides for all. The script is stopped
    there. If it ends before, what there is then is diagnosed, without gradients: those left are
    of a step that was taken.

    Raises UserError if there is nothing to diagnose or the script failed, with its traceback.
    """
    watch = _Watch(step, console)
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

    def __init__(self, step: int, console: Console) -> None:
        self.found: list[Examined] = []
        self._step = step
        self._console = console
        self._steps: dict[Muon, int] = {}  # begun so far

    def before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        """The hook: of every optimizer, AdamW's within ours too."""
        if not isinstance(optimizer, Muon):
            return None
        self._steps[optimizer] = self._steps.get(optimizer, 0) + 1
        if self._steps[optimizer] < self._step:
            return None
        return when_gradients_are_there(args, kwargs, self._finish)

    def _finish(self) -> None:
        if not self.found:  # a script that swallows the stop comes here again
            self.found = self._examine(f"Diagnosed before step {self._step}")
        raise ScriptStop

    def after_end(self, script: Path, how: str) -> list[Examined]:
        """For a script that ended by itself."""
        if not self._steps:
            raise UserError(
                f"{script}: expected steps of a lowbit_muon optimizer, got none: the script ended"
                f"{how}"
            )
        for optimizer in self._steps:
            optimizer.zero_grad(set_to_none=True)
        steps = max(self._steps.values())
        return self._examine(f"The script ended after {steps} steps, before step {self._step}")

    def _examine(self, when: str) -> list[Examined]:
        found = []
        for optimizer in self._steps:
            rows = diagnose_with_progress(optimizer, self._console)
            exact = sum(row.with_gradient for row in rows)
            kind = "exact for that step" if exact == len(rows) else _estimates(exact, len(rows))
            remarks = (f"{when}: errors are {kind}.",)
            aux = aux_state_of(optimizer)
            found.append(Examined(type(optimizer).__name__, rows, aux, remarks))
        return found


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
