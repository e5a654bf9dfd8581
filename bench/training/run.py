"""One training run, in a process of its own thread."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.training.methods import AUX_LR, METHODS, make_optimizer
from bench.training.models import CONTEXT, GPT, make_model, model_label
from bench.training.text import corpus
from lowbit_muon import MuonWithAuxAdam
from lowbit_muon.tools.finetune.llama import Llama

SEQUENCES = 8  # of CONTEXT bytes a step
WARMUP = 20  # steps
FINAL_FACTOR = 0.1  # of the learning rate, reached linearly


@dataclass(frozen=True)
class Plan:
    """What a run computes, all of it: equal plans give equal losses."""

    model: str
    method: str
    lr: float
    seed: int
    steps: int
    held_out_bytes: int
    evaluations: int
    width: int
    layers: int

    @property
    def key(self) -> str:
        """Unique among the runs of a results file."""
        model = model_label(self.model, self.width, self.layers)
        return f"{model} {self.method} lr {self.lr:g} seed {self.seed}"


def train(plan: Plan) -> dict[str, Any]:
    """The held-out curve [[bytes seen, nats a byte], ...] and bytes of the optimizer's state.

    The seed draws weights and order of the data, the same for every method.
    """
    torch.set_num_threads(1)
    text, digest = corpus(plan.held_out_bytes, CONTEXT)
    model = make_model(plan.model, plan.seed, plan.width, plan.layers)
    optimizer = make_optimizer(model, METHODS[plan.method], plan.lr, plan.seed)
    points = {round((i + 1) * plan.steps / plan.evaluations) for i in range(plan.evaluations)}
    curve: list[list[float]] = []
    for step in range(plan.steps):
        set_learning_rates(optimizer, plan.lr, factor(step, plan.steps))
        model.loss(text.batch(step, SEQUENCES, plan.seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in points:
            loss = held_out_loss(model, text.held_out)
            curve.append([(step + 1) * SEQUENCES * CONTEXT, loss])
    return {"curve": curve, "state_bytes": optimizer.state_bytes(), "text": digest}


def factor(step: int, steps: int) -> float:
    """Of the learning rates in step 0, 1, ...: warm-up, then linearly down."""
    left = (steps - step) / steps
    return min(1.0, (step + 1) / WARMUP) * (FINAL_FACTOR + (1 - FINAL_FACTOR) * left)


def set_learning_rates(optimizer: MuonWithAuxAdam, lr: float, factor: float) -> None:
    """Those of the matrices, which AdamW decays where it takes them, and of the rest."""
    for group in optimizer.param_groups:
        of_matrices = group["use_muon"] or group["weight_decay"]
        group["lr"] = factor * (lr if of_matrices else AUX_LR)


@torch.no_grad()
def held_out_loss(model: GPT | Llama, ids: Tensor) -> float:
    """Mean over all windows of the held-out text, in nats a byte."""
    return statistics.fmean(model.loss(batch).item() for batch in windows(ids))


def windows(ids: Tensor) -> Iterator[Tensor]:
    """Batches int64 [SEQUENCES, CONTEXT + 1] that cover the text; what is left over is cut off."""
    starts = torch.arange((len(ids) - 1) // CONTEXT)[:, None] * CONTEXT
    for part in starts.split(SEQUENCES):
        yield ids[part + torch.arange(CONTEXT + 1)]
