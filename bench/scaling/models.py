"""The matrices that Muon takes in models of 1B to 1T parameters, from their public configs."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.tools.plan.model_shapes import read_model, skeleton

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Stack:
    """A parameter of Muon: one matrix [rows, columns], or several of one shape one on another."""

    rows: int
    columns: int
    matrices: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """Of each matrix."""
        return self.rows, self.columns


@dataclass(frozen=True)
class Model:
    """One model. published: its parameter count where `source` states it; elements: as built here.

    stacks: Muon's parameters, in the model's order.
    """

    title: str
    source: str
    published: int
    elements: int
    stacks: tuple[Stack, ...]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of every matrix."""
        return [stack.shape for stack in self.stacks for _ in range(stack.matrices)]

    @property
    def muon_elements(self) -> int:
        """Elements of all matrices."""
        return sum(stack.matrices * stack.rows * stack.columns for stack in self.stacks)


# config.json of meta-llama's repositories on huggingface.co, and the parameters that these state.
_LLAMAS = {
    "llama3-1b": (
        "Llama-3.2-1B", 1_235_814_400,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
         "tie_word_embeddings": True},
    ),
    "llama3-8b": (
        "Meta-Llama-3-8B", 8_030_261_248,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
    "llama3-70b": (
        "Meta-Llama-3-70B", 70_553_706_496,
        {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256},
    ),
}  # fmt: skip
# huggingface.co/moonshotai/Kimi-K2-Instruct, 3,416 more than are built here, of what is not known;
# the report (arXiv 2507.20534) says 1.04T.
_KIMI_PUBLISHED = 1_026_408_235_864
_KIMI_TITLE, _KIMI_SOURCE = "Kimi-K2", "moonshotai/Kimi-K2-Instruct"
NAMES = (*_LLAMAS, "kimi-k2", "kimi-k2-stacked")


def make_model(name: str) -> Model:
    """One of NAMES. "stacked" keeps the experts of a layer in three parameters, as 3-D tensors."""
    if name in _LLAMAS:
        title, published, config = _LLAMAS[name]
        source = f"meta-llama/{title}"
        return _model(title, source, published, _read_config({"model_type": "llama", **config}))
    stacked = name == "kimi-k2-stacked"
    title = f"{_KIMI_TITLE}, experts {'stacked' if stacked else 'separate'}"
    return _model(title, _KIMI_SOURCE, _KIMI_PUBLISHED, dict(_kimi(stacked)))


def _read_config(values: dict[str, object]) -> Shapes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        return read_model(path).parameters


def _kimi(stacked: bool) -> Iterator[tuple[str, Shape]]:
    """DeepSeek-V3's architecture (arXiv 2412.19437) in Kimi-K2's sizes (arXiv 2507.20534)."""
    layers, dense_layers, hidden, heads, vocabulary = 61, 1, 7168, 64, 163840
    q_rank, kv_rank, nope, rope, value = 1536, 512, 128, 64, 128
    experts, shared, expert, dense = 384, 1, 2048, 18432

    def linear(name: str, rows: int, columns: int) -> tuple[str, Shape]:
        return f"{name}.weight", (rows, columns)

    def gated(name: str, size: int) -> Iterator[tuple[str, Shape]]:
        yield linear(f"{name}.gate_proj", size, hidden)
        yield linear(f"{name}.up_proj", size, hidden)
        yield linear(f"{name}.down_proj", hidden, size)

    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(layers):
        path = f"model.layers.{layer}"
        attention = f"{path}.self_attn"
        yield linear(f"{attention}.q_a_proj", q_rank, hidden)
        yield f"{attention}.q_a_layernorm.weight", (q_rank,)
        yield linear(f"{attention}.q_b_proj", heads * (nope + rope), q_rank)
        yield linear(f"{attention}.kv_a_proj_with_mqa", kv_rank + rope, hidden)
        yield f"{attention}.kv_a_layernorm.weight", (kv_rank,)
        yield linear(f"{attention}.kv_b_proj", heads * (nope + value), kv_rank)
        yield linear(f"{attention}.o_proj", hidden, heads * value)
        if layer < dense_layers:
            yield from gated(f"{path}.mlp", dense)
        else:
            yield linear(f"{path}.mlp.gate", experts, hidden)
            yield f"{path}.mlp.gate.e_score_correction_bias", (experts,)
            if stacked:
                for name, shape in gated(f"{path}.mlp.experts", expert):
                    yield name.removesuffix(".weight"), (experts, *shape)
            else:
                for index in range(experts):
                    yield from gated(f"{path}.mlp.experts.{index}", expert)
            yield from gated(f"{path}.mlp.shared_experts", shared * expert)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"{path}.{name}.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield linear("lm_head", vocabulary, hidden)


def _model(title: str, source: str, published: int, shapes: Shapes) -> Model:
    taken = _taken_by_muon(shapes)
    stacks = []
    for name, shape in shapes.items():
        if _pattern(name) in taken:
            *matrices, rows, columns = shape
            stacks.append(Stack(rows, columns, *matrices))
    return Model(title, source, published, sum(map(math.prod, shapes.values())), tuple(stacks))


def _taken_by_muon(shapes: Shapes) -> set[str]:
    """Patterns of the names that `muon_param_groups` gives to Muon.

    It is asked with one parameter of each pattern: a module for each of 70,000 takes long.
    """
    first = {_pattern(name): name for name in reversed(shapes)}
    groups = muon_param_groups(skeleton({name: shapes[name] for name in first.values()}))
    names = (name for group in groups if group["use_muon"] for name in group["param_names"])
    return {_pattern(name) for name in names}


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "*", name)
