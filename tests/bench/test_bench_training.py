"""The training benchmark: its data, its choice of learning rates, its pairing of seeds."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from rich.console import Console

from bench.training import __main__ as command
from bench.training import report, text
from bench.training.methods import BASELINE, GRIDS, METHODS, make_optimizer
from bench.training.models import CONTEXT, LAYERS, MODELS, WIDTH, make_model
from bench.training.run import FINAL_FACTOR, WARMUP, Plan, factor, train, windows

SHORT = Plan(
    "gpt", "spectral4", 5e-3, 0, steps=2, held_out_bytes=2048, evaluations=2, width=64, layers=2
)


def run_of(method: str, lr: float, seed: int, *losses: float) -> dict[str, Any]:
    curve = [[1000 * (i + 1), loss] for i, loss in enumerate(losses)]
    return {"model": "gpt", "method": method, "lr": lr, "seed": seed, "curve": curve,
            "state_bytes": 8, "width": WIDTH, "layers": LAYERS}  # fmt: skip


def test_the_text_is_of_both_sources_and_held_out_text_is_not_trained_on() -> None:
    corpus, digest = text.corpus(8192, CONTEXT)
    assert corpus.held_out.numel() == 8192
    held_out = bytes(corpus.held_out.tolist())
    train_bytes = bytes(corpus.train.tolist())
    assert b"LORD" in train_bytes
    assert b"def __init__(self" in train_bytes
    for start in (100, 4200):  # one piece of each text
        assert held_out[start : start + 400] not in train_bytes
    assert len(digest) == 16


def test_windows_cover_the_held_out_text_once() -> None:
    ids = torch.arange(5 * CONTEXT + 7)
    inputs = torch.cat([batch[:, :-1].flatten() for batch in windows(ids)])
    assert torch.equal(inputs, ids[: 5 * CONTEXT])


def test_learning_rates_warm_up_and_fall_to_the_last_factor() -> None:
    steps = 200
    factors = [factor(step, steps) for step in range(steps)]
    assert factors[0] == pytest.approx(1 / WARMUP)
    assert max(factors) == factors[WARMUP - 1]
    assert factors[-1] == pytest.approx(FINAL_FACTOR + (1 - FINAL_FACTOR) / steps)


@pytest.mark.parametrize(
    ("method", "model"),
    [
        (name, model)
        for name, method in METHODS.items()
        for model in MODELS
        if not (method.rule and model == "modern")  # formats alone are compared there
    ],
)
def test_every_method_trains_every_model(model: str, method: str) -> None:
    if method == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    made = make_model(model, seed=0, width=64, layers=1)
    before = [parameter.detach().clone() for parameter in made.parameters()]
    optimizer = make_optimizer(made, METHODS[method], 1e-3, seed=0)
    # The modern one's head, then its outputs are zero; that Drop-Muon leaves a matrix out twelve
    # times has a chance of 2^-12, with these seeds it does not happen.
    steps = 3 if model == "modern" else 1
    for _ in range(12 if METHODS[method].rule == "drop_muon" else steps):
        made.loss(torch.randint(256, (2, 17))).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [not torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True)]
    # Position embeddings of unused positions stay, all others have entries that move.
    assert all(moved)


def test_a_run_is_a_function_of_its_plan() -> None:
    first, second = train(SHORT), train(SHORT)
    assert first == second
    assert [seen for seen, _ in first["curve"]] == [1024, 2048]
    assert all(0 < loss < 2 * math.log(256) for _, loss in first["curve"])


def test_results_are_continued(tmp_path: Path) -> None:
    runs: dict[str, Any] = {}

    def finished(plan: Plan, result: dict[str, Any]) -> None:
        runs[plan.key] = {**command.asdict(plan), **result}

    quiet = Console(quiet=True)
    command.carry_out("one", [SHORT, SHORT], runs, 1, finished, quiet)
    assert list(runs) == [SHORT.key]
    restored = json.loads(json.dumps(runs))
    assert command.is_done(SHORT, restored)
    assert not command.is_done(Plan(**{**command.asdict(SHORT), "steps": 3}), restored)


def test_the_best_rate_is_seed_0s_of_a_model_of_one_size() -> None:
    grid = GRIDS[BASELINE]
    runs = {str(lr): run_of(BASELINE, lr, 0, 3.0, abs(lr - grid[1])) for lr in grid}
    runs["another seed"] = run_of(BASELINE, grid[2], 1, 3.0, -1.0)
    runs["wider"] = {**run_of(BASELINE, grid[3], 0, 3.0, -1.0), "width": 512}
    assert report.best_rates(runs) == {("gpt", BASELINE): grid[1], ("gpt 512x4", BASELINE): grid[3]}
    assert report.rows(runs, "gpt")[0].losses == {0: 0.0}
    assert report.rows(runs, "gpt 512x4")[0].losses == {0: -1.0}


def test_gaps_are_paired_by_seed() -> None:
    runs = {
        **{f"a{s}": run_of(BASELINE, 1e-3, s, 3.0, loss) for s, loss in enumerate((2.0, 2.2))},
        **{f"b{s}": run_of("spectral4", 1e-3, s, 3.0, loss) for s, loss in enumerate((2.1, 2.5))},
    }
    baseline, ours = report.rows(runs, "gpt")
    assert ours.gaps == pytest.approx({0: 0.1, 1: 0.3})
    assert ours.gap_error == pytest.approx(0.1)
    assert ours.unit == baseline.spread == pytest.approx(0.2 / math.sqrt(2))
    assert report.cells(ours)[1:] == ["+0.2000", "+1.4"]
    assert report.cells(baseline)[1:] == ["", ""]


def test_a_rule_of_its_own_has_a_baseline_of_its_own() -> None:
    baseline = METHODS["muonq4"].baseline
    runs = {
        "a": run_of(BASELINE, 1e-3, 0, 2.0),
        "b": run_of(baseline, 1e-3, 0, 1.5),
        "c": run_of("muonq4", 1e-3, 0, 1.75),
    }
    found = {row.method: row.gaps for row in report.rows(runs, "gpt")}
    assert found == {BASELINE: {0: 0.0}, baseline: {0: 0.0}, "muonq4": {0: 0.25}}


def test_the_plot_of_rules_names_those_with_two_seeds(tmp_path: Path) -> None:
    runs = {
        f"{method} {seed}": run_of(method, 1e-3, seed, 2.0)
        for rule, seeds in {"lion": 2, "namo": 1}.items()
        for method in (rule, f"{rule}, spectral4")
        for seed in range(seeds)
    }
    path = tmp_path / "rules.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        report.plot_rules(path, runs)
    text = path.read_text()
    assert "lion" in text
    assert "namo" not in text


def test_the_plot_shows_both_models(tmp_path: Path) -> None:
    runs = {f"{m}{s}": {**run_of(BASELINE, 1e-3, s, 3.0, 2.0), "model": m}
            for m in ("gpt", "llama") for s in (0, 1)}  # fmt: skip
    path = tmp_path / "new" / "curves.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        report.plot(path, runs)
    drawn = path.read_text()
    assert "gpt, 2 seeds" in drawn
    assert "llama, 2 seeds" in drawn


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="got nothing"):
        command.names(METHODS)("fp32;nothing")
