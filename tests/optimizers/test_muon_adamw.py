"""MuonWithAuxAdam: both parts do what they do alone, and live, save and fail as one optimizer."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_checkpoint import assert_equal_optimizers, assert_same, make_params, run, through_file
from torch import Tensor, nn

from lowbit_muon import Muon
from lowbit_muon.optimizers import muon_adamw as aux_adam
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.state.gradients import NonFiniteGradientError

bitsandbytes = pytest.importorskip("bitsandbytes")

MUON_SHAPES = ((24, 40), (8, 4, 3, 3))
AUX_SHAPES = ((80, 60), (40,), ())  # the first is large enough for 8 bits
KINDS = ("adamw", "adamw8bit")


def make_groups(dtype: torch.dtype = torch.float32, **aux: Any) -> list[dict[str, Any]]:
    params = make_params((*MUON_SHAPES, *AUX_SHAPES), [dtype] * 5)
    return [
        {"params": params[:2], "use_muon": True},
        {"params": params[2:], "use_muon": False, **aux},
    ]


def make(kind: str = "adamw8bit", **options: Any) -> MuonWithAuxAdam:
    return MuonWithAuxAdam(make_groups(), aux_adam=kind, **options)


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def with_values(optimizer: MuonWithAuxAdam, values: list[Tensor]) -> MuonWithAuxAdam:
    with torch.no_grad():
        for param, value in zip(parameters(optimizer), values, strict=True):
            param.copy_(value)
    return optimizer


def values_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param.detach().clone() for param in parameters(optimizer)]


# Groups


def test_groups_of_kellerjordan_are_taken_unchanged_with_their_defaults() -> None:
    groups = make_groups()
    before = [dict(group) for group in groups]
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    assert groups == before
    muon, aux = optimizer.param_groups
    assert (muon["lr"], muon["momentum"], muon["weight_decay"]) == (0.02, 0.95, 0.0)
    assert {key: value for key, value in aux.items() if key != "params"} == {
        "use_muon": False,
        "lr": 3e-4,
        "betas": (0.9, 0.95),
        "eps": 1e-10,
        "weight_decay": 0.0,
        "nonfinite": "skip",
        "aux_adam": "adamw",
        "format_version": 1,
    }
    assert "aux_adam" not in muon


def test_groups_override_options() -> None:
    params = make_params()
    optimizer = MuonWithAuxAdam(
        [
            {"params": params[:1], "use_muon": True, "lr": 0.1, "state_format": "fp32"},
            {"params": params[1:2], "use_muon": False, "betas": [0.8, 0.9], "aux_adam": "adamw"},
            {"params": params[3:], "use_muon": False, "nonfinite": "raise"},
        ],
        aux_adam="adamw8bit",
        state_format="mulaw4",
    )
    run(optimizer, 0, 1)
    assert "dense" in optimizer.state[params[0]]
    assert "exp_avg" in optimizer.state[params[1]]
    assert "state1" in optimizer.state[params[3]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            [{"params": [nn.Parameter(torch.ones(3, 3))], "use_muon": True},
             {"params": [nn.Parameter(torch.ones(3, 3))]}],
            "use_muon=None",
        ),
        ([{"params": [nn.Parameter(torch.ones(3, 3))], "use_muon": 1}], "use_muon=1"),
        ([{"params": [nn.Parameter(torch.ones(3))], "use_muon": True}], "2 or more dimensions"),
        ([{"params": [nn.Parameter(torch.ones(3))], "use_muon": False, "lr": -1}], "lr: expected"),
        (
            [{"params": [nn.Parameter(torch.ones(3))], "use_muon": False, "betas": (0.9, 1)}],
            "betas: expected",
        ),
        (
            [{"params": [nn.Parameter(torch.ones(3))], "use_muon": False, "aux_adam": "sgd"}],
            "aux_adam: expected",
        ),
        (
            [{"params": [nn.Parameter(torch.ones(3).double())], "use_muon": False,
              "aux_adam": "adamw8bit"}],
            "takes float32",
        ),
        (
            [{"params": [nn.Parameter(torch.ones(3) * 1j)], "use_muon": False}],
            "got torch.complex64",
        ),
    ],
)  # fmt: skip
def test_bad_groups_are_refused(groups: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonWithAuxAdam(groups)
    optimizer = make()
    if isinstance(groups[-1], dict):
        with pytest.raises(ValueError, match=message):
            optimizer.add_param_group(groups[-1])
        assert len(optimizer.param_groups) == 2


# Each part does what it does alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_both_parts_equal_their_optimizers_alone(kind: str, dtype: torch.dtype) -> None:
    aux_options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    both = MuonWithAuxAdam(make_groups(dtype, **aux_options), aux_adam=kind)
    muon_group, aux_group = make_groups(dtype)
    muon = Muon(muon_group["params"], lr=0.02, weight_decay=0.0)
    adamw = {"adamw": torch.optim.AdamW, "adamw8bit": bitsandbytes.optim.AdamW8bit}[kind]
    alone = adamw(aux_group["params"], **aux_options)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(parameters(both), parameters(muon) + parameters(alone), strict=True):
            a.grad = torch.randn(a.shape, generator=generator).to(dtype)
            b.grad = a.grad.clone()
        both.step()
        muon.step()
        alone.step()
    for a, b in zip(parameters(both), parameters(muon) + parameters(alone), strict=True):
        assert torch.equal(a, b)


def test_exact_adamw_is_the_adam_of_kellerjordans_muon() -> None:
    """Bias-corrected moments, eps beside the root of the second, decoupled decay; in float64."""
    param = nn.Parameter(torch.randn(7, 5))
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.1}
    optimizer = MuonWithAuxAdam(
        [{"params": [param], "use_muon": False, **options}], aux_adam="adamw"
    )
    weight = param.detach().double()
    first, second = torch.zeros(7, 5).double(), torch.zeros(7, 5).double()
    steps = 5
    for step in range(1, steps + 1):
        grad = torch.randn(7, 5)
        param.grad = grad
        optimizer.step()
        first = 0.9 * first + 0.1 * grad.double()
        second = 0.95 * second + 0.05 * grad.double().square()
        weight *= 1 - 0.01 * 0.1
        second_root = (second / (1 - 0.95**step)).sqrt()
        weight -= 0.01 * (first / (1 - 0.9**step)) / (second_root + 1e-10)
    # Each step rounds the weight three times; its update, below 4 * lr here, takes under 16
    # roundings of its own.
    bound = steps * 2**-24 * (3 * float(weight.abs().max()) + 16 * 4 * 0.01)
    assert float((param.detach().double() - weight).abs().max()) <= bound


# Choice of the AdamW


@pytest.fixture
def fresh_probe() -> Iterator[None]:
    def clear() -> None:
        aux_adam._8bit_problem.cache_clear()
        aux_adam._works_or_warn.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.usefixtures("fresh_probe")
def test_auto_takes_8_bits_where_bitsandbytes_works() -> None:
    optimizer = make("auto")
    assert optimizer.param_groups[1]["aux_adam"] == "adamw8bit"
    run(optimizer, 0, 1)
    large, small, _ = (optimizer.state[param] for param in parameters(optimizer)[2:])
    assert large["state1"].dtype == torch.uint8
    assert small["state1"].dtype == torch.float32


@pytest.mark.usefixtures("fresh_probe")
def test_auto_falls_back_with_one_warning_and_an_explicit_choice_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    remedies = r'\(pip install bitsandbytes\); aux_adam="adamw" chooses it without this warning$'
    with pytest.warns(RuntimeWarning, match=f"instead of 8-bit AdamW: .* {remedies}") as caught:
        optimizer = make("auto")
    assert len(caught) == 1
    assert optimizer.param_groups[1]["aux_adam"] == "adamw"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(make("auto"), 0, 1)
    with pytest.raises(RuntimeError, match=r"'adamw8bit' is not available: .*bitsandbytes"):
        make("adamw8bit")


@pytest.mark.usefixtures("fresh_probe")
def test_auto_does_not_trust_an_adamw_that_steps_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bitsandbytes.optim.AdamW8bit, "step", lambda self: None)
    with pytest.warns(RuntimeWarning, match="its first step went 0.0 instead of -1"):
        assert make("auto").param_groups[1]["aux_adam"] == "adamw"


def test_auto_keeps_float64_exact() -> None:
    optimizer = MuonWithAuxAdam(
        [{"params": [nn.Parameter(torch.ones(100, 60).double())], "use_muon": False}]
    )
    assert optimizer.param_groups[0]["aux_adam"] == "adamw"


# Non-finite gradients


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poisoned_step", [0, 2])
def test_skip_protects_a_parameter_and_its_adamw_state(
    kind: str, poison: float, poisoned_step: int
) -> None:
    """As if the parameter had had no gradient in that step; the others go on."""
    optimizer, reference = make(kind), make(kind)
    for step in range(4):
        grads = [torch.randn(param.shape) for param in parameters(optimizer)]
        for a, b, grad in zip(parameters(optimizer), parameters(reference), grads, strict=True):
            a.grad, b.grad = grad.clone(), grad.clone()
        if step == poisoned_step:
            parameters(optimizer)[2].grad[3, 4] = poison
            parameters(reference)[2].grad = None
            with pytest.warns(RuntimeWarning, match=r"\(80, 60\) held inf or nan"):
                optimizer.step()
        else:
            optimizer.step()
        reference.step()
    skipped = optimizer.state[parameters(optimizer)[2]].pop("skipped")
    assert (skipped, reference.state[parameters(reference)[2]].pop("skipped")) == (1, 0)
    assert_equal_optimizers(optimizer, reference)


@pytest.mark.parametrize("bad", [0, 2])
def test_raise_comes_before_anything_changes_in_either_part(bad: int) -> None:
    optimizer = make(nonfinite="raise")
    run(optimizer, 0, 1)
    before, values = copy.deepcopy(optimizer.state_dict()), values_of(optimizer)
    for param in parameters(optimizer):
        param.grad = torch.ones_like(param)
    parameters(optimizer)[bad].grad.view(-1)[5] = torch.nan
    with pytest.raises(NonFiniteGradientError, match="expected finite values, got 1 of"):
        optimizer.step()
    assert_same(optimizer.state_dict(), before)
    assert_same(values_of(optimizer), values)


@pytest.mark.parametrize(
    ("kind", "dtype", "fits", "too_large"),
    [
        # Roots of 3.4e38 and 65504, the largest numbers of the moments' dtypes.
        ("adamw", torch.float32, 1.8e19, 1.9e19),
        ("adamw", torch.bfloat16, 1.8e19, 1.9e19),
        ("adamw", torch.float16, 255.0, 257.0),
        ("adamw", torch.float64, 1e154, float("inf")),
        ("adamw8bit", torch.float16, 6e4, float("inf")),
        ("adamw8bit", torch.float32, 1.8e19, 1.9e19),
    ],
)
def test_gradients_whose_squares_the_moments_cannot_hold_are_skipped(
    kind: Any, dtype: torch.dtype, fits: float, too_large: float
) -> None:
    param = nn.Parameter(torch.zeros(4096, dtype=dtype))
    optimizer = MuonWithAuxAdam([{"params": [param], "use_muon": False}], aux_adam=kind)
    param.grad = torch.full_like(param, fits)
    optimizer.step()
    assert (optimizer.state[param]["skipped"], int(optimizer.state[param]["step"])) == (0, 1)
    assert param.isfinite().all()
    optimizer.load_state_dict(optimizer.state_dict())  # which takes finite moments only
    before = param.detach().clone()
    param.grad = torch.full_like(param, too_large)
    with pytest.warns(RuntimeWarning, match="too large"):
        optimizer.step()
    assert optimizer.state[param]["skipped"] == 1
    assert torch.equal(param, before)


def test_a_zero_gradient_leaves_float16_weights() -> None:
    """The default eps, 1e-10, is zero in float16, and zero over zero is not a number."""
    halves, others = nn.Parameter(torch.ones(8).half()), nn.Parameter(torch.ones(8))
    group = {"params": [halves, others], "use_muon": False}
    optimizer = MuonWithAuxAdam([group], aux_adam="adamw")
    for param in (halves, others):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(halves, torch.ones(8).half())
    assert torch.equal(others, torch.ones(8))


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = MuonWithAuxAdam([{"params": [embedding.weight], "use_muon": False}])
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()


# One optimizer


def test_state_bytes_counts_shared_tables_once() -> None:
    params = make_params([(100, 256), (64, 256), (10,)], [torch.float32] * 3)
    optimizer = MuonWithAuxAdam([{"params": params, "use_muon": False}], aux_adam="adamw8bit")
    run(optimizer, 0, 1)
    codes = 2 * (100 + 64) * 256
    scales = 2 * 4 * (100 + 64)  # a float32 for each 256 elements
    tables = 2 * 4 * 256
    small = 2 * 4 * 10
    assert optimizer.state_bytes() == codes + scales + tables + small
    resumed = MuonWithAuxAdam(
        [{"params": make_params([(100, 256), (64, 256), (10,)]), "use_muon": False}],
        aux_adam="adamw8bit",
    )
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert resumed.state_bytes() == optimizer.state_bytes()


@pytest.mark.parametrize("state_format", ["spectral4", "mulaw4", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_bit_for_bit(kind: str, state_format: str) -> None:
    optimizer = make(kind, state_format=state_format)
    run(optimizer, 0, 3)
    saved, values = through_file(optimizer.state_dict()), values_of(optimizer)
    assert list(saved["state"]) == [0, 1, 2, 3, 4]
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2, 3, 4]]
    run(optimizer, 3, 6)
    resumed = with_values(make(kind, state_format=state_format), values)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict(), saved)
    run(resumed, 3, 6)
    assert_equal_optimizers(resumed, optimizer)


def test_loaded_tensors_are_copies() -> None:
    optimizer = make()
    run(optimizer, 0, 1)
    saved = optimizer.state_dict()
    before = copy.deepcopy(saved)
    resumed = make()
    resumed.load_state_dict(saved)
    run(resumed, 1, 2)
    assert_same(saved, before)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("kind", KINDS)
def test_deepcopy_and_pickle_go_on_identically(
    kind: str, clone: Callable[[MuonWithAuxAdam], MuonWithAuxAdam]
) -> None:
    optimizer = make(kind)
    run(optimizer, 0, 2)
    other = clone(optimizer)
    assert other.aux_adam == kind
    run(optimizer, 2, 4)
    run(other, 2, 4)
    assert_equal_optimizers(other, optimizer)
    other.add_param_group({"params": nn.Parameter(torch.ones(3)), "use_muon": False})
    assert other.param_groups[2]["aux_adam"] == kind


@pytest.mark.parametrize("kind", KINDS)
def test_schedulers_and_tensor_lr_reach_both_parts(kind: str) -> None:
    groups = make_groups(lr=torch.tensor(0.5))
    groups[0]["lr"] = torch.tensor(0.25)
    optimizer = MuonWithAuxAdam(groups, aux_adam=kind)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step == 0))
    run(optimizer, 0, 1)
    scheduler.step()
    values = values_of(optimizer)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.0, 0.0]
    run(optimizer, 1, 2)  # a learning rate of zero and no weight decay: nothing moves
    assert_same(values_of(optimizer), values)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=4)
    run(optimizer, 2, 3)
    assert not torch.equal(values_of(optimizer)[2], values[2])
    assert_same(through_file(optimizer.state_dict()), optimizer.state_dict())


def test_closures_hooks_names_and_zero_grad_work_on_the_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    named = dict(model.named_parameters())
    groups: list[dict[str, Any]] = [
        {"params": [item for item in named.items() if item[1].ndim == rank], "use_muon": rank == 2}
        for rank in (2, 1)
    ]
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight", "1.weight"], ["0.bias", "1.bias"]]
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        calls.append("closure")
        return loss

    first = optimizer.step(closure)
    assert calls == ["before", "closure", "after"]
    assert optimizer.step(closure).item() < first.item()
    optimizer.zero_grad()
    assert all(param.grad is None for param in model.parameters())
    values = values_of(optimizer)
    optimizer.step()  # no gradients: nothing to do
    assert_same(values_of(optimizer), values)


def test_groups_added_later_train() -> None:
    optimizer = make()
    run(optimizer, 0, 1)
    added = [nn.Parameter(torch.ones(6, 9)), nn.Parameter(torch.ones(9))]
    optimizer.add_param_group({"params": added[:1], "use_muon": True})
    optimizer.add_param_group({"params": added[1], "use_muon": False, "lr": 0.1})
    run(optimizer, 1, 2)
    assert "codes" in optimizer.state[added[0]]
    assert "state1" in optimizer.state[added[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_degenerate_parameters_step_and_resume(kind: str) -> None:
    def build() -> MuonWithAuxAdam:
        params = make_params([(0, 5), (1, 7), (), (0,)], [torch.float32] * 4)
        return MuonWithAuxAdam(
            [{"params": params[:2], "use_muon": True}, {"params": params[2:], "use_muon": False}],
            aux_adam=kind,
        )

    optimizer = build()
    run(optimizer, 0, 2)
    resumed = with_values(build(), values_of(optimizer))
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    run(optimizer, 2, 3)
    run(resumed, 2, 3)
    assert_equal_optimizers(resumed, optimizer)


# Other states
