"""How commands print: text as it is, tables, and progress: a bar, or lines in a log."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rich import progress
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lowbit_muon.tools.progress import LogLines

KIB, MIB = 2**10, 2**20
TABLE_WIDTH = 80  # that every table fits into, but for --wide
_WITHOUT_LIMIT = 1000
_MESSAGE_CHARACTERS = 2000  # of an error; a name in a damaged file may be as long as the file


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Go on in silence, so that `| head` does not end a run before it is saved."""
        self.quiet = True
        discard_output()


def discard_output() -> None:
    """Send what is still printed, and what waits to be, nowhere: its reader or disk is gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def plain_console(*, quiet: bool = False) -> Console:
    """A console that prints text as it is: no markup in it, and no line breaks added to it."""
    return _Console(markup=False, highlight=False, emoji=False, soft_wrap=True, quiet=quiet)


def printable(text: str) -> str:
    """A text in one line: what a terminal would not show, or obey, as Python would escape it."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    more = len(shown) - _MESSAGE_CHARACTERS
    return shown if more <= 0 else f"{shown[:_MESSAGE_CHARACTERS]} ... ({more} characters more)"


@dataclass(frozen=True)
class Column:
    """A column of a table: numbers, whole on the right, or text, on the left and broken if long.

    wide: only with `--wide`.
    """

    heading: str
    text: bool = False
    wide: bool = False


def make_table(
    title: str,
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    *,
    wide: bool,
    sums: Sequence[str] | None = None,
) -> Table:
    """A table with a cell of each row for each of `columns`; `sums`: a row below a line."""
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown = [column for column in columns if wide or not column.wide]
    for column in shown:
        if column.text:
            table.add_column(column.heading, overflow="fold")
        else:
            table.add_column(column.heading, justify="right", no_wrap=True)

    def add(cells: Sequence[str]) -> None:
        pairs = zip(columns, cells, strict=True)
        table.add_row(*(cell for column, cell in pairs if column in shown))

    for row in rows:
        add(row)
    if sums is not None:
        table.add_section()
        add(sums)
    return table


def show_table(console: Console, table: Table, *, wide: bool) -> None:
    """Print a table: in `TABLE_WIDTH` columns, in more where a terminal has them, or any `wide`."""
    before = console.width
    least = max(before, TABLE_WIDTH) if console.is_terminal else TABLE_WIDTH
    console.width = _WITHOUT_LIMIT if wide else least
    try:
        console.print(table, soft_wrap=False)
    finally:
        console.width = before


def add_wide(parser: argparse.ArgumentParser) -> None:
    """The option `--wide` of a command with tables."""
    parser.add_argument(
        "--wide",
        action="store_true",
        help=f"tables with all columns, on lines of more than {TABLE_WIDTH} characters",
    )


class Progress:
    """What a command shows while it works; a context manager.

    A bar on a terminal, lines in a log (`LogLines`): what is counted, how many of how many, and a
    status. transient: the bar goes when the work is done.
    """

    def __init__(
        self,
        console: Console,
        counted: str,
        total: int,
        *,
        done: int = 0,
        transient: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._counted, self._total, self._done = counted, total, done
        self._log = None if console.is_terminal else LogLines(console.print, clock)
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[status]}"),
            progress.TimeRemainingColumn(),
            console=console,
            transient=transient,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task(counted, total=total, completed=done, status="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, status: str = "") -> None:
        """Show that one more is done."""
        self._done += 1
        self.note(status)

    def note(self, status: str) -> None:
        """Show what goes on between two of those that are counted."""
        self._bar.update(self._task, completed=self._done, status=status)
        if self._log is not None:
            self._log.offer(f"{self._counted} {self._done}/{self._total}  {status}".rstrip())
