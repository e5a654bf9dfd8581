"""`lowbit-muon doctor` on checkpoints: every layout, what stands out, and mistakes."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from lowbit_muon import PRESETS, Diagnosis, Muon, MuonWithAuxAdam, muon_param_groups, quantize
from lowbit_muon.state.diagnosis import end_codes
from lowbit_muon.tools.cli import main, split_at_dashes
from lowbit_muon.tools.doctor.examine import Examined
from lowbit_muon.tools.doctor.findings import findings, gaussian_end_shares
from lowbit_muon.tools.doctor.report import diagnosis_table
from lowbit_muon.tools.doctor.saved_state import AuxState
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore

HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


class Model(nn.Module):
    """An embedding, two matrices of unlike shape, one of them fused of two, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.up = nn.Linear(16, 48, bias=False)
        self.down = nn.Linear(48, 16)
        self.norm = nn.LayerNorm(16)


def train(optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Steps with gradients of noise, which are gone afterwards."""
    for _ in range(steps):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn_like(param)
        optimizer.step()
    optimizer.zero_grad()


def trained() -> tuple[Model, MuonWithAuxAdam]:
    model = Model()
    groups = muon_param_groups(model, split_fused={"up": 2}, overrides={"down.weight": "spectral8"})
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    train(optimizer)
    return model, optimizer


def examine(tmp_path: Path, *arguments: object) -> dict[str, Any]:
    """The JSON of the one optimizer that the command finds."""
    path = tmp_path / "doctor.json"
    assert main(["doctor", *map(str, arguments), "--json", str(path)]) == 0
    (found,) = json.loads(path.read_text())["optimizers"]
    result: dict[str, Any] = found
    return result


def plain(optimizer: Muon) -> list[dict[str, Any]]:
    return [row.to_dict() for row in optimizer.diagnose()]


# Checkpoints of ours --------------------------------------------------------------------------

Save = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], object]


def save_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(dict(tensors), path)


def bare(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    torch.save(state, folder / "anything.pth")
    return folder / "anything.pth"


def in_a_dict(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    torch.save({"optimizer": state, "model": weights, "epoch": 3}, folder / "a.pt")
    return folder / "a.pt"


def in_a_dict_of_long_names(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    values = {"optimizer_state_dict": state, "model_state_dict": weights}
    torch.save(values, folder / "a.pt")
    return folder / "a.pt"


def before_zip_files(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    values = {"optimizer": state, "model": weights}
    torch.save(values, folder / "a.pt", _use_new_zipfile_serialization=False)
    return folder / "a.pt"


def of_lightning(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    inside = {f"net.{name}": value for name, value in weights.items()}
    torch.save({"optimizer_states": [state], "state_dict": inside}, folder / "a.ckpt")
    return folder / "a.ckpt"


def of_trainer(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    save_file(folder / "model.safetensors", weights)
    torch.save(state, folder / "optimizer.pt")
    return folder


def of_accelerate(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    save_file(folder / "model.safetensors", weights)
    torch.save(state, folder / "optimizer.bin")
    return folder


def of_finetune(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    store = CheckpointStore(folder / "run" / "checkpoints")
    empty: dict[str, Any] = {"model": weights, "optimizer": {**state, "state": {}}}
    store.save(1, empty)
    return store.save(2, {"model": weights, "optimizer": state})


def run_of_finetune(folder: Path, weights: Mapping[str, Tensor], state: Any) -> Path:
    return of_finetune(folder, weights, state).parent.parent


@pytest.mark.parametrize(
    "save",
    [
        bare, in_a_dict, in_a_dict_of_long_names, before_zip_files, of_lightning, of_trainer,
        of_accelerate, of_finetune, run_of_finetune,
    ],
)  # fmt: skip
def test_a_checkpoint_has_the_diagnoses_of_the_optimizer_that_it_was_saved_from(
    save: Save, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = trained()
    target = save(tmp_path, model.state_dict(), optimizer.state_dict())
    found = examine(tmp_path, target)
    assert found["matrices"] == plain(optimizer)
    assert {row["name"] for row in found["matrices"]} == {
        "up.weight[0]", "up.weight[1]", "down.weight"
    }  # fmt: skip
    muon_bytes = sum(row["nbytes"] + row["rule_nbytes"] for row in found["matrices"])
    assert (found["optimizer"], found["aux_parameters"]) == ("MuonWithAuxAdam", 4)
    assert found["aux_bytes"] == optimizer.state_bytes() - muon_bytes
    shown = capsys.readouterr().out
    assert "MuonWithAuxAdam, 3 matrices" in shown
    assert re.search(r"up\.weight\[1\] +24x16 +spectral4 .* ~0\.\d{3} ", shown)
    assert "AdamW, not diagnosed: 4 parameters" in shown


def test_rules_and_what_they_keep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Model()
    groups = muon_param_groups(
        model, split_fused={"up": 2}, overrides={"down.weight": {"rule": "adamuon"}}
    )
    optimizer = MuonWithAuxAdam(groups, rule="normuon", aux_adam="adamw")
    train(optimizer)
    found = examine(tmp_path, in_a_dict(tmp_path, model.state_dict(), optimizer.state_dict()))
    rows = {row["name"]: row for row in found["matrices"]}
    assert found["matrices"] == plain(optimizer)
    # NorMuon: a float32 for each of 24 rows; AdaMuon: a byte an element, two vectors of scales.
    kept = {"up.weight[0]": 4 * 24, "up.weight[1]": 4 * 24, "down.weight": 16 * 48 + 4 * (16 + 48)}
    rules = {"up.weight[0]": "normuon", "up.weight[1]": "normuon", "down.weight": "adamuon"}
    assert {name: row["rule_nbytes"] for name, row in rows.items()} == kept
    assert {name: row["rule"] for name, row in rows.items()} == rules
    # What a format takes does not depend on the rule.
    assert rows["down.weight"]["nbytes"] == quantize(torch.ones(16, 48), "spectral4").nbytes
    assert rows["down.weight"]["bits_per_element"] == 8 * rows["down.weight"]["nbytes"] / (16 * 48)
    total = sum(row["nbytes"] + row["rule_nbytes"] for row in rows.values())
    assert found["aux_bytes"] == optimizer.state_bytes() - total
    assert re.search(r"down\.weight +16x48 +adamuon\+spectral4 ", capsys.readouterr().out)
    assert main(["doctor", str(tmp_path / "a.pt"), "--wide"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"down\.weight .* 1\.0 *$", shown, re.MULTILINE)
    assert re.search(
        rf"all, median error .* {sum(kept.values()) / 1024:.1f} *$", shown, re.MULTILINE
    )
    assert "rule KiB: what the update rule keeps" in shown


UNNAMED: dict[str, dict[str, Any]] = {
    "plain": {},
    "stack": {"batch_experts": True},
    "heads": {"row_splits": [3, 5]},
    "heads of a stack": {"row_splits": [3, 5, 8], "batch_experts": True},
    "auto": {"state_format": "auto"},
    "compensated": {"compensation": True, "rule": "normuon"},
    "dense": {"state_format": "fp32", "batch_experts": True},
}


@pytest.mark.parametrize("options", UNNAMED.values(), ids=list(UNNAMED))
def test_parameters_without_names_have_their_shapes_in_the_state(
    options: dict[str, Any], tmp_path: Path
) -> None:
    shapes = [(8, 16), (8, 2, 3)] if "row_splits" not in options else [(8, 16)]
    if "batch_experts" in options:
        shapes = [(4, 8, 6), (2, 2, 8, 6), (1, 8, 6)] if len(options) == 1 else [(2, 8, 6)]
    dtype = torch.bfloat16 if "compensation" in options else torch.float32
    optimizer = Muon([nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes], **options)
    train(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    found = examine(tmp_path, tmp_path / "a.pt")
    expected = plain(optimizer)
    for row in expected:  # numbered in the optimizer, and in the file by groups
        row["name"] = f"group 0, #{row['name']}"
    assert found["matrices"] == expected


def test_the_state_of_a_plain_muon(tmp_path: Path) -> None:
    params = [nn.Parameter(torch.ones(8, 16)), nn.Parameter(torch.ones(4, 2, 3))]
    optimizer = Muon(params, lr=torch.tensor(0.01), ns_steps=3, backend="reference")
    train(optimizer)
    torch.save(optimizer.state_dict(), tmp_path / "a.pt")
    found = examine(tmp_path, tmp_path / "a.pt")
    # the command takes the kernels of its machine, whose products round in another order
    optimizer.param_groups[0]["backend"] = "auto"
    assert (found["optimizer"], found["aux_parameters"]) == ("Muon", 0)
    assert [{**row, "name": ""} for row in found["matrices"]] == [
        {**row, "name": ""} for row in plain(optimizer)
    ]


def test_parameters_without_a_momentum_are_left_out(tmp_path: Path) -> None:
    params = {name: nn.Parameter(torch.ones(8, 16)) for name in ("used", "unused")}
    optimizer = Muon(params.items())
    params["used"].grad = torch.randn(8, 16)
    optimizer.step()
    optimizer.zero_grad()
    target = in_a_dict(tmp_path, {"used": params["used"]}, optimizer.state_dict())
    assert examine(tmp_path, target)["matrices"] == plain(optimizer)


def test_in_another_format(tmp_path: Path) -> None:
    model, optimizer = trained()
    target = in_a_dict(tmp_path, model.state_dict(), optimizer.state_dict())
    found = examine(tmp_path, target, "--format=nf4")
    assert found["remarks"] == ["The saved momentum was decoded and stored again in nf4."]
    state = optimizer.state_dict()
    group = state["param_groups"][0]  # of `up`; the override has one of its own
    up = Muon([("up.weight", model.up.weight)], state_format="nf4", row_splits=[24, 24])
    up.load_state_dict({"state": {0: state["state"][group["params"][0]]}, "param_groups": [group]})
    assert found["matrices"][:2] == plain(up)
    assert found["matrices"][2]["state_format"] == "nf4"


def test_several_optimizers_in_a_list(tmp_path: Path) -> None:
    model, optimizer = trained()
    adam = torch.optim.AdamW(model.parameters())
    train(adam, 1)
    states = [adam.state_dict(), optimizer.state_dict(), optimizer.state_dict()]
    target = tmp_path / "a.ckpt"
    torch.save({"optimizer_states": states, "state_dict": model.state_dict()}, target)
    path = tmp_path / "doctor.json"
    assert main(["doctor", str(target), f"--json={path}"]) == 0
    document = json.loads(path.read_text())
    assert document["target"] == str(target)
    assert document["torch"] == torch.__version__
    assert [found["matrices"] for found in document["optimizers"]] == [plain(optimizer)] * 2


# Checkpoints of others ------------------------------------------------------------------------


SHAPES = {"up": (48, 16), "down": (16, 48)}


def momentum_of_others() -> dict[int, dict[str, Tensor]]:
    return {i: {"momentum_buffer": torch.randn(size)} for i, size in enumerate(SHAPES.values())}


def of_torch() -> Any:
    params = [(name, nn.Parameter(torch.zeros(size))) for name, size in SHAPES.items()]
    theirs = torch.optim.Muon(params, ns_steps=4)
    train(theirs)
    return theirs.state_dict()


def of_keller_jordan() -> Any:
    states = momentum_of_others()
    groups = [
        {"params": [0, 1], "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0},
        {"params": [2], "use_muon": False, "lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10},
    ]
    zeros = torch.zeros(5)
    adam = {2: {"exp_avg": zeros, "exp_avg_sq": zeros.clone(), "step": 1}}
    return {"state": {**states, **adam}, "param_groups": groups}


def of_moonlight() -> Any:
    states = momentum_of_others()
    group = {"params": [0, 2, 1], "wd": 0.1, "lr": 0.01, "momentum": 0.9, "ns_steps": 5}
    zeros = torch.zeros(5)
    adam = {"moment1": zeros, "moment2": zeros.clone(), "step": 1, "use_muon": False}
    marked = {key: {**state, "use_muon": True} for key, state in states.items()}
    return {"state": {**marked, 2: adam}, "param_groups": [group]}


@pytest.mark.parametrize("make", [of_torch, of_keller_jordan, of_moonlight])
@pytest.mark.parametrize("state_format", [None, "spectral2"])
def test_momentum_in_full_precision_is_shown_as_ours_would_store_it(
    make: Callable[[], Any], state_format: str | None, tmp_path: Path
) -> None:
    state = make()
    torch.save(state, tmp_path / "theirs.pt")
    options = [] if state_format is None else [f"--format={state_format}"]
    found = examine(tmp_path, tmp_path / "theirs.pt", *options)
    # What loading the momentum alone gives. Moonlight's is a sum, (1 - 0.9) of which is ours.
    scale = 0.1 if make is of_moonlight else 1.0
    buffers = [
        scale * state["state"][key]["momentum_buffer"]
        for key in state["param_groups"][0]["params"]
        if "momentum_buffer" in state["state"][key]
    ]
    expected = []
    for buffer in buffers:
        steps = state["param_groups"][0].get("ns_steps", 5)
        ours = Muon([buffer.clone()], state_format=state_format or "spectral4", ns_steps=steps)
        ours.load_state_dict(
            {
                "state": {0: {"momentum_buffer": buffer}},
                "param_groups": [{"params": [0], "ns_steps": steps}],
            }
        )
        expected += plain(ours)
    for row, wanted in zip(found["matrices"], expected, strict=True):
        assert {**row, "name": None} == {**wanted, "name": None}
    assert found["optimizer"] == ("torch.optim.Muon" if make is of_torch else "another Muon")
    assert "full precision" in found["remarks"][0]
    assert (state_format or "spectral4") in found["remarks"][0]
    assert found["aux_parameters"] == (0 if make is of_torch else 1)


def test_names_of_torchs_muon_are_kept(tmp_path: Path) -> None:
    torch.save(of_torch(), tmp_path / "theirs.pt")
    found = examine(tmp_path, tmp_path / "theirs.pt")
    assert [row["name"] for row in found["matrices"]] == ["up", "down"]


# Mistakes -------------------------------------------------------------------------------------


class Unknown:
    """A class that a checkpoint must not make us import."""


def state_of(optimizer_class: type, steps: int = 1, **options: Any) -> dict[str, Any]:
    optimizer = optimizer_class([("w", nn.Parameter(torch.ones(8, 16)))], **options)
    train(optimizer, steps)
    state: dict[str, Any] = optimizer.state_dict()
    return state


def damaged(**entries: Any) -> dict[str, Any]:
    state = copy.deepcopy(state_of(Muon))
    state["state"][0] |= entries
    return state


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state_of(torch.optim.SGD, momentum=0.9), "of a Muon, got entries momentum_buffer"),
        (state_of(torch.optim.AdamW), "expected the state of a Muon, got entries exp_avg, exp_avg"),
        (state_of(torch.optim.SGD), "expected the state of a Muon, got "),
        ({"model": {"w": torch.ones(2)}}, "expected an optimizer's state_dict, bare .* keys model"),
        ({"optimizer": {"state": {}, "param_groups": 3}}, "expected an optimizer's state_dict"),
        ({"optimizer_states": []}, "expected an optimizer's state_dict"),
        ([1, 2], "expected an optimizer's state_dict, bare .* got list"),
        (state_of(Muon, steps=0), "expected a momentum, got none: it was saved before the first"),
        (damaged(codes=torch.zeros(3, 8, dtype=torch.uint8)), "state of parameter 0.*codes: expec"),
        (damaged(rows=9), r"state of parameter 0 .*matrix \[9, 16\]: codes: expected"),
        (damaged(rows=-1), "state of w: rows: expected a whole number >= 0"),
        (damaged(rows=10**8), "state of w: expected the momentum of 100000000 x 16 elements, got"),
        (Unknown(), "expected tensors and plain values only .*Unknown; save optimizer.state_dict"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_diagnosed(
    content: object, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "a.pt"
    torch.save(content, target)
    assert main(["doctor", str(target)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"lowbit-muon: {target}: ")
    assert captured.err.count("\n") == 1
    assert re.search(message, captured.err)
    assert captured.out == ""


def test_a_file_that_is_cut_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = trained()
    target = in_a_dict(tmp_path, model.state_dict(), optimizer.state_dict())
    whole = target.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        target.write_bytes(whole[:size])
        assert main(["doctor", str(target)]) == 2
        assert f"{target}: expected a file of torch.save that is whole" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "TARGET: expected a file or folder that exists, got nothing"),
        (["nothing.py"], "TARGET: expected a script that exists, got nothing.py"),
        (["folder"], "TARGET: expected a folder with optimizer.pt, .* got folder with notes.txt"),
        (["w.safetensors"], "TARGET: expected an optimizer's state .* got weights"),
        (["a.pt", "--steps=3"], "--steps: expected with a script .NAME.py. only, got a.pt"),
        (["a.pt", "--", "x"], "arguments after --: expected with a script"),
        (["a.py", "--format=nf4"], "--format: expected with a checkpoint only, got a.py"),
        (["a.py", "--steps=1", "--worst=3"], "--worst: expected --steps of 2 or more"),
        (["a.pt", "--json=folder"], "--json: expected a file that can be written, got .*folder"),
    ],
)  # fmt: skip
def test_wrong_arguments(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("folder/notes.txt").write_text("")
    Path("w.safetensors").write_text("")
    Path("a.py").write_text("raise AssertionError")
    torch.save(state_of(Muon), "a.pt")
    assert main(["doctor", *arguments]) == 2
    captured = capsys.readouterr()
    assert re.match(f"lowbit-muon: .*{message}", captured.err)
    assert captured.err.count("\n") == 1


def test_arguments_after_dashes_are_a_scripts() -> None:
    assert split_at_dashes(["doctor", "a.py"]) == (["doctor", "a.py"], [])
    given = ["doctor", "a.py", "--", "-x", "--", "y"]
    assert split_at_dashes(given) == (["doctor", "a.py"], ["-x", "--", "y"])
    with pytest.raises(SystemExit, match="2"):
        main(["info", "--", "x"])


# What stands out ------------------------------------------------------------------------------


def row(name: str = "w", **values: Any) -> Diagnosis:
    defaults: dict[str, Any] = {
        "shape": (64, 96), "state_format": "spectral4", "rule": "muon", "nbytes": 3200,
        "bits_per_element": 4.1, "rule_nbytes": 0,
        "steps": 5, "skipped": 0, "direction_error": 0.15, "with_gradient": True,
        "effective_rank": 30.0, "stable_rank": 8.0, "end_codes": 0.0154,
    }  # fmt: skip
    return Diagnosis(name=name, **{**defaults, **values})


def test_nothing_stands_out_of_what_is_usual() -> None:
    errors = torch.linspace(0.14, 0.16, 20).tolist()
    assert findings([row(f"w{i}", direction_error=error) for i, error in enumerate(errors)]) == []
    assert findings([]) == []


def test_an_error_far_above_the_median_of_its_own_format() -> None:
    errors = torch.linspace(0.14, 0.16, 20).tolist()
    rows = [row(f"w{i}", direction_error=error) for i, error in enumerate(errors)]
    others = [row(f"v{i}", direction_error=0.5, state_format="nf4") for i in range(3)]
    # The median of distances from the median, 0.15, is 0.005: the threshold is 0.176.
    assert findings([*rows, row("x", direction_error=0.174), *others]) == []
    (sentence,) = findings([*rows, row("x", direction_error=0.179), *others])
    assert "far above spectral4's median of 0.151" in sentence
    assert "1 matrix: x (0.179)" in sentence


def test_a_spread_of_zero_leaves_room_for_chance() -> None:
    # 1 / sqrt(2 * 64 * 96) of 0.15 is 0.00135; 3.5 times that is 0.0047.
    usual = [row(f"w{i}") for i in range(5)]
    assert findings([*usual, row("x", direction_error=0.154)]) == []
    assert len(findings([*usual, row("x", direction_error=0.156)])) == 1


def test_only_the_worst_are_named() -> None:
    usual = [row(f"w{i}") for i in range(20)]
    bad = [row(f"x{i}", direction_error=0.5 + i / 100) for i in range(5)]
    (sentence,) = findings([*usual, *bad])
    assert "5 matrices: x4 (0.540), x3 (0.530), x2 (0.520) and 2 more;" in sentence


def test_updates_that_are_worse_than_none() -> None:
    (sentence,) = findings([row("x", direction_error=1.0), row("y", direction_error=1.0)])
    assert "as if there were no update at all, in 2 matrices: x (1.000) and y (1.000)" in sentence


def test_skipped_gradients_missing_gradients_and_zeros() -> None:
    skipped, missing = findings([row("x", steps=3, skipped=2), row("y", steps=1), row("z")])
    assert "inf or nan were skipped, as often as in brackets, in 1 matrix: x (2)" in skipped
    assert "as many of 5 steps as in brackets to 1 matrix: y (4)" in missing
    (zeros,) = findings([row("x", direction_error=None, effective_rank=0.0, stable_rank=0.0)])
    assert zeros.startswith("The momentum is zero")


@pytest.mark.parametrize(
    "name", [f.name for f in PRESETS.values() if not f.is_dense and f.statistic == "rms"]
)
def test_shares_at_the_ends_are_those_of_normal_matrices(name: str) -> None:
    shares = gaussian_end_shares(name)
    assert shares is not None
    expected, one_level_more = shares
    assert expected < one_level_more <= 1
    shape = (512, 1024)
    found = end_codes(quantize(torch.randn(shape), name))
    assert found is not None
    # Four standard deviations of the number of such codes; and the row's own RMS, not the exact
    # one, of which 1024 entries leave 1 / sqrt(2 * 1024) to chance, in all rows alike 0.1%.
    deviation = math.sqrt(expected * (1 - expected) / (shape[0] * shape[1]))
    assert abs(found - expected) < 4 * deviation + 0.002 * expected
    matrix = row(shape=shape, state_format=name, end_codes=found)
    assert findings([matrix]) == []


def test_large_entries_that_are_clipped() -> None:
    entries = torch.randn(256, 512)
    entries[torch.rand(256, 512) < 0.01] *= 20
    clipped = end_codes(quantize(entries, "mulaw8"))
    (sentence,) = findings([row("x", shape=(256, 512), state_format="mulaw8", end_codes=clipped)])
    assert "than normal entries would have (0.00% in mulaw8)" in sentence
    assert f"1 matrix: x ({clipped:.2%})" in sentence
    # The same share in a matrix so small that it is one code is chance.
    assert findings([row(shape=(4, 1024), state_format="mulaw8", end_codes=1 / 4096)]) == []


def test_four_bits_have_to_be_a_level_short() -> None:
    # Of a Gaussian 1.5% are in the outermost levels and 5.6% in the two outermost.
    big = (1024, 1024)
    assert findings([row(shape=big, end_codes=0.05)]) == []
    (sentence,) = findings([row(shape=big, end_codes=0.06)])
    assert "would have (1.54% in spectral4)" in sentence


@pytest.mark.parametrize("name", ["linear8", "nf4", "fp32", "my own"])
def test_formats_that_clip_nothing_or_are_unknown_have_no_share_to_compare_with(name: str) -> None:
    assert gaussian_end_shares(name) is None
    assert findings([row(state_format=name, end_codes=0.9)]) == []


# The table and the plot -----------------------------------------------------------------------


def shown(found: Examined, worst: int | None) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(diagnosis_table(found, worst, wide=True))
    return console.export_text()


def test_the_table_has_the_sums_of_all_matrices() -> None:
    rows = [row(f"w{i}", direction_error=0.1 * i, nbytes=1024 * i) for i in range(1, 4)]
    rows.append(row("flat", direction_error=None, end_codes=None, skipped=2, nbytes=0))
    text = shown(Examined("Muon", rows, AuxState(0, 0), ()), 2)
    assert "Muon, 4 matrices, 2 of the largest errors shown" in text
    names = re.findall(r"^ (w\d|flat) ", text, re.MULTILINE)
    assert names == ["w3", "w2"]
    # 6 KiB, 8 * 6144 / (4 * 64 * 96) bits, two skipped, median of 0.1, 0.2 and 0.3.
    assert re.search(r"all, median error +2\.00 +6\.0 +2 +0\.200", text)
    everything = shown(Examined("Muon", rows, AuxState(0, 0), ()), None)
    assert re.search(r"flat .* none ", everything)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_the_plot_has_a_point_and_a_name_for_each_matrix(tmp_path: Path) -> None:
    model, optimizer = trained()
    target = in_a_dict(tmp_path, model.state_dict(), optimizer.state_dict())
    svg, png = tmp_path / "plots" / "a.svg", tmp_path / "a.png"
    for path in (svg, png):
        assert main(["doctor", str(target), f"--plot={path}"]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    # matplotlib draws letters as shapes and leaves what they say in comments.
    comments = re.findall(r"<!-- (.*?) -->", text)
    for row in optimizer.diagnose():
        assert row.name in comments
    for label in ("spectral4", "spectral8", "median", "direction error"):
        assert label in comments


def test_a_missing_matplotlib_is_one_sentence_before_anything_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> Any:
        return None if name == "matplotlib" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    torch.save(state_of(Muon), tmp_path / "a.pt")
    assert main(["doctor", str(tmp_path / "a.pt"), "--plot=a.svg"]) == 2
    expected = "lowbit-muon: --plot: matplotlib is not installed (pip install matplotlib)\n"
    assert capsys.readouterr().err == expected
