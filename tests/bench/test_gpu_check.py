"""The GPU check script on a machine without a GPU: it runs to the end, and its checks can fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device_reference import DeviceReference, stand_in
from rich.console import Console
from torch import Tensor

from bench import gpu_check
from bench.gpu.correctness import CHECKS, Check, Sizes
from bench.gpu.roofline import RATES, step_on_paper, torch_step_on_paper
from bench.gpu.rows import Case, Row
from lowbit_muon.state.offload import Fetched

SIZES = Sizes(matrices=((1, 1), (17, 129)), products=((1, 1, 1), (9, 20, 33)))
CPU = torch.device("cpu")
REFERENCE = DeviceReference()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_every_row_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpu.json"
    assert gpu_check.main(["--json", str(file)]) == 0
    document = json.loads(file.read_text())
    assert document["machine"]["device"] is None
    assert "no GPU" in capsys.readouterr().out
    rows = document["results"]
    groups = {row["group"] for row in rows}
    assert groups == {
        "correct", "codec", "product", "graph", "step", "paper",
    }  # fmt: skip
    for row in rows:
        if row["group"] == "paper":
            assert "estimate" in row["unit"]
        else:
            assert row["status"] == "skipped"
            assert "no GPU" in row["detail"]
    assert sum(row["group"] == "correct" for row in rows) == 2 * len(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_checks_accept_the_reference(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, REFERENCE, "reference")
    assert check.run(REFERENCE, CPU, SIZES) > 0


class Broken(DeviceReference):
    """One element of one kind of result is off by a little."""

    def __init__(self, what: str) -> None:
        self.what = what

    def _spoil(self, what: str, x: Tensor) -> Tensor:
        if what == self.what and x.numel():
            flat = x.view(-1) if x.is_contiguous() else x.mT.view(-1)
            flat[-1] = flat[-1] + (1 if x.dtype == torch.uint8 else 0.01 + flat[-1].abs() / 8)
        return x

    def accumulate(self, buffer: Tensor, terms: Any) -> Tensor:
        squares = super().accumulate(buffer, terms)
        self._spoil("accumulate", buffer)
        return squares

    def quantize(self, *args: Any, **kwargs: Any) -> Any:
        packed, scales = super().quantize(*args, **kwargs)
        return self._spoil("quantize", packed), scales

    def update_codes(self, *args: Any, **kwargs: Any) -> Any:
        squares = super().update_codes(*args, **kwargs)
        self._spoil("update_codes", kwargs["packed"])
        return squares

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        super().rotate(x, inverse=inverse)
        self._spoil("rotate", x)

    def code_gram(self, codes: Any) -> Tensor:
        return self._spoil("code_gram", super().code_gram(codes))

    def code_product(self, *args: Any, **kwargs: Any) -> Tensor:
        what = "code_product epilogue" if kwargs.get("out") is not None else "code_product"
        return self._spoil(what, super().code_product(*args, **kwargs))

    def product(self, *args: Any, active: Any = None, **kwargs: Any) -> Tensor:
        if self.what == "active":
            active = None
        what = "product" if active is None else "active product"
        return self._spoil(what, super().product(*args, active=active, **kwargs))

    def symmetric_product(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._spoil("symmetric_product", super().symmetric_product(*args, **kwargs))

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        return self._spoil("scaled", super().scaled(x, factor, out=out))

    def update_weight(self, weight: Tensor, update: Tensor, **kwargs: Any) -> None:
        super().update_weight(weight, update, **kwargs)
        if self.what in ("update_weight", "step") or (
            self.what == "rounding" and kwargs["seed"] is not None
        ):
            weight.mul_(1.25)


SEEN_BY = {
    "accumulate": "accumulate",
    "quantize": "quantize",
    "update_codes": "update_codes",
    "rotate": "rotate",
    "code_gram": "code products",
    "code_product": "code products",
    "code_product epilogue": "code products",
    "product": "dense products",
    "active product": "dense products",
    "active": "dense products",
    "symmetric_product": "dense products",
    "scaled": "weights",
    "update_weight": "weights",
    "rounding": "weights",
    "step": "optimizer steps",
}


@pytest.mark.parametrize("what", SEEN_BY)
def test_checks_see_a_broken_kernel(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(check for check in CHECKS if check.name == SEEN_BY[what])
    broken = Broken(what)
    stand_in(monkeypatch, broken, "reference")
    with pytest.raises(AssertionError):
        check.run(broken, CPU, SIZES)


def test_checks_see_codes_that_do_not_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, REFERENCE, "reference")
    (check,) = (check for check in CHECKS if check.name == "host offload")
    monkeypatch.setattr(Fetched, "give_back", lambda self: None)
    with pytest.raises(AssertionError, match="offload"):
        check.run(REFERENCE, CPU, SIZES)


def test_a_broken_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> int:
        raise AssertionError("wrong")

    monkeypatch.setattr(gpu_check, "CHECKS", (Check("rotate", fails),))
    monkeypatch.setattr(gpu_check, "backend_or_reason", lambda _: (REFERENCE, None))
    rows = gpu_check.run_all(["triton"], quick=True, console=Console(quiet=True))
    assert rows[0] == Row("correct", "triton: rotate", "failed", "AssertionError: wrong")
    timings = [row for row in rows[1:] if row.group != "paper"]
    assert timings
    assert all(row.status == "skipped" and "failed rotate" in row.detail for row in timings)


def test_late_cases_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "backend_or_reason", lambda _: (REFERENCE, None))
    rows = gpu_check.run_all(["triton"], quick=True, console=Console(quiet=True), seconds=-1)
    assert all("not reached" in row.detail for row in rows if row.group != "paper")


def test_an_error_becomes_a_row() -> None:
    def run() -> Any:
        yield Row("codec", "first", "measured")
        raise RuntimeError("out of\nmemory")

    rows = list(Case("codec", "name", run).rows())
    assert [row.status for row in rows] == ["measured", "failed"]
    assert rows[1].detail == "RuntimeError: out of memory"


def test_unknown_backends_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--backends", "triton,metal"])
    assert "expected some of" in capsys.readouterr().err


@pytest.mark.parametrize(("m", "n"), [(64, 96), (256, 256)])
def test_work_on_paper_is_what_the_mathematics_says(m: int, n: int) -> None:
    """Operations of one step of one matrix, a product and a sum counted as two; one triangle of
    symmetric products."""
    work = step_on_paper((n, m), "spectral4").work
    # decode: Y Y^T and two limbs of (Y Y^T + cI) Y
    assert work["code_gram"].operations == m * m * n
    assert work["code_product"].operations == 2 * 2 * m * m * n
    # the encoder's 18 products at its default shift, of which two stages, without W in the first,
    # are not rounded
    exact = 18 if m < 256 else 5
    assert work["symmetric tf32x3"].operations == exact * m**3
    assert ("symmetric rounded" in work) == (m >= 256)
    if m >= 256:
        assert work["symmetric rounded"].operations == (18 - exact) * m**3
    # Newton-Schulz in runs of 2, 2 and 1 steps: a Gram matrix each (and the encoder's), 5 of Z,
    # 2 of R Z and of R, 2 of W; then W X for each run, and the encoder's C X
    assert work["symmetric float16"].operations == 4 * m * m * n + (5 + 2 + 2 + 2) * m**3
    assert work["product float16"].operations == (3 + 1) * 2 * m * m * n
    # read and written: codes, and a float32 matrix
    assert work["quantize"].bytes == 4 * m * n + m * n // 2
    assert step_on_paper((m, n), "spectral4", count=3).work["code_gram"].operations == 3 * m * m * n


def test_torch_on_paper() -> None:
    """Five steps of two products with X and one of m x m, all in bfloat16."""
    m, n = 64, 96
    work = torch_step_on_paper((n, m)).work["torch product float16"]
    assert work.operations == 5 * (2 * 2 * m * m * n + 2 * m**3)


def test_least_times_are_bounded_by_bandwidth_and_rate() -> None:
    for entry in step_on_paper((256, 512), "mulaw4").work.values():
        assert entry.seconds >= entry.operations / RATES[entry.unit]
        assert entry.seconds >= entry.bytes / 3.35e12
