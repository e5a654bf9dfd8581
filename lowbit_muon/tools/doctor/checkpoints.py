"""What is in a checkpoint: the states of optimizers."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch

from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore

StateDict = Mapping[str, Any]

# transformers' Trainer, Accelerate's save_state, `lowbit-muon finetune`.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "state.pt")
# Lightning: a list under `optimizer_states`.
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states")


@dataclass(frozen=True)
class Checkpoint:
    """The optimizers' state dicts of one file."""

    file: Path
    optimizers: list[StateDict]


def read_checkpoint(target: Path) -> Checkpoint:
    """Read a checkpoint's file or folder. Raises UserError."""
    file = _optimizer_file(target)
    return Checkpoint(file, _optimizer_states(_load_tensors(file), file))


def _optimizer_file(target: Path) -> Path:
    if target.is_file():
        if target.suffix == ".safetensors":
            raise UserError(
                "TARGET: expected an optimizer's state (optimizer.pt, a checkpoint), got weights, "
                f"{target}"
            )
        return target
    if not target.is_dir():
        raise UserError(f"TARGET: expected a file or folder that exists, got {target}")
    for folder in (target, *_finetune_checkpoints(target)):
        for name in _OPTIMIZER_FILES:
            if (folder / name).is_file():
                return folder / name
    raise UserError(
        f"TARGET: expected a folder with {', '.join(_OPTIMIZER_FILES[:-1])} or a checkpoint of "
        f"lowbit-muon finetune, got {target} with {_listing(target)}"
    )


def _finetune_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a fine-tune, newest first, in its folder or in its folder of checkpoints."""
    stores = (CheckpointStore(folder), CheckpointStore(folder / "checkpoints"))
    return [path for store in stores for path in reversed(store.checkpoints())]


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "") or "nothing in it"


def _optimizer_states(content: object, file: Path) -> list[StateDict]:
    if _is_state_dict(content):
        return [content]
    values = content if isinstance(content, Mapping) else {}
    for key in _OPTIMIZER_KEYS:
        states = values.get(key)
        states = states if isinstance(states, (list, tuple)) else [states]
        if states and all(map(_is_state_dict, states)):
            return list(states)
    got = f"keys {', '.join(map(str, list(values)[:6]))}" if values else type(content).__name__
    raise UserError(
        f"{file}: expected an optimizer's state_dict, bare or under one of "
        f"{', '.join(_OPTIMIZER_KEYS)}, got {got}"
    )


def _is_state_dict(value: object) -> TypeGuard[StateDict]:
    """Whether it has the entries that every `Optimizer.state_dict()` has."""
    if not isinstance(value, Mapping):
        return False
    states, groups = value.get("state"), value.get("param_groups")
    return (
        isinstance(states, Mapping)
        and isinstance(groups, list)
        and all(isinstance(state, Mapping) for state in states.values())
        and all(isinstance(group, Mapping) and _are_keys(group.get("params")) for group in groups)
    )


def _are_keys(params: object) -> bool:
    return isinstance(params, list) and all(isinstance(key, (int, str)) for key in params)


def _load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, on the CPU; tensors are mapped from the file where it can be."""
    try:
        mapped = zipfile.is_zipfile(path)  # files of torch before 1.6 are read as a whole
        if mapped:
            _check_not_compressed(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # a damaged file fails in as many ways as a pickle has parts
        # torch.load calls a class that it does not know GLOBAL, as pickle's own opcode is called.
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise UserError(
                f"{path}: expected tensors and plain values only (no code of a checkpoint is run), "
                f"got a {found[1]}; save optimizer.state_dict() by itself"
            ) from None
        raise UserError(
            f"{path}: expected a file of torch.save that is whole, got a {type(error).__name__}"
        ) from None


def _check_not_compressed(path: Path) -> None:
    """Raise UserError for a small file that would fill the memory."""
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > path.stat().st_size:
        raise UserError(
            f"{path}: expected a file of torch.save, which compresses nothing, got one of "
            f"{path.stat().st_size:,} bytes with {size:,} in it"
        )
