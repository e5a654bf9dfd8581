"""The FSDP2 example on two processes: all killed after a checkpoint, and resumed in new ones."""

from __future__ import annotations

import importlib
import os
import signal
import warnings
from pathlib import Path
from typing import Any

import accelerate
import processes
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

PROCESSES = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """An uninterrupted run, of each process."""
    return launch(tmp_path_factory.mktemp("fsdp2") / "whole")


@pytest.mark.long
def test_killed_processes_resume_like_one_run(whole: list[dict[str, Any]], tmp_path: Path) -> None:
    launch(tmp_path / "killed", fatal=True)
    rest = launch(tmp_path / "killed", resume=True)
    for uninterrupted, resumed in zip(whole, rest, strict=True):
        processes.assert_resumed(as_result(uninterrupted), as_result(resumed))
    assert whole[0]["losses"] == whole[1]["losses"]
    assert whole[0]["losses"][-1] < whole[0]["losses"][0]


def test_every_process_keeps_its_share_of_the_state(whole: list[dict[str, Any]]) -> None:
    assert all(of_process["steps_dtensors"] for of_process in whole)
    sizes = [of_process["state_bytes"] for of_process in whole]
    # The same matrices in each of two layers, so that owners can share them almost evenly; AdamW's
    # moments lie with the shards.
    assert max(sizes) < 0.6 * sum(sizes)


def as_result(found: dict[str, Any]) -> processes.Result:
    return processes.Result(found["losses"], found["weights"], 0.0, 0)


def launch(folder: Path, *, resume: bool = False, fatal: bool = False) -> list[dict[str, Any]]:
    """What the example left on each process; nothing where it was killed."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    started = [
        processes.context().Process(target=_child, args=(rank, folder, resume, fatal))
        for rank in range(PROCESSES)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(processes.TIMEOUT)
    for rank, process in enumerate(started):
        process.kill()
        expected = -signal.SIGKILL if fatal else 0
        assert process.exitcode == expected, (folder / f"log-{rank}").read_text()[-4000:]
    if fatal:
        return []
    return [torch.load(folder / f"result-{rank}") for rank in range(PROCESSES)]


def _child(rank: int, folder: Path, resume: bool, fatal: bool) -> None:
    log = os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank}
    place |= {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES
    )
    _pretend_gpus()
    result: dict[str, Any] = {}
    _watch_checkpoint(result, fatal)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "lowbit_muon uses torch.optim.AdamW", RuntimeWarning)
        result["losses"], model = importlib.import_module("example_fsdp2").main(str(folder), resume)
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    torch.save({**result, "weights": weights}, folder / f"result-{rank}")
    dist.barrier()
    # Without the interpreter's own end, in which torch's gloo threads may abort the process.
    os._exit(0)


def _pretend_gpus() -> None:
    """Accelerate takes an `fsdp_plugin` on GPUs and the like only; on CPUs it leaves it aside."""
    state = accelerate.PartialState(cpu=True)
    state.__dict__["distributed_type"] = accelerate.utils.DistributedType.MULTI_GPU


def _watch_checkpoint(result: dict[str, Any], fatal: bool) -> None:
    """Note the optimizer of the run when it is saved; if `fatal`, end the process after that."""
    save_state = accelerate.Accelerator.save_state

    def watched(self: accelerate.Accelerator, *arguments: Any) -> None:
        save_state(self, *arguments)
        if fatal:
            dist.barrier()  # saved by all
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer = self._optimizers[0].optimizer
        params = [param for group in optimizer.param_groups for param in group["params"]]
        result["steps_dtensors"] = all(isinstance(param, DTensor) for param in params)
        result["state_bytes"] = optimizer.state_bytes()

    accelerate.Accelerator.save_state = watched  # type: ignore[method-assign]
