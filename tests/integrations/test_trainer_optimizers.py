"""The ways to give transformers.Trainer our optimizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_llama import make_examples, make_model
from torch import nn

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

OPTIONS: dict[str, Any] = {"state_format": "spectral3", "aux_adam": "adamw"}
Arguments = Callable[[nn.Module], dict[str, Any]]


def ready_made(model: nn.Module) -> dict[str, Any]:
    optimizer = MuonWithAuxAdam(muon_param_groups(model), **OPTIONS)
    return {"optimizers": (optimizer, transformers.get_constant_schedule(optimizer))}


def class_and_groups(model: nn.Module) -> dict[str, Any]:
    options = {"params": muon_param_groups(model), **OPTIONS}
    return {"optimizer_cls_and_kwargs": (MuonWithAuxAdam, options)}


def factory(_: nn.Module) -> dict[str, Any]:
    """Trainer calls what is not an optimizer class, and the result with the model."""

    def build(model: nn.Module, **options: Any) -> MuonWithAuxAdam:
        return MuonWithAuxAdam(muon_param_groups(model), **options)

    return {"optimizer_cls_and_kwargs": (lambda: build, dict(OPTIONS))}


def make_trainer(folder: Path, arguments: Arguments) -> Any:
    model = make_model()
    settings = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_strategy="no",
        logging_steps=1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    data = make_examples(16)
    return transformers.Trainer(model, settings, train_dataset=data, **arguments(model))


def test_all_ways_train_alike(tmp_path: Path) -> None:
    trained = []
    for arguments in (ready_made, class_and_groups, factory):
        trainer = make_trainer(tmp_path, arguments)
        trainer.train()
        optimizer = trainer.optimizer.optimizer
        assert isinstance(optimizer, MuonWithAuxAdam)
        assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-4]
        assert optimizer.param_groups[0]["state_format"]["bits"] == 3
        trained.append(list(trainer.model.parameters()))
    for first, *others in zip(*trained, strict=True):
        assert all(torch.equal(first, other) for other in others)


def test_trainers_own_groups_are_refused_with_the_remedy(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, lambda _: {"optimizer_cls_and_kwargs": (MuonWithAuxAdam, dict(OPTIONS))}
    )
    with pytest.raises(ValueError, match=r"use_muon True or False, as muon_param_groups"):
        trainer.create_optimizer()
