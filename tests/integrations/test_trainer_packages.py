"""The guide's lines for trainers that are no part of the development environment.

Each package asks for its own old releases of transformers and others, and no two of them can be
installed together: a test runs where its package can be imported (`pip install --no-deps PACKAGE`
and what an import then misses), and says why where not. `trainers.md` has the versions that ran.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
from documentation import GUIDES, code_blocks
from tiny_llama import make_examples, make_model
from torch import nn

from lowbit_muon import MuonWithAuxAdam
from lowbit_muon.optimizers.routing import _say_that_it_goes_by_shape

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own, while they are imported
(TRAINERS,) = (guide for guide in GUIDES if guide.stem == "trainers")
RATE, DECAY = 3e-4, 0.05


def lines_of(package: str) -> dict[str, Any]:
    """What the guide's file for a package defines."""
    (block,) = (text for text in code_blocks(TRAINERS, "py") if f"from {package}" in text)
    names: dict[str, Any] = {}
    exec(compile(block, f"{TRAINERS.name}, {package}", "exec"), names)
    return names


def arguments(folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        str(folder), learning_rate=RATE, weight_decay=DECAY, max_steps=1, use_cpu=True,
        lr_scheduler_type="constant", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip


def assert_ours(optimizer: Any, model: nn.Module) -> None:
    """Our optimizer of the model's parameters, with the trainer's rate and weight decay."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # Accelerate wraps it
    assert isinstance(optimizer, MuonWithAuxAdam)
    assert {group["lr"] for group in optimizer.param_groups} == {RATE}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {DECAY, 0.0}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert {id(param) for param in params} == {id(param) for param in model.parameters()}
    (muon,) = (group for group in optimizer.param_groups if group["use_muon"])
    assert all("layers" in name for name in muon["param_names"])


def test_axolotl(tmp_path: Path) -> None:
    """Its trainers' mixin makes the optimizer; a plugin of ours has told it which."""
    pytest.importorskip("axolotl.integrations.base", exc_type=ImportError)
    mixins = pytest.importorskip("axolotl.core.trainers.mixins", exc_type=ImportError)
    from transformers import Trainer

    class AxolotlTrainer(mixins.OptimizerMixin, Trainer):
        pass

    args = arguments(tmp_path)
    for name in ("loraplus_lr_ratio", "embedding_lr_scale", "embedding_lr", "lr_groups"):
        setattr(args, name, None)  # axolotl's own arguments, as they are where nobody sets them
    trainer = AxolotlTrainer(make_model(), args, train_dataset=make_examples(8))
    lines_of("axolotl")["LowbitMuon"]().post_trainer_create(None, trainer)
    trainer.train()
    assert_ours(trainer.optimizer, trainer.model)


def test_ms_swift(tmp_path: Path) -> None:
    """Its trainers ask the callback that `--optimizer` names."""
    optimizers = pytest.importorskip("swift.optimizers", exc_type=ImportError)
    lines_of("swift")
    model = make_model()
    trainer = types.SimpleNamespace(model=model, args=arguments(tmp_path))
    callback = optimizers.optimizers_map["lowbit_muon"](trainer.args, trainer)
    assert_ours(callback.create_optimizer(), model)
    assert_ours(callback.create_optimizer(model=model), model)


def test_llama_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trainers take what `create_custom_optimizer` makes; `use_muon` is then ours."""
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    utils = pytest.importorskip("llamafactory.train.trainer_utils", exc_type=ImportError)
    started: list[bool] = []
    # (the real one imports all of its trainers; that it has this name is seen in its source)
    source = Path(utils.__file__).with_name("tuner.py").read_text(encoding="utf-8")
    assert "def run_exp(" in source
    tuner = types.SimpleNamespace(run_exp=lambda: started.append(True))
    monkeypatch.setitem(sys.modules, "llamafactory.train.tuner", tuner)
    monkeypatch.setattr(utils, "_create_muon_optimizer", utils._create_muon_optimizer)
    lines_of("llamafactory")
    assert started == [True]
    ways = dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini"), False)
    finetuning = types.SimpleNamespace(**ways, loraplus_lr_ratio=None, use_muon=True)
    model = make_model()
    assert_ours(utils.create_custom_optimizer(model, arguments(tmp_path), finetuning), model)


def test_torchtune() -> None:
    """Its recipes instantiate a component of the parameters, which have no names."""
    config = pytest.importorskip("torchtune.config", exc_type=ImportError)
    from omegaconf import OmegaConf

    (block,) = (b for b in code_blocks(TRAINERS, "yaml") if "_component_" in b)
    given = OmegaConf.create(block).optimizer
    _say_that_it_goes_by_shape.cache_clear()
    with pytest.warns(UserWarning, match="went by their shapes"):
        optimizer = config.instantiate(given, make_model().parameters())
    assert isinstance(optimizer, MuonWithAuxAdam)
    assert {group["lr"] for group in optimizer.param_groups} == {2e-4} == {given.lr}
