"""What is in a checkpoint: optimizer states, and where the shapes of their matrices are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lowbit_muon.tools.doctor.weights import Shapes, load_tensors, read_shapes, shapes_in
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore

StateDict = Mapping[str, Any]

# transformers' Trainer, Accelerate's save_state, `lowbit-muon finetune`.
_OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "state.pt")
# Lightning: a list under `optimizer_states`.
_OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict", "optimizer_states")


@dataclass(frozen=True)
class Checkpoint:
    """The optimizers' state dicts of one file, and how to find the shapes of the weights."""

    file: Path
    optimizers: list[StateDict]
    find_shapes: Callable[[], Shapes]  # called only if the states do not tell


def read_checkpoint(target: Path, weights: Path | None) -> Checkpoint:
    """Read a checkpoint's file or folder; `weights` is where the model's weights are, if given.

    Raises UserError.
    """
    file = _optimizer_file(target)
    content = load_tensors(file)
    optimizers = _optimizer_states(content, file)

    def find_shapes() -> Shapes:
        if weights is not None:
            return read_shapes(weights)
        beside = {} if _is_state_dict(content) else shapes_in(content)
        return beside or read_shapes(file.parent)

    return Checkpoint(file, optimizers, find_shapes)


def _optimizer_file(target: Path) -> Path:
    if target.is_file():
        if target.suffix == ".safetensors":
            raise UserError(
                f"TARGET: expected an optimizer's state (optimizer.pt, a checkpoint), got weights, "
                f"{target}; give weights by --weights"
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
