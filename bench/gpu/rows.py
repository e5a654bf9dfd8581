"""One line of the GPU check's table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped", "measured"]


@dataclass(frozen=True)
class Row:
    """value is in `unit`; ratio is against `baseline` (a time divided by ours: above 1 we win)."""

    group: str
    name: str
    status: Status
    detail: str = ""
    value: float | None = None
    unit: str = ""
    ratio: float | None = None
    baseline: str = ""


@dataclass(frozen=True)
class Case:
    """Something that makes rows; `reason` says why it cannot run, if it cannot."""

    group: str
    name: str
    run: Callable[[], Iterator[Row]]
    reason: str | None = None

    def rows(self) -> Iterator[Row]:
        """The rows, or the one that says why there are none; an error is a failed row."""
        if self.reason is not None:
            yield Row(self.group, self.name, "skipped", self.reason)
            return
        try:
            yield from self.run()
        except Exception as error:  # the script goes on: one broken case hides no other
            message = " ".join(str(error).split())[:300]
            yield Row(self.group, self.name, "failed", f"{type(error).__name__}: {message}")
