"""The comparison of two checkouts: equal to itself, and a change of one constant is seen."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import compare_trees
from bench.compare_trees import (
    LONG,
    OPTION_FORMATS,
    Case,
    cases,
    parse_shapes,
    presets,
    same_bits,
    state_differences,
    trajectory,
    workers,
)
from lowbit_muon import PRESETS, RULES
from lowbit_muon.backends.cpu.adapter import unavailable_reason

ROOT = compare_trees.ROOT

needs_extension = pytest.mark.skipif(
    unavailable_reason() is not None, reason="the C++ extension was not built"
)


def copied_tree(folder: Path, *replaced: tuple[str, str]) -> Path:
    """A copy of this package with texts of its sources replaced."""
    shutil.copytree(ROOT / "lowbit_muon", folder / "lowbit_muon")
    for old, new in replaced:
        found = [path for path in folder.rglob("*.py") if old in path.read_text()]
        assert found, old
        for path in found:
            path.write_text(path.read_text().replace(old, new))
    return folder


# Of one format all options, of which there are many.
OF_MUONQ4 = {"muonq4", "muonq4, nesterov=False", "auto"}
OF_SPECTRAL4 = {
    "spectral4",
    "spectral4, bfloat16, compensation=True",
    "spectral4, MuonWithAuxAdam, aux_adam=adamw, skipped gradients",
    "spectral4, rule=namo_d",
    "spectral4, bfloat16, rule=muown, compensation=True",
    "auto",
}


@pytest.mark.long
@needs_extension
@pytest.mark.parametrize(("preset", "names"), [("muonq4", OF_MUONQ4), ("spectral4", OF_SPECTRAL4)])
def test_a_tree_equals_itself_in_everything(preset: str, names: set[str], tmp_path: Path) -> None:
    path = tmp_path / "new" / "result.json"
    compare_trees.main([
        str(ROOT), "--quick", "--steps", "2", "--repeats", "1", "--formats", preset,
        "--shapes", "2x6x10", "--json", str(path),
    ])  # fmt: skip
    results = json.loads(path.read_text())["results"]
    trained = results["trajectories"]
    assert {row["name"] for row in trained} >= names
    for row in trained:
        # 8-bit AdamW needs a package that may be missing.
        assert row["equal"] or "adamw8bit" in row["name"], row
    assert [(row["shapes"], row["format"]) for row in results["time"]] == [("2x6x10", preset)]
    for row in results["time"]:
        assert row["seconds"].keys() == {"old", "new", "torch"}
        assert all(len(values) == 1 and values[0] > 0 for values in row["seconds"].values())
    for row in results["memory"]:
        # A step orthogonalises a float32 copy of the momentum, whatever else it holds.
        assert row["old"] == row["new"] >= 4 * math.prod(row["shape"])


@needs_extension
def test_changed_constants_are_seen(tmp_path: Path) -> None:
    tree = copied_tree(
        tmp_path,
        ("(3.4445, -4.7750, 2.0315)", "(3.4445, -4.7750, 2.0325)"),
        ('"mulaw8", bits=8, mu=4.5, clip=4.2', '"mulaw8", bits=8, mu=4.5, clip=4.0'),
    )
    shapes = ((6, 10), (0, 4), (12, 5))
    polar = {"ns_coefficients": "polar_express"}
    with workers(tree, ROOT, threads=1) as pair:
        polynomial, codes, neither, failed = (
            trajectory(one, pair, 2)
            for one in (
                Case("mulaw4", shapes),
                Case("mulaw8", shapes, polar),
                Case("mulaw4", shapes, polar),
                Case("mulaw4", shapes, {"ns_steps": 0}),
            )
        )
        assert "mulaw4" in presets(pair, ())
        assert presets(pair, ("fp32", "bf16")) == ["bf16", "fp32"]  # in the presets' order
        with pytest.raises(SystemExit, match=r"--formats: expected presets .* got \['fp64'\]"):
            presets(pair, ("fp32", "fp64"))
    assert neither.equal
    assert neither.weights is None
    assert neither.state == {}
    # Other weights of the same momentum. The polynomial's values are of size one and differ by
    # 1e-3 x^5: little, but more than float32 rounding.
    assert not polynomial.equal
    assert polynomial.weights is not None
    assert 1e-5 < polynomial.weights < 0.1
    assert polynomial.shape in ((6, 10), (12, 5))
    assert polynomial.state == {}
    assert not codes.equal
    assert codes.state.keys() == {"codes", "scales"}
    # A byte a code; the scales follow clip, by 5% here.
    assert re.fullmatch(r"[1-9]\d* of 120 bytes", codes.state["codes"])
    assert 0.01 < float(codes.state["scales"]) < 0.1
    assert not failed.equal
    assert failed.error is not None
    assert failed.error.count("ns_steps: expected") == 2  # once a tree


@pytest.mark.long
@needs_extension
def test_a_lost_preset_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = copied_tree(tmp_path, ('StateFormat("fp32", bits=32)', 'StateFormat("fp33", bits=32)'))
    compare_trees.main([str(tree), "--quick", "--what", "trajectories", "--formats", "bf16"])
    assert "presets of one tree only: fp32, fp33" in capsys.readouterr().out


def test_a_tree_without_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="old tree: expected a checkout of lowbit_muon"):
        compare_trees.main([str(tmp_path), "--quick"])
    # A package that cannot be imported: its process ends before it answers.
    (tmp_path / "lowbit_muon").mkdir()
    (tmp_path / "lowbit_muon" / "__init__.py").write_text("raise SystemExit(3)\n")
    with pytest.raises(SystemExit, match="ended with 3"):
        compare_trees.main([str(tmp_path), "--quick"])


def test_every_preset_option_and_rule_has_a_case() -> None:
    found = list(cases(list(PRESETS), list(RULES), quick=False))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert set(PRESETS) <= set(names)
    options = {option for case in found for option in case.options}
    assert options == {
        "nesterov", "ns_input", "ns_steps", "weight_decay", "adjust_lr_fn", "ns_coefficients",
        "lr", "momentum", "eps", "seed", "backend", "stochastic_rounding", "compensation",
        "batch_experts", "row_splits", "aux_adam", "rule",
    }  # fmt: skip
    assert {case.options.get("rule") for case in found} == {None, *RULES}
    assert all(math.prod(shape) > 2**20 for shape in LONG)
    assert any(LONG[0] in case.shapes and case.options for case in found)
    assert set(OPTION_FORMATS) <= set(PRESETS)


def test_bits_are_compared_and_not_values() -> None:
    x = torch.tensor([0.0, 1.0, float("nan")])
    assert same_bits(x, x.clone())
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0))
    assert not same_bits(x, x.double())
    assert not same_bits(torch.zeros(2, 3), torch.zeros(3, 2))
    assert same_bits(torch.zeros(0, 3), torch.zeros(0, 3))


def test_differences_of_states_are_told_by_role() -> None:
    old: dict[str, Any] = {
        "step": 3,
        "skipped": 0,
        "0.packed": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "1.packed": torch.tensor([4, 5], dtype=torch.uint8),
        "0.scales": torch.tensor([3.0, 4.0]),
        "gone": torch.zeros(1),
        "longer": torch.zeros(1),
        "nan": torch.tensor([1.0, 2.0]),
    }
    assert state_differences([old], [dict(old)]) == {}
    new = {
        **{key: value for key, value in old.items() if key != "gone"},
        "step": 4,
        "1.packed": torch.tensor([4, 6], dtype=torch.uint8),
        "0.scales": torch.tensor([3.0, 4.5]),
        "longer": torch.zeros(2),
        "nan": torch.tensor([1.0, float("nan")]),
        "came": 1,
    }
    assert state_differences([old], [new]) == {
        "packed": "1 of 5 bytes",
        "scales": "1.0e-01",  # 0.5 of a norm of 5
        "nan": "inf",
        "step": "3, now 4",
        "longer": "torch.float32 (1,), now torch.float32 (2,)",
        "gone": "only in the old tree",
        "came": "only in the new tree",
    }


def test_shapes_are_parsed() -> None:
    assert parse_shapes("8x20") == ((8, 20),)
    assert parse_shapes("3x8x20") == ((8, 20),) * 3
    assert len(parse_shapes("smollm2")) == 28
    for bad in ("8", "8x", "0x4", "1x2x3x4", "gpt5"):
        with pytest.raises(SystemExit, match="--shapes: expected"):
            parse_shapes(bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--what", "speed"], "--what: expected"),
        (["--steps", "0"], "--steps: expected"),
        (["--repeats", "-1"], "--repeats: expected"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        compare_trees.main([str(ROOT), *arguments])
    assert message in capsys.readouterr().err
