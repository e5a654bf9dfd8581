"""Accelerate: a training loop of one's own, with save_state and load_state."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from tiny_llama import make_examples, make_model
from torch import nn
from torch.utils.data import DataLoader

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

BATCHES, ACCUMULATED = 12, 2
STEPS = BATCHES // ACCUMULATED


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the saved state. Returns the loss of every batch seen and the model."""
    accelerator = Accelerator(
        cpu=True, mixed_precision="bf16", gradient_accumulation_steps=ACCUMULATED
    )
    model = make_model()
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.02, aux_lr=3e-3, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    loader = DataLoader(
        make_examples(4 * BATCHES),
        batch_size=4,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
    )
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    saved = Path(output_dir) / "state"
    batches, done = loader, 0
    if resume:
        accelerator.load_state(str(saved))
        done = BATCHES // 2
        batches = accelerator.skip_first_batches(loader, done)
    losses = []
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if done + len(losses) == BATCHES // 2:
            accelerator.save_state(str(saved))
    return losses, accelerator.unwrap_model(model)


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
