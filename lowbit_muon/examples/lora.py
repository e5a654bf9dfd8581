"""Fine-tune LoRA adapters (peft) of a small GPT: it knows a book, and learns it in capitals.

    python -m lowbit_muon.examples.lora --plot loss.svg

An adapter is two thin matrices, which Muon takes as they are; the frozen weights are left out. The
option that matters: adjust_lr_fn="match_rms_adamw", which gives updates AdamW's size.
"""

from __future__ import annotations

import copy
import functools

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lowbit_muon import MuonWithAuxAdam
from lowbit_muon.examples.common import Run, bible, compare, counts, state_bytes, trapezoid, windows
from lowbit_muon.examples.nanochat import CONTEXT, GPT, SEQUENCES, next_byte_loss

TITLE = "LoRA of rank 8, nats a byte"
RANK = 8
STEPS = 80
PRETRAINING_STEPS = 100
# For each method the best that bench.gallery found.
RATES = {"fp32": 0.02, "spectral4": 0.02, "adamw": 0.016}


@functools.cache
def pretrained() -> GPT:
    """A GPT that has read the book as it is printed; the same for every run."""
    torch.manual_seed(0)
    model = GPT()
    optimizer = MuonWithAuxAdam(model, lr=0.02, aux_lr=3e-3, aux_adam="adamw")
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, PRETRAINING_STEPS))
    generator = torch.Generator().manual_seed(0)
    for _ in range(PRETRAINING_STEPS):
        next_byte_loss(model, windows(bible(), SEQUENCES, CONTEXT + 1, generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def capitals(text: Tensor) -> Tensor:
    """ASCII's small letters as capitals."""
    return torch.where((text >= ord("a")) & (text <= ord("z")), text - 32, text)


def make_optimizer(model: nn.Module, method: str, lr: float) -> Optimizer:
    """Muon with the momentum in a format, or AdamW."""
    if method == "adamw":
        trained = [param for param in model.parameters() if param.requires_grad]
        return torch.optim.AdamW(trained, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    return MuonWithAuxAdam(
        model, lr=lr, adjust_lr_fn="match_rms_adamw", state_format=method, aux_adam="adamw"
    )


def train(method: str, lr: float, steps: int = STEPS, seed: int = 0) -> Run:
    """The loss of each step; adapters and data follow from the seed, the same for every method."""
    base = copy.deepcopy(pretrained())
    torch.manual_seed(seed)
    layers = ["query", "key", "value", "out", "up", "down"]
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=layers))
    optimizer = make_optimizer(model, method, lr)
    schedule = LambdaLR(optimizer, lambda step: trapezoid(step, steps))
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in counts(steps, method):
        ids = capitals(windows(bible(), SEQUENCES, CONTEXT + 1, generator))
        loss = next_byte_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return Run(losses, state_bytes(optimizer))


if __name__ == "__main__":
    compare(TITLE, train, RATES, STEPS)
