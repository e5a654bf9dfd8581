"""Names and shapes of a checkpoint's tensors, from the headers of safetensors files alone.

The safetensors package would read a header too, but not without the data behind it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from lowbit_muon.tools.errors import UserError

Shape = tuple[int, ...]

INDEX_FILE = "model.safetensors.index.json"
# A header is JSON of names, dtypes and shapes; the format's own limit
# (https://github.com/huggingface/safetensors, MAX_HEADER_SIZE).
MOST_JSON_BYTES = 100_000_000
# Of one tensor, what an int64 can count in bits; torch's indices go no further.
MOST_ELEMENTS = 2**55
_MOST_DIMENSIONS = 8
# Tensors in checkpoints that nothing trains: rotary tables, GPT-2's masks, positions, counts.
_NO_PARAMETER = re.compile(
    r"inv_freq$|masked_bias$|position_ids$|running_(mean|var)$|num_batches_tracked$"
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError."""
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"a file of more than {MOST_JSON_BYTES:,} bytes")
        return _json_object(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected an object in JSON, got {error}") from None


def _json_object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text, object_pairs_hook=_without_duplicates)
    except RecursionError:
        raise ValueError("values within values beyond all limits") from None
    if not isinstance(value, dict):
        raise ValueError(f"a {type(value).__name__}")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name twice")
    return found


def read_index(path: Path) -> list[Path]:
    """The files that an index names, all within its folder. Raises UserError."""
    weight_map = read_json(path).get("weight_map")
    names = set()
    for name in weight_map.values() if isinstance(weight_map, dict) else ():
        parts = PurePosixPath(name).parts if isinstance(name, str) else ()
        if not parts or parts[0] == "/" or ".." in parts or "\0" in name:
            raise UserError(f"{path}: weight_map: expected files beside it, got {name!r}")
        names.add(name)
    if not names:
        raise UserError(f"{path}: expected a weight_map of names and files, got none")
    return [path.parent / name for name in sorted(names)]


def read_header(path: Path) -> dict[str, Shape]:
    """Shapes of the tensors of a safetensors file that may be parameters. Raises UserError.

    The file starts with the length of the header, 8 bytes, little-endian, and the header in JSON
    (https://github.com/huggingface/safetensors).
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= MOST_JSON_BYTES:
                raise ValueError(f"{start!r}")
            header = _json_object(file.read(length))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a safetensors header, got {error}") from None
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _is_entry(entry):
            raise UserError(f"{path}: expected dtype and shape of {name!r}, got {entry!r}")
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
    return {name: shape for name, shape in shapes.items()
            if _is_parameter(name, shape, header[name]["dtype"])}  # fmt: skip


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return False
    shape = entry.get("shape")
    return isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS and is_size(shape)


def is_size(shape: Iterable[object]) -> bool:
    """Whether torch can have a tensor of that shape, without any data."""
    sizes = [size for size in shape if type(size) is int and 0 <= size <= MOST_ELEMENTS]
    return len(sizes) == len(list(shape)) and math.prod(sizes) <= MOST_ELEMENTS


def _is_parameter(name: str, shape: Shape, dtype: str) -> bool:
    """Whether a tensor is trained. GPT-2's masks are called `attn.bias`, of four dimensions."""
    mask = name.endswith("attn.bias") and len(shape) == 4
    floating = dtype.startswith(("F", "BF"))
    return floating and 0 not in shape and not mask and not _NO_PARAMETER.search(name)
