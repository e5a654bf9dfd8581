"""A gradient of zeros, as an expert without tokens has it: the momentum shrinks, its codes stay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor, nn

from lowbit_muon import PRESETS, Muon
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.state.parameter import matrix_views, momentum_format, read_matrix
from lowbit_muon.state.stored import ROLES

CODED = [name for name, f in PRESETS.items() if not f.is_dense]


@pytest.fixture(params=["host", "device"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where optimizers step."""
    if request.param == "device":
        monkeypatch.setattr(muon_module, "get_backend", lambda *_: DeviceReference())
    return request.param


def gradient(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(optimizer: Muon, param: Tensor) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in optimizer.state[param].items() if k.split(".")[-1] in ROLES}


def codes(state: dict[str, Tensor]) -> list[Tensor]:
    return [value for key, value in state.items() if "codes" in key]


def momentum(optimizer: Muon, param: Tensor) -> Tensor:
    group, state = optimizer.param_groups[0], optimizer.state[param]
    (view,) = matrix_views(param, group)
    return read_matrix(state, view, momentum_format(group, state)).dequantize()


@pytest.mark.parametrize("ns_input", ["exact", "stored"])
@pytest.mark.parametrize("name", CODED)
def test_codes_stay_and_the_size_follows(name: str, ns_input: Any, place: str) -> None:
    param = nn.Parameter(torch.zeros(24, 40))
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, state_format=name, ns_input=ns_input)
    for step in range(3):
        param.grad = gradient((24, 40), step)
        optimizer.step()
    before, start = stored(optimizer, param), momentum(optimizer, param)
    updates = []
    for _ in range(60):
        param.grad = torch.zeros(24, 40)
        weights = param.detach().clone()
        optimizer.step()
        updates.append(param.detach() - weights)
    after = stored(optimizer, param)
    for old, new in zip(codes(before), codes(after), strict=True):
        assert torch.equal(old, new)
    # A factor is rounded to float32 in each of the 60 steps.
    size = 1.0 if PRESETS[name].normalize else 0.95**60
    error = (momentum(optimizer, param) - size * start).norm() / (size * start).norm()
    assert error < 60 * torch.finfo(torch.float32).eps
    # Newton-Schulz of the same matrix in other sizes, in float32 (2.4e-3, see test_device_step;
    # float16 on devices): nothing of the direction is lost.
    turned = torch.cosine_similarity(updates[0].flatten(), updates[-1].flatten(), 0)
    assert turned > 1 - 1e-4
    assert optimizer.state_dict()["state"][0]["step"] == 63


@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "linear8", "muonq4", "bf16"])
def test_an_idle_expert_leaves_the_others_as_they_would_be(name: str, place: str) -> None:
    """One of four experts gets no tokens for three steps; one never had any."""
    options: dict[str, Any] = {"state_format": name, "batch_experts": True, "lr": 0.1}
    param, other = (nn.Parameter(gradient((4, 12, 20), 9)) for _ in range(2))
    optimizer, busy = Muon([param], **options), Muon([other], **options)
    for step in range(5):
        for each in param, other:
            each.grad = gradient((4, 12, 20), step)
            each.grad[3] = 0
        if step >= 2:
            param.grad[1] = 0
        if step == 2:
            before = stored(optimizer, param)
        optimizer.step()
        busy.step()
    for index in (0, 2, 3):
        assert torch.equal(param[index], other[index])
    after = stored(optimizer, param)
    for key in after:
        if key.startswith("1.") and "codes" in key:
            assert torch.equal(after[key], before[key])
        elif not key.startswith("1."):
            assert torch.equal(after[key], busy.state[other][key])


@pytest.mark.parametrize("name", ["linear8", "mulaw4", "spectral4"])
def test_a_large_matrix_whose_rows_are_read_by_panels(name: str) -> None:
    param = nn.Parameter(torch.zeros(520, 2050))
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, state_format=name)
    param.grad = gradient((520, 2050), 0)
    optimizer.step()
    before, start, weights = (
        stored(optimizer, param),
        momentum(optimizer, param),
        param.detach().clone(),
    )
    param.grad.zero_()
    optimizer.step()
    for old, new in zip(codes(before), codes(stored(optimizer, param)), strict=True):
        assert torch.equal(old, new)
    error = (momentum(optimizer, param) - 0.95 * start).norm()
    # Decoding takes three products with sums of 520 terms.
    assert error < 3 * 520**0.5 * torch.finfo(torch.float32).eps * start.norm()
    fresh = nn.Parameter(torch.zeros(520, 2050))
    expected = Muon([fresh], lr=1.0, weight_decay=0.0, state_format="fp32", nesterov=False)
    fresh.grad = start
    expected.step()
    update = param.detach() - weights
    # Gram form and panels against the dense form in float32: 2.4e-3 each.
    assert (update - fresh).norm() < 5e-3 * fresh.norm()


@pytest.mark.parametrize("name", CODED)
def test_a_momentum_fades_to_zero_and_comes_back(name: str, place: str) -> None:
    param = nn.Parameter(torch.ones(8, 12))
    optimizer = Muon([param], momentum=0.1, weight_decay=0.0, state_format=name)
    param.grad = gradient((8, 12), 0)
    optimizer.step()
    for _ in range(60):  # 0.1^60, where float32 ends at 1e-45
        param.grad = torch.zeros(8, 12)
        optimizer.step()
    assert param.isfinite().all()
    if not PRESETS[name].normalize:
        assert not momentum(optimizer, param).any()
        weights = param.detach().clone()
        optimizer.step()
        assert torch.equal(param, weights)
    param.grad = gradient((8, 12), 1)
    optimizer.step()
    fresh = nn.Parameter(torch.ones(8, 12))
    if not PRESETS[name].normalize:
        expected = Muon([fresh], momentum=0.1, weight_decay=0.0, state_format="fp32")
        fresh.grad = param.grad.clone()
        expected.step()
        assert torch.allclose(param - weights, fresh - 1, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_skipped_stack_keeps_its_idle_experts_too(bad: float, place: str) -> None:
    param = nn.Parameter(torch.ones(3, 6, 8))
    optimizer = Muon([param], state_format="linear8", batch_experts=True)
    param.grad = gradient((3, 6, 8), 0)
    optimizer.step()
    before = copy.deepcopy(stored(optimizer, param))
    param.grad[0] = 0
    param.grad[1, 2, 3] = bad
    with pytest.warns(RuntimeWarning, match="inf or nan") if place == "host" else _nothing():
        optimizer.step()
    for key, value in stored(optimizer, param).items():
        assert torch.equal(value, before[key]), key


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


# What a constant gradient is stored as in the end, after 150 steps of the default momentum: the
# relative errors of the momentum and of its update, measured for 64x128, 128x128 and 256x256
# (0.007, 0.092, 0.315-0.345, 0.032-0.045, 0.52-0.62, 0.68-0.81 and 0.01, 0.17, 0.34-0.44,
# 0.024-0.035, 0.24-0.28, 0.28-0.29), with a margin of a tenth. Formats that store each entry by
# itself come to rest in an error of one quantisation. Those that store a companded spectrum do not:
# each store adds noise, which the next one takes for signal.
CONSTANT = {
    "linear8": (0.008, 0.015), "nf4": (0.10, 0.19), "mulaw4": (0.38, 0.49),
    "spectral8": (0.050, 0.039), "spectral4": (0.69, 0.31), "spectral3": (0.89, 0.32),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_gradient(name: str) -> None:
    """What README says of it, with the codes in the loop."""
    grad, exact = gradient((64, 128), 0), torch.zeros(64, 128)
    param = nn.Parameter(torch.zeros(64, 128))
    optimizer = Muon([param], lr=1.0, weight_decay=0.0, state_format=name)
    for _ in range(150):
        exact.lerp_(grad, 0.05)
        weights, param.grad = param.detach().clone(), grad.clone()
        optimizer.step()
    reference = nn.Parameter(torch.zeros(64, 128))
    reference.grad = grad
    Muon([reference], lr=1.0, weight_decay=0.0, state_format="fp32").step()
    of_momentum, of_update = CONSTANT[name]
    assert (momentum(optimizer, param) - exact).norm() < of_momentum * exact.norm()
    assert (param - weights - reference).norm() < of_update * reference.norm()
