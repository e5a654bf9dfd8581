"""Damaged state dicts and damaged files of checkpoints: refused whole, or harmless.

`make fuzz` runs 1,000 of each, the test suite a few of them, always the same.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_checkpoint import assert_same, make_params, run, through_file
from test_fuzz_optimizer import check_state
from torch import Tensor

from lowbit_muon import Muon, MuonWithAuxAdam
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore, _fingerprint

CASES, SHARDS = (1_000, 4) if os.environ.get("FUZZ") else (80, 1)
SETTINGS = settings(
    max_examples=CASES // SHARDS,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)

NAN, INF = float("nan"), float("inf")
GARBAGE: tuple[Any, ...] = (
    None, True, 0, 1, -1, 0.5, 10**400, 1e308, NAN, INF, -INF, "", "codes", b"x", [], [1], (0,),
    {}, {"a": {"b": [None]}}, {1: 2, "x": 3}, [[0], 1], torch.float32, torch.tensor(2),
    torch.tensor(NAN), torch.ones(2, 3), torch.ones(()).to("meta"), torch.eye(2).to_sparse(),
)  # fmt: skip
FORMATS = (
    "spectral4", "spectral3", "spectral8", "mulaw4", "muonq4", "linear8", "mulaw8", "nf4", "bf16",
    "fp32",
)  # fmt: skip
SHAPES = ((6, 10), (10, 6), (6, 10), (3, 2, 2, 2))


def ours(state_format: str, **options: Any) -> Muon:
    return Muon(make_params(SHAPES), state_format=state_format, **options)


def with_adam(state_format: str, kind: str = "adamw") -> Muon:
    # at least 4096 elements, or bitsandbytes keeps them in float32
    params = make_params([*SHAPES, (64, 64), (5,)], [torch.float32] * 6)
    return MuonWithAuxAdam(
        [
            {"params": params[:4], "use_muon": True, "state_format": state_format},
            {"params": params[4:], "use_muon": False, "aux_adam": kind},
        ]
    )


def theirs(optimizer: Muon, **group: Any) -> dict[str, Any]:
    """The optimizer's state in another project's layout."""
    saved = optimizer.export_full_precision()
    saved["param_groups"] = [{**options, **group} for options in saved["param_groups"]]
    return saved


def moonlight() -> dict[str, Any]:
    """Moonlight's layout: one group, and a flag in each parameter's state."""
    optimizer = stepped(with_adam("fp32"))
    saved = optimizer.export_full_precision()
    for entries in saved["state"].values():
        entries["use_muon"] = "momentum_buffer" in entries
        for old, new in (("exp_avg", "moment1"), ("exp_avg_sq", "moment2")):
            if old in entries:
                entries[new] = entries.pop(old)
    group = {"lr": 1e-3, "wd": 0.1, "momentum": 0.9, "nesterov": True, "ns_steps": 5,
             "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8,
             "params": list(saved["state"])}  # fmt: skip
    return {"state": saved["state"], "param_groups": [group]}


def stepped(optimizer: Muon, first: int = 0) -> Muon:
    run(optimizer, first, first + 2)
    return optimizer


# (a saved state, an optimizer that it fits)
SOURCES: dict[str, tuple[Callable[[], dict[str, Any]], Callable[[], Muon]]] = {
    **{
        name: (lambda name=name: stepped(ours(name)).state_dict(), lambda name=name: ours(name))
        for name in FORMATS
    },
    "another format": (lambda: stepped(ours("spectral4")).state_dict(), lambda: ours("mulaw4")),
    "splits": (
        lambda: stepped(Muon(make_params([(6, 10)]), row_splits=(2, 0, 4))).state_dict(),
        lambda: Muon(make_params([(6, 10)]), state_format="fp32"),
    ),
    "experts": (
        lambda: stepped(Muon(make_params([(3, 4, 5)]), batch_experts=True)).state_dict(),
        lambda: Muon(make_params([(3, 4, 5)]), batch_experts=True),
    ),
    "experts as one matrix": (
        lambda: stepped(Muon(make_params([(3, 4, 5)]), batch_experts=True)).state_dict(),
        lambda: Muon(make_params([(3, 4, 5)])),
    ),
    "adamw": (lambda: stepped(with_adam("mulaw4")).state_dict(), lambda: with_adam("mulaw4")),
    "torch.optim.Muon": (lambda: theirs(stepped(ours("fp32"))), lambda: ours("spectral4")),
    "KellerJordan": (lambda: theirs(stepped(with_adam("fp32"))), lambda: with_adam("spectral4")),
    "Moonlight": (moonlight, lambda: with_adam("nf4")),
}
if importlib.util.find_spec("bitsandbytes"):
    SOURCES["adamw8bit"] = (
        lambda: stepped(with_adam("spectral4", "adamw8bit")).state_dict(),
        lambda: with_adam("spectral4", "adamw8bit"),
    )


def garbage() -> st.SearchStrategy[Any]:
    return st.sampled_from(GARBAGE).map(copy.deepcopy)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside a state dict, containers included."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    return [path] * bool(path) + [p for key, v in items for p in places(v, (*path, key))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(state_dict: dict[str, Any], path: tuple[Any, ...], value: Any) -> None:
    """Set a place, in a tuple by way of a list."""
    parent = at(state_dict, path[:-1])
    if isinstance(parent, tuple):
        parent = list(parent)
        put(state_dict, path[:-1], parent)
    parent[path[-1]] = value


def damaged_tensor(draw: st.DrawFn, tensor: Tensor) -> Any:
    """A tensor with other values, of another dtype or shape, or without values."""
    kinds = ["dtype", "transpose", "cut", "flat", "meta", "sparse", "empty"]
    kind = draw(st.sampled_from([*kinds, *3 * ["bits", "value"]]))
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    if kind == "bits" and tensor.numel():
        raw = tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
        for _ in range(draw(st.integers(1, 3))):
            raw[draw(st.integers(0, raw.numel() - 1))] ^= 1 << draw(st.integers(0, 7))
        return raw.view(tensor.dtype).view(tensor.shape)
    if kind == "value" and tensor.numel():
        values = tensor.clone(memory_format=torch.contiguous_format)
        value = draw(st.sampled_from((NAN, INF, -1.0, 1e38, 3e38, 1e-45, 0.0)))
        place = draw(st.integers(0, values.numel() - 1))
        values.view(-1)[place] = value if tensor.is_floating_point() else 255
        return values
    if kind == "dtype":
        dtypes = (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.uint8,
            torch.bool,
            torch.cfloat,
        )
        return tensor.to(draw(st.sampled_from(dtypes)))
    if kind == "cut":
        return tensor[..., :-1] if tensor.ndim else tensor[None]
    if kind == "meta":
        return tensor.to("meta")
    if kind == "sparse":
        return tensor.to_sparse()
    if kind == "empty":
        return torch.empty(0)
    return tensor.flatten() if kind == "flat" else tensor.T if tensor.ndim == 2 else tensor[None]


def damage(draw: st.DrawFn, state_dict: dict[str, Any]) -> str:
    """Change something in a state dict; returns what, for the report of a failure."""
    state_dict.setdefault("state", {})
    found = places(state_dict)
    tensors = [path for path in found if isinstance(at(state_dict, path), Tensor)]
    path = draw(st.sampled_from(draw(st.sampled_from((found, tensors or found)))))
    value, parent = at(state_dict, path), at(state_dict, path[:-1])
    kind = draw(st.sampled_from(("drop", "rename", "add", "replace", "swap", "tensor", "tensor")))
    if kind == "drop" and not isinstance(parent, tuple):
        del parent[path[-1]]
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(("other", "codes", 7, None, (0,))))] = parent.pop(path[-1])
    elif kind == "add" and isinstance(value, dict):
        value[draw(st.sampled_from(("other", "codes", "params", 7, None)))] = draw(garbage())
    elif kind == "swap":
        other = draw(st.sampled_from(places(state_dict)))
        # a place inside the other would make a cycle
        if other[: len(path)] != path and path[: len(other)] != other:
            theirs = at(state_dict, other)
            put(state_dict, other, copy.deepcopy(value))
            put(state_dict, path, theirs)
    elif kind == "tensor" and isinstance(value, Tensor):
        put(state_dict, path, damaged_tensor(draw, value))
    else:
        put(state_dict, path, draw(garbage()))
    return f"{kind} {path}"


@st.composite
def damaged_states(draw: st.DrawFn) -> tuple[str, list[str], dict[str, Any]]:
    torch.manual_seed(0)
    name = draw(st.sampled_from(sorted(SOURCES)))
    state_dict = copy.deepcopy(SOURCES[name][0]())
    done = [damage(draw, state_dict) for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3))))]
    return name, done, state_dict


def check_damaged(name: str, state_dict: dict[str, Any]) -> bool:
    """Load into an optimizer that is in use; returns whether it was taken."""
    optimizer = stepped(SOURCES[name][1](), first=5)
    before = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    error = None
    try:
        optimizer.load_state_dict(state_dict)
    except ValueError as refusal:
        error = str(refusal)
    if error is not None:
        assert_same(optimizer.state_dict(), before)
        # which parameter, group or part of the state dict, what was expected and what came
        assert any(word in error for word in ("parameter", "param_groups", "state"))
        assert "expected" in error or "missing" in error
    else:
        through_file(optimizer.state_dict())
    params = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [v for state in optimizer.state.values() for v in state.values()]
    assert not any(v.requires_grad for v in tensors if isinstance(v, Tensor))
    for param, weight in zip(params, weights, strict=True):
        assert torch.equal(param, weight)
    # A damaged option may be a legal one, and AdamW goes anywhere by moments that do not belong
    # together.
    sane = {
        id(p): group.get("use_muon", True)
        and float(group["lr"]) <= 1 >= group["weight_decay"]
        and group["ns_coefficients"] == Muon(params[:1]).defaults["ns_coefficients"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    steps = [int(optimizer.state[p].get("step", 0)) for p in params]
    run(optimizer, 7, 8)
    check_state(optimizer)
    for param, step in zip(params, steps, strict=True):
        assert int(optimizer.state[param]["step"]) == step + 1
        assert bool(param.isfinite().all()) or not sane[id(param)]
    return error is None


@pytest.mark.parametrize("name", SOURCES)
def test_an_undamaged_state_loads(name: str) -> None:
    assert check_damaged(name, SOURCES[name][0]())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_a_damaged_state_is_refused_whole_or_harmless(shard: int) -> None:
    loaded = []

    def check(case: tuple[str, list[str], dict[str, Any]]) -> None:
        loaded.append(check_damaged(case[0], case[2]))

    seed(shard)(SETTINGS(given(damaged_states())(check)))()
    # Both happen, or the damage is no test of one of them.
    assert 0 < sum(loaded) < len(loaded)


# What the long run found, each with what the error must say
FOUND: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "without values": (("state", 1, "codes"), lambda t: t.to("meta"), "codes: expected"),
    "sparse": (("state", 1, "scales"), lambda t: t.to_sparse(), "scales: expected"),
    "too large": (("state", 1, "scales"), lambda t: t.fill_(1e36), "norm up to 1e"),
    "too many steps": (("state", 1, "step"), lambda _: 1e308, "step: expected"),
    "key of a parameter": (("param_groups", 0, "params", 1), lambda _: [1], "numbers or names"),
    "names": (("param_groups", 0, "param_names"), lambda _: 3, "param_names: expected 4 strings"),
    "rate": (("param_groups", 0, "lr"), lambda _: torch.ones(()).to("meta"), "lr: expected"),
    "splits": (("param_groups", 0, "row_splits"), lambda _: 6, "row_splits: expected"),
    "experts": (("param_groups", 0, "batch_experts"), lambda _: torch.ones(2), "experts: expected"),
    "format": (("param_groups", 0, "state_format", "rotate"), lambda _: torch.ones(2), "rotate: "),
}  # fmt: skip


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_stays_refused(name: str) -> None:
    path, change, message = FOUND[name]
    optimizer = stepped(ours("mulaw4"))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].setdefault("param_names", list("abcd"))
    put(saved, path, change(at(saved, path)))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same(optimizer.state_dict(), before)


@pytest.mark.parametrize("target", ["fp32", "mulaw4"])
@pytest.mark.parametrize("layout", ["fp32", "torch.optim.Muon", "adamw", "Moonlight"])
def test_saved_tensors_that_require_gradients_load_as_plain_ones(layout: str, target: str) -> None:
    saved = SOURCES[layout][0]()
    for entries in saved["state"].values():
        for value in entries.values():
            if isinstance(value, Tensor) and value.is_floating_point():
                value.requires_grad_()
    optimizer = with_adam(target) if layout in ("adamw", "Moonlight") else ours(target)
    optimizer.load_state_dict(saved)
    values = [value for state in optimizer.state.values() for value in state.values()]
    assert not any(value.requires_grad for value in values if isinstance(value, Tensor))


# Files


def flipped(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut_short(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def page_lost(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data)) // 4096 * 4096
    return data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :]


def other_text(data: bytes, draw: random.Random) -> bytes:
    texts = (b"", b"null", b"[1]", b"{}", b'{"bytes": "many"}', b"[" * 100_000, b"\xff\xfe{}")
    return draw.choice(texts)


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two checkpoints with optimizers of every layout, and what is in them."""
    store = CheckpointStore(tmp_path_factory.mktemp("intact"))
    payloads: list[dict[str, Any]] = []
    for step in (1, 2):
        states = {name: saved() for name, (saved, _) in SOURCES.items()}
        payloads.append({"format_version": 1, "step": step, "optimizers": states})
        store.save(step, payloads[-1])
    return store.folder, payloads


@pytest.mark.parametrize("shard", range(SHARDS))
def test_damaged_files_fall_back_to_the_checkpoint_before(
    shard: int, intact: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder, payloads = intact
    draw = random.Random(shard)
    for case in range(CASES // SHARDS):
        store = CheckpointStore(tmp_path / str(case))
        shutil.copytree(folder, store.folder)
        newest = store.checkpoints()[-1]
        name = draw.choice(["state.pt", "manifest.json"])
        damage = draw.choice([flipped, cut_short, page_lost, other_text, None])
        path = newest / name
        before = path.read_bytes()
        after = damage(before, draw) if damage else None
        if after is None:
            path.unlink()
        else:
            path.write_bytes(after)
        if (
            name == "state.pt"
            and after
            and damage in (cut_short, other_text)
            and draw.random() < 0.5
        ):
            # written so, by a process that was already broken: the manifest says the same
            (newest / "manifest.json").write_text(json.dumps({"step": 2, **_fingerprint(path)}))
        found, messages = store.load_newest()
        # (a byte of the manifest that says nothing, or a page of zeros, may change nothing)
        harmless = found["step"] == 2
        assert not harmless or after == before or name == "manifest.json", (damage, name)
        assert len(messages) == (not harmless)
        assert_same(found, payloads[found["step"] - 1])
        shutil.rmtree(store.folder)


def test_all_damaged_is_a_clear_error(
    intact: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    shutil.copytree(intact[0], store.folder)
    for path in store.checkpoints():
        (path / "manifest.json").write_bytes(b"[" * 100_000)
    with pytest.raises(UserError, match=r"step-00000002 is damaged .*; .*step-00000001 is"):
        store.load_newest()
