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

from lowbit_muon import (
    RULES,
    MuonFactory,
    MuonWithAuxAdam,
    muon_param_groups,
    release_gradients,
)
from lowbit_muon.optimizers.routing import _say_that_it_goes_by_shape

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


def arguments_of(folder: Path, **options: Any) -> transformers.TrainingArguments:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return transformers.TrainingArguments(**{**settings, **options})


def make_trainer(folder: Path, arguments: Arguments) -> Any:
    model = make_model()
    settings = arguments_of(folder)
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


def test_trainers_own_groups_are_routed_by_shape_and_the_factory_named(tmp_path: Path) -> None:
    """Trainer tells the class nothing of names and of its learning rate."""
    _say_that_it_goes_by_shape.cache_clear()
    trainer = make_trainer(
        tmp_path, lambda _: {"optimizer_cls_and_kwargs": (MuonWithAuxAdam, dict(OPTIONS))}
    )
    with pytest.warns(UserWarning, match="use MuonFactory"):
        trainer.create_optimizer()


def test_the_factory_honours_trainers_arguments(tmp_path: Path) -> None:
    """One rate for all, weight decay of what Trainer decays, its AdamW's betas and epsilon."""
    args = arguments_of(
        tmp_path, learning_rate=1e-3, weight_decay=0.1, adam_beta2=0.98, adam_epsilon=1e-7
    )
    options = {"training_args": args, **OPTIONS}
    trainer = transformers.Trainer(
        make_model(), args, train_dataset=make_examples(16),
        optimizer_cls_and_kwargs=(MuonFactory, options),
    )  # fmt: skip
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert {group["lr"] for group in optimizer.param_groups} == {1e-3}
    decays = {
        (group["use_muon"], param.ndim): group["weight_decay"]
        for group in optimizer.param_groups
        for param in group["params"]
    }
    assert decays == {(True, 2): 0.1, (False, 2): 0.1, (False, 1): 0.0}
    muon, aux = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert (muon["adjust_lr_fn"], muon["state_format"]["bits"]) == ("match_rms_adamw", 3)
    assert (aux["betas"], aux["eps"]) == ((0.9, 0.98), 1e-7)
    assert trainer.state.log_history[0]["learning_rate"] == 1e-3


@pytest.mark.parametrize(
    ("options", "lr", "aux_lr", "scale"),
    [
        ({}, 5e-5, 5e-5, "match_rms_adamw"),  # TrainingArguments' own default
        ({"lr": 1e-2, "adjust_lr_fn": "original"}, 1e-2, 3e-4, "original"),
        ({"rule": "normuon", "lr": 1e-2}, 1e-2, 3e-4, None),
        ({"rule": RULES["muon"]}, 5e-5, 5e-5, "match_rms_adamw"),
        ({"rule": "moonlight"}, 5e-5, 5e-5, "match_rms_adamw"),
        ({"aux_lr": 1e-4, "aux_patterns": ["q_proj"]}, 5e-5, 1e-4, "match_rms_adamw"),
    ],
)
def test_options_of_the_factory(
    tmp_path: Path, options: dict[str, Any], lr: float, aux_lr: float, scale: str | None
) -> None:
    optimizer = MuonFactory()(make_model(), arguments_of(tmp_path), **OPTIONS, **options)
    muon, aux = optimizer.param_groups[0], optimizer.param_groups[-1]
    assert (muon["lr"], aux["lr"], muon["adjust_lr_fn"]) == (lr, aux_lr, scale)
    names = [name for group in optimizer.param_groups[:1] for name in group["param_names"]]
    assert any("q_proj" in name for name in names) != ("aux_patterns" in options)


def test_the_factory_without_a_rate_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r'training_args: .*\{"training_args": args\}'):
        MuonFactory()(make_model())
    assert MuonFactory()(make_model(), lr=1e-4, **OPTIONS).param_groups[0]["lr"] == 1e-4


def released(folder: Path, *, release: bool, clip: float, steps: int = 3) -> Any:
    """A trainer that has trained with two batches a step, the last step with one."""
    args = arguments_of(
        folder, gradient_accumulation_steps=2, max_grad_norm=clip, max_steps=steps,
        per_device_train_batch_size=4, learning_rate=1e-2,
    )  # fmt: skip
    trainer = transformers.Trainer(
        make_model(), args, train_dataset=make_examples(20),
        optimizer_cls_and_kwargs=(MuonFactory, {"training_args": args, **OPTIONS}),
    )  # fmt: skip
    if release:
        release_gradients(trainer)
    trainer.train()
    return trainer


def test_release_with_accumulation_gives_trainers_own_weights(tmp_path: Path) -> None:
    """max_grad_norm 0 does not clip, and the norm is in the log all the same."""
    usual, other = (released(tmp_path, release=flag, clip=0.0) for flag in (False, True))
    for one, two in zip(usual.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)
    norms = [
        [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
        for trainer in (usual, other)
    ]
    assert len(norms[0]) == 3
    # Both are sums of the same squares in float32, in another order.
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_release_frees_gradients_and_clips_by_the_running_norm(tmp_path: Path) -> None:
    seen: list[bool] = []

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **parts: Any) -> None:
            seen.append(any(param.grad is not None for param in parts["model"].parameters()))

    args = arguments_of(tmp_path, max_grad_norm=0.5)
    trainer = transformers.Trainer(
        make_model(), args, train_dataset=make_examples(16), callbacks=[Look()],
        optimizer_cls_and_kwargs=(MuonFactory, {"training_args": args, **OPTIONS}),
    )  # fmt: skip
    release_gradients(trainer)
    trainer.train()
    assert seen == [False] * args.max_steps
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == args.max_steps
    assert min(norms) > 0.5
    # The hooks are gone: the model can be trained by another loop.
    trainer.model(**{k: v[None] for k, v in make_examples(1)[0].items()}).loss.backward()
    assert all(param.grad is not None for param in trainer.model.parameters())


def test_release_refuses_fp16(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, ready_made)
    trainer.args.fp16 = True
    with pytest.raises(ValueError, match="fp16=True"):
        release_gradients(trainer)


@pytest.mark.parametrize(
    ("dtypes", "options", "expected"),
    [
        ((torch.float32, torch.float32), {}, (False, False)),
        ((torch.bfloat16, torch.float32), {}, (True, False)),
        ((torch.bfloat16, torch.float16), {}, (False, False)),
        ((torch.bfloat16, torch.bfloat16), {"stochastic_rounding": False}, (False, False)),
        ((torch.bfloat16, torch.bfloat16), {"compensation": True}, (False, True)),
    ],
)
def test_the_factory_rounds_bfloat16_weights_stochastically(
    dtypes: tuple[torch.dtype, ...], options: dict[str, bool], expected: tuple[bool, bool]
) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for dtype in dtypes))
    optimizer = MuonFactory()(model, lr=1e-4, aux_adam="adamw", **options)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            assert (group["stochastic_rounding"], group["compensation"]) == expected
