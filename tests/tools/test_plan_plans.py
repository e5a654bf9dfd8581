"""Rows of the table, what changes them, and the smallest change after which something fits."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.step import peak_bytes
from lowbit_muon import RULES, Muon, MuonWithAuxAdam, attach_gradient_release, muon_param_groups
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.memory import Routing, route, rule_state_bytes
from lowbit_muon.tools.plan.plans import (
    ADAMW,
    ADAMW8BIT,
    EXACTNESS,
    LORA_RANK,
    TORCH_MUON,
    Plan,
    Setup,
    adapters,
    make_plans,
    our_plans,
    refusal,
    smallest_change,
)

OTHERS = {ADAMW, ADAMW8BIT, TORCH_MUON}
HEAVY = Setup(torch.float32, aux_adam="adamw")


def small_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(500, 96),
            "layers": nn.ModuleList([nn.Linear(96, 160), nn.Linear(160, 96, bias=False)]),
            "norm": nn.LayerNorm(96),
        }
    )


ROUTING = route(small_model())


def row(setup: Setup, name: str = "spectral4", routing: Routing = ROUTING) -> Plan:
    (plan,) = our_plans(routing, setup, [name])
    return plan


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_plans_cover_every_format_and_are_sorted(device: Any) -> None:
    plans = make_plans(ROUTING, Setup(device=device, activations=10**9))
    by_name = {plan.name: plan for plan in plans}
    assert set(by_name) == {*PRESETS, *OTHERS}
    assert [plan.total for plan in plans] == sorted(plan.total for plan in plans)
    weights = 2 * sum(p.numel() for p in small_model().parameters())
    for plan in plans:
        assert plan.weights == plan.gradients == weights
        # activations are gone before the step
        assert plan.total == 2 * weights + plan.state + 10**9
    assert by_name["fp32"].momentum_bits == 32
    assert by_name[ADAMW].momentum_bits == 32  # two moments of 16 bits
    assert 4 < by_name["spectral4"].momentum_bits < 5
    assert set(EXACTNESS) <= set(PRESETS)


def test_a_rule_leaves_out_the_formats_that_refuse_it() -> None:
    rule = RULES["namo"]
    setup = Setup(torch.float32, "cpu", "adamw", rule=rule)
    plans = {plan.name for plan in make_plans(ROUTING, setup)}
    assert plans == {*PRESETS, *OTHERS} - {"muonq4"}
    with pytest.raises(ValueError, match="divides out in every step") as refused:
        Muon([nn.Parameter(torch.zeros(4, 4))], rule=rule, state_format="muonq4", nesterov=False)
    assert refusal(rule, PRESETS["muonq4"]) == str(refused.value)
    assert refusal(rule, PRESETS["spectral4"]) == ""


def test_the_same_adamw_is_beside_every_muon() -> None:
    """8 bits save two bytes of each element of the embedding, less scales and tables."""
    wide, narrow = (
        {plan.name: plan.state for plan in make_plans(ROUTING, Setup(aux_adam=kind))}
        for kind in ("adamw", "adamw8bit")
    )
    saved = {name: wide[name] - narrow[name] for name in wide}
    assert saved[ADAMW] == saved[ADAMW8BIT] == 0
    assert {saved[name] for name in (*PRESETS, TORCH_MUON)} == {saved["fp32"]}
    scales, tables, vectors = 2 * 4 * 188, 2 * 4 * 256, 4 * (160 + 96 + 96)  # 48000 / 256 = 187.5
    assert saved["fp32"] == 2 * 500 * 96 - scales - tables - vectors


class Tied(nn.Module):
    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(4000, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(3))
        self.head = nn.Linear(64, 4000, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().sum()


@pytest.mark.parametrize("tied", [True, False])
def test_gradient_release_holds_no_more_than_planned(tied: bool) -> None:
    """The peak of a whole backward pass that steps, above weights and state, of one token.

    A tied embedding has two gradients, of input and output, which torch adds to each other; it does
    so before the step, and the plan has both at once.
    """
    model = Tied(tied=tied)
    optimizer = MuonWithAuxAdam(muon_param_groups(model), aux_adam="adamw")
    attach_gradient_release(model, optimizer)
    ids = torch.tensor([3])

    def step() -> None:
        model(ids).backward()
        optimizer.step()

    step()
    routing = route(model, tied=tied)
    plan = row(Setup(torch.float32, "cpu", "adamw", gradient_release=True), routing=routing)
    measured = peak_bytes(step)
    activations = 4 * 4000 * 6  # logits, squares, and what their backward pass makes of them
    assert measured <= plan.gradients + plan.workspace + activations
    # AdamW's step takes twice the embedding's size: 1 + 2 of 1 + 2, and with a tie of 3 + 2.
    assert measured >= (3 / 5 if tied else 1) * (plan.gradients + plan.workspace)
    assert plan.gradients == (3 if tied else 1) * 4 * 4000 * 64


def test_gradient_release_adds_activations_to_the_workspace() -> None:
    plan = row(Setup(gradient_release=True, activations=10**6))
    assert plan.total == plan.weights + plan.gradients + plan.state + plan.workspace + 10**6


def test_compensation_is_a_byte_of_each_element_that_muon_takes() -> None:
    model = small_model().to(torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    sizes = []
    for chosen in (True, False):
        groups = muon_param_groups(model)
        optimizer = MuonWithAuxAdam(groups, aux_adam="adamw", compensation=chosen)
        optimizer.step()
        sizes.append(optimizer.state_bytes())
    planned = row(Setup(compensation=True)).state - row(Setup()).state
    assert planned == sizes[0] - sizes[1] == ROUTING.muon_elements


def test_offload_moves_the_momentum_and_what_a_rule_keeps() -> None:
    rule = RULES["namo_d"]
    usual, offloaded = (row(Setup(rule=rule, offload=chosen)) for chosen in (False, True))
    assert offloaded.host == usual.state - offloaded.state > rule_state_bytes(ROUTING, rule) > 0
    assert usual.workspace < offloaded.workspace <= usual.workspace + offloaded.host


def test_adapters_are_those_that_peft_makes() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=300,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    routing, elements = route(model), sum(p.numel() for p in model.parameters())
    chosen = peft.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # that PEFT uses an older name
        tuned = peft.get_peft_model(model, chosen)
    assert route(tuned) == adapters(routing, 8)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    plan = row(Setup(lora=8), routing=routing)
    assert plan.gradients == sum(p.numel() * p.itemsize for p in trained)
    assert plan.weights == 2 * elements + plan.gradients


def test_a_model_without_linear_layers_has_no_adapters() -> None:
    routing = Routing(Counter({((8, 3, 3, 3), False): 1}), Counter())
    with pytest.raises(UserError, match="--lora: expected a model with linear layers"):
        adapters(routing, 8)
    assert smallest_change(routing, Setup(), 1) is None


# From what costs least to what costs most.
CHANGED: list[dict[str, Any]] = [
    {"aux_adam": "adamw8bit"}, {"gradient_release": True}, {"offload": True},
    {"dtype": torch.bfloat16}, {"lora": LORA_RANK},
]  # fmt: skip


def test_the_smallest_change_is_the_cheapest_that_fits() -> None:
    """Against all subsets of changes, for as much memory as each of them takes."""
    least: dict[frozenset[int], int] = {}
    for size in range(1, 6):
        for chosen in itertools.combinations(range(5), size):
            options: dict[str, Any] = {}
            for index in chosen:
                options |= CHANGED[index]
            changed = dataclasses.replace(HEAVY, **options)
            plans = our_plans(ROUTING, changed, EXACTNESS)
            least[frozenset(chosen)] = min(plan.total for plan in plans)
    for memory in least.values():
        found = smallest_change(ROUTING, HEAVY, memory)
        assert found is not None
        changed, plan = found
        assert plan.total <= memory
        fitting = [chosen for chosen, total in least.items() if total <= memory]
        expected = min(fitting, key=lambda chosen: sorted(chosen, reverse=True))
        made = {
            index
            for index, change in enumerate(CHANGED)
            for name, value in change.items()
            if getattr(changed, name) == value
        }
        assert made == expected
        more_exact = EXACTNESS[: EXACTNESS.index(plan.name)]
        assert not list(our_plans(ROUTING, changed, more_exact, memory))
    assert smallest_change(ROUTING, HEAVY, min(least.values()) - 1) is None


def test_changes_that_make_no_difference_are_not_proposed() -> None:
    on_a_cpu = dataclasses.replace(HEAVY, device="cpu")
    tight = row(dataclasses.replace(on_a_cpu, lora=LORA_RANK, dtype=torch.bfloat16), "spectral2")
    found = smallest_change(ROUTING, on_a_cpu, tight.total)
    assert found is not None
    assert not found[0].offload
    assert smallest_change(ROUTING, dataclasses.replace(found[0], lora=8), 1) is None
    compensated = Setup(compensation=True)
    memory = row(Setup(gradient_release=True), "spectral2").total
    found = smallest_change(ROUTING, compensated, memory)
    assert found is not None
    assert not found[0].compensation
