"""The model's bytes, owners and state against what processes of torch.distributed (gloo) count.

The bytes have to be equal. The time of a step is compared with the work of the busiest process and
the cores there are, without communication: processes share this machine's memory. Where other
programs run beside them, only the processor time of the busiest process says something.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from bench.scaling.designs import (
    DTYPE,
    FORMAT,
    newton_schulz_operations,
    sharded_units,
    stored_bytes,
    traffic,
)
from bench.scaling.models import Stack
from lowbit_muon import Muon
from lowbit_muon.distributed.ownership import assign_owners, cost
from lowbit_muon.distributed.sharing import ReplicatedParameters, ShardedParameters
from lowbit_muon.step.options import UpdateDtype

UPDATE_DTYPES: tuple[UpdateDtype, ...] = ("float32", "bfloat16", "int8")
_SECONDS = 300  # that processes wait for each other on a busy machine
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["bench.scaling.calibration"])


def small_model(hidden: int, layers: int) -> list[Stack]:
    """Layers as in a Llama, and a stack of five experts; neither divides by four processes."""
    inner = hidden * 8 // 3 + 1
    one = [Stack(hidden, hidden), Stack(hidden // 4, hidden), Stack(inner, hidden)]
    return one * layers + [Stack(hidden, inner), Stack(hidden // 2, hidden, matrices=5)]


def calibrate(stacks: Sequence[Stack], processes: Sequence[int], steps: int) -> dict[str, Any]:
    """A row for each number of processes, measured beside modelled."""
    load = os.getloadavg()[0]  # of the last minute, before
    rows = [_row(stacks, count, steps) for count in processes]
    cores = os.cpu_count() or 1
    for row in rows:
        share, busy = row.pop("largest_share"), max(1.0, row["processes"] / cores)
        row["modelled_seconds"] = rows[0]["seconds"] * share * busy
        row["modelled_cpu_seconds"] = rows[0]["cpu_seconds"] * share
    return {"stacks": [[s.matrices, s.rows, s.columns] for s in stacks], "cores": cores,
            "load": load, "steps": steps, "rows": rows}  # fmt: skip


def _row(stacks: Sequence[Stack], count: int, steps: int) -> dict[str, Any]:
    units = sharded_units(stacks, count)
    owners = [unit.owner for unit in units]
    loads, state = [0] * count, [0] * count
    for unit in units:
        loads[unit.owner] += newton_schulz_operations(unit.shape)
        state[unit.owner] += stored_bytes(unit.shape)
    copies = _copies(stacks)
    copy_owners = assign_owners([cost(copy.shape) for copy in copies], count)
    weights = [0] * count
    for copy, owner in zip(copies, copy_owners, strict=True):
        weights[owner] += copy.rows * copy.columns * DTYPE.itemsize * (count - 1)
    measured = run(count, [[s.matrices, s.rows, s.columns] for s in stacks], steps)
    times = [found["seconds"] for found in measured]
    cpu = [statistics.median(found["cpu_seconds"]) for found in measured]
    return {
        "processes": count,
        "bytes": {
            **{dtype: [found["bytes"][dtype] for found in measured] for dtype in UPDATE_DTYPES},
            "DDP": [found["bytes"]["DDP"] for found in measured],
        },
        "modelled_bytes": {
            **{dtype: traffic(units, count, dtype).sent.tolist() for dtype in UPDATE_DTYPES},
            "DDP": weights,
        },
        "owners_equal": all(found["owners"] == owners for found in measured),
        "state_bytes": [found["state"] for found in measured],
        "modelled_state_bytes": state,
        "seconds": statistics.median(max(at) for at in zip(*times, strict=True)),
        "cpu_seconds": max(cpu),
        "largest_share": max(loads) / sum(loads),
    }


def _copies(stacks: Sequence[Stack]) -> list[Stack]:
    """Those that are also stepped under DDP: parameters of one matrix."""
    return [stack for stack in stacks if stack.matrices == 1]


def run(processes: int, stacks: list[list[int]], steps: int) -> list[dict[str, Any]]:
    """What `_measure` found in each process. Raises RuntimeError with what one had to say."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            _CONTEXT.Process(
                target=_work, args=(rank, processes, folder, stacks, steps), daemon=True
            )
            for rank in range(processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(_SECONDS)
        for worker in workers:
            worker.kill()
        files = [Path(folder) / f"{rank}.json" for rank in range(processes)]
        missing = [file for file in files if not file.exists()]
        if missing:
            errors = [file.read_text() for file in Path(folder).glob("*.error")]
            raise RuntimeError(f"{len(missing)} processes without a result: {' '.join(errors)}")
        return [json.loads(file.read_text()) for file in files]


def _work(rank: int, processes: int, folder: str, stacks: list[list[int]], steps: int) -> None:
    """One process. It ends without the interpreter's end, where torch's gloo threads may abort."""
    torch.set_num_threads(1)
    code = 0
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes,
            timeout=datetime.timedelta(seconds=_SECONDS),
        )  # fmt: skip
        found = _measure([Stack(rows, columns, n) for n, rows, columns in stacks], steps)
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    except BaseException:
        (Path(folder) / f"{rank}.error").write_text(traceback.format_exc())
        code = 1
    os._exit(code)


def _measure(stacks: Sequence[Stack], steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {"bytes": {}}
    for dtype in UPDATE_DTYPES:
        optimizer = _sharded(stacks, dtype)
        shared = [part for group in optimizer.param_groups for part in optimizer._shared(group)]
        times = _step(optimizer, steps if dtype == "bfloat16" else 1)
        counted = sum(part.exchange.bytes_sent for part in shared)
        found["bytes"][dtype] = counted // (1 + len(times))
        if dtype == "bfloat16":
            found["seconds"] = [wall for wall, _ in times]
            found["cpu_seconds"] = [cpu for _, cpu in times]
            found["state"] = optimizer.state_bytes()
            found["owners"] = [
                unit.owner
                for part in shared
                if isinstance(part, ShardedParameters)
                for unit in part.units
            ]
    params = [_weight(copy, number) for number, copy in enumerate(_copies(stacks))]
    world = dist.group.WORLD
    optimizer = Muon(params, state_format=FORMAT, process_group=world)
    _step(optimizer, 0)
    shared = optimizer._shared(optimizer.param_groups[0])
    assert all(isinstance(part, ReplicatedParameters) for part in shared)
    found["bytes"]["DDP"] = sum(part.exchange.bytes_sent for part in shared)
    return found


def _sharded(stacks: Sequence[Stack], dtype: UpdateDtype) -> Muon:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = [
        nn.Parameter(distribute_tensor(_weight(stack, i), mesh, [Shard(0)], src_data_rank=None))
        for i, stack in enumerate(stacks)
    ]
    return Muon(params, state_format=FORMAT, update_dtype=dtype, batch_experts=True)


def _weight(stack: Stack, seed: int) -> nn.Parameter:
    size = stack.shape if stack.matrices == 1 else (stack.matrices, *stack.shape)
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return nn.Parameter(values.to(DTYPE))


def _step(optimizer: Muon, steps: int) -> list[tuple[float, float]]:
    """Seconds, and seconds of this process's own, of each step after the first."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = param.detach().clone()
    optimizer.step()
    return [_timed(optimizer) for _ in range(steps)]


def _timed(optimizer: Muon) -> tuple[float, float]:
    """From a barrier to a barrier; processor time without them."""
    dist.barrier()
    start, own = time.perf_counter(), time.process_time()
    optimizer.step()
    own = time.process_time() - own
    dist.barrier()
    return time.perf_counter() - start, own
