"""Lightning's command line, which knows the optimizer by its class alone."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn

from lowbit_muon import MuonWithAuxAdam
from lowbit_muon.optimizers.routing import _say_that_it_goes_by_shape

QUIET = ["--trainer.logger=false", "--trainer.enable_checkpointing=false",
         "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false",
         "--trainer.accelerator=cpu", "--trainer.max_steps=1"]  # fmt: skip


class Network(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))

    def training_step(self, batch: Tensor, _: int) -> Tensor:
        loss: Tensor = self.layers(batch).square().mean()
        return loss


class Numbers(LightningDataModule):
    def train_dataloader(self) -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader(torch.ones(4, 8), 4)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore")  # Lightning's own, of its parser and data loader
def test_the_command_line_makes_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    _say_that_it_goes_by_shape.cache_clear()
    arguments = [
        "fit", "--optimizer=lowbit_muon.MuonWithAuxAdam", "--optimizer.lr=2e-4",
        "--optimizer.weight_decay=0.1", "--optimizer.adjust_lr_fn=match_rms_adamw",
        "--optimizer.state_format=spectral3", "--optimizer.aux_adam=adamw",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="went by their shapes"):
        cli = LightningCLI(
            Network,
            Numbers,
            args=arguments + QUIET,
            save_config_callback=None,
            seed_everything_default=0,
        )
    (optimizer,) = cli.trainer.optimizers
    assert isinstance(optimizer, MuonWithAuxAdam)
    muon, aux = optimizer.param_groups
    assert (muon["lr"], muon["weight_decay"], aux["lr"]) == (2e-4, 0.1, 2e-4)
    assert (muon["adjust_lr_fn"], muon["state_format"]["bits"]) == ("match_rms_adamw", 3)
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}
