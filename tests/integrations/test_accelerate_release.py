"""Gradient release in a loop of Accelerate's, with accumulation."""

from __future__ import annotations

import accelerate
import torch
from tiny_llama import make_examples, make_model
from torch import Tensor

from lowbit_muon import MuonWithAuxAdam, attach_gradient_release, muon_param_groups


def train(*, released: bool) -> list[Tensor]:
    """Weights after two steps of two batches."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = make_model()
    optimizer = MuonWithAuxAdam(muon_param_groups(model))
    model, prepared = accelerator.prepare(model, optimizer)
    if released:
        attach_gradient_release(model, optimizer)
    for example in make_examples(4):
        with accelerator.accumulate(model):
            loss = model(**{name: row[None] for name, row in example.items()}).loss
            accelerator.backward(loss)
            has_gradients = any(param.grad is not None for param in model.parameters())
            assert has_gradients != (released and accelerator.sync_gradients)
            prepared.step()
            prepared.zero_grad()
    return [param.detach().clone() for param in model.parameters()]


def test_weights_are_those_of_the_usual_loop() -> None:
    for usual, released in zip(train(released=False), train(released=True), strict=True):
        assert torch.equal(usual, released)
