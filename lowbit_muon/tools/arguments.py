"""Values of command-line arguments, each within what makes sense."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

PLOT_SUFFIXES = (".svg", ".png")
MOST = 10**9  # of what is counted, where nothing less is the limit
MOST_THREADS = 1024


def whole_number(low: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A parser of a whole number in [low, most]."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= most:
            expected = f"expected a whole number >= {low} and <= {most}"
            raise argparse.ArgumentTypeError(f"{expected}, got {text[:80]!r}")
        return value

    return parse


def positive_number(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def plot_path(text: str) -> Path:
    """A file that a plot can be written to."""
    path = Path(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a file that ends in {' or '.join(PLOT_SUFFIXES)}, got {text!r}"
        )
    return path
