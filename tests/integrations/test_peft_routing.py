"""Which optimizer gets which parameter of an adapter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
from tiny_llama import make_model

from lowbit_muon import muon_param_groups

# PEFT reads a property that transformers renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def route(**options: Any) -> tuple[set[str], set[str]]:
    """Names of the parameters that Muon and AdamW take."""
    model = peft.get_peft_model(make_model(), peft.LoraConfig(r=4, **options))
    groups = muon_param_groups(model)
    muon, aux = (
        {name for group in groups if group["use_muon"] == uses for name in group["param_names"]}
        for uses in (True, False)
    )
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert muon | aux == trainable
    assert not muon & aux
    return muon, aux


@pytest.mark.parametrize("use_dora", [False, True])
def test_both_factors_go_to_muon_and_magnitudes_to_adamw(use_dora: bool) -> None:
    muon, aux = route(target_modules="all-linear", use_dora=use_dora)
    assert len(muon) == 2 * 7 * 2  # two factors of seven projections in two layers
    assert all(".lora_A." in name or ".lora_B." in name for name in muon)
    assert len(aux) == (7 * 2 if use_dora else 0)
    assert all("lora_magnitude_vector" in name for name in aux)


def test_factors_of_an_embedding_go_to_adamw() -> None:
    muon, aux = route(target_modules=["q_proj", "embed_tokens"])
    assert all("q_proj" in name for name in muon)
    assert len(aux) == 2
    assert all("lora_embedding" in name for name in aux)


def test_factors_of_the_head_go_to_adamw() -> None:
    muon, aux = route(target_modules=["q_proj", "lm_head"])
    assert all("q_proj" in name for name in muon)
    assert len(aux) == 2
    assert all("lm_head.lora_" in name for name in aux)


def test_layers_trained_in_full_are_taken_as_what_they_are() -> None:
    muon, aux = route(
        target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head", "norm", "o_proj"]
    )
    assert all("q_proj.lora_" in name or "o_proj.modules_to_save" in name for name in muon)
    assert sum("o_proj" in name for name in muon) == 2
    assert len(aux) == 2 + 5  # embedding, head and every norm
    assert all("embed_tokens" in name or "lm_head" in name or "norm" in name for name in aux)


def test_tokens_trained_one_by_one_go_to_adamw() -> None:
    _, aux = route(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    assert [name.split(".")[-2] for name in aux] == ["trainable_tokens_delta"]
