"""The benchmarks of kernels: peaks, fractions of them, one schema, gates, plots without timing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lowbit_muon.backends.cpu import adapter as cpu

if cpu.unavailable_reason() is not None:
    pytest.skip(str(cpu.unavailable_reason()), allow_module_level=True)

from bench import codec, harness, lut_gemm, machine_peaks, orthogonalize, report, sweep
from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.benchmark import measure as measure_module
from lowbit_muon.tools.benchmark import peaks
from lowbit_muon.tools.benchmark.cases import Case, Prepared, UnavailableError
from lowbit_muon.tools.benchmark.counts import product_operations, symmetric_operations
from lowbit_muon.tools.benchmark.gates import GateError
from lowbit_muon.tools.benchmark.measure import Result, measure_cases
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

ISAS = cpu.supported_isas()
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
FIELDS = {field.name for field in dataclasses.fields(Result)}


@pytest.fixture(autouse=True)
def unchanged_level() -> Iterator[None]:
    before = cpu.isa()
    yield
    assert cpu.isa() == before
    cpu.set_isa(before)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything so small that a benchmark takes a second; numbers mean nothing then."""
    monkeypatch.setattr(measure_module, "SAMPLE_SECONDS", 0.0)
    monkeypatch.setattr(machine_peaks, "ITERATIONS", 100)
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(peaks, "PRODUCT_SIZES", {"cpu": 32})
    monkeypatch.setattr(codec, "SHAPES", ((16, 128),))
    monkeypatch.setattr(codec, "COLD_BYTES", 2 * 4 * 16 * 128)
    monkeypatch.setattr(lut_gemm, "SHAPES", ((32, 64), (32, 32)))
    monkeypatch.setattr(orthogonalize, "QUICK_ROWS", (24,))
    monkeypatch.setattr(sweep, "QUICK", sweep.Plan((16, 24), 8, (1, 2), (16, 32), 1, 60.0))


# ---- Peaks ----


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("isa", ISAS)
def test_peaks_are_positive_and_finite(isa: str, threads: int) -> None:
    rows = machine_peaks.measure(harness.Run(isa, threads), 2, shared=True)
    names = {row.name for row in rows}
    assert {f"fp32 {isa}", f"int16 {isa}", "copy from memory", "copy in L2"} < names
    for row in rows:
        assert row.status == "measured", row.detail
        assert row.threads == threads
        assert row.work is not None
        assert row.median is not None
        assert 0 < row.work / row.median < math.inf
        assert (row.roof, row.fraction) == (row.name, 1.0)
        assert row.isa == (isa if isa in row.name.split() else None)


def test_a_run_leaves_level_and_threads_as_they_were() -> None:
    before = cpu.isa(), torch.get_num_threads()
    with harness.Run(ISAS[0], 2).applied():
        assert (cpu.isa(), torch.get_num_threads()) == (ISAS[0], 2)
    assert (cpu.isa(), torch.get_num_threads()) == before
    with pytest.raises(UnavailableError), harness.Run(ISAS[0], 2).applied():
        fail_to_prepare()
    assert (cpu.isa(), torch.get_num_threads()) == before
    with pytest.raises(ValueError, match="'avx1024'"), harness.Run("avx1024", 1).applied():
        pass


# ---- Fractions ----


def made_up(name: str, work: float | None = None, roof: str | None = None) -> Case:
    counted = {} if work is None or roof is None else {roof: work}
    return Case(name, lambda: Prepared(lambda: None, work=counted), isa="avx2")


def test_fractions_of_rows_that_were_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {
        "peak": [1.0, 0.5, 4.0], "ours": [2.0, 2.0, 9.0], "other": [1.0] * 3, "none": [1.0] * 3,
        "without": [1.0] * 3,
    }  # fmt: skip
    monkeypatch.setattr(measure_module, "interleaved", lambda *_, **__: seconds)
    cases = [
        made_up("ours", 50.0, "peak"), made_up("other", 7.0, "skipped"), made_up("none", 7.0),
        made_up("without", None, "peak"), made_up("peak", 100.0, "peak"),
        Case("skipped", fail_to_prepare, peer=True),
    ]  # fmt: skip
    rows = {row.name: row for row in measure_cases(cases, (2, 3), 3)}
    # 50 in 2 s where 100 in 1 s are possible
    assert rows["ours"].fraction == 0.25
    assert (rows["ours"].work, rows["ours"].roof, rows["ours"].isa) == (50.0, "peak", "avx2")
    assert rows["peak"].fraction == 1.0
    assert [rows[name].fraction for name in ("other", "none", "without", "skipped")] == [None] * 4
    assert rows["skipped"].status == "skipped"
    assert rows["ours"].threads == torch.get_num_threads()


def fail_to_prepare() -> Prepared:
    raise UnavailableError("it is not here")


def test_a_triangle_counts_the_products_it_has() -> None:
    entries = [(i, j) for i in range(5) for j in range(i, 5)]
    assert symmetric_operations(5, 7) == 2 * 7 * len(entries)
    assert product_operations(5, 7, 3) == 2 * 5 * 7 * 3


@pytest.mark.parametrize("method", ["newton_schulz", "gram", "auto"])
@pytest.mark.parametrize("shape", [(8, 8), (8, 24)])
def test_operations_are_those_a_method_does(
    method: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[float] = []
    product, symmetric = CpuBackend.product, CpuBackend.symmetric_product

    def counted(self: CpuBackend, a: Any, b: Any, **options: Any) -> Any:
        done.append(product_operations(*a.shape, b.shape[1]))
        return product(self, a, b, **options)

    def counted_symmetric(self: CpuBackend, a: Any, b: Any = None, **options: Any) -> Any:
        done.append(symmetric_operations(*a.shape))
        return symmetric(self, a, b, **options)

    monkeypatch.setattr(CpuBackend, "product", counted)
    monkeypatch.setattr(CpuBackend, "symmetric_product", counted_symmetric)
    x = decaying_matrix(*shape, torch.Generator().manual_seed(0))
    orthogonalize.orthogonalize(x, 5, "muon", method, eps=1e-7)
    assert sum(done) == orthogonalize.operations(method, *shape)


def test_int4_codes_are_within_half_a_step() -> None:
    weights = decaying_matrix(64, 96, torch.Generator().manual_seed(0))
    codes, scales_and_zeros, decoded = lut_gemm.int4_codes(weights)
    assert (int(codes.min()), int(codes.max())) == (0, 15)
    assert codes.shape == weights.shape
    assert scales_and_zeros.shape == (3, 64, 2)
    scales = scales_and_zeros[..., 0].float().mT.repeat_interleave(32, dim=1)
    # Beside rounding, scale and zero are bfloat16: at the ends 8 steps by 2^-9 each, and the zero
    # is up to 15 + 8 steps away from what it is added to.
    zeros = scales_and_zeros[..., 1].float().mT.repeat_interleave(32, dim=1)
    allowed = 0.5 * scales + 2.0**-8 * (8 * scales + zeros.abs())
    assert bool(((decoded - weights).abs() <= allowed).all())


# ---- Every benchmark: its rows ----

MAINS = {
    "machine_peaks": machine_peaks.main, "codec": codec.main, "lut_gemm": lut_gemm.main,
    "orthogonalize": orthogonalize.main, "sweep": sweep.main,
}  # fmt: skip


def rows_of(name: str, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    file = folder / f"{name}.json"
    MAINS[name](["--quick", f"--json={file}", *arguments])
    document = json.loads(file.read_text())
    assert set(document) == {"machine", "results"}
    assert [row.to_dict() for row in harness.read_results(file)] == document["results"]
    return list(document["results"])


@pytest.mark.parametrize("name", MAINS)
def test_quick_runs_write_rows_of_the_schema(name: str, tmp_path: Path) -> None:
    rows = rows_of(name, tmp_path, "--threads", "1")
    assert rows
    keys = {f"{row['name']} {row['format'] or ''}".strip() for row in rows}
    for row in rows:
        assert set(row) == FIELDS
        assert row["device"] == "cpu"
        assert row["status"] in ("measured", "skipped"), row["detail"]
        assert row["isa"] in (None, *ISAS)
        assert row["baseline"] is None or row["baseline"] in keys
        assert row["roof"] is None or row["roof"] in keys
        if row["median"] is None:
            assert row["status"] == "skipped" or row["error"] > 0
            continue
        assert row["threads"] == 1
        assert all(value > 0 for value in row["seconds"])
        assert (row["roof"] is None) == (row["fraction"] is None)
        assert row["fraction"] is None or 0 < row["fraction"] < math.inf
        assert row["error"] is None or 0 <= row["error"] <= row["allowed_error"] < 1
    shares = [row for row in rows if row["fraction"] is not None and row["roof"] != row["name"]]
    assert bool(shares) == (name not in ("machine_peaks", "sweep"))


@pytest.mark.parametrize("name", ["codec", "lut_gemm", "orthogonalize", "machine_peaks"])
def test_levels_and_threads_are_lists(name: str, tmp_path: Path) -> None:
    levels = [ISAS[0], ISAS[-1]]
    rows = rows_of(name, tmp_path, "--repeats", "1", "--threads", "1", "2", "--isas", *levels)
    found = {(row["isa"], row["threads"]) for row in rows if row["isa"] is not None}
    assert found >= {(isa, threads) for isa in levels for threads in (1, 2)}
    roofs = {row["roof"] for row in rows if row["isa"] == ISAS[0]}
    assert not any(roof and roof.endswith(ISAS[-1]) for roof in roofs if ISAS[0] != ISAS[-1])


def test_an_unknown_level_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        codec.main(["--isas", "avx1024"])
    assert "avx1024" in capsys.readouterr().err


def test_a_wrong_product_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = lut_gemm.lut_gram
    monkeypatch.setattr(
        lut_gemm, "lut_gram", lambda *args, **options: exact(*args, **options) * 1.01
    )
    file = tmp_path / "lut_gemm.json"
    with pytest.raises(SystemExit, match="gram: s8, 4 bits"):
        lut_gemm.main(["--quick", f"--json={file}"])
    rows = {row.name: row for row in harness.read_results(file)}
    assert rows["gram: f32"].status == rows["gram: s8, 4 bits"].status == "error"
    assert rows["gram: f32"].detail.startswith("GateError: gram: expected a relative error")
    assert rows["gram: f32"].seconds == []
    assert rows["A X: f32"].status == "measured"


def test_codes_that_differ_from_the_reference_are_not_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = decaying_matrix(16, 128, torch.Generator().manual_seed(0))
    for name in codec.FORMATS:
        assert codec.check(CpuBackend(), x, name).error < 0.6
    accumulate = CpuBackend.accumulate

    def spoiled(self: CpuBackend, buffer: torch.Tensor, terms: Terms) -> torch.Tensor:
        squares = accumulate(self, buffer, terms)
        buffer[0, 0] += 1
        return squares

    monkeypatch.setattr(CpuBackend, "accumulate", spoiled)
    with pytest.raises(GateError, match="codes of spectral4 differ from the reference"):
        codec.check(CpuBackend(), x, "spectral4")


# ---- Peers ----


def prepare_peer(operation: str) -> Prepared:
    x = decaying_matrix(16, 128, torch.Generator().manual_seed(0))
    return codec.prepare_bitsandbytes([x, x.clone()], operation, "copy in L2")


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("operation", codec.OPERATIONS)
def test_bitsandbytes_moves_what_our_nf4_moves(operation: str) -> None:
    prepared = prepare_peer(operation)
    prepared.call()
    assert prepared.passed is not None
    layout = PRESETS["nf4"].code_layout()
    ours = 4 * 16 * 128 + 16 * layout.row_bytes(128) + 4 * 16 * layout.blocks(128)
    assert prepared.work == {"copy in L2": ours}


def test_peers_that_are_missing_are_skipped_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "gram_newton_schulz", None)
    rows = rows_of("codec", tmp_path, "--threads", "1")
    rows += rows_of("orthogonalize", tmp_path, "--threads", "1")
    reasons = {row["name"]: row["detail"] for row in rows if row["status"] == "skipped"}
    assert set(reasons) == {
        *(f"{operation} {cache} bitsandbytes"
          for operation in codec.OPERATIONS for cache in codec.CACHES),
        orthogonalize.PACKAGE,
    }  # fmt: skip
    assert all("pip install" in reason for reason in reasons.values())


def test_shapes_that_the_int4_product_does_not_take_are_skipped() -> None:
    x = lut_gemm.Operands(decaying_matrix(24, 40, torch.Generator().manual_seed(0)))
    with pytest.raises(UnavailableError, match="multiples of 32 and 16, got 24x40"):
        x.int4_packed()


# ---- The sweep and its plot ----


def test_the_sweep_has_every_combination_once() -> None:
    found = sweep.points(sweep.FULL, [1, 2])
    assert len({(point.shape, point.threads) for point in found}) == len(found)
    by_key = {(point.shape, point.threads): point.formats for point in found}
    assert set(by_key) == {
        *(((m, m), 2) for m in (256, 512, 1024, 2048, 4096)),
        *(((512, 512 * aspect), 2) for aspect in (1, 2, 4, 8)),
        ((1024, 4096), 1), ((1024, 4096), 2),
    }  # fmt: skip
    for key, formats in by_key.items():
        wanted = set(sweep.FORMATS)
        wanted |= set(sweep.BITS.values()) if key == ((1024, 4096), 2) else set()
        assert set(formats) == wanted
    work = [sweep.step_work(point.shape) for point in found]
    assert work == sorted(work)
    assert {PRESETS[name].bits: name for name in sweep.BITS.values()} == sweep.BITS


def test_steps_of_the_sweep_have_time_and_memory(tmp_path: Path) -> None:
    rows = rows_of("sweep", tmp_path, "--threads", "1", "2")
    assert {row["threads"] for row in rows} == {1, 2}
    for row in rows:
        assert row["status"] == "measured", row["detail"]
        assert row["state_bytes"] > 0
        assert row["peak_bytes"] > 0
    rows = [row for row in rows if row["shape"] == [16, 32] and row["threads"] == 2]
    stored = {row["format"]: row["state_bytes"] for row in rows}
    assert stored["spectral2"] < stored["spectral4"] < stored["spectral8"] < stored["fp32"]


def test_what_no_time_is_left_for_is_a_row_with_the_reason(tmp_path: Path) -> None:
    rows = rows_of("sweep", tmp_path, "--threads", "1", "--seconds", "1e-9")
    assert {(row["status"], row["detail"]) for row in rows} == {("skipped", "no time was left")}
    assert len({tuple(row["shape"]) for row in rows}) == 5


def test_a_shape_that_would_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = 0.0
    deadlines = {}

    def pretend(point: sweep.Point, repeats: int, deadline: float) -> tuple[list[Result], float]:
        nonlocal clock
        deadlines[point.shape] = deadline - clock
        least = 1.0 + 1e-3 * sweep.step_work(point.shape)
        clock += least
        return [Result("step", point.shape, "fp32", "cpu", "fp32", "measured")], least

    monkeypatch.setattr("time.perf_counter", lambda: clock)
    monkeypatch.setattr(sweep, "measure", pretend)
    # m^3 / 1000 s and a second of calls: 2, 9 and 65 s
    plan = sweep.Plan((10, 20, 40), 10, (1,), (10, 10), seconds=60.0)
    monkeypatch.setattr(sweep, "QUICK", plan)
    sweep.main(["--quick", "--threads", "1"])
    assert list(deadlines) == [(10, 10), (20, 20)]
    assert deadlines[20, 20] >= sweep.LEAST_SECONDS
    assert "no time was left" in capsys.readouterr().out
    clock = 0.0
    sweep.main(["--quick", "--threads", "1", "--seconds", "100"])
    assert list(deadlines) == [(10, 10), (20, 20), (40, 40)]
    assert deadlines[40, 40] == 100.0 - 2 - 9


@pytest.mark.skipif(not HAS_MATPLOTLIB, reason="matplotlib is not installed")
def test_a_plot_needs_no_timing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of("sweep", tmp_path, "--threads", "1", "2")
    source = f"--from={tmp_path / 'sweep.json'}"

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("timed")

    monkeypatch.setattr(sweep, "measure_cases", refuse)
    file = tmp_path / "plots" / "sweep.svg"
    sweep.main(["--quick", source, f"--plot={file}"])
    assert b"<svg" in file.read_bytes()
    columns = sweep.series(harness.read_results(tmp_path / "sweep.json"), sweep.QUICK)
    assert [sorted({column.place(row) for row in column.rows}) for column in columns] == [
        [16, 24], [1, 2], [2, 3, 4, 8], [1, 2],
    ]  # fmt: skip


# ---- README's tables ----


def test_tables_of_the_report_have_ratio_and_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orthogonalize, "QUICK_ROWS", (64,))
    for name in ("machine_peaks", "codec", "lut_gemm", "orthogonalize"):
        rows_of(name, tmp_path, "--repeats", "1", "--threads", "1", "2")
    (tmp_path / "machine_peaks.json").rename(tmp_path / "machine.json")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    share = r"\d+\.\d+ \(\d+%\)"
    for text, row in (
        (report.machine(), r"\| fp32 \w+ \| [\d,]+ \| [\d,]+ \|"),
        (report.codec(), rf"\| `spectral4` \| {share}, {share} \| {share}, {share} \|"),
        (report.lut_gemm(), rf"\| gram: s8, 4 bits \| {share} \|"),
        (report.orthogonalize(), rf"\| auto \| {share} \| {share} \| {share} \|"),
    ):
        assert re.search(row, text), text
