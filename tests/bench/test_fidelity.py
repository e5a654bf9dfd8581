"""The figures of `bench.fidelity` on matrices whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench import fidelity
from bench.capture import load
from bench.peer_formats import GRASP_BLOCK, grasp, grid_quantize


def test_grid_scales_are_the_smaller_of_row_and_column() -> None:
    """An outlier spoils neither its row nor its column: all else keeps the small scale."""
    x = torch.ones(4, 4)
    x[1, 2] = 100
    decoded, _ = grid_quantize(x, 4)
    assert torch.equal(decoded, x)  # 100 = min(100, 100), and the others 1 = min(1, 100)


@pytest.mark.parametrize("bits", [4, 8])
def test_grid_error_is_half_a_step(bits: int) -> None:
    x = torch.randn(GRASP_BLOCK + 9, 2 * GRASP_BLOCK + 5)
    decoded, stored = grid_quantize(x, bits)
    for row in (slice(0, GRASP_BLOCK), slice(GRASP_BLOCK, None)):
        part = x[row, :GRASP_BLOCK]
        scale = torch.minimum(part.abs().amax(1, keepdim=True), part.abs().amax(0, keepdim=True))
        step = scale / (2 ** (bits - 1) - 1)
        error = (decoded[row, :GRASP_BLOCK] - part).abs()
        assert (error <= step / 2 * (1 + 1e-5)).all()
    blocks = [(128, 128), (128, 128), (128, 5), (9, 128), (9, 128), (9, 5)]
    assert stored == bits * x.numel() + 32 * sum(m + n for m, n in blocks)
    assert torch.equal(grid_quantize(torch.zeros(3, 5), bits)[0], torch.zeros(3, 5))


def test_grasp_keeps_the_leading_directions() -> None:
    """A matrix of rank m/16 is all factors, which have 8 bits."""
    x = torch.randn(64, 4) @ torch.randn(4, 96)
    decoded, bits = grasp(x)
    assert fidelity.relative_error(decoded, x) < 2 * 2.0**-7  # two factors of half a step of 1/127
    assert bits > 4


def test_largest_angle() -> None:
    basis = torch.eye(5, 2, dtype=torch.float64)
    turned = basis.clone()
    angle = 0.3
    turned[:, 1] = 0
    turned[1, 1], turned[4, 1] = math.cos(angle), math.sin(angle)
    assert fidelity.largest_angle(basis, basis) == pytest.approx(0, abs=1e-5)
    assert fidelity.largest_angle(basis, turned) == pytest.approx(math.degrees(angle))


def test_polar_factor_is_orthogonal() -> None:
    polar = fidelity.polar_factor(torch.randn(6, 9))
    torch.testing.assert_close(polar @ polar.mT, torch.eye(6, dtype=torch.float64))


def test_pareto_front() -> None:
    points = {"a": (2.0, 0.5), "b": (4.0, 0.1), "c": (4.1, 0.2), "d": (8.0, 0.1), "e": (3.0, 0.6)}
    results = {name: {"bits": x, "update": y} for name, (x, y) in points.items()}
    assert fidelity.pareto_front(results) == ["a", "b"]  # d has b's error in more bits


def test_more_bits_are_nearer() -> None:
    matrix = torch.linalg.qr(torch.randn(48, 48))[0] / torch.arange(1, 49) @ torch.randn(48, 80)
    results = fidelity.measure({"one": matrix / matrix.norm()}, Console(quiet=True))
    for family, suffix in (("spectral", ""), ("linear", ", rows")):
        for figure in ("momentum", "update", "polar"):
            values = [results[f"{family}{bits}{suffix}"][figure] for bits in (8, 4, 3, 2)]
            assert values == sorted(values)  # type: ignore[type-var]
    assert set(results) == set(fidelity.methods())
    assert {row["family"] for row in results.values()} == set(fidelity.FAMILIES)


def test_command_writes_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "momentum.safetensors"
    save_file({"big": torch.randn(40, 64).half(), "small": torch.randn(16, 32).half()}, data)
    assert all(float(x.norm()) == pytest.approx(1) for x in load(data).values())
    names = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "svg")}
    fidelity.main(["--quick", "--data", str(data), "--json", names["json"], "--plot", names["svg"]])
    assert "spectral4" in capsys.readouterr().out
    document = json.loads(Path(names["json"]).read_text())
    assert document["results"]["matrices"] == {"small": [16, 32]}
    assert set(document["results"]["formats"]) == set(fidelity.methods())
    assert "<svg" in Path(names["svg"]).read_text()
