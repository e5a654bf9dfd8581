"""Accelerate's FSDP2: `torchrun --nproc-per-node 2 example_fsdp2.py FOLDER`, or accelerate launch.

Accelerate puts sharded parameters in the place of the optimizer's own in `prepare`; each matrix is
stepped by one process, and its state is saved in parts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from tiny_llama import make_examples, make_model
from torch import nn
from torch.utils.data import DataLoader

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

BATCHES = 8


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the saved state. Returns the loss of every batch seen and the model."""
    accelerator = Accelerator(
        fsdp_plugin=FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
            state_dict_type="SHARDED_STATE_DICT",
        )
    )
    model = make_model()
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.02, aux_lr=3e-3, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, BATCHES)
    loader = DataLoader(
        make_examples(8 * BATCHES),
        batch_size=4,  # of each process
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
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if done + len(losses) == BATCHES // 2:
            accelerator.save_state(str(saved))
    return losses, model


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
