"""`lowbit-muon bench`: gates that accept and refuse, rows, table, JSON, plot, mistakes."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor

from lowbit_muon import PRESETS, QuantizedMatrix
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.tools.benchmark import cases as cases_module
from lowbit_muon.tools.benchmark import command, gates, peaks, report
from lowbit_muon.tools.benchmark.cases import DTYPES, Prepared, Problem, make_cases
from lowbit_muon.tools.benchmark.command import parse_formats, parse_shapes
from lowbit_muon.tools.benchmark.measure import Result, measure, share_deadline
from lowbit_muon.tools.benchmark.momentum import decaying_matrix
from lowbit_muon.tools.benchmark.report import results_table, significant, write_results
from lowbit_muon.tools.cli import main

CPU = torch.device("cpu")
SHAPES = ((16, 24), (24, 16))
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
KEYS = {
    "name", "shape", "format", "device", "dtype", "status", "detail", "seconds", "median",
    "spread", "baseline", "ratio", "error", "allowed_error", "state_bytes", "bits_per_element",
    "peak_bytes", "threads", "isa", "work", "roof", "fraction", "bytes", "flops",
}  # fmt: skip
PEERS = {
    "torch copy", "torch.mm Gram fp32", "Newton-Schulz fp32", "Newton-Schulz bf16",
    "torch.optim.Muon", "torch.optim.AdamW", "bitsandbytes AdamW8bit",
}  # fmt: skip
PEAKS = {"copy from memory", "copy in L2", "torch.mm fp32", "torch.mm bf16"}
WITHOUT_INTEGERS = {"muonq4", "mulaw8", "nf4", "bf16", "fp32"}  # no whole levels
OPERATIONS = {"step", "quantize", "dequantize", "lut_gram"}


@pytest.fixture(autouse=True)
def small_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that they take no time; their numbers mean nothing then."""
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(peaks, "PRODUCT_SIZES", {"cpu": 32})


def rows_of(results: list[Result], name: str) -> list[Result]:
    return [result for result in results if result.name == name]


def run(problem: Problem, formats: list[str], name: str) -> Prepared:
    (case,) = (case for case in make_cases(problem, formats) if case.name == name)
    return case.prepare()


def test_input_looks_like_a_momentum() -> None:
    matrix = decaying_matrix(24, 60, torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(matrix)
    # 1/i times the singular values of a Gaussian matrix, all within a factor of about 2
    assert values[0] / values[-1] > 10
    assert bool(matrix.isfinite().all())
    assert (matrix == 0).sum() == 0
    tall = decaying_matrix(60, 24, torch.Generator().manual_seed(0))
    assert torch.equal(tall, matrix.mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (7, 1), (2, 3)], ids=str)
def test_gates_accept_every_format(shape: tuple[int, int], dtype: str) -> None:
    problem = Problem(shape, dtype, CPU)
    for case in make_cases(problem, list(PRESETS)):
        if case.peer:
            continue
        if case.name == "lut_gram" and case.format in WITHOUT_INTEGERS:
            with pytest.raises(cases_module.UnavailableError, match="'s8' cannot read q"):
                case.prepare()
            continue
        prepared = case.prepare()
        assert prepared.passed is not None
        assert prepared.passed.error <= prepared.passed.allowed < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gates_accept_the_batched_step_of_devices(
    shape: tuple[int, int], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    for name in PRESETS:
        assert run(Problem(shape, dtype, CPU), [name], "step").passed is not None


def spoil(monkeypatch: pytest.MonkeyPatch, where: str) -> str:
    """Breaks one function a little; the operation that has to be refused."""
    if where == "orthogonalize":
        exact = cases_module.orthogonalize
        monkeypatch.setattr(cases_module, where, lambda x: exact(x, steps=4))
    elif where == "lut_gram":
        gram = cases_module.lut_gram
        monkeypatch.setattr(
            cases_module, where, lambda *args, **options: gram(*args, **options) * 1.001
        )
    elif where == "dequantize":
        decode = QuantizedMatrix.dequantize
        monkeypatch.setattr(
            QuantizedMatrix, where, lambda self, backend: decode(self, backend).roll(1, 1)
        )
    else:
        step_parameters = muon_module.Muon._step_parameters

        def without_lookahead(self: Any, group: dict[str, Any], *arguments: Any) -> None:
            step_parameters(self, {**group, "nesterov": False}, *arguments)

        # (not `step`: torch wraps it for every class that is made, and keeps that)
        monkeypatch.setattr(muon_module.Muon, "_step_parameters", without_lookahead)
    return where


@pytest.mark.parametrize("where", ["orthogonalize", "lut_gram", "dequantize", "step"])
def test_a_wrong_result_is_an_error_and_not_timed(
    where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = spoil(monkeypatch, where)
    results = measure(Problem((16, 24), "fp32", CPU), ["mulaw4"], 1)
    (row,) = rows_of(results, name)
    assert row.status == "error"
    assert row.detail.startswith("GateError: ")
    assert "expected a relative error of at most" in row.detail
    assert (row.seconds, row.median, row.ratio) == ([], None, None)
    (baseline,) = (result for result in results if result.name == row.baseline)
    assert baseline.status == "measured"
    assert main(["bench", "--shapes=16x24", "--format=mulaw4", "--repeats=1"]) == 1
    assert "GateError" in capsys.readouterr().out


def test_an_exception_of_ours_hides_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("a kernel\nfailed [1, 2]")

    monkeypatch.setattr(cases_module, "lut_gram", fail)
    results = measure(Problem((16, 24), "fp32", CPU), ["mulaw4"], 1)
    assert [(r.name, r.detail) for r in results if r.status == "error"] == [
        ("lut_gram", "RuntimeError: a kernel failed [1, 2]")
    ]
    assert rows_of(results, "step")[0].status == "measured"


def test_a_peer_that_fails_is_skipped_and_leaves_no_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("not for this dtype")

    monkeypatch.setattr(torch.optim, "Muon", fail)
    results = measure(Problem((16, 24), "fp32", CPU), ["fp32"], 1)
    (peer,) = rows_of(results, "torch.optim.Muon")
    assert (peer.status, peer.detail) == ("skipped", "RuntimeError: not for this dtype")
    (step,) = rows_of(results, "step")
    assert (step.status, step.baseline, step.ratio) == ("measured", "torch.optim.Muon", None)


@pytest.mark.parametrize("present", [True, False])
def test_bitsandbytes_is_timed_or_skipped(present: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((64, 64), "fp32", CPU)
    if present and not HAS_BITSANDBYTES:
        pytest.skip("bitsandbytes is not installed")
    if not present:

        def unavailable(*_: object, **__: object) -> None:
            raise RuntimeError("aux_adam: 'adamw8bit' is not available: no bitsandbytes")

        monkeypatch.setattr(cases_module, "MuonWithAuxAdam", unavailable)
    (row,) = rows_of(measure(problem, ["fp32"], 1), "bitsandbytes AdamW8bit")
    if present:
        assert row.status == "measured"
        assert row.bits_per_element is not None
        # 4096 elements: two states of 8 bits, with scales and tables of 256 floats
        assert 16 <= row.bits_per_element < 24
    else:
        assert row.status == "skipped"
        assert row.detail.endswith("no bitsandbytes")


def test_rows_say_what_was_measured() -> None:
    results = measure(Problem((24, 16), "bf16", CPU), ["spectral4", "fp32"], 2)
    assert len({(r.name, r.format) for r in results}) == len(results)
    names = {result.name for result in results}
    assert names == PEERS | PEAKS | OPERATIONS | {"orthogonalize", "torch.mm Gram bf16"}
    by_key = {(result.name, result.format): result for result in results}
    step, baseline = by_key["step", "spectral4"], by_key["torch.optim.Muon", None]
    assert step.status == baseline.status == "measured"
    assert (step.dtype, baseline.dtype, step.device) == ("bf16", "bf16", "cpu")
    assert step.median is not None
    assert baseline.median is not None
    assert step.ratio == step.median / baseline.median
    assert len(step.seconds) == 2
    assert min(step.seconds) <= step.median <= max(step.seconds)
    stored = QuantizedMatrix.zeros((24, 16), PRESETS["spectral4"], seed=0, device=CPU)
    assert step.state_bytes == by_key["quantize", "spectral4"].state_bytes == stored.nbytes
    assert step.bits_per_element == stored.bits_per_element
    assert baseline.state_bytes == 24 * 16 * 2
    assert by_key["torch.optim.AdamW", None].state_bytes == 2 * 24 * 16 * 2 + 4
    dense = by_key["lut_gram", "fp32"]
    assert dense.status == "skipped"
    assert "format 'fp32' is not one of levels and scales" in dense.detail


def test_a_timed_step_starts_from_the_weight_and_rate_it_was_given() -> None:
    problem = Problem((16, 24), "fp32", CPU)
    prepared = run(problem, ["spectral4"], "step")
    optimizer = prepared.call.__self__  # type: ignore[attr-defined]
    (group,) = optimizer.param_groups
    (param,) = group["params"]
    assert group["lr"] == 1e-3
    assert torch.equal(param, problem.parameter())
    assert param.grad is problem.grad


def test_reference_iteration_is_the_polynomial_of_the_singular_values() -> None:
    x = decaying_matrix(20, 9, torch.Generator().manual_seed(0)).double()
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(gates.newton_schulz(x), u * s @ vh, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("found", [torch.tensor([[1.0, torch.nan]]), torch.tensor([[1.0, 0.0]])])
def test_nan_never_passes_a_gate(found: Tensor) -> None:
    with pytest.raises(gates.GateError, match=r"x: expected .* at most 1.0e-01, got"):
        gates.expect_close("x", found, torch.tensor([[1.0, 1.0]]), 0.1)


def test_an_error_allowed_of_zeros_would_be_useless() -> None:
    for state_format in PRESETS.values():
        assert 0 < gates.allowed_stored_error(state_format) < 0.9


def test_the_json_schema(tmp_path: Path) -> None:
    file = tmp_path / "new" / "bench.json"
    arguments = ["--shapes=16x24,24x16", "--format=mulaw4,nf4", "--repeats=2", "--threads=1"]
    assert main(["bench", *arguments, f"--json={file}"]) == 0
    document = json.loads(file.read_text())
    assert set(document) == {"machine", "results"}
    assert {"cpu", "gpu", "cores", "threads", "isa", "torch", "python", "system"} <= set(
        document["machine"]
    )
    assert document["machine"]["threads"] == 1
    results = document["results"]
    assert {tuple(row["shape"]) for row in results} == set(SHAPES)
    assert {field.name for field in dataclasses.fields(Result)} == KEYS
    for key in KEYS:
        assert write_results.__doc__ is not None
        assert key in write_results.__doc__, f"{key} is not described"
    names = {row["name"] for row in results}
    for row in results:
        assert set(row) == KEYS
        assert row["device"] == "cpu"
        assert row["dtype"] in DTYPES
        assert row["baseline"] is None or row["baseline"] in names
        assert (row["format"] is None) == (row["name"] not in OPERATIONS)
        if row["status"] == "measured":
            assert len(row["seconds"]) == 2
            assert all(value > 0 for value in row["seconds"])
            assert row["detail"] == ""
            assert (row["error"] is None) == (row["allowed_error"] is None)
        else:
            assert row["status"] == "skipped"
            assert row["detail"]
            assert row["seconds"] == []
            assert row["median"] is row["ratio"] is None


def test_what_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--shapes=16x24", "--format=mulaw4,nf4", "--repeats=1"]) == 0
    shown = capsys.readouterr().out
    assert "16x24, fp32 weights, cpu, 1 rounds" in shown
    for text in ("dequantize mulaw4", "bitsandbytes AdamW8bit", "torch.mm Gram fp32"):
        assert f"\n {text} " in shown
    assert "step to torch.optim.Muon" in shown
    assert "lut_gram nf4: skipped: panel: 's8' cannot read q" in shown


def test_a_row_without_numbers_has_its_status_in_the_table() -> None:
    row = Result("step", (16, 24), "nf4", "cpu", "fp32", "error", "GateError: far off")
    (cells,) = zip(*(column.cells for column in results_table([row]).columns), strict=True)
    assert cells == ("step nf4", "error", *[""] * 5)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0"), (0.000931, "0.000931"), (0.1, "0.100"), (1.0, "1.00"), (54.321, "54.3"),
        (123.4, "123"), (12345.6, "12,346"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float, shown: str) -> None:
    assert significant(value) == shown


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ("step", {"torch.optim.Muon", "torch.optim.AdamW", "bitsandbytes AdamW8bit", "step"}),
        ("orthogonalize", {"Newton-Schulz fp32", "Newton-Schulz bf16", "orthogonalize"}),
        ("quantize", {"torch copy", "quantize"}),
        ("lut_gram,dequantize", {"torch copy", "torch.mm Gram fp32", "lut_gram", "dequantize"}),
    ],
)
def test_parts_are_chosen_with_what_they_are_compared_with(parts: str, names: set[str]) -> None:
    results = measure(Problem((16, 24), "fp32", CPU), ["spectral4"], 1, parts=parts.split(","))
    needed = PEAKS if parts != "quantize" else PEAKS - {"torch.mm bf16"}
    assert {result.name for result in results} == names | needed
    keys = {f"{result.name} {result.format or ''}".strip() for result in results}
    assert {result.baseline for result in results} - {None} <= keys
    assert all(r.fraction is not None for r in results if r.status == "measured")


def test_the_command_times_the_parts_that_it_is_asked_for(tmp_path: Path) -> None:
    file, table = tmp_path / "bench.json", tmp_path / "bench.csv"
    arguments = ["--shapes=16x24,8x8", "--format=mulaw4,nf4", "--repeats=2", "--threads=1"]
    outputs = [f"--json={file}", f"--csv={table}"]
    assert main(["bench", *arguments, "--parts=lut_gram", *outputs]) == 0
    results = json.loads(file.read_text())["results"]
    assert {row["name"] for row in results} == {"torch.mm Gram fp32", "lut_gram", *PEAKS}
    # The same rows, without their samples; what is not there is empty.
    with open(table, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert set(rows[0]) == KEYS - {"seconds"}
    for row, result in zip(rows, results, strict=True):
        result["shape"] = "x".join(map(str, result["shape"]))
        del result["seconds"]
        assert row == {key: "" if value is None else str(value) for key, value in result.items()}


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_plot(suffix: str, start: bytes, tmp_path: Path) -> None:
    file = tmp_path / "plots" / f"bench.{suffix}"
    arguments = ["--shapes=16x24,8x8", "--format=fp32", "--repeats=1"]
    assert main(["bench", *arguments, f"--plot={file}"]) == 0
    assert file.read_bytes().startswith(start)


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_bars_have_one_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From zero, in units of torch.optim.Muon's step, on one scale in all panels."""
    drawn: list[Any] = []
    monkeypatch.setattr(report, "write_plot", lambda path, figure: drawn.append(figure))
    rows = [
        Result(name, shape, None, "cpu", "fp32", "measured", median=median * scale, spread=0.1)
        for shape, scale in (((16, 24), 1.0), ((8, 8), 0.01))
        for name, median in (("torch copy", 0.002), ("torch.optim.Muon", 0.004), ("step", 0.01))
    ]
    peak = dataclasses.replace(rows[0], name="torch.mm fp32", roof="torch.mm fp32")
    report.plot_results(tmp_path / "a.svg", [*rows, peak])
    panels = drawn[0].axes
    for panel in panels:
        assert [bar.get_x() for bar in panel.patches] == [0.0] * 3
        assert [bar.get_width() for bar in panel.patches] == pytest.approx([0.5, 1.0, 2.5])
        assert panel.get_xscale() == "linear"
        assert panel.get_xlim()[0] == 0.0
        assert panel.get_xlabel() == "times torch.optim.Muon"
    assert panels[0].get_xlim() == panels[1].get_xlim()
    assert "10.0 ms" in [text.get_text() for text in panels[0].texts]
    report.plot_results(tmp_path / "a.svg", [row for row in rows if row.name != "torch.optim.Muon"])
    assert drawn[1].axes[0].get_xlabel() == "times torch copy"


def refuse_to_measure(*_: object, **__: object) -> None:
    raise AssertionError("measured before the arguments were checked")


def test_a_missing_matplotlib_is_one_sentence_before_anything_is_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "matplotlib" else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(command, "measure", refuse_to_measure)
    assert main(["bench", "--shapes=8x8", "--plot=bench.svg"]) == 2
    assert capsys.readouterr().err == (
        "lowbit-muon: --plot: matplotlib is not installed (pip install matplotlib)\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", refuse_to_measure)
    assert main(["bench", "--device=cuda"]) == 2
    assert capsys.readouterr().err == (
        "lowbit-muon: --device: expected 'cpu', since torch finds no GPU here, got 'cuda'\n"
    )


def test_other_mistakes_are_found_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "measure", refuse_to_measure)
    (tmp_path / "file").write_text("")
    for argument, message in (
        (f"--json={tmp_path}", f"--json: expected a file that can be written, got {tmp_path}"),
        (
            f"--json={tmp_path}/file/x",
            f"--json: expected a file that can be written, got {tmp_path}/file/x: ",
        ),
        ("--backend=triton", "--backend: 'triton'"),
    ):
        assert main(["bench", "--device=cpu", argument]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"lowbit-muon: {message}")
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "expected", "got"),
    [
        ("--shapes=16y4", "ROWSxCOLUMNS", "16y4"),
        ("--shapes=0x4", "ROWSxCOLUMNS", "0x4"),
        ("--shapes=4x4,", "ROWSxCOLUMNS", "''"),
        ("--format=int5", "spectral4, spectral3", "int5"),
        ("--parts=steps", "step, orthogonalize, quantize", "steps"),
        ("--dtype=int8", "bf16", "int8"),
        ("--device=tpu", "cuda", "tpu"),
        ("--repeats=0", "a whole number >= 1", "'0'"),
        ("--threads=two", "a whole number >= 1", "two"),
        ("--seconds=-1", "a number > 0", "-1"),
        ("--seconds=nan", "a number > 0", "nan"),
        ("--plot=bench.pdf", ".svg or .png", "bench.pdf"),
    ],
)
def test_argparse_names_what_was_expected_and_what_came(
    argument: str, expected: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["bench", argument])
    assert stopped.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"lowbit-muon bench: error: argument {argument.split('=')[0]}: ")
    assert expected in message
    assert got in message


def test_lists_on_the_command_line() -> None:
    assert parse_shapes("16x24, 8x8,16x24") == [(16, 24), (8, 8)]
    assert parse_formats("nf4,fp32, nf4") == ["nf4", "fp32"]
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers(), "")
    defaults = parser.parse_args(["bench"])
    assert defaults.shapes == parse_shapes(command.SHAPES)
    assert set(defaults.formats) <= set(PRESETS)


def test_seconds_end_the_rounds_and_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    results = measure(Problem((8, 8), "fp32", CPU), ["fp32"], 9, deadline=0.0)
    assert {len(r.seconds) for r in results if r.status == "measured"} == {1}
    monkeypatch.setattr("time.perf_counter", lambda: 100.0)
    assert share_deadline(None, 3) is None
    assert share_deadline(130.0, 3) == 110.0
    assert share_deadline(130.0, 1) == 130.0


def test_an_interruption_keeps_the_shapes_that_were_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(problem: Problem, *args: Any, **options: Any) -> list[Result]:
        if problem.shape == (8, 8):
            raise KeyboardInterrupt
        return measure(problem, *args, **options)

    monkeypatch.setattr(command, "measure", interrupted)
    file = tmp_path / "bench.json"
    arguments = ["--shapes=4x6,8x8", "--format=fp32", "--repeats=1", f"--json={file}"]
    assert main(["bench", *arguments]) == 130
    assert {tuple(row["shape"]) for row in json.loads(file.read_text())["results"]} == {(4, 6)}


def test_the_package_never_imports_bench() -> None:
    package = Path(sys.modules["lowbit_muon"].__file__ or "").parent
    for path in package.rglob("*.py"):
        assert "import bench" not in path.read_text(), path
        assert "from bench" not in path.read_text(), path
