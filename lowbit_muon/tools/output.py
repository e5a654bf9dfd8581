"""Files that a command leaves behind: whether they can be written, and that none is half there."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_muon.tools.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LOCK, _PARTIAL = ".lock", ".partial"


def check_outputs(outputs: Sequence[tuple[str, Path | None]], inputs: Sequence[Path] = ()) -> None:
    """Raise UserError unless each option's file can be written, before any work is done for it.

    Makes the folders. inputs: what is read, and must not be replaced.
    """
    given = [(option, path) for option, path in outputs if path is not None]
    for option, path in given:
        if option == "--plot" and importlib.util.find_spec("matplotlib") is None:
            raise UserError("--plot: matplotlib is not installed (pip install matplotlib)")
        with replacing(option, path, keep=True) as partial:
            if any(path.exists() and file.exists() and path.samefile(file) for file in inputs):
                raise UserError(f"{option}: expected a file of its own, got the input {path}")
            if partial.name.endswith(_PARTIAL):  # a full disk has no room for this either
                partial.write_bytes(bytes(4096))
    if len({path.absolute() for _, path in given}) < len(given):
        raise UserError(f"{given[0][0]}: expected a file for each output, got {given[0][1]} twice")


def cannot_write(option: str, path: Path, reason: object) -> UserError:
    """The error for a file, or a run's folder, that cannot be written."""
    kind = "folder" if option == "--out" else "file"
    return UserError(f"{option}: expected a {kind} that can be written, got {path}: {reason}")


@contextmanager
def replacing(option: str, path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A path to write to, which then takes the place of `path`: the old file is there, or the new.

    A device or pipe is written to itself. keep: only try, and leave the old file. Raises UserError
    that names the option where the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
        if path.is_dir():
            raise cannot_write(option, path, "it is a folder")
        if path.exists() and not os.access(path, os.W_OK):
            raise cannot_write(option, path, "it is read-only")
        if path.exists() and not path.is_file():
            yield path
            return
        partial = path.with_name(path.name + _PARTIAL)
        try:
            yield partial
            if not keep:
                with open(partial, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise cannot_write(option, path, getattr(error, "strerror", None) or error) from None


def write_json(path: Path, value: Any, option: str = "--json") -> None:
    """Write JSON, creating the folder. Raises UserError that names the option."""
    with replacing(option, path) as partial:
        partial.write_text(json.dumps(value, indent=1), encoding="utf-8")


def write_plot(path: Path, figure: Figure, option: str = "--plot") -> None:
    """Draw a figure of matplotlib, as SVG or PNG by the path's suffix; as `write_json`."""
    with replacing(option, path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix[1:])


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder, made if it is not there, for one run. Raises UserError if another has it.

    The system releases it when the process ends, however that happens.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / _LOCK, "a", encoding="utf-8")  # noqa: SIM115
    except (OSError, ValueError) as error:
        raise cannot_write("--out", folder, getattr(error, "strerror", None) or error) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--out: expected a folder of no other run, got {folder}, where one is running"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
