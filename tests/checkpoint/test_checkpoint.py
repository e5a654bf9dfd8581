"""State dicts of Muon: what they hold, what loads, and that resuming is exact."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbit_muon import PRESETS, Muon

SHAPES = ((24, 40), (40, 24), (8, 4, 3, 3), (8, 64))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float32)


def make_params(shapes: Any = SHAPES, dtypes: Any = DTYPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(shapes, dtypes, strict=False)
    ]


def run(optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first..last-1 with gradients that depend on the step and the parameter only."""
    for step in range(first, last):
        generator = torch.Generator().manual_seed(100 + step)
        for group in optimizer.param_groups:
            for param in group["params"]:
                grad = torch.randn(param.shape, generator=generator)
                param.grad = (1e-2 * grad).to(param.dtype)
        optimizer.step()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a: Any, b: Any) -> None:
    """Equal in value, dtype, structure and type."""
    assert type(a) is type(b), (a, b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def assert_equal_optimizers(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    assert_same(a.state_dict(), b.state_dict())
    for group_a, group_b in zip(a.param_groups, b.param_groups, strict=True):
        for p, q in zip(group_a["params"], group_b["params"], strict=True):
            assert torch.equal(p, q)


def copy_params(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(param.detach().clone()) for param in params]


def momentum_of(optimizer: Muon, index: int = 0) -> Tensor:
    return optimizer.export_full_precision()["state"][index]["momentum_buffer"]


# Saving and resuming


@pytest.mark.parametrize("name", PRESETS)
def test_resume_is_bit_for_bit(name: str) -> None:
    params = make_params()
    optimizer = Muon(params, state_format=name)
    run(optimizer, 0, 3)
    saved, saved_params = through_file(optimizer.state_dict()), copy_params(params)
    run(optimizer, 3, 6)
    resumed = Muon(saved_params, state_format=name)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict(), saved)
    run(resumed, 3, 6)
    assert_equal_optimizers(resumed, optimizer)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((3, 8, 12), {"batch_experts": True}),
        ((24, 16), {"row_splits": (8, 4, 12)}),
        ((6, 5, 3), {}),
        ((0, 7), {}),
        ((1, 9), {}),
        ((9, 1), {}),
    ],
)
@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "muonq4"])
def test_resume_of_stacks_splits_and_degenerate_shapes(
    name: str, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    params = make_params([shape])
    optimizer = Muon(params, state_format=name, **options)
    run(optimizer, 0, 2)
    saved, saved_params = through_file(optimizer.state_dict()), copy_params(params)
    run(optimizer, 2, 4)
    resumed = Muon(saved_params, state_format=name, **options)
    resumed.load_state_dict(saved)
    run(resumed, 2, 4)
    assert_equal_optimizers(resumed, optimizer)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 140),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    name=st.sampled_from(sorted(PRESETS)),
    scale=st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
)
def test_any_state_survives_a_file(
    rows: int, columns: int, dtype: torch.dtype, name: str, scale: float
) -> None:
    param = nn.Parameter(torch.ones(rows, columns, dtype=dtype))
    optimizer = Muon([param], state_format=name)
    param.grad = (scale * torch.randn(rows, columns)).to(dtype)
    optimizer.step()
    saved = through_file(optimizer.state_dict())
    resumed = Muon([nn.Parameter(param.detach().clone())], state_format=name)
    resumed.load_state_dict(saved)
    assert_same(resumed.state_dict(), saved)


def test_state_dict_holds_tensors_and_plain_values_only() -> None:
    def check(value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                assert type(key) in (str, int)
                check(inner)
        elif type(value) in (list, tuple):
            for inner in value:
                check(inner)
        else:
            assert type(value) in (Tensor, str, int, float, bool, type(None)), value

    optimizer = Muon(make_params(), state_format=PRESETS["nf4"])
    run(optimizer, 0, 1)
    state_dict = optimizer.state_dict()
    check(state_dict)
    assert [group["format_version"] for group in state_dict["param_groups"]] == [1]
    # torch.distributed.checkpoint reads flattened groups by the keys of these
    assert optimizer.param_groups[0]["format_version"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRESETS)
def test_no_state_is_cast_to_the_parameters_dtype(name: str, dtype: torch.dtype) -> None:
    """torch's own loading casts uint8 codes and float32 scales (MuonQ's state grows 3.8 times)."""
    optimizer = Muon(make_params(dtypes=[dtype] * 4), state_format=name)
    run(optimizer, 0, 1)
    expected = [
        {key: value.dtype for key, value in state.items() if isinstance(value, Tensor)}
        for state in optimizer.state.values()
    ]
    size = optimizer.state_bytes()
    optimizer.load_state_dict(optimizer.state_dict())
    found = [
        {key: value.dtype for key, value in state.items() if isinstance(value, Tensor)}
        for state in optimizer.state.values()
    ]
    assert found == expected
    assert optimizer.state_bytes() == size


def test_loaded_tensors_are_copies_with_storage_of_their_own_size() -> None:
    optimizer = Muon(make_params())
    run(optimizer, 0, 1)
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        padded = torch.zeros(2 * state["codes"].shape[0], state["codes"].shape[1] + 64).byte()
        view = padded[: state["codes"].shape[0], : state["codes"].shape[1]]
        state["codes"] = view.copy_(state["codes"])
    before = copy.deepcopy(saved)
    resumed = Muon(make_params())
    resumed.load_state_dict(saved)
    elements = sum(
        value.numel() * value.element_size()
        for state in resumed.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    assert resumed.state_bytes() == elements
    run(resumed, 1, 2)
    assert_same(saved, before)


def test_parameters_without_a_gradient_have_no_state_before_it_is_saved_and_load() -> None:
    """Saved are zeros: torch.distributed.checkpoint wants the state of every trained parameter."""
    params = make_params()
    params[3].requires_grad_(False)
    optimizer = Muon(params)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert list(optimizer.state) == params[:1]
    saved = through_file(optimizer.state_dict())
    assert [state["step"] for state in saved["state"].values()] == [1, 0, 0]
    others = copy_params(params)
    others[3].requires_grad_(False)
    resumed = Muon(others)
    resumed.load_state_dict(saved)
    assert_equal_optimizers(resumed, optimizer)
    del saved["state"][2]  # as torch's own optimizers save it
    resumed.load_state_dict(saved)
    assert list(resumed.state) == others[:1]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_deepcopy_and_pickle_go_on_identically(clone: Callable[[Muon], Muon]) -> None:
    optimizer = Muon(make_params(), state_format="mulaw4", nonfinite="raise")
    run(optimizer, 0, 2)
    other = clone(optimizer)
    run(optimizer, 2, 4)
    assert other.state[other.param_groups[0]["params"][0]]["step"] == 2
    run(other, 2, 4)
    assert_equal_optimizers(other, optimizer)


def test_schedulers_resume_and_cycle_the_momentum() -> None:
    def build() -> tuple[Muon, Any]:
        optimizer = Muon(make_params(), lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=1e-2, total_steps=10
        )

    optimizer, scheduler = build()
    for step in range(4):
        run(optimizer, step, step + 1)
        scheduler.step()
    saved = through_file({"o": optimizer.state_dict(), "s": scheduler.state_dict()})
    saved_params = copy_params(optimizer.param_groups[0]["params"])
    resumed, resumed_scheduler = build()
    with torch.no_grad():
        for param, value in zip(resumed.param_groups[0]["params"], saved_params, strict=True):
            param.copy_(value)
    resumed.load_state_dict(saved["o"])
    resumed_scheduler.load_state_dict(saved["s"])
    assert resumed.param_groups[0]["momentum"] not in (0.95, build()[0].defaults["momentum"])
    for opt, sched in ((optimizer, scheduler), (resumed, resumed_scheduler)):
        for step in range(4, 8):
            run(opt, step, step + 1)
            sched.step()
    assert_equal_optimizers(resumed, optimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=4),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_drive_the_learning_rate(make: Callable[[Any], Any], as_tensor: bool) -> None:
    reference = torch.optim.SGD(make_params(SHAPES[:1]), lr=0.02)
    optimizer = Muon(make_params(SHAPES[:1]), lr=torch.tensor(0.02) if as_tensor else 0.02)
    scheduler, reference_scheduler = make(optimizer), make(reference)
    for step in range(3):
        run(optimizer, step, step + 1)
        scheduler.step()
        run(reference, step, step + 1)
        reference_scheduler.step()
        # A Tensor lr is float32: one rounding at first, then a difference, a product and a sum in
        # each of three steps, of at most 2^-24 each.
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(
            reference.param_groups[0]["lr"], rel=10 * 2**-24
        )


def test_tensor_lr_is_saved_and_loaded() -> None:
    optimizer = Muon(make_params(), lr=torch.tensor(0.5))
    run(optimizer, 0, 1)
    saved = through_file(optimizer.state_dict())
    resumed = Muon(make_params(), lr=torch.tensor(0.1))
    resumed.load_state_dict(saved)
    lr = resumed.param_groups[0]["lr"]
    assert isinstance(lr, Tensor)
    assert float(lr) == 0.5
    assert lr is not saved["param_groups"][0]["lr"]


def test_names_are_kept_and_named_in_errors() -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 6, bias=False), "b": nn.Linear(6, 8, bias=False)})
    optimizer = Muon(model.named_parameters())
    run(optimizer, 0, 1)
    saved = through_file(optimizer.state_dict())
    assert saved["param_groups"][0]["param_names"] == ["a.weight", "b.weight"]
    saved["state"][1]["codes"] = saved["state"][1]["codes"][:, :-1]
    with pytest.raises(ValueError, match=r"parameter 1 \(group 0, b.weight\).*codes: expected"):
        optimizer.load_state_dict(saved)


def test_a_group_added_after_loading_trains() -> None:
    optimizer = Muon(make_params(SHAPES[:1]), state_format="mulaw4")
    run(optimizer, 0, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    added = nn.Parameter(torch.ones(5, 6))
    optimizer.add_param_group({"params": added, "state_format": "spectral3"})
    run(optimizer, 1, 2)
    assert "norm" in optimizer.state[added]
    resumed = Muon([{"params": make_params(SHAPES[:1])}, {"params": nn.Parameter(torch.ones(5, 6)),
                    "state_format": "spectral3"}], state_format="mulaw4")  # fmt: skip
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(resumed.state_dict(), optimizer.state_dict())


# Hooks


def test_user_hooks_run_around_the_conversion_and_ours_are_removed() -> None:
    optimizer = Muon(make_params())
    run(optimizer, 0, 1)
    saved = optimizer.state_dict()
    seen: list[str] = []

    def pre_hook(opt: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert state_dict["state"][0]["codes"].dtype == torch.uint8
        seen.append("pre")
        return {**state_dict, "state": {0: state_dict["state"][0]}}

    def post_hook(opt: Any) -> None:
        seen.append("post")
        assert [state["codes"].dtype for state in opt.state.values()] == [torch.uint8]

    optimizer.register_load_state_dict_pre_hook(pre_hook)
    optimizer.register_load_state_dict_post_hook(post_hook)
    for _ in range(2):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="param_groups"):
        optimizer.load_state_dict({**saved, "param_groups": []})
    assert seen == ["pre", "post"] * 2 + ["pre"]
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1
