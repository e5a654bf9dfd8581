"""Names and shapes of a model's parameters, from its `config.json` or from safetensors headers.

The result is a skeleton: an nn.Module without data (device "meta") with the model's parameter names
and the module classes that `muon_param_groups` goes by, so that parameters are routed by its rules
and no others. A config says which module is what; a header has names only, see `_kind_by_name`.
"""

from __future__ import annotations

import json
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lowbit_muon.tools.plan.errors import PlanError

Kind = Literal["linear", "transposed", "embedding", "norm", "conv", "other"]

_META = torch.device("meta")
INDEX_FILE = "model.safetensors.index.json"
# A header is JSON of names, dtypes and shapes; the format's own limit
# (https://github.com/huggingface/safetensors, MAX_HEADER_SIZE).
_MOST_HEADER_BYTES = 100_000_000
# Tensors in checkpoints that nothing trains: rotary tables, GPT-2's masks, positions, counts.
_NO_PARAMETER = re.compile(
    r"inv_freq$|masked_bias$|position_ids$|running_(mean|var)$|num_batches_tracked$"
)
_EMBEDDING_NAMES = re.compile(r"emb|wte|wpe|token|position", re.IGNORECASE)


@dataclass(frozen=True)
class ParameterShape:
    """One parameter: its full name, its size, and what kind of module owns it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class ModelShapes:
    """A model's parameters and where they were read."""

    source: str
    parameters: tuple[ParameterShape, ...]

    @property
    def elements(self) -> int:
        """Parameters of the model, shared ones once."""
        return sum(torch.Size(p.shape).numel() for p in self.parameters)

    def skeleton(self) -> nn.Module:
        """A model without data and without a forward pass."""
        return _build(self.parameters)


def read_model(path: Path) -> ModelShapes:
    """Read a config.json, a safetensors file or its index, or a folder with any of them.

    A folder's config goes first if its model_type is known, since it says more than names do.
    Raises PlanError.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise PlanError(f"MODEL: expected a file or folder that exists, got {path}")
    if path.suffix == ".safetensors":
        return _from_headers([path])
    values = _read_json(path)
    if "weight_map" in values:
        return _from_index(path, values)
    return _from_config(path, values)


def _read_folder(folder: Path) -> ModelShapes:
    config = folder / "config.json"
    shards = sorted(folder.glob("*.safetensors"))
    values = _read_json(config) if config.is_file() else {}
    if values and (values.get("model_type") in ARCHITECTURES or not shards):
        return _from_config(config, values)
    index = folder / INDEX_FILE
    if index.is_file():
        return _from_index(index, _read_json(index))
    if not shards:
        raise PlanError(
            f"MODEL: expected a folder with config.json, *.safetensors or {INDEX_FILE}, "
            f"got {folder}"
        )
    return _from_headers(shards)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(f"MODEL: expected JSON in {path}, got {error}") from None
    if not isinstance(values, dict):
        raise PlanError(f"MODEL: expected a JSON object in {path}, got {type(values).__name__}")
    return values


# From a config --------------------------------------------------------------------------------


class _Config:
    """Fields of a config.json, with errors that name them."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self._path, self._values = path, values

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number >= 1; `default` where it is missing or null."""
        value = self._values.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise PlanError(
                f"MODEL: {self._path}: {name}: expected a whole number >= 1, got {value!r}"
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise PlanError(f"MODEL: {self._path}: {name}: expected true or false, got {value!r}")
        return value

    def numbers(self, name: str) -> list[int]:
        value = self._values.get(name) or []
        if not isinstance(value, list) or not all(isinstance(v, int) for v in value):
            raise PlanError(
                f"MODEL: {self._path}: {name}: expected a list of numbers, got {value!r}"
            )
        return value


@dataclass(frozen=True)
class _Decoder:
    """What tells one Llama-like model_type of Hugging Face's transformers from another.

    qkv_bias, output_bias: None for what `attention_bias` says. experts: names of the layer's MLP
    and of its experts' matrices, or None for a dense MLP.
    """

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    head_norms: bool = False
    experts: Literal["mixtral", "qwen"] | None = None
    shared_expert: bool = False


def _decoder(config: _Config, kind: _Decoder) -> Iterator[ParameterShape]:
    """transformers/models/{llama,mistral,qwen2,qwen3,mixtral,..}/modeling_*.py"""
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    kv_heads = config.size("num_key_value_heads", heads)
    head = config.size("head_dim", max(1, hidden // heads))
    attention_bias = config.flag("attention_bias", False)
    qkv_bias = attention_bias if kind.qkv_bias is None else kind.qkv_bias
    output_bias = attention_bias if kind.output_bias is None else kind.output_bias
    vocabulary = config.size("vocab_size")
    yield ParameterShape("model.embed_tokens.weight", (vocabulary, hidden), "embedding")
    for layer in range(config.size("num_hidden_layers")):
        path = f"model.layers.{layer}"
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            yield from _linear(f"{path}.self_attn.{name}_proj", rows * head, hidden, qkv_bias)
        yield from _linear(f"{path}.self_attn.o_proj", hidden, heads * head, output_bias)
        if kind.head_norms:
            for name in ("q_norm", "k_norm"):
                yield ParameterShape(f"{path}.self_attn.{name}.weight", (head,), "norm")
        yield from _mlp(config, kind, path, layer, hidden)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield ParameterShape(f"{path}.{name}.weight", (hidden,), "norm")
    yield ParameterShape("model.norm.weight", (hidden,), "norm")
    if not config.flag("tie_word_embeddings", False):
        yield from _linear("lm_head", vocabulary, hidden, False)


def _mlp(
    config: _Config, kind: _Decoder, path: str, layer: int, hidden: int
) -> Iterator[ParameterShape]:
    if kind.experts == "mixtral":
        moe, count = f"{path}.block_sparse_moe", config.size("num_local_experts")
        yield from _linear(f"{moe}.gate", count, hidden, False)
        for expert in range(count):
            names = ("w1", "w3", "w2")
            size = config.size("intermediate_size")
            yield from _gated(f"{moe}.experts.{expert}", names, size, hidden, False)
        return
    names = ("gate_proj", "up_proj", "down_proj")
    sparse = kind.experts == "qwen" and (
        layer not in config.numbers("mlp_only_layers")
        and (layer + 1) % config.size("decoder_sparse_step", 1) == 0
    )
    if not sparse:
        size, bias = config.size("intermediate_size"), config.flag("mlp_bias", False)
        yield from _gated(f"{path}.mlp", names, size, hidden, bias)
        return
    count = config.size("num_experts")
    yield from _linear(f"{path}.mlp.gate", count, hidden, False)
    for expert in range(count):
        size = config.size("moe_intermediate_size")
        yield from _gated(f"{path}.mlp.experts.{expert}", names, size, hidden, False)
    if kind.shared_expert:
        size = config.size("shared_expert_intermediate_size")
        yield from _gated(f"{path}.mlp.shared_expert", names, size, hidden, False)
        yield from _linear(f"{path}.mlp.shared_expert_gate", 1, hidden, False)


def _gated(
    path: str, names: tuple[str, str, str], size: int, hidden: int, bias: bool
) -> Iterator[ParameterShape]:
    gate, up, down = names
    yield from _linear(f"{path}.{gate}", size, hidden, bias)
    yield from _linear(f"{path}.{up}", size, hidden, bias)
    yield from _linear(f"{path}.{down}", hidden, size, bias)


def _linear(path: str, rows: int, columns: int, bias: bool) -> Iterator[ParameterShape]:
    yield ParameterShape(f"{path}.weight", (rows, columns), "linear")
    if bias:
        yield ParameterShape(f"{path}.bias", (rows,), "linear")


def _gpt2(config: _Config) -> Iterator[ParameterShape]:
    """transformers/models/gpt2/modeling_gpt2.py; Conv1D keeps its weight as [inputs, outputs]."""
    hidden = config.size("n_embd", 768)
    inner = config.size("n_inner", 4 * hidden)
    vocabulary = config.size("vocab_size", 50257)
    yield ParameterShape("transformer.wte.weight", (vocabulary, hidden), "embedding")
    positions = config.size("n_positions", 1024)
    yield ParameterShape("transformer.wpe.weight", (positions, hidden), "embedding")
    for layer in range(config.size("n_layer", 12)):
        path = f"transformer.h.{layer}"
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            yield ParameterShape(f"{path}.{name}.weight", (rows, columns), "transposed")
            yield ParameterShape(f"{path}.{name}.bias", (columns,), "transposed")
        yield from _layer_norm(f"{path}.ln_1", hidden)
        yield from _layer_norm(f"{path}.ln_2", hidden)
    yield from _layer_norm("transformer.ln_f", hidden)
    if not config.flag("tie_word_embeddings", True):
        yield from _linear("lm_head", vocabulary, hidden, False)


def _layer_norm(path: str, size: int) -> Iterator[ParameterShape]:
    yield ParameterShape(f"{path}.weight", (size,), "norm")
    yield ParameterShape(f"{path}.bias", (size,), "norm")


def _decoder_of(kind: _Decoder) -> Callable[[_Config], Iterator[ParameterShape]]:
    return lambda config: _decoder(config, kind)


ARCHITECTURES: dict[str, Callable[[_Config], Iterator[ParameterShape]]] = {
    "llama": _decoder_of(_Decoder()),
    "mistral": _decoder_of(_Decoder(qkv_bias=False, output_bias=False)),
    "qwen2": _decoder_of(_Decoder(qkv_bias=True, output_bias=False)),
    "qwen3": _decoder_of(_Decoder(head_norms=True)),
    "mixtral": _decoder_of(_Decoder(qkv_bias=False, output_bias=False, experts="mixtral")),
    "qwen2_moe": _decoder_of(
        _Decoder(qkv_bias=True, output_bias=False, experts="qwen", shared_expert=True)
    ),
    "qwen3_moe": _decoder_of(_Decoder(head_norms=True, experts="qwen")),
    "gpt2": _gpt2,
}


def _from_config(path: Path, values: Mapping[str, Any]) -> ModelShapes:
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise PlanError(
            f"MODEL: {path}: model_type: expected one of {', '.join(sorted(ARCHITECTURES))}, got "
            f"{model_type!r}; for any other model give its checkpoint, a .safetensors file or the "
            "folder of them (only headers are read)"
        )
    parameters = tuple(ARCHITECTURES[model_type](_Config(path, values)))
    return ModelShapes(f"{path} ({model_type})", parameters)


# From headers ---------------------------------------------------------------------------------


def _from_index(path: Path, values: Mapping[str, Any]) -> ModelShapes:
    weight_map = values.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PlanError(f"MODEL: {path}: expected a weight_map of names and files, got none")
    return _from_headers([path.parent / str(name) for name in sorted(set(weight_map.values()))])


def _from_headers(paths: list[Path]) -> ModelShapes:
    found: dict[str, ParameterShape] = {}
    for path in paths:
        for name, entry in read_header(path).items():
            shape = tuple(entry["shape"])
            if _is_parameter(name, shape, str(entry["dtype"])):
                found[name] = ParameterShape(name, shape, _kind_by_name(name, shape))
    if not found:
        raise PlanError(f"MODEL: expected parameters in {paths[0]}, got none")
    files = f"{paths[0]}" if len(paths) == 1 else f"{len(paths)} files in {paths[0].parent}"
    return ModelShapes(f"{files} (safetensors headers)", tuple(found.values()))


def read_header(path: Path) -> dict[str, Any]:
    """{name: {"dtype": .., "shape": [..], ..}} of a safetensors file, without its data.

    The file starts with the length of the header, 8 bytes, little-endian, and the header in JSON
    (https://github.com/huggingface/safetensors). Raises PlanError.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= _MOST_HEADER_BYTES:
                raise PlanError(f"MODEL: {path}: expected a safetensors header, got {start!r}")
            header = json.loads(file.read(length))
    except (OSError, ValueError) as error:
        raise PlanError(f"MODEL: {path}: expected a safetensors header, got {error}") from None
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    if not isinstance(header, dict) or not all(map(_is_entry, header.values())):
        raise PlanError(f"MODEL: {path}: expected names with dtype and shape in the header")
    return header


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
        return False
    return "dtype" in entry and all(isinstance(v, int) and v >= 0 for v in entry["shape"])


def _is_parameter(name: str, shape: tuple[int, ...], dtype: str) -> bool:
    """Whether a tensor is trained. GPT-2's masks are called `attn.bias`, of four dimensions."""
    mask = name.endswith("attn.bias") and len(shape) == 4
    return dtype.startswith(("F", "BF")) and not mask and not _NO_PARAMETER.search(name)


def _kind_by_name(name: str, shape: tuple[int, ...]) -> Kind:
    """What owns a parameter that only a name is known of.

    A matrix called `weight` is an embedding's if its module's name says so (embed_tokens, wte, wpe,
    position_embeddings) and a linear layer's otherwise; four or five dimensions are a
    convolution's, and so are three if the path says "conv". Everything else is left to what
    `muon_param_groups` makes of the name: three dimensions are a stack of experts.
    """
    path, _, own_name = name.rpartition(".")
    if len(shape) > 3 or (len(shape) == 3 and "conv" in path.lower()):
        return "conv"
    if own_name != "weight" or len(shape) > 2:
        return "other"
    if len(shape) < 2:
        return "norm"
    return "embedding" if _EMBEDDING_NAMES.search(path.rpartition(".")[2]) else "linear"


# The skeleton ---------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """A linear layer with its weight as [inputs, outputs], under the name that transformers use."""


def _build(parameters: Iterable[ParameterShape]) -> nn.Module:
    owned: dict[str, list[ParameterShape]] = defaultdict(list)
    for parameter in parameters:
        owned[parameter.name.rpartition(".")[0]].append(parameter)
    paths = set(owned)
    for path in owned:
        parts = path.split(".")
        paths |= {".".join(parts[:end]) for end in range(1, len(parts))}
    # Layers of a stack are children of a ModuleList, by which `muon_param_groups` knows them.
    stacks = {path.rpartition(".")[0] for path in paths if path.rpartition(".")[2].isdigit()} - set(
        owned
    )
    modules: dict[str, nn.Module] = {"": nn.Module()}
    for path in sorted(paths - {""}, key=lambda path: path.count(".")):
        parent, _, name = path.rpartition(".")
        made = nn.ModuleList() if path in stacks else _module(owned.get(path, []))
        modules[parent].add_module(name, made)
        modules[path] = made
    for path, members in owned.items():
        for parameter in members:
            value = nn.Parameter(torch.empty(parameter.shape, device=_META))
            modules[path].register_parameter(parameter.name.rpartition(".")[2], value)
    return modules[""]


def _module(members: list[ParameterShape]) -> nn.Module:
    """A module of the class that its largest parameter belongs to."""
    if not members:
        return nn.Module()
    largest = max(members, key=lambda parameter: len(parameter.shape))
    if largest.kind == "linear" and len(largest.shape) == 2:
        rows, columns = largest.shape
        return nn.Linear(columns, rows, bias=False, device=_META)
    if largest.kind == "embedding":
        rows, columns = largest.shape
        return nn.Embedding(rows, columns, device=_META)
    if largest.kind == "norm":
        return nn.LayerNorm(1, elementwise_affine=False, device=_META)
    if largest.kind == "conv":
        return nn.Conv2d(1, 1, 1, bias=False, device=_META)
    return Conv1D() if largest.kind == "transposed" else nn.Module()
