"""The recorder, the loop and the figures of `bench.fidelity`, where the answers are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from recordings import recording
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench import capture, fidelity
from bench.closed_loop import MUONQ, TORCH, Sequence, relative_error
from bench.peer_formats import GRASP_BLOCK, grasp, grid_quantize
from lowbit_muon import PRESETS, Muon, orthogonalize, quantize


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
    assert relative_error(decoded, x) < 2 * 2.0**-7  # two factors of half a step of 1/127
    assert bits > 4


# The loop


@pytest.mark.parametrize("name", ["fp32", "spectral4", "linear8", "nf4"])
def test_the_loop_is_the_optimizers(name: str) -> None:
    """Weights of zeros and a rate of minus one: each step adds its update to them."""
    grads = recording()
    found = Sequence.of(grads, range(8, 12)).closed(
        lambda x: quantize(x, PRESETS[name]).dequantize()
    )
    weight = torch.nn.Parameter(torch.zeros_like(grads[0]))
    optimizer = Muon([weight], lr=1.0, weight_decay=0.0, state_format=name)
    for step, grad in enumerate(grads):
        before = weight.detach().clone()
        weight.grad = grad.clone()
        optimizer.step()
        if step >= 8:
            # The optimizer's products are its backend's; codes at a threshold may fall otherwise.
            assert relative_error(before - weight.detach(), found[step - 8]) < 0.02


def test_what_loses_nothing_changes_nothing() -> None:
    for rule in (TORCH, MUONQ):
        sequence = Sequence.of(recording(), range(8, 12), rule)
        torch.testing.assert_close(sequence.closed(lambda x: x), sequence.updates)
        torch.testing.assert_close(sequence.once(lambda x: x), sequence.updates[-1])


def test_once_is_one_store() -> None:
    """Of a loop in which only the step before the last is measured, nothing was stored before."""
    grads = recording(steps=2)
    sequence = Sequence.of(grads, range(1, 2))

    def store(x: Tensor) -> Tensor:
        return quantize(x, "nf4").dequantize()

    torch.testing.assert_close(sequence.once(store), sequence.closed(store)[-1])


def test_muonqs_rule_has_neither_size_nor_nesterov() -> None:
    grads = recording(steps=3)
    sequence = Sequence.of(grads, range(2, 3), MUONQ)
    again = Sequence.of(grads * torch.tensor([1.0, 7.0, 0.1])[:, None, None], range(2, 3), MUONQ)
    torch.testing.assert_close(sequence.updates, again.updates)
    momentum = MUONQ.add(sequence.momenta[0], grads[2])
    assert float(momentum.norm()) == pytest.approx(1)
    torch.testing.assert_close(sequence.updates[0], orthogonalize(momentum))


def test_pareto_front() -> None:
    points = {"a": (2.0, 0.5), "b": (4.0, 0.1), "c": (4.1, 0.2), "d": (8.0, 0.1), "e": (3.0, 0.6)}
    results = {name: {"bits": x, "mean": y} for name, (x, y) in points.items()}
    assert fidelity.pareto_front(results) == ["a", "b"]  # d has b's error in more bits


def test_more_bits_are_nearer_and_the_loop_is_worse() -> None:
    results = fidelity.measure({"one": recording(24, 48, 80)}, Console(quiet=True))
    for family, suffix in (("spectral", ""), ("linear", ", rows")):
        for figure in fidelity.FIGURES:
            errors = [results[f"{family}{bits}{suffix}"][figure] for bits in (8, 4, 3, 2)]
            assert errors == sorted(errors)
    assert set(results) == set(fidelity.methods())
    assert {row["family"] for row in results.values()} == set(fidelity.FAMILIES)
    assert set(PRESETS) - set(results) == {"fp32"}  # which is what they are compared with
    assert results["spectral4"]["mean"] > results["spectral4"]["once"]


def test_command_writes_table_json_and_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "run.safetensors"
    save_file({"big": recording(40, 40, 64), "small": recording(40)}, data)
    names = {kind: str(tmp_path / f"out.{kind}") for kind in ("json", "svg")}
    fidelity.main(["--quick", "--data", str(data), "--json", names["json"], "--plot", names["svg"]])
    assert "spectral4" in capsys.readouterr().out
    document = json.loads(Path(names["json"]).read_text())
    assert document["results"]["recording"] == {"small": [12, 16, 32]}
    assert set(document["results"]["formats"]) == set(fidelity.methods())
    assert "<svg" in Path(names["svg"]).read_text()


def test_the_recorder_keeps_the_gradients_after_those_it_skips(tmp_path: Path) -> None:
    for skip, steps in ((0, 3), (1, 2)):
        out = str(tmp_path / f"{skip}.safetensors")
        capture.main(["--width", "16", "--skip", f"{skip}", "--steps", f"{steps}", "--out", out])
    whole, part = (load_file(tmp_path / f"{skip}.safetensors") for skip in (0, 1))
    assert {name: list(x.shape) for name, x in whole.items()} == {
        "blocks.2.query.weight": [3, 16, 16],
        "blocks.2.up.weight": [3, 16, 64],
    }
    for name, grads in part.items():
        assert torch.equal(grads, whole[name][1:])


def test_the_shipped_recording_is_the_recorders() -> None:
    shipped = capture.load()
    assert set(shipped) == set(capture.MATRICES)
    assert {len(grads) for grads in shipped.values()} == {80}
    assert all(bool(grads.isfinite().all()) for grads in shipped.values())
    assert capture.SHIPPED.stat().st_size < 4 * 2**20
