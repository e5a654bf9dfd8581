"""A model without data (device "meta"), from its `config.json` or from safetensors headers.

A config is built by transformers, which know what every module is. A header has names only, see
`_module`. `muon_param_groups` routes the parameters of both, by its rules and no others.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lowbit_muon.optimizers.param_groups import HEAD_NAMES
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.headers import (
    INDEX_FILE,
    MOST_ELEMENTS,
    Shape,
    is_size,
    read_header,
    read_index,
    read_json,
)

_EMBEDDING_NAMES = re.compile(r"emb|wte|wpe|token|position", re.IGNORECASE)
# Of a model: more than twice the experts' matrices of Kimi-K2 (arXiv 2507.20534), in modules of
# their own, and how long transformers may take to make them.
MOST_TENSORS, MOST_SECONDS = 200_000, 20.0
# Of a config: any whole number, and those that count what is made one by one.
_MOST_NUMBER = 2**31
_MOST_DEPTH = 100  # torch walks through modules by recursion
_MOST_COUNTS = {
    r"layers?$|blocks?$|depth": 2000,
    r"(head|expert|stage|level|label|group)s?$": 10**5,
}
_OTHER_INPUTS = (
    "give the checkpoint: a .safetensors file or the folder of them (only headers are read)"
)


@dataclass(frozen=True)
class ModelShapes:
    """A model without data and without a forward pass, and where it was read.

    tied: whether layers share a parameter. Checkpoints do not say it; they are taken to be tied if
    they have no head.
    """

    source: str
    model: nn.Module
    tied: bool

    @property
    def parameters(self) -> dict[str, Shape]:
        """Shapes by name, of shared parameters once."""
        return {name: tuple(param.shape) for name, param in self.model.named_parameters()}

    @property
    def elements(self) -> int:
        """Of all parameters."""
        return sum(map(math.prod, self.parameters.values()))


def read_model(path: Path) -> ModelShapes:
    """Read a config.json, a safetensors file or its index, or a folder with any of them.

    A folder's config goes first if its model can be made, since it says more than names do.
    Raises UserError.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise UserError(f"MODEL: expected a file or folder that exists, got {path}")
    if path.suffix == ".safetensors":
        return _from_headers([path])
    values = read_json(path)
    return _from_headers(read_index(path)) if "weight_map" in values else _from_config(path, values)


def _read_folder(folder: Path) -> ModelShapes:
    config, index = folder / "config.json", folder / INDEX_FILE
    files = read_index(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if config.is_file():
        try:
            return _from_config(config, read_json(config))
        except UserError:
            if not files:
                raise
    if not files:
        raise UserError(
            f"MODEL: expected a folder with config.json, *.safetensors or {INDEX_FILE}, "
            f"got {folder}"
        )
    return _from_headers(files)


# From a config --------------------------------------------------------------------------------


def _from_config(path: Path, values: dict[str, Any]) -> ModelShapes:
    model_type = values.get("model_type")
    if not isinstance(model_type, str):
        raise UserError(
            f"{path}: model_type: expected the name of an architecture, got {model_type!r}; "
            f"or {_OTHER_INPUTS}"
        )
    _check_numbers(path, values)
    if importlib.util.find_spec("transformers") is None:
        raise UserError(
            f"{path}: transformers is not installed (pip install 'lowbit-muon[plan]'); "
            f"or {_OTHER_INPUTS}"
        )
    try:
        with _quiet(), _limited(), torch.device("meta"):
            model = _make(model_type, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # of as many kinds as transformers has models
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: expected a config of {model_type}, got {reason}") from None
    tied = len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
    shapes = ModelShapes(f"{path} ({model_type})", model, tied)
    for name, shape in shapes.parameters.items():
        if not is_size(shape) or 0 in shape:
            raise UserError(f"{path}: {name}: expected a size >= 1 and < 2^55, got {shape}")
    if shapes.elements > MOST_ELEMENTS:
        raise UserError(f"{path}: expected fewer parameters, got {shapes.elements:,}")
    return shapes


def _make(model_type: str, values: dict[str, Any]) -> nn.Module:
    """The class that the config names, or its usual one, and never code beside the config."""
    import transformers

    if model_type not in transformers.CONFIG_MAPPING:
        raise UserError(
            f"model_type: expected one that transformers {transformers.__version__} know, got "
            f"{model_type!r}; or {_OTHER_INPUTS}"
        )
    config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
    name = next(iter(values.get("architectures") or ()), None)
    kind: Any = getattr(transformers, str(name), None)
    if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
        usual = (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING)
        kind = next(mapping for mapping in usual if type(config) in mapping)[type(config)]
    model: nn.Module = kind._from_config(config, attn_implementation="eager")
    return model


def _check_numbers(path: Path, value: object, name: str = "") -> None:
    """Raise UserError for a number of layers, heads or anything that no model has."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_numbers(path, inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            _check_numbers(path, inner, name)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        limits = (most for pattern, most in _MOST_COUNTS.items() if re.search(pattern, name))
        most = next(limits, _MOST_NUMBER)
        if isinstance(value, int) and abs(value) > most:
            raise UserError(f"{path}: {name}: expected a whole number <= {most:,}, got {value:,}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Within it transformers have nothing to say, and nobody to ask."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # looked at when they are imported
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _limited() -> Iterator[None]:
    """Within it a model of too many tensors is an error as soon as it has them.

    Time is the processor's, from the first tensor on: imports come before it, and neither a cold
    disk nor what else the machine is doing makes a model too large.
    """
    tensors, start = 0, 0.0

    def count(*_: object) -> None:
        nonlocal tensors, start
        tensors += 1
        if tensors == 1:
            start = time.process_time()
        if tensors > MOST_TENSORS or time.process_time() - start > MOST_SECONDS:
            raise UserError(
                f"expected a model of at most {MOST_TENSORS:,} tensors, made in {MOST_SECONDS:.0f} "
                f"s of processor time, got {tensors:,} so far"
            )

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


# From headers ---------------------------------------------------------------------------------


def _from_headers(paths: Sequence[Path]) -> ModelShapes:
    found: dict[str, Shape] = {}
    for path in paths:
        found |= read_header(path)
    files = f"{paths[0]}" if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
    if not 0 < len(found) <= MOST_TENSORS or not is_size([sum(map(math.prod, found.values()))]):
        raise UserError(
            f"{files}: expected parameters, {MOST_TENSORS:,} at most, got {len(found):,}"
        )
    try:
        tied = set(HEAD_NAMES).isdisjoint(part for name in found for part in name.split("."))
        return ModelShapes(f"{files} (safetensors headers)", skeleton(found), tied)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{files}: expected names of a model's parameters, got {error}") from None


def skeleton(shapes: Mapping[str, Shape]) -> nn.Module:
    """A model with such parameters, without data."""
    owned: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        path, _, own_name = name.rpartition(".")
        if path.count(".") >= _MOST_DEPTH:
            raise ValueError(f"modules in {path.count('.')} others")
        owned[path][own_name] = shape
    paths = {".".join(parts[:end]) for parts in (path.split(".") for path in owned)
             for end in range(1, len(parts) + 1)} - {""}  # fmt: skip
    # Layers of a stack are children of a ModuleList, by which `muon_param_groups` knows them.
    stacks = {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2].isdigit()}
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for path in sorted(paths, key=lambda path: path.count(".")):
        parent, _, name = path.rpartition(".")
        stack = path in stacks and path not in owned
        modules[path] = nn.ModuleList() if stack else _module(path, owned.get(path, {}))
        modules[parent].add_module(name, modules[path])
    for path, members in owned.items():
        for own_name, shape in members.items():
            value = nn.Parameter(torch.empty(shape, device="meta"))
            modules[path].register_parameter(own_name, value)
    return modules[""]


def _module(path: str, members: Mapping[str, Shape]) -> nn.Module:
    """A module of the class that the name and shape of its largest parameter speak for.

    A matrix called `weight` is an embedding's if its module's name says so (embed_tokens, wte, wpe,
    position_embeddings) and a linear layer's otherwise; four or five dimensions are a
    convolution's, and so are three if the path says "conv". Everything else is left to what
    `muon_param_groups` makes of the name: three dimensions are a stack of experts.
    """
    name, shape = max(members.items(), key=lambda member: len(member[1]), default=("", ()))
    if len(shape) > 3 or (len(shape) == 3 and "conv" in path.lower()):
        return nn.Conv2d(1, 1, 1, bias=False, device="meta")
    if name != "weight" or len(shape) > 2:
        return nn.Module()
    if len(shape) < 2:
        return nn.LayerNorm(1, elementwise_affine=False)
    if _EMBEDDING_NAMES.search(path.rpartition(".")[2]):
        return nn.Embedding(shape[0], shape[1], device="meta")
    return nn.Linear(shape[1], shape[0], bias=False, device="meta")
