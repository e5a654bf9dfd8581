"""An update is one of values: where the elements of a parameter or gradient lie does not matter."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from lowbit_muon import Muon, MuonWithAuxAdam, muon_param_groups

Layout = Callable[[Tensor], Tensor]


def padded(x: Tensor) -> Tensor:
    """With a gap behind each row."""
    return torch.zeros(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype)[..., : x.shape[-1]].copy_(x)


def reversed_dims(x: Tensor) -> Tensor:
    order = tuple(reversed(range(x.ndim)))
    return x.permute(order).contiguous().permute(order)


def negated(x: Tensor) -> Tensor:
    """The values of x as the imaginary part of a conjugate, which negates what lies in memory."""
    found = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert found.is_neg()
    return found


LAYOUTS: dict[str, Layout] = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "padded": padded,
    "reversed": reversed_dims,
    "strided": lambda x: torch.stack([x, x], dim=-1)[..., 0],
}
# What PyTorch's autograd and its users may leave in `.grad` of a parameter of any layout.
GRADIENT_LAYOUTS: dict[str, Layout] = {**LAYOUTS, "negated": negated}
SHAPES = {
    (12, 4, 3, 3): {}, (4, 12, 3, 3): {}, (3, 10, 6): {"batch_experts": True},
    (2, 3, 5, 7): {"batch_experts": True}, (16, 2, 3, 3): {"row_splits": (4, 12)},
}  # fmt: skip
OPTIONS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.float32, {"state_format": "spectral4"}),
    (torch.float32, {"state_format": "muonq4"}),
    (torch.float32, {"state_format": "fp32", "backend": "reference"}),
    (torch.bfloat16, {"state_format": "linear8", "stochastic_rounding": True}),
    (torch.bfloat16, {"state_format": "mulaw4", "compensation": True}),
    (torch.float16, {"state_format": "spectral3"}),
]


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def train(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    options: dict[str, Any],
    layout: Layout = torch.Tensor.contiguous,
    gradient_layout: Layout = torch.Tensor.contiguous,
    state: dict[str, Any] | None = None,
    first: int = 0,
) -> tuple[nn.Parameter, Muon]:
    param = nn.Parameter(layout(values(shape, dtype, 100)))
    optimizer = Muon([param], lr=0.1, **SHAPES[shape], **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in range(first, first + 2):
        param.grad = gradient_layout(values(shape, dtype, step))
        strides = param.stride()
        optimizer.step()
        assert param.stride() == strides
    return param, optimizer


@functools.cache
def contiguous(shape: tuple[int, ...], number: int) -> Tensor:
    """What the options of that number make of weights and gradients without gaps."""
    return train(shape, *OPTIONS[number])[0].detach()


def layout_of(name: str, shape: tuple[int, ...]) -> Layout:
    if name == "channels_last" and SHAPES[shape].get("batch_experts"):
        pytest.skip("of convolutions")
    return LAYOUTS[name]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_weights_of_any_layout_get_the_same_update(name: str, shape: tuple[int, ...]) -> None:
    for number, (dtype, options) in enumerate(OPTIONS):
        found, _ = train(shape, dtype, options, layout=layout_of(name, shape))
        assert torch.equal(found, contiguous(shape, number)), options


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", GRADIENT_LAYOUTS)
def test_gradients_of_any_layout_give_the_same_update(name: str, shape: tuple[int, ...]) -> None:
    for number, (dtype, options) in enumerate(OPTIONS):
        if name == "negated" and dtype != torch.float32:
            continue  # no such complex dtype, or with a warning
        layout = GRADIENT_LAYOUTS[name] if name == "negated" else layout_of(name, shape)
        found, _ = train(shape, dtype, options, gradient_layout=layout)
        assert torch.equal(found, contiguous(shape, number)), options


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_expanded_gradient(backend: str) -> None:
    plain, expanded = (nn.Parameter(values((6, 8), torch.float32, 0)) for _ in range(2))
    for param in plain, expanded:
        row = values((1, 8), torch.float32, 1).expand(6, 8)
        param.grad = row.contiguous() if param is plain else row
        Muon([param], backend=backend).step()
    assert torch.equal(plain, expanded)


@pytest.mark.parametrize(("before", "after"), [("contiguous", "last"), ("last", "contiguous")])
def test_a_checkpoint_of_one_layout_loads_under_another(before: str, after: str) -> None:
    layouts = {"contiguous": torch.Tensor.contiguous, "last": LAYOUTS["channels_last"]}
    shape = (12, 4, 3, 3)
    for dtype, options in OPTIONS:
        _, source = train(shape, dtype, options, layouts[before])
        saved = source.state_dict()
        expected, _ = train(shape, dtype, options, layouts[before], state=saved, first=2)
        found, _ = train(shape, dtype, options, layouts[after], state=saved, first=2)
        assert torch.equal(found, expected), options


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3))


def train_model(net: nn.Module, optimizer: MuonWithAuxAdam, steps: int) -> None:
    for step in range(steps):
        x = values((2, 8, 12, 12), torch.float32, step).to(memory_format=torch.channels_last)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        for param in net.parameters():  # the same numbers, whichever convolution computed them
            param.grad = param.grad * 0 + values(tuple(param.shape), torch.float32, step)
        optimizer.step()


@pytest.mark.parametrize("kind", ["adamw", "auto"])
@pytest.mark.parametrize("when", ["before", "after", "later"])
def test_a_model_in_channels_last(when: str, kind: str) -> None:
    """Made so before or after its optimizer, or between two steps; AdamW takes one convolution."""
    plain, net = convolutions(), convolutions()
    groups = [muon_param_groups(each, aux_patterns=["^0"]) for each in (plain, net)]
    expected = MuonWithAuxAdam(groups[0], aux_adam=kind)
    train_model(plain, expected, 4)
    if when == "before":
        net.to(memory_format=torch.channels_last)
    optimizer = MuonWithAuxAdam(muon_param_groups(net, aux_patterns=["^0"]), aux_adam=kind)
    if when == "after":
        net.to(memory_format=torch.channels_last)
    train_model(net, optimizer, 2)
    if when == "later":
        net.to(memory_format=torch.channels_last)
    resumed = MuonWithAuxAdam(muon_param_groups(net, aux_patterns=["^0"]), aux_adam=kind)
    resumed.load_state_dict(optimizer.state_dict())
    for step in (2, 3):
        for param in net.parameters():
            param.grad = values(tuple(param.shape), torch.float32, step)
        resumed.step()
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        if ours.ndim == 4:
            assert ours.is_contiguous(memory_format=torch.channels_last)


BAD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "wrapper": (lambda: TwoTensor(torch.ones(4, 6), torch.ones(4, 6)), "TwoTensor"),
    "expanded": (lambda: torch.ones(1, 6).expand(4, 6), r"strides \(0, 1\)"),
    "negative": (lambda: negated(torch.ones(4, 6)), "negative of others"),
    "sparse": (lambda: torch.ones(4, 6).to_sparse(), "layout torch.sparse_coo"),
    "rows": (lambda: torch.ones(4, 6).to_sparse_csr(), "layout torch.sparse_csr"),
    "float8": (lambda: torch.ones(4, 6).to(torch.float8_e4m3fn), "float8_e4m3fn"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", BAD)
def test_a_parameter_that_cannot_be_stepped_is_named_at_once(name: str, backend: str) -> None:
    make, message = BAD[name]
    good, bad = nn.Parameter(torch.ones(4, 6)), nn.Parameter(make())
    with pytest.raises(TypeError, match=rf"parameter 'tail.weight': expected .*{message}"):
        Muon([("body.weight", good), ("tail.weight", bad)], backend=backend)


GRADIENTS: dict[str, tuple[Callable[[], Tensor], type[Exception], str]] = {
    "sparse": (lambda: torch.ones(4, 6).to_sparse(), RuntimeError, "sparse"),
    "wrapper": (lambda: TwoTensor(torch.ones(4, 6), torch.ones(4, 6)), TypeError, "TwoTensor"),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("use_muon", [True, False])
def test_a_refused_gradient_changes_nothing(name: str, use_muon: bool) -> None:
    """Whichever group it is in, and though others come before it."""
    make, error, message = GRADIENTS[name]
    params = [nn.Parameter(torch.ones(4, 6)) for _ in range(4)]
    optimizer = MuonWithAuxAdam(
        [
            {"params": [("a", params[0])], "use_muon": True},
            {"params": [("b", params[1])], "use_muon": False},
            {"params": [("c", params[2]), ("bad", params[3])], "use_muon": use_muon},
        ]
    )
    for param in params:
        param.grad = torch.ones(4, 6)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    steps = [int(optimizer.state[param]["step"]) for param in params]
    params[3].grad = make()
    with pytest.raises(error, match=f"'bad'.*{message}"):
        optimizer.step()
    for param, weights in zip(params, before, strict=True):
        assert torch.equal(param, weights)
    assert [int(optimizer.state[param]["step"]) for param in params] == steps


@pytest.mark.parametrize("shape", [(16, 48), (48, 32), (64, 48), (32, 47), (32, 49)])
@pytest.mark.parametrize(
    "options",
    [
        *({"state_format": name} for name in ("spectral4", "linear8", "fp32", "muonq4", "auto")),
        {"state_format": "spectral4", "row_splits": (16, 16)},
    ],
    ids=str,
)
def test_a_resized_parameter_is_refused(shape: tuple[int, int], options: dict[str, Any]) -> None:
    other, param = (nn.Parameter(torch.ones(32, 48)) for _ in range(2))
    optimizer = Muon([("other", other), ("pruned", param)], **options)
    for each in other, param:
        each.grad = values((32, 48), torch.float32, 0)
    optimizer.step()
    before = other.detach().clone()
    param.grad = None
    param.data = torch.ones(shape)
    param.grad = values(shape, torch.float32, 1)
    size = rf"32 x 48, got {shape[0]} x {shape[1]}"
    with pytest.raises(ValueError, match=rf"parameter 'pruned': expected the size .*{size}"):
        optimizer.step()
    assert torch.equal(other, before)


@pytest.mark.parametrize("kind", ["adamw", "auto"])
def test_a_resized_parameter_of_adamw_is_refused(kind: str) -> None:
    weight, param = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(4096))
    optimizer = MuonWithAuxAdam(
        [
            {"params": [("weight", weight)], "use_muon": True},
            {"params": [("vector", param)], "use_muon": False},
        ],
        aux_adam=kind,
    )
    for each in weight, param:
        each.grad = torch.ones_like(each)
    optimizer.step()
    before = weight.detach().clone()
    param.grad = None
    param.data = torch.ones(8192)
    param.grad = torch.ones(8192)
    with pytest.raises(ValueError, match=r"'vector': .*\(4096,\), got \(8192,\)"):
        optimizer.step()
    assert torch.equal(weight, before)


def test_the_state_of_the_transposed_shape_is_not_loaded() -> None:
    """Its codes would fit."""
    saved = []
    for shape in (32, 48), (48, 32):
        param = nn.Parameter(torch.ones(shape))
        optimizer = Muon([param])
        param.grad = values(shape, torch.float32, 0)
        optimizer.step()
        saved.append(optimizer.state_dict())
    with pytest.raises(ValueError, match="of 48 x 32 elements, got that of 32 x 48"):
        optimizer.load_state_dict(saved[0])
