"""Lightning: configure_optimizers returns the optimizer and a scheduler that follows its steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_llama import make_examples, make_model
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

EPOCHS, STEPS = 2, 6


class LanguageModel(lightning.LightningModule):
    """A causal language model that remembers the losses of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.model = make_model()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        groups = muon_param_groups(self.model, lr=0.02, aux_lr=3e-3, weight_decay=0.1)
        optimizer = MuonWithAuxAdam(groups)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the first epoch's end. Returns the loss of every batch and the model."""
    module = LanguageModel()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=EPOCHS,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(output_dir, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # Lightning does not save where in an epoch the data's order was: here it is always the same.
    loader = DataLoader(make_examples(4 * STEPS), batch_size=4)
    checkpoint = Path(output_dir) / "epoch=0.ckpt"
    trainer.fit(module, loader, ckpt_path=checkpoint if resume else None)
    return module.losses, module.model


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
