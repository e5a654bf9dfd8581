"""`bench.step` and its table of other optimizers: gates, reasons, state that is counted, JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import peers as peers_module
from bench import step as step_module
from bench.peers import (
    GATE_SHAPES,
    LEAST_COSINE,
    PEERS,
    QUINTIC,
    Peer,
    check_direction,
    contained,
    cosine,
    polar_factor,
)
from bench.shapes import MODELS
from bench.step import BASELINES, FULL, SHIPPED, main, measure, parameters, state_bytes, variants
from lowbit_muon import RULES, Muon
from lowbit_muon.tools.benchmark.cases import UnavailableError
from lowbit_muon.tools.benchmark.gates import GateError
from lowbit_muon.tools.benchmark.measure import Result
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

MISSING = Peer("nobody's Muon", "nobodys-muon", "nobodys_muon:Muon")
SGD = Peer("SGD", "torch", "torch.optim:SGD")
SHAPE = (24, 40)
YOUJIACHENG = (  # heavyball's and gram-newton-schulz' coefficients, step by step
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


class Broken(torch.optim.SGD):
    """An optimizer whose step fails."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise ValueError("out of order")


class TakesGradients(torch.optim.SGD):
    """An optimizer that overwrites gradients and takes them off the parameters."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                assert float(param.grad.norm()) > 0
                param.grad.zero_().add_(1)
                param.grad = None


class Codes(Tensor):
    """A tensor made of codes and scales, as torchao's states are."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Codes:
        made: Codes = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        return made

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, *arguments: Any) -> Any:
        raise NotImplementedError


def row(results: list[Result], name: str) -> Result:
    (found,) = (result for result in results if result.name == name)
    return found


def test_table_is_well_formed() -> None:
    names = [peer.name for peer in (*BASELINES, *PEERS)]
    assert len(set(names)) == len(names)
    for peer in PEERS:
        module, colon, target = peer.target.partition(":")
        assert all(part.isidentifier() for part in (*module.split("."), target))
        assert colon
        assert peer.package in peer.name or peer.package == "torch"
        assert peer.muon == ("AdamW" not in peer.name)


@pytest.mark.parametrize("peer", BASELINES, ids=lambda peer: peer.name)
def test_muon_passes_the_gate(peer: Peer) -> None:
    passed = check_direction(peer)
    assert passed.error <= passed.allowed == pytest.approx(math.sqrt(1 - LEAST_COSINE**2))


@pytest.mark.parametrize("target", ["torch.optim:SGD", "torch.optim:AdamW"])
def test_gate_refuses_another_update(target: str) -> None:
    with pytest.raises(GateError, match=r"at least 0\.95, got 0\.[0-6]"):
        check_direction(Peer("not Muon", "torch", target))


def test_gate_refuses_no_update_and_the_opposite() -> None:
    with pytest.raises(GateError, match="got nan"):
        check_direction(Peer("still", "torch", "torch.optim:Muon", group={"lr": 0.0}))
    with pytest.raises(GateError, match=r"got -0\.9"):
        check_direction(Peer("uphill", "torch", f"{__name__}:Uphill"))


class Uphill(torch.optim.Muon):
    """Muon in the wrong direction."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        before = [param.clone() for param in self.param_groups[0]["params"]]
        super().step()
        for param, old in zip(self.param_groups[0]["params"], before, strict=True):
            param.copy_(2 * old - param)


def test_bound_of_the_gate() -> None:
    """Its derivation: values of at least 0.005 are lifted to [0.68, 1.16]."""
    for shape in GATE_SHAPES:
        matrix = decaying_matrix(*shape, torch.Generator().manual_seed(0))
        assert torch.linalg.svdvals(matrix).min() / matrix.norm() >= 0.005
        assert cosine(matrix, polar_factor(matrix)) < 0.5
    for steps in ((QUINTIC,) * 5, YOUJIACHENG):
        values = torch.logspace(math.log10(0.005), 0, 20_000, dtype=torch.float64)
        for a, b, c in steps:
            values = a * values + b * values**3 + c * values**5
        assert values.min() >= 0.68
        assert values.max() <= 1.16
    least = 2 * math.sqrt(0.68 * 1.16) / (0.68 + 1.16)
    assert math.cos(math.acos(least) + 0.03) >= LEAST_COSINE


def test_polar_factor_of_a_known_matrix() -> None:
    x = torch.tensor([[0.0, -3.0, 0.0], [0.5, 0.0, 0.0]])
    expected = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(polar_factor(x), expected)


def test_missing_package_gives_the_reason() -> None:
    with pytest.raises(
        UnavailableError, match="nobodys-muon is not installed: pip install nobodys-muon"
    ):
        MISSING.make([], 0.0)


def test_old_python_gives_the_reason() -> None:
    with pytest.raises(UnavailableError, match=r"needs Python 9\.1 or newer"):
        dataclasses.replace(MISSING, python=(9, 1)).make([], 0.0)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import another_nobody", "misses a package"),
        ("raise OSError('no CUDA')", "cannot be imported: OSError: no CUDA"),
        ("", "cannot be imported: AttributeError"),
    ],
)
def test_package_that_cannot_be_used_gives_the_reason(
    source: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unusable_muon.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(peers_module.sys.modules, "unusable_muon", raising=False)
    with pytest.raises(UnavailableError, match=reason):
        Peer("unusable", "unusable-muon", "unusable_muon:Muon").make([], 0.0)


def test_run_goes_on_past_what_fails() -> None:
    broken = Peer("broken", "bench", f"{__name__}:Broken", muon=False)
    results = measure([SHAPE], variants([MISSING, SGD, broken]), repeats=1)
    assert row(results, MISSING.name).status == "skipped"
    assert row(results, SGD.name).status == "error"
    assert row(results, SGD.name).detail.startswith("GateError: first update")
    assert row(results, "broken").detail == "ValueError: out of order"
    measured = [result for result in results if result.status == "measured"]
    assert len(measured) == len(results) - 3
    assert all(result.peak_bytes and result.state_bytes for result in measured)


def test_gate_of_ours_is_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise GateError("not today")

    monkeypatch.setattr(step_module, "check_ours", refuse)
    results = measure([SHAPE], variants([]), repeats=1)
    ours = [result for result in results if result.format is not None]
    assert {result.status for result in ours} == {"error"}
    assert {result.status for result in results if result not in ours} == {"measured"}


def test_gradients_are_there_for_every_step_and_stay_as_they_were() -> None:
    taker = Peer("taker", "bench", f"{__name__}:TakesGradients", muon=False)
    params = parameters([SHAPE])
    (grad,) = (param.grad for param in params)
    assert grad is not None
    before = grad.clone()
    (variant,) = (v for v in variants([taker]) if v.name == "taker")
    prepared = step_module.prepare(variant, params, [grad])
    prepared.step()
    assert torch.equal(grad, before)


class Slow(torch.optim.SGD):
    """An optimizer whose steps take a fifth of a second."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        time.sleep(0.2)


def test_what_is_far_slower_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "SLOW_SECONDS", 0.1)
    slow = Peer("slow", "bench", f"{__name__}:Slow", muon=False)
    results = measure([SHAPE], variants([slow]), repeats=3)
    assert len(row(results, "slow").seconds) == 1
    assert row(results, "slow").spread is None
    assert len(row(results, FULL).seconds) == 3


def test_compiled_peers_are_not_in_a_quick_run() -> None:
    compiled = dataclasses.replace(BASELINES[0], name="compiled", compiled=True)
    results = measure([SHAPE], variants([compiled], quick=True), repeats=1)
    assert row(results, "compiled").status == "skipped"
    assert "--quick" in row(results, "compiled").detail


def holder(place: Callable[[torch.optim.Optimizer, Tensor, Tensor], None]) -> int:
    """State bytes of an optimizer with codes [4, 8] uint8 and scale [4] float32 somewhere."""
    param = nn.Parameter(torch.zeros(4, 8))
    optimizer = torch.optim.SGD([param], lr=0.1)
    place(optimizer, torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4))
    return state_bytes(optimizer, [param])


def in_state(optimizer: torch.optim.Optimizer, codes: Tensor, scale: Tensor) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param] = {"codes": codes, "scale": scale, "view": codes[1:], "count": 3}


def nested(optimizer: torch.optim.Optimizer, codes: Tensor, scale: Tensor) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param] = {0: {"codes": [codes, param.detach().view(-1)]}, "more": (scale,)}


def in_attributes(optimizer: torch.optim.Optimizer, codes: Tensor, scale: Tensor) -> None:
    optimizer.buffers = types.SimpleNamespace(codes=codes, scale=scale)  # type: ignore[attr-defined]
    optimizer.buffers.itself = optimizer.buffers  # type: ignore[attr-defined]


def in_subclass(optimizer: torch.optim.Optimizer, codes: Tensor, scale: Tensor) -> None:
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state[param] = {"exp_avg": Codes(codes, scale)}


@pytest.mark.parametrize("place", [in_state, nested, in_attributes, in_subclass])
def test_state_is_counted_wherever_it_is(
    place: Callable[[torch.optim.Optimizer, Tensor, Tensor], None],
) -> None:
    assert holder(place) == 4 * 8 + 4 * 4


@pytest.mark.parametrize("state_format", ["fp32", "mulaw4", "spectral4"])
def test_state_of_ours_is_what_the_optimizer_says(state_format: str) -> None:
    params = parameters([SHAPE, (40, 24)])
    optimizer = Muon(params, state_format=state_format)
    optimizer.step()
    assert state_bytes(optimizer, params) == optimizer.state_bytes()


def test_process_is_left_as_it_was() -> None:
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    with contained():
        torch.set_float32_matmul_precision("medium")
        torch.set_num_threads(threads + 1)
        print("not to be seen")
    assert torch.get_float32_matmul_precision() == precision
    assert torch.get_num_threads() == threads


def test_models_have_a_source_and_their_size() -> None:
    for layer in MODELS.values():
        assert layer.source.count("/") == 1
    elements = {
        name: sum(rows * columns for rows, columns in layer.matrices)
        for name, layer in MODELS.items()
    }
    # 30, 12, 16 and 32 layers: the models' sizes but for embeddings, norms and biases
    assert elements["smollm2"] * 30 == 106_168_320
    assert elements["gpt2"] * 12 == 84_934_656
    assert elements["llama3-1b"] * 16 == 973_078_528
    assert elements["llama3-8b"] * 32 == 6_979_321_856


def test_quick_run_writes_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "PEERS", (MISSING, SGD))
    path = tmp_path / "step.json"
    main(["--quick", "--shape", "24", "40", "--threads", "1", "--json", str(path)])
    written = json.loads(path.read_text())
    results = written["results"]
    assert written["machine"]["threads"] == 1
    assert results["shapes"] == [[24, 40]]
    assert set(results) == {"title", "shapes", "repeats", "onednn_max_cpu_isa", "rows"}
    fields = {field.name for field in dataclasses.fields(Result)}
    for found in results["rows"]:
        assert set(found) == fields
        assert found["shape"] == [24, 40]
        assert (found["median"] is None) == (found["status"] != "measured")
        assert bool(found["detail"]) == (found["status"] != "measured")
        assert len(found["seconds"]) == (3 if found["status"] == "measured" else 0)
    by_name = {(found["name"], found["format"]): found for found in results["rows"]}
    shipped, ours = by_name[SHIPPED, None], by_name["step", "mulaw4"]
    assert ours["ratio"] == pytest.approx(ours["median"] / shipped["median"])
    assert ours["baseline"] == SHIPPED
    assert shipped["ratio"] is None
    assert by_name[FULL, None]["state_bytes"] == 4 * 24 * 40
    assert ours["error"] <= ours["allowed_error"]


def test_step_over_several_matrices_has_no_shape() -> None:
    shapes = [(8, 16), (16, 8)]
    results = measure(shapes, [next(variants([]))], repeats=1)
    written = step_module.document(results, shapes, "two", 1)
    assert [found["shape"] for found in written["rows"]] == [None]
    assert written["shapes"] == [[8, 16], [16, 8]]
    assert written["rows"][0]["bits_per_element"] == 32


def test_every_rule_is_made_with_its_own_options() -> None:
    """Lion has no Nesterov momentum, Muon has; muonq4 never."""
    of_rules = [v for v in variants([], rules=sorted(RULES)) if v.name.startswith("step, ")]
    assert len(of_rules) == 2 * (1 + len(RULES))
    for variant in of_rules:
        (group,) = variant.make(parameters([SHAPE])).param_groups
        own = dict(RULES[group["rule"]["name"]].options)
        assert group["nesterov"] == own.get("nesterov", True), variant.name
    (muonq4,) = (v for v in variants([]) if (v.name, v.format) == ("step", "muonq4"))
    assert not muonq4.make(parameters([SHAPE])).param_groups[0]["nesterov"]
