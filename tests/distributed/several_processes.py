"""Functions run by several processes of torch.distributed (gloo) on this machine."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Imported once, by the server that all processes are forked from. torch imports its compiler late,
# for any optimizer or DTensor; `lowbit_muon` imports nothing by itself.
LIBRARIES = (
    "pytest",
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "lowbit_muon.optimizers.muon_adamw",
    "lowbit_muon.tools.finetune.training",
)
TIMEOUT = 300  # seconds, of a test on a machine that is busy with something else

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(list(LIBRARIES))


def run(
    processes: int,
    function: Callable[..., Any],
    folder: Path,
    *arguments: Any,
    exit_codes: dict[int, int] | None = None,
    seconds: float = TIMEOUT,
) -> list[Any]:
    """What `function(*arguments)` returned in each process; None where it was meant to die.

    exit_codes: of processes that do not come to their end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    store = folder / "store"
    store.unlink(missing_ok=True)
    workers = [
        _CONTEXT.Process(
            target=_work, args=(rank, processes, str(folder), function, arguments), daemon=True
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(seconds)
    late = [rank for rank, worker in enumerate(workers) if worker.is_alive()]
    for worker in workers:
        worker.kill()
    assert not late, f"processes {late} did not end within {seconds} seconds"
    # All of them: where one dies by a signal, the others tell of a connection only.
    ends = {rank: worker.exitcode for rank, worker in enumerate(workers)}
    told = "\n".join(error.read_text() for error in sorted(folder.glob("error-*")))
    assert ends == dict.fromkeys(ends, 0) | (exit_codes or {}), f"exit codes {ends}\n{told}"
    results: list[Any] = []
    for rank in range(processes):
        file = folder / f"result-{rank}"
        results.append(torch.load(file, weights_only=False) if file.exists() else None)
        file.unlink(missing_ok=True)
    return results


def _work(
    rank: int, processes: int, folder: str, function: Callable[..., Any], arguments: Any
) -> None:
    faulthandler.enable()  # where it is when it dies by a signal
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=processes,
            timeout=datetime.timedelta(seconds=TIMEOUT),
        )
        torch.save(function(*arguments), Path(folder) / f"result-{rank}")
        dist.barrier()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        code = 1
    sys.stdout.flush()
    # Without the interpreter's own end, in which torch's gloo threads may abort the process.
    os._exit(code)
