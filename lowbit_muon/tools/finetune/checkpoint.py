"""Checkpoints on disk that survive a killed process, a full disk and flipped bits.

A checkpoint is a folder `step-NNNNNNNN` with the tensors (`state.pt`) and a manifest that holds
their size and SHA-256. It is written under another name, synced and only then renamed, and older
ones are removed after that: whenever the process dies, a complete checkpoint is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, cast

import torch

from lowbit_muon.tools.errors import UserError

FORMAT_VERSION = 1
_STATE, _MANIFEST = "state.pt", "manifest.json"
_PREFIX, _PARTIAL, _DAMAGED = "step-", ".partial-", ".damaged"


class DamagedCheckpointError(Exception):
    """A checkpoint that is incomplete or not what was written; the message says how."""


class CheckpointStore:
    """The checkpoints of one run, in one folder that one process writes to."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep  # the newest, and the one before in case the newest is damaged

    def checkpoints(self) -> list[Path]:
        """Folders of the checkpoints, oldest first, whether damaged or not."""
        found = self.folder.glob(_PREFIX + "*")
        return sorted(path for path in found if path.name[len(_PREFIX) :].isdigit())

    def save(self, step: int, payload: dict[str, Any]) -> Path:
        """Write a checkpoint; returns its folder. `payload` holds tensors and plain values only."""
        final = self.folder / f"{_PREFIX}{step:08d}"
        partial = self.folder / (_PARTIAL + final.name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(_PARTIAL + "*"):
                shutil.rmtree(leftover)
            _write(partial, step, {"format_version": FORMAT_VERSION, **payload})
            os.rename(partial, final)
            _sync_folder(self.folder)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            raise UserError(
                f"cannot save checkpoint {final}: {error}; the one before it is unharmed"
            ) from error
        for old in self.checkpoints()[: -self.keep]:
            shutil.rmtree(old)
        return final

    def load_newest(self) -> tuple[dict[str, Any], list[str]]:
        """The newest checkpoint that is whole, and a message for each damaged one passed over.

        A damaged one is set aside (renamed), so that it is never taken for a good one again.
        Raises UserError if none is left.
        """
        messages: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                return load_checkpoint(path), messages
            except DamagedCheckpointError as damage:
                aside = path.with_name(path.name + _DAMAGED)
                shutil.rmtree(aside, ignore_errors=True)
                os.rename(path, aside)
                messages.append(f"checkpoint {path} is damaged ({damage}); kept as {aside.name}")
        found = "; ".join(messages) or f"no checkpoint in {self.folder}"
        raise UserError(f"nothing to resume from: {found}")


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """What was saved in a checkpoint folder, tensors on the CPU.

    Raises DamagedCheckpointError if it is not complete or not what its manifest says, UserError
    if a newer version of this program wrote it.
    """
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        found = _fingerprint(folder / _STATE)
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedCheckpointError(str(error)) from None
    for key, value in found.items():
        expected = manifest.get(key) if isinstance(manifest, dict) else None
        if expected != value:
            raise DamagedCheckpointError(f"{_STATE}: expected {key} {expected}, got {value}")
    try:
        payload = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
        version = payload["format_version"]
    except Exception as error:  # of any kind, for bytes that torch.save did not write
        raise DamagedCheckpointError(f"{_STATE}: {type(error).__name__}: {error}") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder}: expected checkpoint format {FORMAT_VERSION}, "
            f"got {version}; it was written by another version of lowbit-muon"
        )
    return cast(dict[str, Any], payload)


def _write(folder: Path, step: int, payload: dict[str, Any]) -> None:
    folder.mkdir()
    with open(folder / _STATE, "wb") as file:
        torch.save(payload, file)
        file.flush()
        os.fsync(file.fileno())
    manifest = {"step": step, **_fingerprint(folder / _STATE)}
    with open(folder / _MANIFEST, "wb") as file:
        file.write(json.dumps(manifest).encode())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
