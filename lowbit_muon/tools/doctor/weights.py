"""Shapes of a model's weights by name, and which of them an optimizer's parameters are."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.headers import Shape, read_header, read_index

Shapes = dict[str, Shape]

# Where training scripts put the model's state dict beside the optimizer's; Lightning: state_dict.
MODEL_KEYS = ("model", "model_state_dict", "state_dict")
# torch.compile's wrapper, anywhere; DataParallel's and DistributedDataParallel's, in front.
_WRAPPERS = re.compile(r"(?<![^.])_orig_mod\.|^module\.")
# PEFT saves its matrices without the name of the adapter that its parameters have.
_ADAPTER = re.compile(r"(?<=\.lora_)([AB])\.[^.]+\.weight$")


def load_tensors(path: Path) -> Any:
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


def read_shapes(path: Path) -> Shapes:
    """Shapes in a file of weights or in all of a folder; of safetensors only headers are read.

    Raises UserError for a file that cannot be read; a folder without weights has no shapes.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            file for name in ("pytorch_model*.bin", "adapter_model.bin") for file in path.glob(name)
        )
    elif not path.is_file():
        raise UserError(f"--weights: expected a file or folder that exists, got {path}")
    elif path.suffix == ".json":
        files = read_index(path)
    shapes: Shapes = {}
    for file in files:
        headers_only = file.suffix == ".safetensors"
        shapes |= read_header(file) if headers_only else shapes_in(load_tensors(file))
    return shapes


def shapes_in(content: object) -> Shapes:
    """Shapes of a model's state dict, bare or within a dict; none if there is no such thing."""
    if not isinstance(content, Mapping):
        return {}
    inner = (content[key] for key in MODEL_KEYS if isinstance(content.get(key), Mapping))
    return {
        str(name): tuple(value.shape)
        for name, value in next(inner, content).items()
        if isinstance(value, Tensor)
    }


def match_shapes(names: Sequence[str], shapes: Shapes) -> Shapes:
    """The shape of each parameter, one at least; wrappers may have put prefixes before names.

    Raises UserError naming what is missing.
    """
    plain = {_plain_name(name): shape for name, shape in shapes.items()}
    wanted = [_plain_name(name) for name in names]
    missing = list(names)
    for added, removed in _prefixes(wanted[0], plain):
        found = [added + name.removeprefix(removed) for name in wanted]
        absent = [name for name, other in zip(names, found, strict=True) if other not in plain]
        if not absent:
            return {name: plain[other] for name, other in zip(names, found, strict=True)}
        missing = min(missing, absent, key=len)
    raise UserError(
        f"weights: expected every matrix of the optimizer, found none called {missing[0]!r}"
        + (f" nor {len(missing) - 1} others" if len(missing) > 1 else "")
        + f" among {len(plain)} ({', '.join(list(plain)[:2])}, ...); give the right ones by "
        "--weights FILE_OR_FOLDER"
    )


def _plain_name(name: str) -> str:
    return _ADAPTER.sub(r"\1.weight", _WRAPPERS.sub("", name))


def _prefixes(name: str, weights: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """(prefix to add, prefix to remove) that turn the name into one of a weight, shortest first."""
    if name in weights:
        yield "", ""
    parts = name.split(".")
    for start in range(1, len(parts)):
        if ".".join(parts[start:]) in weights:
            yield "", ".".join(parts[:start]) + "."
    longer = [weight for weight in weights if weight.endswith("." + name)]
    yield from ((weight.removesuffix(name), "") for weight in sorted(longer, key=len))
