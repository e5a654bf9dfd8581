"""`MuonWithAuxAdam` of a model, of parameters and of named parameters, with plain options."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_muon import MuonWithAuxAdam, muon_param_groups
from lowbit_muon.optimizers.routing import _say_that_it_goes_by_shape

VOCABULARY, WIDTH, LAYERS = 96, 8, 2


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH // 2, bias=False)
        self.up_proj = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)


class Model(nn.Module):
    """The shapes and names of a Llama, its head not tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)


@pytest.fixture
def quiet() -> Iterator[None]:
    """Without the warning that parameters have no names."""
    _say_that_it_goes_by_shape.cache_clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "MuonWithAuxAdam was given parameters without names")
        yield


def taken(model: nn.Module, optimizer: MuonWithAuxAdam) -> set[str]:
    """Names of what Muon takes."""
    names = {param: name for name, param in model.named_parameters()}
    groups = [group for group in optimizer.param_groups if group["use_muon"]]
    return {names[param] for group in groups for param in group["params"]}


def matrices(model: nn.Module) -> set[str]:
    """Names that muon_param_groups sends to Muon."""
    groups = [group for group in muon_param_groups(model) if group["use_muon"]]
    return {name for group in groups for name in group["param_names"]}


def test_a_model_is_routed_by_its_structure() -> None:
    model = Model()
    optimizer = MuonWithAuxAdam(model, aux_adam="adamw")
    assert taken(model, optimizer) == matrices(model)
    assert len(matrices(model)) == LAYERS * 4
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-4]
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.q_proj.weight"


def test_named_parameters_are_routed_as_the_model() -> None:
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = MuonWithAuxAdam(model.named_parameters(), aux_adam="adamw")
    assert taken(model, optimizer) == matrices(model)
    assert optimizer.param_groups[0]["param_names"][0] == "layers.0.q_proj.weight"


def test_parameters_are_routed_by_shape_which_is_said_once() -> None:
    _say_that_it_goes_by_shape.cache_clear()
    model = Model()
    with pytest.warns(UserWarning, match="went by their shapes"):
        optimizer = MuonWithAuxAdam(model.parameters(), aux_adam="adamw")
    assert taken(model, optimizer) == matrices(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MuonWithAuxAdam(model.parameters(), aux_adam="adamw")


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize(
    ("shape", "uses_muon"),
    [
        ((8,), False),
        ((8, 1), False),
        ((40, 8), False),  # five times as tall as wide
        ((39, 8), True),
        ((8, 40), True),
        ((8, 4, 3, 3), True),
        ((8, 1, 3, 3), False),  # depthwise
    ],
)
def test_a_parameter_by_itself(shape: tuple[int, ...], uses_muon: bool) -> None:
    """torchtune's optimizer in the backward pass makes one optimizer a parameter."""
    optimizer = MuonWithAuxAdam([nn.Parameter(torch.ones(shape))], aux_adam="adamw")
    assert [group["use_muon"] for group in optimizer.param_groups] == [uses_muon]


@pytest.mark.usefixtures("quiet")
def test_repeated_shapes_are_no_embeddings() -> None:
    """LoRA's tall factors come once a layer, and a table of positions comes once."""
    positions = nn.Parameter(torch.ones(16, 8))
    factors = [nn.Parameter(torch.ones(64, 2)) for _ in range(6)]
    optimizer = MuonWithAuxAdam([positions, *factors], aux_adam="adamw")
    muon, aux = optimizer.param_groups
    assert (muon["use_muon"], muon["params"]) == (True, factors)
    assert (aux["use_muon"], aux["params"]) == (False, [positions])


@pytest.mark.parametrize(
    ("name", "shape", "uses_muon"),
    [
        ("transformer.wte.weight", (9, 8), False),
        ("transformer.wpe.weight", (9, 8), False),
        ("model.embed_tokens.weight", (9, 8), False),
        ("_orig_mod.lm_head.weight", (9, 8), False),
        ("output.weight", (9, 8), False),
        ("layers.0.attn.output.weight", (9, 8), True),
        ("backbone.layers.0.mixer.A_log", (9, 8), False),
        ("visual.position_embedding", (9, 8), False),
        ("layers.0.mlp.weight", (9, 8), True),
    ],
)
def test_names_tell_what_shapes_do_not(name: str, shape: tuple[int, int], uses_muon: bool) -> None:
    optimizer = MuonWithAuxAdam([(name, nn.Parameter(torch.ones(shape)))], aux_adam="adamw")
    (group,) = optimizer.param_groups
    assert (group["use_muon"], group["param_names"]) == (uses_muon, [name])


@pytest.mark.parametrize("kind", ["model", "named", "groups"])
def test_plain_options_reach_the_groups(kind: str) -> None:
    """One rate serves all where updates have AdamW's size; vectors do not decay."""
    model = Model()
    params: Any = {"model": model, "named": model.named_parameters()}.get(kind)
    if kind == "groups":
        params = [{"params": list(model.named_parameters())}]
    optimizer = MuonWithAuxAdam(
        params, 2e-4, 0.1, 0.9, adjust_lr_fn="match_rms_adamw", aux_adam="adamw"
    )
    muon = [group for group in optimizer.param_groups if group["use_muon"]]
    aux = [group for group in optimizer.param_groups if not group["use_muon"]]
    assert {group["lr"] for group in muon + aux} == {2e-4}
    assert [(group["momentum"], group["weight_decay"]) for group in muon] == [(0.9, 0.1)]
    decays = {param.ndim: group["weight_decay"] for group in aux for param in group["params"]}
    assert decays == {1: 0.0, 2: 0.1}
    options = optimizer.param_groups[0]
    assert options["adjust_lr_fn"] == "match_rms_adamw"


@pytest.mark.parametrize(
    ("options", "aux_lr"),
    [
        ({"lr": 0.01}, 3e-4),
        ({"lr": 0.01, "aux_lr": 1e-3}, 1e-3),
        ({"lr": 0.01, "rule": "moonlight"}, 0.01),
        ({"lr": 0.01, "rule": "moonlight", "adjust_lr_fn": "original"}, 3e-4),
        ({"lr": torch.tensor(0.01), "adjust_lr_fn": "match_rms_adamw"}, 0.01),
    ],
)
def test_the_rate_of_adamw(options: dict[str, Any], aux_lr: float) -> None:
    optimizer = MuonWithAuxAdam(Model(), aux_adam="adamw", **options)
    rate = optimizer.param_groups[-1]["lr"]
    assert float(rate) == pytest.approx(aux_lr, rel=1e-6)  # of a float32
    assert not isinstance(rate, Tensor) or rate is not options["lr"]


def test_options_of_groups_go_on_to_both_parts() -> None:
    """As Lightning modules and Trainer make them: with and without weight decay."""
    model = Model()
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.2, "lr": 0.5, "betas": (0.8, 0.9), "ns_steps": 3},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAuxAdam(groups, weight_decay=0.1, aux_adam="adamw")
    muon, embeddings, vectors = optimizer.param_groups
    assert (muon["lr"], muon["weight_decay"], muon["ns_steps"]) == (0.5, 0.2, 3)
    assert (embeddings["lr"], embeddings["betas"]) == (0.5, (0.8, 0.9))
    assert "betas" not in muon
    assert "ns_steps" not in embeddings
    assert (vectors["lr"], vectors["weight_decay"]) == (3e-4, 0.0)


@pytest.mark.usefixtures("quiet")
def test_experts_and_convolutions_of_three_dimensions() -> None:
    experts, convolution = nn.Parameter(torch.ones(4, 6, 8)), nn.Parameter(torch.ones(6, 4, 3))
    optimizer = MuonWithAuxAdam([experts, convolution], aux_adam="adamw")
    found = {group["batch_experts"]: group["params"] for group in optimizer.param_groups}
    assert found == {True: [experts], False: [convolution]}


def test_frozen_parameters_are_left_out() -> None:
    model = Model()
    model.layers[0].requires_grad_(False)
    optimizer = MuonWithAuxAdam(model.named_parameters(), aux_adam="adamw")
    assert taken(model, optimizer) == matrices(model)


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ([], ValueError, "at least one parameter to be trained"),
        ([nn.Parameter(torch.ones(2, 2), requires_grad=False)], ValueError, "to be trained"),
        (nn.Parameter(torch.ones(2, 2)), TypeError, "got Parameter"),
        ({nn.Parameter(torch.ones(2, 2))}, TypeError, "got set"),
        (3, TypeError, "got int"),
        ([3], TypeError, "got int"),
        ([{"params": [("w", 3)]}], TypeError, "got int"),
        ([{"params": [nn.Parameter(torch.ones(2))], "is_muon": True}], ValueError, "use_muon"),
        (nn.LayerNorm(4), ValueError, "use AdamW alone"),
    ],
)
def test_bad_parameters(params: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MuonWithAuxAdam(params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected"),
        ({"aux_lr": "fast"}, "aux_lr: expected"),
        ({"weight_decay": -1.0}, "weight_decay: expected"),
        ({"momentum": 1.5}, "momentum: expected"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonWithAuxAdam(Model(), **options)


def test_it_trains_and_comes_back() -> None:
    """A state dict of one that a model made loads into one that its groups made."""
    torch.manual_seed(0)
    model = Model()
    optimizer = MuonWithAuxAdam(model, lr=0.1, aux_adam="adamw")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    before = model.layers[0].q_proj.weight.detach().clone()  # type: ignore[union-attr]
    optimizer.step()
    assert not torch.equal(before, model.layers[0].q_proj.weight)  # type: ignore[union-attr]
    other = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] == 0.1
    assert other.state_bytes() == optimizer.state_bytes()


def test_its_description_has_a_line_a_group() -> None:
    """Kind, size, rate, and what is not at its default."""
    optimizer = MuonWithAuxAdam(Model(), lr=2e-4, aux_adam="adamw", rule="normuon", ns_steps=4)
    elements = LAYERS * WIDTH * (WIDTH + WIDTH // 2 + 8 * WIDTH)
    first, muon, aux, last = repr(optimizer).splitlines()
    assert (first, last) == ("MuonWithAuxAdam(", ")")
    assert muon == (
        f"  Muon: {4 * LAYERS} parameters, {elements:,} elements, lr=0.0002, weight_decay=0.0, "
        "ns_steps=4, rule='normuon', state_format='spectral4',"
    )
    assert aux.startswith("  AdamW: 7 parameters, ")
    assert aux.endswith("lr=0.0003, weight_decay=0.0, aux_adam='adamw',")
