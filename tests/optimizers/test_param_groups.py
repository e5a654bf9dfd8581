"""muon_param_groups: where each parameter of a model goes, by structure."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowbit_muon import PRESETS, StateFormat
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.optimizers.param_groups import muon_param_groups


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(nn.functional.scaled_dot_product_attention(query, key, value))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.mlp = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.attn(self.norm(x)))


class LanguageModel(nn.Module):
    """Embedding, blocks, norm and a head; the vocabulary is as wide as the model, to be nasty."""

    def __init__(self, width: int = 8, vocabulary: int = 8, head: str = "head") -> None:
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(16, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        self.scale = nn.Parameter(torch.ones(()))
        if head != "none":
            setattr(self, head, nn.Linear(width, vocabulary, bias=False))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)) * self.scale


BLOCK_MATRICES = {
    f"blocks.{i}.{name}.weight" for i in range(2) for name in ("attn.c_attn", "attn.c_proj", "mlp")
}


def names(groups: list[dict[str, Any]], use_muon: bool) -> set[str]:
    return {n for group in groups if group["use_muon"] is use_muon for n in group["param_names"]}


def assert_partition(groups: list[dict[str, Any]], model: nn.Module) -> None:
    """Every trainable parameter in one group, once, under one of its names."""
    found = [param for group in groups for param in group["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {param for param in model.parameters() if param.requires_grad}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert by_name[name] is param


@pytest.mark.parametrize("vocabulary", [8, 50])
def test_a_language_model_with_an_untied_head(vocabulary: int) -> None:
    model = LanguageModel(vocabulary=vocabulary)
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    assert names(groups, True) == BLOCK_MATRICES
    assert {"head.weight", "wte.weight", "wpe.weight", "scale"} <= names(groups, False)


def test_a_tied_head_is_listed_once_with_the_embedding() -> None:
    model = LanguageModel()
    model.head.weight = model.wte.weight
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    assert names(groups, True) == BLOCK_MATRICES
    assert "wte.weight" in names(groups, False)


def test_a_tied_embedding_decides_even_if_a_linear_layer_comes_first() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(6, 30, bias=False)
            self.inner = nn.Linear(6, 6, bias=False)
            self.wte = nn.Embedding(30, 6)
            self.project.weight = self.wte.weight

    groups = muon_param_groups(HeadFirst())
    assert names(groups, True) == {"inner.weight"}
    assert names(groups, False) == {"project.weight"}


@pytest.mark.parametrize("head", ["lm_head", "embed_out"])
def test_a_head_is_known_by_name_if_padded(head: str) -> None:
    model = LanguageModel(head=head)
    setattr(model, head, nn.Linear(8, 64, bias=False))
    assert f"{head}.weight" in names(muon_param_groups(model), False)


def test_a_head_is_known_by_the_models_own_word() -> None:
    class Declares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = nn.Linear(8, 99, bias=False)
            self.body = LanguageModel(head="none")

        def get_output_embeddings(self) -> nn.Module:
            return self.decoder

    groups = muon_param_groups(Declares())
    assert names(groups, False) >= {"decoder.weight"}
    assert names(groups, True) == {f"body.{name}" for name in BLOCK_MATRICES}


def test_an_encoder_without_a_head_keeps_its_last_layer_with_muon() -> None:
    """The last linear layer has as many outputs as the vocabulary has rows, but is in a stack."""
    groups = muon_param_groups(LanguageModel(head="none"))
    assert names(groups, True) == BLOCK_MATRICES


def test_convolutions_norms_and_biases() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv1d(8, 8, 3, groups=8), nn.GroupNorm(2, 8),
        nn.ConvTranspose2d(8, 4, 2), nn.PReLU(4), nn.Linear(4, 10), nn.LayerNorm((4, 10)),
        nn.Linear(10, 1),
    )  # fmt: skip
    groups = muon_param_groups(model, aux_patterns=[r"^0\."])
    assert_partition(groups, model)
    assert names(groups, True) == {"4.weight", "6.weight"}
    assert all(not group.get("batch_experts") for group in groups)


def test_unknown_modules_are_read_by_shape_and_name() -> None:
    class Unknown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixing = nn.Parameter(torch.ones(6, 7))
            self.gate_up_proj = nn.Parameter(torch.ones(4, 6, 7))
            self.gate_up_proj_bias = nn.Parameter(torch.ones(4, 7))
            self.position_embedding = nn.Parameter(torch.ones(1, 9, 6))
            self.cls = nn.Parameter(torch.ones(1, 1, 6))
            self.column = nn.Parameter(torch.ones(6, 1))

    model = Unknown()
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    assert names(groups, True) == {"mixing", "gate_up_proj"}
    stacks = [group for group in groups if group["use_muon"] and group["batch_experts"]]
    assert [group["param_names"] for group in stacks] == [["gate_up_proj"]]


def test_multihead_attention_and_recurrent_layers() -> None:
    model = nn.ModuleDict({"a": nn.MultiheadAttention(6, 2), "r": nn.LSTM(4, 5)})
    groups = muon_param_groups(model, split_fused={"a.in_proj_weight": 3, r"r.weight_": 4})
    assert names(groups, True) == {
        "a.in_proj_weight", "a.out_proj.weight", "r.weight_ih_l0", "r.weight_hh_l0"
    }  # fmt: skip
    assert {group["row_splits"] for group in groups if group["use_muon"]} == {
        (6, 6, 6), (5, 5, 5, 5), None
    }  # fmt: skip


def test_frozen_and_shared_parameters() -> None:
    model = LanguageModel()
    model.blocks[1].mlp.weight = model.blocks[0].mlp.weight
    model.blocks[0].attn.c_attn.weight.requires_grad_(False)
    model.wpe.weight.requires_grad_(False)
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    assert names(groups, True) == BLOCK_MATRICES - {
        "blocks.1.mlp.weight", "blocks.0.attn.c_attn.weight"
    }  # fmt: skip


def test_options_reach_their_groups() -> None:
    groups = muon_param_groups(
        LanguageModel(), lr=0.1, momentum=0.8, nesterov=False, weight_decay=0.2,
        adjust_lr_fn="match_rms_adamw", aux_lr=0.3, aux_betas=(0.5, 0.6), aux_eps=1e-6,
        aux_weight_decay=0.4,
    )  # fmt: skip
    muon, aux = groups
    assert (muon["lr"], muon["momentum"], muon["nesterov"]) == (0.1, 0.8, False)
    assert (muon["weight_decay"], muon["adjust_lr_fn"]) == (0.2, "match_rms_adamw")
    assert (aux["lr"], aux["betas"], aux["eps"]) == (0.3, (0.5, 0.6), 1e-6)
    assert aux["weight_decay"] == 0.4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"split_fused": {r"\.c_attn$": 3}}, (8, 8, 8)),
        ({"split_fused": {"c_attn": (8, 4, 12)}}, (8, 4, 12)),
        ({"split_heads": {r"c_attn\.weight": 4}}, (4,) * 6),
    ],
)
def test_splits_make_groups_of_their_own(
    options: dict[str, Any], expected: tuple[int, ...]
) -> None:
    groups = muon_param_groups(LanguageModel(), **options)
    split, plain = sorted(groups[:-1], key=lambda group: group["row_splits"] is None)
    assert split["param_names"] == [f"blocks.{i}.attn.c_attn.weight" for i in range(2)]
    assert split["row_splits"] == expected
    assert plain["row_splits"] is None
    assert len(plain["params"]) == 4


class Conv1D(nn.Module):
    """Named and shaped like the linear layer of Hugging Face's GPT-2: outputs in columns."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, 18))


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Embedding(5, 6), {}, "expected matrices for Muon, got none among 1"),
        (LanguageModel(), {"aux_patterns": [""]}, "got none"),
        (LanguageModel(), {"split_fused": {"qkv": 3}}, "'qkv' matches no matrix"),
        (LanguageModel(), {"split_heads": {"wte": 4}}, "'wte' matches no matrix"),
        (LanguageModel(), {"split_fused": {"c_attn": 7}}, "add up to the 24 rows of blocks.0.attn"),
        (LanguageModel(), {"split_fused": {"c_attn": (8, 8)}}, "add up to the 24 rows"),
        (LanguageModel(), {"split_fused": {"c_attn": (24, 0)}}, "add up to the 24 rows"),
        (LanguageModel(), {"split_heads": {"c_attn": 5}}, "add up to the 24 rows"),
        (LanguageModel(), {"split_heads": {"c_attn": 0}}, "add up to the 24 rows"),
        (LanguageModel(), {"split_heads": {"c_": 4}, "split_fused": {"attn": 2}}, "one split"),
        (nn.Sequential(Conv1D()), {"split_fused": {"0": 3}}, "outputs in rows, got 0.weight"),
        (nn.Sequential(nn.Conv2d(4, 6, 3)), {"split_fused": {"0": 3}}, "outputs in rows"),
    ],
)
def test_what_cannot_be_meant_is_refused(
    model: nn.Module, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        muon_param_groups(model, **options)


@pytest.mark.parametrize("options", [{}, {"split_heads": {"c_attn": 4}}])
def test_the_groups_train(options: dict[str, Any]) -> None:
    model = LanguageModel(vocabulary=20)
    optimizer = MuonWithAuxAdam(muon_param_groups(model, **options), aux_adam="adamw")
    tokens = torch.arange(12).view(2, 6) % 20
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(optimizer.state) == set(model.parameters())


# --- overrides ---


def stack_of_layers() -> nn.ModuleDict:
    layer = {"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)}
    return nn.ModuleDict(
        {"layers": nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(2))}
    )


def formats_by_name(groups: list[dict[str, Any]]) -> dict[str, Any]:
    """name -> state format, which is absent where the optimizer's own counts."""
    return {
        name: group.get("state_format")
        for group in groups
        if group["use_muon"]
        for name in group["param_names"]
    }


def test_overrides_by_pattern_and_the_first_that_matches() -> None:
    groups = muon_param_groups(
        stack_of_layers(),
        overrides={
            "layers.0.down.weight": {"state_format": "spectral3", "lr": 0.5},
            "layers.*.down.weight": "linear8",
        },
    )
    assert formats_by_name(groups) == {
        "layers.0.up.weight": None,
        "layers.1.up.weight": None,
        "layers.0.down.weight": "spectral3",
        "layers.1.down.weight": "linear8",
    }
    assert [g["lr"] for g in groups if "layers.0.down.weight" in g["param_names"]] == [0.5]
    optimizer = MuonWithAuxAdam(groups, aux_adam="adamw")
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()
    stored = {
        name: optimizer.state[param]["codes"].nbytes
        for group in optimizer.param_groups if group["use_muon"]
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }  # fmt: skip
    assert stored["layers.1.down.weight"] == 2 * stored["layers.1.up.weight"]  # 8 bits, and 4


def test_overrides_by_function_join_equal_ones_in_a_group() -> None:
    coarse = dataclasses.replace(PRESETS["mulaw4"], factor_divisor=4)

    def choose(name: str, param: torch.Tensor) -> StateFormat | None:
        return coarse if param.shape[0] == 8 and ".down." in name else None

    groups = [g for g in muon_param_groups(stack_of_layers(), overrides=choose) if g["use_muon"]]
    assert [(len(g["params"]), g.get("state_format")) for g in groups] == [(2, None), (2, coarse)]


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ({"layers.9.*": "linear8"}, ValueError, "'layers.9.*' matches no parameter"),
        ({"layers.*": "int5"}, ValueError, "overrides['layers.*']: state_format: expected one of"),
        ({"layers.*": {"stat_format": "nf4"}}, ValueError, "got stat_format"),
        ({"layers.*": {"row_splits": (4, 4)}}, ValueError, "got row_splits"),
        ({"layers.*": {"momentum": 1.5}}, ValueError, "momentum: expected a number in [0, 1)"),
        ({"layers.*": 4}, TypeError, "expected a state format or a dict of options, got int"),
    ],
)
def test_bad_overrides_are_named(override: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        muon_param_groups(stack_of_layers(), overrides=override)


class Mamba(nn.Module):
    """The parameters of a Mamba layer (arXiv 2312.00752), under the names of its implementation."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(6, 24, bias=False), nn.Linear(12, 6, bias=False)
        self.conv1d = nn.Conv1d(12, 12, 4, groups=12)
        self.x_proj, self.dt_proj = nn.Linear(12, 9, bias=False), nn.Linear(3, 12)
        self.A_log = nn.Parameter(torch.ones(12, 4))
        self.D = nn.Parameter(torch.ones(12))


class Rwkv(nn.Module):
    """Of RWKV 6 and 7 (arXiv 2404.05892, 2503.14456): factors, and low-rank operators."""

    def __init__(self) -> None:
        super().__init__()
        self.time_maa = nn.Parameter(torch.ones(5, 8))
        self.time_decay = nn.Parameter(torch.ones(2, 4))
        self.time_faaaa = nn.Parameter(torch.ones(2, 4))
        self.r_k = nn.Parameter(torch.ones(2, 4))
        self.time_decay_w1 = nn.Parameter(torch.ones(8, 3))
        self.w2 = nn.Parameter(torch.ones(3, 8))


def test_only_operators_of_state_space_models_go_to_muon() -> None:
    model = nn.ModuleDict({"mamba": Mamba(), "rwkv": Rwkv()})
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    assert names(groups, True) == {
        "mamba.in_proj.weight", "mamba.out_proj.weight", "mamba.x_proj.weight",
        "mamba.dt_proj.weight", "rwkv.time_decay_w1", "rwkv.w2",
    }  # fmt: skip


class Projected(nn.Module):
    """A learnable square matrix behind an embedding (Outlier-Safe Pre-Training)."""

    def __init__(self, *, linear: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 8)  # as wide as it is long, to be nasty
        if linear:
            self.emb_proj = nn.Linear(8, 8, bias=False)
        else:
            self.emb_proj = nn.Parameter(torch.eye(8))
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(2))


@pytest.mark.parametrize(("linear", "name"), [(True, "emb_proj.weight"), (False, "emb_proj")])
def test_a_projection_behind_an_embedding_goes_to_muon(linear: bool, name: str) -> None:
    groups = muon_param_groups(Projected(linear=linear))
    assert names(groups, True) == {name, "layers.0.weight", "layers.1.weight"}
    assert names(groups, False) == {"embedding.weight"}


def parametrised() -> nn.Sequential:
    from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

    return nn.Sequential(
        weight_norm(nn.Conv1d(8, 8, 5, groups=2), dim=2), spectral_norm(nn.Conv2d(4, 6, 3)),
        weight_norm(nn.Embedding(10, 4)), orthogonal(nn.Linear(4, 4)), weight_norm(nn.Linear(4, 6)),
    )  # fmt: skip


def test_a_parametrised_weight_is_its_modules_own() -> None:
    model = parametrised()
    groups = muon_param_groups(model)
    assert_partition(groups, model)
    weights = {f"{i}.parametrizations.weight.original" for i in (1, 3)}
    weights |= {f"{i}.parametrizations.weight.original1" for i in (0, 4)}
    assert names(groups, True) == weights
    assert not any(group.get("batch_experts") for group in groups)
    assert names(muon_param_groups(parametrised()[4], aux_patterns=["^bias"]), True) == {
        "parametrizations.weight.original1"
    }


def wrapped() -> dict[str, nn.Module]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 4))

    inner = net()
    inner[0] = torch.compile(inner[0])  # type: ignore[assignment]
    inner[2] = checkpoint_wrapper(inner[2])
    return {
        "plain": net(),
        "compiled": torch.compile(net()),  # type: ignore[dict-item]
        "parallel": nn.DataParallel(net()),
        "both": torch.compile(nn.DataParallel(net())),  # type: ignore[dict-item]
        "inner": inner,
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["plain", "compiled", "parallel", "both", "inner"])
def test_wrappers_are_looked_through(name: str) -> None:
    model = wrapped()[name]
    groups = muon_param_groups(
        model, aux_patterns=[r"^2\."], overrides={"0.*": {"lr": 0.5}, "1.weight": {"eps": 1e-6}},
        no_decay=[r"^1\.weight$"], aux_weight_decay=0.1,
    )  # fmt: skip
    found = {
        name: (group["use_muon"], group["lr"], group.get("eps"))
        for group in groups
        for name in group["param_names"]
    }
    assert found == {
        "0.weight": (True, 0.5, None), "0.bias": (False, 0.5, 1e-10),
        "1.weight": (False, 3e-4, 1e-6), "1.bias": (False, 3e-4, 1e-10),
        "2.weight": (False, 3e-4, 1e-10), "2.bias": (False, 3e-4, 1e-10),
    }  # fmt: skip
    # Names as the wrapped model gives them are found as well.
    raw = next(name for name, _ in model.named_parameters())
    assert names(muon_param_groups(model, aux_patterns=[re.escape(raw)]), True) == {"2.weight"}


@pytest.mark.parametrize("option", ["aux_patterns", "no_decay"])
def test_a_pattern_without_a_match_is_refused(option: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    with pytest.raises(ValueError, match=rf"{option}: 'hed' matches no parameter"):
        muon_param_groups(model, **{option: ["0.bias", "hed"]})
    with pytest.raises(TypeError, match=rf"{option}: expected a sequence of strings, got 'head'"):
        muon_param_groups(model, **{option: "head"})
    model[1].requires_grad_(False)  # what is frozen is there, too
    muon_param_groups(model, **{option: ["^1"]})


def test_overrides_reach_both_kinds_by_the_options_that_they_have() -> None:
    model = nn.ModuleDict(
        {"emb": nn.Embedding(50, 32), "norm": nn.LayerNorm(32), "fc": nn.Linear(32, 32)}
    )
    groups = muon_param_groups(
        model, weight_decay=0.1, aux_weight_decay=0.1,
        overrides={
            "norm.*": {"weight_decay": 0.0}, "emb.*": {"lr": 3e-3, "betas": (0.8, 0.9)},
            "fc.*": {"state_format": "linear8", "lr": 0.3},
        },
    )  # fmt: skip
    keys = ("use_muon", "lr", "weight_decay", "state_format", "betas")
    found = {name: [g.get(key) for key in keys] for g in groups for name in g["param_names"]}
    assert found == {
        "fc.weight": [True, 0.3, 0.1, "linear8", None],
        "fc.bias": [False, 0.3, 0.1, None, (0.9, 0.95)],
        "norm.weight": [False, 3e-4, 0.0, None, (0.9, 0.95)],
        "norm.bias": [False, 3e-4, 0.0, None, (0.9, 0.95)],
        "emb.weight": [False, 3e-3, 0.1, None, (0.8, 0.9)],
    }
    MuonWithAuxAdam(groups)
    by_function = muon_param_groups(
        model, overrides=lambda name, param: {"weight_decay": 0.5} if param.ndim == 1 else "nf4"
    )
    decays = {name: g.get("weight_decay", 0.0) for g in by_function for name in g["param_names"]}
    assert decays == {
        "fc.weight": 0.0, "fc.bias": 0.5, "norm.weight": 0.5, "norm.bias": 0.5, "emb.weight": 0.0
    }  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"emb.*": "linear8"},
            "'emb.*' matches no parameter that has 'state_format', an option of",
        ),
        ({"fc.weight": {"betas": (0.5, 0.5)}}, "that has 'betas', an option of AdamW"),
        ({"emb.*": {"lr": 0.1, "momentum": 0.5}}, "that has 'momentum', an option of Muon"),
        ({"emb.*": {"betas": (0.5, 1.5)}}, "overrides['emb.*']: betas: expected two numbers"),
    ],
)
def test_an_override_that_reaches_nothing_is_refused(overrides: Any, message: str) -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(50, 32), "fc": nn.Linear(32, 32)})
    with pytest.raises(ValueError, match=re.escape(message)):
        muon_param_groups(model, overrides=overrides)


def test_no_decay_spares_vectors_and_norms() -> None:
    model = nn.ModuleDict(
        {"emb": nn.Embedding(50, 32), "norm": nn.LayerNorm((2, 32)), "fc": nn.Linear(32, 32)}
    )
    groups = muon_param_groups(
        model, weight_decay=0.1, aux_weight_decay=0.2, no_decay=True,
        overrides={"fc.bias": {"weight_decay": 0.3}},
    )  # fmt: skip
    decays = {name: g.get("weight_decay", 0.0) for g in groups for name in g["param_names"]}
    assert decays == {
        "fc.weight": 0.1, "fc.bias": 0.3, "norm.weight": 0.0, "norm.bias": 0.0, "emb.weight": 0.2
    }  # fmt: skip


def test_each_group_has_a_tensor_lr_of_its_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.experts = nn.Linear(8, 8), nn.Parameter(torch.randn(2, 8, 8))

    rates = []
    for lr in (0.02, torch.tensor(0.02)):
        optimizer = MuonWithAuxAdam(muon_param_groups(Model(), lr=lr), aux_adam="adamw")
        torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda _, k=k: k for k in (1.0, 0.1, 0.5)])
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
    assert rates[1] == pytest.approx(rates[0], rel=1e-6)  # float32
