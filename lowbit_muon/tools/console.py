"""How commands print: text as it is, tables, and progress on a terminal only."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from rich.box import HEAVY_HEAD, Box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

KIB, MIB = 2**10, 2**20
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


def make_table(
    title: str,
    headings: Iterable[str],
    left: Iterable[str] = (),
    *,
    wrap: bool = True,
    box: Box = HEAVY_HEAD,
) -> Table:
    """An empty table; numbers stand on the right, the first column and those of `left` do not."""
    table = Table(title=title, box=box)
    for number, heading in enumerate(headings):
        justify = "left" if number == 0 or heading in left else "right"
        table.add_column(heading, justify=justify, no_wrap=not wrap)  # type: ignore[arg-type]
    return table


def progress_bar(console: Console, *, transient: bool = True) -> Progress:
    """A bar for tasks with a description and a `status`; nothing where there is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=not console.is_terminal,
    )
