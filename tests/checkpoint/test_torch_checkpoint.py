"""Every way of torch.distributed.checkpoint: the next steps are those of an uninterrupted run."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)

from lowbit_muon import Muon, MuonWithAuxAdam, muon_param_groups

# no_dist=True says so, and torch warns nevertheless; torch 2.9 warns of its own use of a storage
pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled:UserWarning",
    "ignore:TypedStorage is deprecated:UserWarning",
)


class Model(nn.Module):
    """Experts, a fused matrix, tied weights, one matrix that is frozen and one without a use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(160, 32)  # 5120 elements, which bitsandbytes keeps in 8 bits
        self.qkv = nn.Linear(32, 48)
        self.experts = nn.Parameter(torch.randn(3, 16, 24))
        self.down = nn.Linear(24, 32, bias=False)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.unused = nn.Linear(16, 40, bias=False)
        self.head = nn.Linear(32, 160, bias=False)
        self.head.weight = self.embed.weight


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "auto": {"state_format": "auto"},
    "auto, compensation": {"state_format": "auto", "compensation": True, "dtype": torch.bfloat16},
    "muonq4": {"state_format": "muonq4"},
    "mulaw4": {"state_format": "mulaw4"},
    "fp32, tensor lr": {"state_format": "fp32", "lr": torch.tensor(0.02)},
    "8-bit AdamW": {"aux_adam": "adamw8bit"},
    "compensation": {"compensation": True, "dtype": torch.bfloat16},
    "stochastic rounding": {"stochastic_rounding": True, "dtype": torch.bfloat16},
    "offload": {"offload": True},
}
# Gradients of which parameters come in the steps before the state is saved.
STARTS: dict[str, Callable[[str], bool] | None] = {
    "never stepped": None,
    "stepped": lambda name: True,
    "in part": lambda name: "unused" not in name and "down" not in name,
}


def build(case: str) -> tuple[Model, MuonWithAuxAdam]:
    options = {"aux_adam": "adamw", **CASES[case]}
    dtype, lr = options.pop("dtype", torch.float32), options.pop("lr", 0.02)
    if options["aux_adam"] == "adamw8bit":
        pytest.importorskip("bitsandbytes")
    model = Model().to(dtype)
    groups = muon_param_groups(model, lr=lr, split_fused={"qkv": 3})
    groups[0]["params"].append(model.frozen.weight)
    groups[0]["param_names"].append("frozen.weight")
    return model, MuonWithAuxAdam(groups, **options)


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: range,
    has_gradient: Callable[[str], bool] = lambda name: True,
) -> None:
    """Steps with gradients that depend on their number alone."""
    for number, (index, (name, param)) in itertools.product(
        numbers, enumerate(model.named_parameters())
    ):
        generator = torch.Generator().manual_seed(100 * number + index)
        grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        param.grad = grad if has_gradient(name) and param.requires_grad else None
        if index == len(list(model.parameters())) - 1:
            optimizer.step()
            optimizer.zero_grad()


Way = Callable[[nn.Module, Any, nn.Module, Any, Path], None]


def by_functions(**values: bool) -> Way:
    """get_optimizer_state_dict, a file, set_optimizer_state_dict."""

    def way(model: nn.Module, source: Any, new: nn.Module, target: Any, folder: Path) -> None:
        options = StateDictOptions(**values)
        file = io.BytesIO()
        torch.save(get_optimizer_state_dict(model, source, options=options), file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        if options.full_state_dict and options.flatten_optimizer_state_dict:
            # torch itself does not set what it got so, not even of AdamW (KeyError); this it does
            options = StateDictOptions(flatten_optimizer_state_dict=True)
        set_optimizer_state_dict(new, target, saved, options=options)

    return way


def by_files(**values: bool) -> Way:
    """The same with torch.distributed.checkpoint's files."""

    def way(model: nn.Module, source: Any, new: nn.Module, target: Any, folder: Path) -> None:
        options = StateDictOptions(**values)
        saved = {"optimizer": get_optimizer_state_dict(model, source, options=options)}
        dcp.save(saved, checkpoint_id=folder, no_dist=True)
        loaded = {"optimizer": get_optimizer_state_dict(new, target, options=options)}
        dcp.load(loaded, checkpoint_id=folder, no_dist=True)
        set_optimizer_state_dict(new, target, loaded["optimizer"], options=options)

    return way


class App:
    """The wrapper of PyTorch's recipe for torch.distributed.checkpoint."""

    def __init__(self, model: nn.Module, optimizer: Any, **values: bool) -> None:
        self.model, self.optimizer, self.options = model, optimizer, StateDictOptions(**values)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optimizer"],
            options=self.options,
        )


def stateful(save: Any = dcp.save, **values: bool) -> Way:
    def way(model: nn.Module, source: Any, new: nn.Module, target: Any, folder: Path) -> None:
        future = save({"app": App(model, source, **values)}, checkpoint_id=folder, no_dist=True)
        if save is dcp.async_save:
            steps(model, source, range(50, 51))  # which does not change what is saved
            future.result()
        dcp.load({"app": App(new, target, **values)}, checkpoint_id=folder, no_dist=True)

    return way


def itself(model: nn.Module, source: Any, new: nn.Module, target: Any, folder: Path) -> None:
    """An optimizer is stateful by itself; its keys are numbers then."""
    dcp.save({"optimizer": source}, checkpoint_id=folder, no_dist=True)
    dcp.load({"optimizer": target}, checkpoint_id=folder, no_dist=True)


def to_one_file(model: nn.Module, source: Any, new: nn.Module, target: Any, folder: Path) -> None:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    dcp.save({"optimizer": source.state_dict()}, checkpoint_id=folder, no_dist=True)
    dcp_to_torch_save(folder, folder / "one.pt")
    target.load_state_dict(torch.load(folder / "one.pt", weights_only=True)["optimizer"])


FLAT = {"flatten_optimizer_state_dict": True}
FULL = {"full_state_dict": True}
CPU = {"cpu_offload": True}
WAYS: dict[str, Way] = {
    "functions": by_functions(),
    "functions, flat": by_functions(**FLAT),
    "functions, full": by_functions(**FULL),
    "functions, flat, full": by_functions(**FLAT, **FULL),
    "functions, full, cpu": by_functions(**FULL, **CPU),
    "functions, flat, cpu": by_functions(**FLAT, **CPU),
    "functions, flat, frozen": by_functions(**FLAT, ignore_frozen_params=True),
    "functions, frozen": by_functions(ignore_frozen_params=True, keep_submodule_prefixes=False),
    "files": by_files(),
    "files, flat": by_files(**FLAT),
    "files, full, cpu": by_files(**FULL, **CPU),
    "stateful": stateful(),
    "stateful, flat": stateful(**FLAT),
    "stateful, flat, async": stateful(dcp.async_save, **FLAT),
    "optimizer itself": itself,
    "one file": to_one_file,
}
# Of the many combinations: every way with one case, and every case in two ways.
PAIRS = [
    *itertools.product(WAYS, ["default"]),
    *itertools.product(["functions, flat", "files, flat"], list(CASES)[1:]),
]


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(("way", "case"), PAIRS)
def test_a_round_trip_leaves_no_trace(way: str, case: str, start: str, tmp_path: Path) -> None:
    model, optimizer = build(case)
    other_model, other = build(case)
    has_gradient = STARTS[start]
    if has_gradient is not None:
        steps(model, optimizer, range(2), has_gradient)
        steps(other_model, other, range(2), has_gradient)
    new_model, new = build(case)
    new_model.load_state_dict(other_model.state_dict())
    WAYS[way](other_model, other, new_model, new, tmp_path)
    new_model.load_state_dict(model.state_dict())
    for numbers in (range(2, 3), range(3, 5)):
        steps(model, optimizer, numbers)
        steps(new_model, new, numbers)
    for (name, expected), found in zip(
        model.named_parameters(), new_model.parameters(), strict=True
    ):
        assert torch.equal(found, expected), name
    assert_same(new.state_dict(), optimizer.state_dict())


def assert_same(found: Any, expected: Any) -> None:
    """Equal in value and dtype; lists may be tuples."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_making_states_changes_nothing() -> None:
    """torch takes a step with zero gradients and a learning rate of 0 where there is no state."""
    for options in (StateDictOptions(), StateDictOptions(**FLAT)):
        model, optimizer = build("default")
        before = [param.clone() for param in model.parameters()]
        get_optimizer_state_dict(model, optimizer, options=options)
        assert all(map(torch.equal, before, model.parameters()))
        for state in optimizer.state.values():
            assert int(state["step"]) == 0
        assert model.frozen.weight not in optimizer.state


def test_a_step_that_only_looks_like_it_counts() -> None:
    """A warm-up from 0 has gradients; zero gradients have a learning rate or a state."""
    param = nn.Parameter(torch.ones(8, 12))
    for lr, grad, expected in ((0.0, 1.0, 1), (0.1, 0.0, 1), (0.0, 0.0, 0)):
        optimizer = Muon([param], lr=lr)
        param.grad = torch.full((8, 12), grad)
        optimizer.step()
        assert optimizer.state[param]["step"] == expected
        optimizer.step()
        assert optimizer.state[param]["step"] == expected + 1


def test_the_size_of_an_automatic_state_does_not_depend_on_the_choice() -> None:
    sizes = set()
    for scale in (0.0, 1.0):
        param = nn.Parameter(torch.zeros(32, 64))
        optimizer = Muon([param], state_format="auto")
        sizes.add(optimizer.state_dict()["state"][0]["state_format"].shape)
        param.grad = scale * torch.randn(32, 1) * torch.randn(1, 64)
        optimizer.step()
        sizes.add(optimizer.state_dict()["state"][0]["state_format"].shape)
    assert len(sizes) == 1


def test_an_automatic_state_without_a_format_is_exported_as_none() -> None:
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([param], lr=0.0, state_format="auto")
    param.grad = torch.zeros(4, 6)
    optimizer.step()  # as torch.distributed.checkpoint makes states
    assert optimizer.export_full_precision()["state"] == {}
