"""A line in a log every so often, so that a long run is not silent where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

LOG_SECONDS = 15.0


class LogLines:
    """Shows a line at most every `LOG_SECONDS`, and none of what takes less.

    show: prints a line; clock: seconds that only grow.
    """

    def __init__(
        self, show: Callable[[str], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._show = show
        self._clock = clock
        self._last = clock()

    def offer(self, line: str) -> None:
        """Show the line if it is time for one."""
        now = self._clock()
        if now - self._last >= LOG_SECONDS:
            self._show(line)
            self._last = now
