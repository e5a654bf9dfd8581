"""Values of command-line arguments that several commands take."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from lowbit_muon.tools.benchmark.report import PLOT_SUFFIXES


def whole_number(text: str) -> int:
    """A count of one or more."""
    if not re.fullmatch(r"[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def plot_path(text: str) -> Path:
    """A file that a plot can be written to."""
    path = Path(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise argparse.ArgumentTypeError(
            f"expected a file that ends in {' or '.join(PLOT_SUFFIXES)}, got {text!r}"
        )
    return path
