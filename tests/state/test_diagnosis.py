"""optimizer.diagnose(): figures of known matrices, and nothing changed."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    Muon,
    MuonWithAuxAdam,
    muon_param_groups,
    orthogonalize,
    quantize,
)
from lowbit_muon.state.diagnosis import effective_rank, end_codes, stable_rank
from lowbit_muon.state.update_error import rotated_sample
from lowbit_muon.tools.benchmark.momentum import decaying_matrix


def stepped(
    state_format: str, shape: tuple[int, int] = (48, 96), steps: int = 2, rule: str = "muon"
) -> Muon:
    """An optimizer of one parameter "w" after some steps, with the next gradient there."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(shape))
    optimizer = Muon([("w", param)], state_format=state_format, nesterov=False, rule=rule)
    for _ in range(steps):
        param.grad = decaying_matrix(*shape, generator)
        optimizer.step()
    param.grad = decaying_matrix(*shape, generator)
    return optimizer


def decoded_momentum(optimizer: Muon) -> Tensor:
    (state,) = optimizer.export_full_precision()["state"].values()
    momentum: Tensor = state["momentum_buffer"]
    return momentum


@pytest.mark.parametrize("shape", [(48, 96), (96, 48)])
@pytest.mark.parametrize("state_format", ["spectral4", "mulaw4", "linear8", "nf4"])
@pytest.mark.parametrize("rule", ["muon", "moonlight"])  # a sum, which is exported as an average
def test_with_a_gradient_it_is_the_error_of_the_next_stored_momentum(
    rule: str, state_format: str, shape: tuple[int, int]
) -> None:
    optimizer = stepped(state_format, shape, rule=rule)
    (param,) = optimizer.param_groups[0]["params"]
    (found,) = optimizer.diagnose()
    following = 0.95 * decoded_momentum(optimizer) + 0.05 * param.grad
    exact = orthogonalize(following.double())
    stored = orthogonalize(quantize(following, state_format).dequantize().double())
    expected = float((stored - exact).norm() / exact.norm())
    assert found.with_gradient
    # float32 Newton-Schulz differs from float64's by up to 2.4e-3 (tests of newton_schulz).
    assert found.direction_error == pytest.approx(expected, abs=5e-3)
    assert (found.name, found.shape, found.steps, found.skipped) == ("w", shape, 2, 0)


def test_fewer_bits_have_larger_errors_and_fp32_none() -> None:
    formats = ("fp32", "spectral8", "spectral4", "spectral3", "spectral2")
    errors = [stepped(name).diagnose()[0].direction_error for name in formats]
    assert errors[0] == 0
    assert errors == sorted(errors)


def test_without_a_gradient_it_is_an_estimate_of_the_same() -> None:
    optimizer = stepped("spectral4")
    (exact,) = optimizer.diagnose()
    optimizer.zero_grad()
    (estimate,) = optimizer.diagnose()
    assert not estimate.with_gradient
    assert exact.direction_error is not None
    # Another matrix, without the last gradient, and another draw of the noise of 48 x 96 entries,
    # whose norm varies by 1 / sqrt(2 * 4608) = 1%; a tenth leaves room for the other spectrum.
    assert estimate.direction_error == pytest.approx(exact.direction_error, rel=0.1)


def test_nothing_changes() -> None:
    optimizer = stepped("spectral4")
    (param,) = optimizer.param_groups[0]["params"]
    before, weight = copy.deepcopy(optimizer.state_dict()), param.detach().clone()
    optimizer.diagnose()
    after = optimizer.state_dict()
    assert torch.equal(weight, param)
    for key, value in before["state"][0].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(after["state"][0][key]))


def test_a_model_has_a_row_for_each_matrix_that_muon_takes() -> None:
    model = nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 8)})
    groups = muon_param_groups(model, split_fused={"qkv": 3})
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    assert optimizer.diagnose() == []  # no state yet
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    model["out"].weight.grad[0, 0] = math.nan  # taken as if it were not there
    rows = {row.name: row for row in optimizer.diagnose()}
    assert set(rows) == {"qkv.weight[0]", "qkv.weight[1]", "qkv.weight[2]", "out.weight"}
    assert not rows["out.weight"].with_gradient
    assert sum(row.nbytes for row in rows.values()) < optimizer.state_bytes()
    plain: list[dict[str, Any]] = json.loads(json.dumps([row.to_dict() for row in rows.values()]))
    assert plain[0]["shape"] == [8, 8]


def test_a_momentum_of_zeros_has_no_direction() -> None:
    param = nn.Parameter(torch.ones(4, 8))
    param.grad = torch.zeros(4, 8)
    optimizer = Muon([param])
    optimizer.step()
    (row,) = optimizer.diagnose()
    assert (row.name, row.direction_error, row.effective_rank, row.stable_rank) == ("0", None, 0, 0)


def test_ranks_of_known_spectra() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([1.0, 1e-20])) == pytest.approx(1)
    assert stable_rank(torch.tensor([2.0, 1.0, 1.0])) == pytest.approx(1.5)


def test_turning_keeps_singular_values() -> None:
    x = decaying_matrix(16, 300, torch.Generator().manual_seed(0))
    # The rotation is orthogonal to float32 roundings.
    torch.testing.assert_close(torch.linalg.svdvals(rotated_sample(x)), torch.linalg.svdvals(x))


def test_end_codes_counts_clipped_entries() -> None:
    x = torch.full((2, 64), 0.1)
    x[0, :6], x[1, 5] = 1.0, -1.0
    stored = quantize(x, PRESETS["nf4"])  # one block a row, absmax scales: 1 and -1 are its ends
    assert end_codes(stored) == pytest.approx(7 / 128)
    assert end_codes(quantize(x, "fp32")) is None
