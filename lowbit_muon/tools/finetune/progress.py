"""What a run shows while it works: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console

from lowbit_muon.tools.console import MIB, progress_bar

PLAIN_LINES = 10  # of progress in a whole run


class TrainingProgress:
    """Shows loss, tokens/s and optimizer state of the steps of a run; a context manager."""

    def __init__(self, console: Console, first_step: int, steps: int) -> None:
        self.console = console
        self.steps = steps
        self._every = max(1, steps // PLAIN_LINES)
        self._bar = progress_bar(console, transient=False)
        self._task = self._bar.add_task("training", total=steps, completed=first_step, status="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def step(self, done: int, loss: float, tokens_per_second: float, state_bytes: int) -> None:
        """Show that `done` steps are done; `loss` is the last one's."""
        status = (
            f"loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"state {state_bytes / MIB:,.1f} MiB"
        )
        self._bar.update(self._task, completed=done, status=status)
        if not self.console.is_terminal and (done % self._every == 0 or done == self.steps):
            self.console.print(f"step {done}/{self.steps}  {status}")
