"""Runs of the examples, each in a process of its own that imports nothing twice.

    python processes.py EXAMPLE FOLDER [--model smollm2] [--steps N] [--threads N]

A server process imports the libraries once; every run is forked from it and shares no model,
optimizer or random state with another. The command is the test of an example that takes a model
and steps, at a size that no test has: one run to its end, one killed after its first checkpoint and
resumed.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing.context
import os
import signal
import time
import warnings
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.tools.finetune.report import peak_memory_bytes

# Afterwards the server is that of tests/distributed, which need the first ones.
LIBRARIES = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "lowbit_muon.optimizers.muon_adamw",
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
# Seconds, on a machine that is busy with something else: of a test, and of the command.
TIMEOUT, LONG_TIMEOUT = 600, 7200


@dataclass
class Result:
    """What a run that came to its end left behind."""

    losses: list[float]
    weights: dict[str, Tensor]
    seconds: float
    peak_bytes: int  # resident, with what the server had imported


def finish(example: str, folder: Path, *, resume: bool = False, **options: Any) -> Result:
    """Run an example, whose `main` gets the options, to its end."""
    code = _run(example, folder, {"resume": resume, **options}, None)
    assert code == 0, _log(folder).read_text()[-4000:]
    return Result(**torch.load(folder.with_suffix(".result")))


def kill_after(method: str, example: str, folder: Path, **options: Any) -> None:
    """Run an example and kill it when `method` ("module.Class.method") has returned once."""
    code = _run(example, folder, options, method)
    assert code == -signal.SIGKILL, _log(folder).read_text()[-4000:]


def assert_resumed(whole: Result, rest: Result) -> None:
    """The second half of a run that was killed is that of one that was not, bit for bit."""
    assert len(rest.losses) >= len(whole.losses) // 2
    assert rest.losses == whole.losses[-len(rest.losses) :]
    assert rest.weights.keys() == whole.weights.keys()
    for key, weight in whole.weights.items():
        assert torch.equal(rest.weights[key], weight), key


@functools.cache
def context() -> multiprocessing.context.ForkServerContext:
    """Processes forked from a server that has imported `LIBRARIES`.

    A test process has one server. What tests/distributed started is stopped, or every run would
    import the libraries for itself, ten seconds each; multiprocessing has no public way to do that.
    """
    forkserver._forkserver._stop()
    chosen = multiprocessing.get_context("forkserver")
    chosen.set_forkserver_preload(list(LIBRARIES))
    return chosen


def _log(folder: Path) -> Path:
    return folder.with_suffix(".log")


def _run(example: str, folder: Path, options: dict[str, Any], fatal: str | None) -> int | None:
    folder.mkdir(exist_ok=True)
    timeout = options.pop("timeout", TIMEOUT)
    process = context().Process(target=_child, args=(example, folder, options, fatal))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
    return process.exitcode


def _child(example: str, folder: Path, options: dict[str, Any], fatal: str | None) -> None:
    log = os.open(_log(folder), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(options.pop("threads", 1))
    main = importlib.import_module(example).main
    if fatal is not None:
        _die_after(fatal)
    started = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for message, category in THEIR_WARNINGS:
            warnings.filterwarnings("ignore", message, category)
        losses, model = main(str(folder), **options)
    result = {
        "losses": losses,
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "seconds": time.perf_counter() - started,
        "peak_bytes": peak_memory_bytes(),
    }
    torch.save(result, folder.with_suffix(".result"))


def _die_after(method: str) -> None:
    path, _, name = method.rpartition(".")
    module, _, owner_name = path.rpartition(".")
    owner = getattr(importlib.import_module(module), owner_name)
    original = getattr(owner, name)

    def last(*args: object, **options: object) -> None:
        original(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, last)


def _command_line() -> None:
    parser = argparse.ArgumentParser(description="kill and resume an example")
    parser.add_argument("example", help="as in example_trainer")
    parser.add_argument("folder", type=Path, help="a new one")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=1)
    options = {"timeout": LONG_TIMEOUT, **vars(parser.parse_args())}
    example, folder = options.pop("example"), options.pop("folder")
    folder.mkdir()
    whole = finish(example, folder / "whole", **options)
    kill_after("transformers.Trainer._save_checkpoint", example, folder / "killed", **options)
    rest = finish(example, folder / "killed", resume=True, **options)
    for name, run in (("uninterrupted", whole), ("killed and resumed", rest)):
        losses = " ".join(f"{loss:.4f}" for loss in run.losses)
        print(f"{name}: {losses}; {run.seconds:.0f} s, {run.peak_bytes / 2**20:,.0f} MiB")
    assert_resumed(whole, rest)
    print("losses and weights are the same, bit for bit")


if __name__ == "__main__":
    _command_line()
