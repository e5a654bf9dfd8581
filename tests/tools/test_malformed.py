"""Files that are not what they should be: one sentence and status 2, or a plan; never a traceback.

Every field of a small valid file is replaced by every value of ODD, one at a time.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import time
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lowbit_muon import Muon
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan import command, model_shapes
from lowbit_muon.tools.plan.plans import Plan

ODD: list[Any] = [
    None, True, -1, 0, 10**9, 10**30, 0.5, float("nan"), float("inf"), "", "../x", "a\0b",
    "two\nlines \x1b[31m", "x" * 5000, [], [[]], ["x"], {}, {"a": 1},
]  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
    "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "rope_theta": 1e4,
    "num_labels": 2, "auto_map": {"AutoConfig": "code--of.Others"},
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300}
ENTRY = {"dtype": "F32", "shape": [8, 4], "data_offsets": [0, 128]}
NESTED = b"[" * 100_000


def header(entries: object) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.fixture
def check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., int]:
    """Runs a command in a folder of its own; returns the status, 0 or 2 with one sentence."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        began = time.process_time()  # others may have the processor
        status = main(list(arguments))
        error = capsys.readouterr().err
        assert time.process_time() - began < 20
        if status:
            assert status == 2
            assert error.startswith("lowbit-muon: ")
            assert error.count("\n") == 1
            assert error[:-1].isprintable()
            assert len(error) < 3000
        else:
            assert error == ""
        return status

    return run


@pytest.fixture
def plan(check: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bytes], int]:
    """`check` of `plan` and a file's content, without the sizes, which take a while."""
    fits = Plan("spectral4", 4.0, 0, 0, 0, 0, 0)
    monkeypatch.setattr(command, "make_plans", lambda *_: [fits])

    def run(name: str, content: bytes) -> int:
        Path(name).write_bytes(content)
        return check("plan", name, "--device-memory=1GiB")

    return run


@pytest.mark.parametrize("base", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_every_field_of_a_config(base: dict[str, Any], plan: Callable[[str, bytes], int]) -> None:
    assert plan("config.json", json.dumps(base).encode()) == 0
    for field in base:
        for value in ODD:
            plan("config.json", json.dumps({**base, field: value}).encode())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_attention_heads": 10**9}, "num_attention_heads: expected a whole number <= 100,000"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: expected a whole number <= 2,000"),
        ({"num_labels": 10**9}, "num_labels: expected a whole number <= 100,000"),
        ({"hidden_size": 10**30}, "hidden_size: expected a whole number <= 2,147,483,648"),
        ({"text_config": {"n_layer": 10**9}}, "text_config.n_layer: expected a whole number"),
        ({"hidden_size": 2**29, "vocab_size": 2**29}, "expected a size >= 1 and < 2^55"),
        ({"model_type": []}, "model_type: expected the name of an architecture, got []"),
    ],
)
def test_a_config_beyond_all_models_is_named_at_once(
    changes: dict[str, Any], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, **changes}))
    assert main(["plan", str(path), "--device-memory=1GiB"]) == 2
    assert named in capsys.readouterr().err


def test_a_model_of_too_many_parts_is_not_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit_muon.tools.plan.model_shapes.MOST_TENSORS", 20)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA, "num_hidden_layers": 9}))
    assert main(["plan", str(path), "--device-memory=1GiB"]) == 2
    assert "expected a model of at most 20 tensors" in capsys.readouterr().err


def test_only_the_time_of_making_a_model_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came before its first tensor was an import, however long it took."""
    now = [0.0]
    clock = types.SimpleNamespace(process_time=lambda: now[0])
    monkeypatch.setattr("lowbit_muon.tools.plan.model_shapes.time", clock)
    with model_shapes._limited():
        now[0] = 1000.0
        nn.Linear(2, 2)
        now[0] += model_shapes.MOST_SECONDS
        nn.Linear(2, 2)
        now[0] += 1.0
        with pytest.raises(UserError, match=r"made in 20 s of processor time, got 5 so far"):
            nn.Linear(2, 2)


def test_transformers_are_named_where_they_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert main(["plan", str(tmp_path), "--device-memory=1GiB"]) == 2
    assert "not installed (pip install 'lowbit-muon[plan]')" in capsys.readouterr().err
    # A checkpoint beside the config is enough.
    (tmp_path / "a.safetensors").write_bytes(header({"a.weight": ENTRY}))
    assert main(["plan", str(tmp_path), "--device-memory=1GiB"]) == 0


def test_every_field_of_a_header(plan: Callable[[str, bytes], int]) -> None:
    others = {"layers.0.b.weight": ENTRY}
    for value in ODD:
        plan("m.safetensors", header({**others, "a.weight": value}))
        plan("m.safetensors", header({**others, "__metadata__": value}))
        plan("m.safetensors", header({**others, "a.weight": {**ENTRY, "shape": [value, 4]}}))
        for field in ENTRY:
            plan("m.safetensors", header({**others, "a.weight": {**ENTRY, field: value}}))


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "a.", ".a", "a..b", "a\n.weight", "\ud800.weight", "training", "forward.weight",
        "_parameters.weight", "layers", "layers.0", "layers.0.weight.b", "a.in_features",
        ".".join("a" * 2000), "x" * 10_000 + ".weight",
    ],
)  # fmt: skip
def test_odd_names_in_a_header(name: str, plan: Callable[[str, bytes], int]) -> None:
    plan("m.safetensors", header({"layers.0.weight": ENTRY, name: ENTRY}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("m.safetensors", header(b'{"a":' + NESTED)),
        ("m.safetensors", header(b'{"a.w":{"dtype":"F32"},"a.w":{"dtype":"F32","shape":[4,4]}}')),
        ("m.safetensors", struct.pack("<Q", 2**63) + b"{}"),
        ("m.safetensors", header({"a.weight": {**ENTRY, "shape": [2**28, 2**28]}})),
        ("m.safetensors", header({"a.weight": {**ENTRY, "shape": [0, 4]}})),
        ("m.safetensors", header({i: ENTRY | {"shape": [2**27, 2**27]} for i in "abc"})),
        ("config.json", NESTED),
        ("config.json", b"\xff\xfe{"),
        ("config.json", b'{"model_type": "gpt2", "model_type": "llama"}'),
        ("config.json", b'{"model_type": "gpt2", "n_embd": 1' + b"0" * 5000 + b"}"),
    ],
)  # fmt: skip
def test_files_that_no_program_writes(
    name: str, content: bytes, plan: Callable[[str, bytes], int]
) -> None:
    assert plan(name, content) == 2


@pytest.mark.parametrize(
    "file", [*ODD, "/etc/passwd", "a/../../w", ".", "i.json", "\\..\\w", "w.safetensors"], ids=repr
)
def test_an_index_stays_in_its_folder(
    file: Any, plan: Callable[[str, bytes], int], tmp_path: Path
) -> None:
    (tmp_path / "w.safetensors").write_bytes(header({"a.weight": ENTRY}))
    content = json.dumps({"weight_map": {"a.weight": file}}).encode()
    assert plan("i.json", content) == (0 if file == "w.safetensors" else 2)


# Checkpoints ----------------------------------------------------------------------------------


def trained(optimizer_class: type, **options: Any) -> dict[str, Any]:
    optimizer = optimizer_class([("w", nn.Parameter(torch.ones(8, 4)))], **options)
    optimizer.param_groups[0]["params"][0].grad = torch.randn(8, 4)
    optimizer.step()
    state: dict[str, Any] = optimizer.state_dict()
    return state


TENSORS = [
    torch.ones(()), torch.ones(3), torch.ones(0, 4), torch.full((8, 4), float("nan")),
    torch.ones(8, 4).to(torch.float8_e4m3fn), torch.ones(8, 4, dtype=torch.complex64),
    torch.ones(8, 4, dtype=torch.int64), torch.ones(1, 1).expand(10**7, 10**7),
    torch.ones(8, 4).to_sparse(), torch.empty(8, 4, device="meta"),
    torch.full((8, 4), 1e300, dtype=torch.float64), torch.full((8, 4), 1e38), torch.zeros(8, 4),
]  # fmt: skip


def fields(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of everything within nested dicts and lists."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from fields(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from fields(inner, (*path, index))


def replaced(value: Any, path: tuple[Any, ...], new: object) -> Any:
    found = copy.deepcopy(value)
    inner = found
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return found


@pytest.mark.parametrize("kind", ["ours", "theirs"])
@settings(
    max_examples=300 if os.environ.get("FUZZ") else 100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_every_field_of_a_state(kind: str, data: st.DataObject, check: Callable[..., int]) -> None:
    base = trained(Muon if kind == "ours" else torch.optim.Muon)
    path = data.draw(st.sampled_from(list(fields(base))))
    torch.save(replaced(base, path, data.draw(st.sampled_from(ODD + TENSORS))), "a.pt")
    check("doctor", "a.pt")


@pytest.mark.parametrize("value", TENSORS, ids=lambda t: f"{t.dtype}-{list(t.shape)}")
def test_momentum_of_odd_tensors(value: torch.Tensor, check: Callable[..., int]) -> None:
    state = trained(torch.optim.Muon)
    torch.save(replaced(state, ("state", 0, "momentum_buffer"), value), "a.pt")
    check("doctor", "a.pt")


def test_a_small_file_with_much_in_it_is_not_unpacked(check: Callable[..., int]) -> None:
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(50_000_000))
    assert os.path.getsize("bomb.pt") < 100_000
    assert check("doctor", "bomb.pt") == 2


@settings(
    max_examples=500 if os.environ.get("FUZZ") else 50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 20))
def test_flipped_bytes(seed: int, flips: int, check: Callable[..., int]) -> None:
    torch.save(trained(torch.optim.Muon), "a.pt")
    content = bytearray(Path("a.pt").read_bytes())
    generator = torch.Generator().manual_seed(seed)
    for place in torch.randint(len(content), (flips,), generator=generator).tolist():
        content[place] ^= 1 << int(torch.randint(8, (), generator=generator))
    Path("a.pt").write_bytes(content)
    check("doctor", "a.pt")
