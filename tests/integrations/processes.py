"""Runs of the examples, each in a process of its own that imports nothing twice.

A server process imports the libraries once; every run is forked from it and shares no model,
optimizer or random state with another.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

LIBRARIES = (
    "lowbit_muon",
    "transformers.trainer",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "peft",
    "trl.trainer.sft_trainer",
    "lightning.pytorch",
)
# Warnings that these libraries cause among themselves.
THEIR_WARNINGS = (
    ("`is_gradient_checkpointing` is deprecated", FutureWarning),  # PEFT, of transformers
    ("`gradient_checkpointing` is deprecated", FutureWarning),  # TRL, of transformers
    ("`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning),  # Lightning, of torch
    ("Checkpoint directory .* exists", UserWarning),  # Lightning, of the one it resumes from
)
TIMEOUT = 600  # seconds, on a machine that is busy with something else


@dataclass
class Result:
    """What a run that came to its end left behind."""

    losses: list[float]
    weights: dict[str, Tensor]


def finish(example: str, folder: Path, *, resume: bool = False) -> Result:
    """Run an example to its end."""
    assert _run(example, folder, resume, None) == 0, _log(folder).read_text()[-4000:]
    return Result(**torch.load(folder.with_suffix(".result")))


def kill_after(method: str, example: str, folder: Path) -> None:
    """Run an example and kill it when `method` ("module.Class.method") has returned once."""
    code = _run(example, folder, False, method)
    assert code == -signal.SIGKILL, _log(folder).read_text()[-4000:]


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _run(example: str, folder: Path, resume: bool, fatal: str | None) -> int | None:
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    process = context.Process(target=_child, args=(example, folder, resume, fatal))
    process.start()
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def _child(example: str, folder: Path, resume: bool, fatal: str | None) -> None:
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    main = importlib.import_module(example).main
    if fatal is not None:
        _die_after(fatal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message, category in THEIR_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        losses, model = main(str(folder), resume)
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    torch.save({"losses": losses, "weights": weights}, folder.with_suffix(".result"))


def _die_after(method: str) -> None:
    path, _, name = method.rpartition(".")
    module, _, owner_name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    original = getattr(owner, name)

    def last(*args: object, **options: object) -> None:
        original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, last)
