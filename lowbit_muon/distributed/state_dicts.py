"""The state of shared parameters in a state dict: tensors that torch.distributed.checkpoint knows.

In memory a stored matrix is whole and lies on its owner. Saved it is a DTensor, cut by its rows
over the processes, so that every process saves a part under the same keys, and a checkpoint loads
on another number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_muon.distributed.agreement import exchanging, gather_objects
from lowbit_muon.distributed.sharing import SharedParameters
from lowbit_muon.state.parameter import MatrixView, stored_keys
from lowbit_muon.state.placement import in_parts, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, Placement

State = dict[str, Any]

_COUNTERS = ("step", "skipped")
_LOCAL = "remainder"  # lies beside the weights, in parts like theirs


def spread_states(shared: SharedParameters, states: Mapping[Tensor, State]) -> dict[Tensor, State]:
    """The states of shared parameters as every process saves them; a collective operation.

    Tensors of more than one element are DTensors, cut by their first dimension.
    """
    # Imported here and below, where tensors are distributed: it takes half a second.
    from torch.distributed.tensor import DTensor, distribute_tensor

    params, names = shared.params, shared.names
    own = [
        {key: _described(value) for key, value in states[param].items() if _is_whole(key, param)}
        for param in params
    ]
    gathered = gather_objects(own, shared.process_group, names)
    found: dict[Tensor, State] = {}
    for place, (name, param) in enumerate(zip(names, params, strict=True)):
        state = states[param]
        result: State = {key: int(state[key]) for key in _COUNTERS}  # tensors on a device
        holders = {
            key: (process, described)
            for process, of_process in enumerate(gathered)
            for key, described in of_process[place].items()
        }
        mesh, placements = _mesh(shared, param)
        for key in sorted(holders):
            process, (kind, value, dtype) = holders[key]
            if kind == "plain":
                result[key] = value
                continue
            full = state.get(key)
            if process != shared.exchange.process:
                full = torch.empty(value, dtype=dtype, device=shared.exchange.device)
            assert isinstance(full, Tensor)
            full = full.to(shared.exchange.device, copy=True)  # ours goes on changing
            with exchanging([name]):
                dist.broadcast(full, group=shared.process_group, group_src=process)
            if full.numel() > 1:
                full = distribute_tensor(full, mesh, placements, src_data_rank=None)
            result[key] = full
        if _LOCAL in state and in_parts(param):
            result[_LOCAL] = DTensor.from_local(
                state[_LOCAL].clone(),
                param.device_mesh,
                param.placements,
                shape=param.shape,
                stride=param.stride(),
                run_check=False,
            )
        found[param] = result
    return found


def gathered(entries: Mapping[str, Any]) -> State:
    """A saved state with whole tensors; a collective operation where they are DTensors."""
    return {
        key: value.full_tensor() if is_dtensor(value) else value for key, value in entries.items()
    }


def own_state(
    state: State, param: Tensor, views: list[MatrixView], shared: SharedParameters, index: int
) -> State:
    """Of a parameter's whole state, what this process keeps: its own matrices, and counters."""
    from torch.distributed.tensor import distribute_tensor

    own = [view for number, view in enumerate(views) if shared.owns(index, number)]
    dropped = {*stored_keys(state, views)} - {*stored_keys(state, own)}
    kept = {key: value for key, value in state.items() if key not in dropped}
    if _LOCAL in kept and in_parts(param):
        whole = distribute_tensor(
            kept[_LOCAL], param.device_mesh, param.placements, src_data_rank=None
        )
        kept[_LOCAL] = whole.to_local().clone()
    elif not own:
        kept = {name: kept[name] for name in _COUNTERS}
    return kept


def cut_like(param: Tensor, state: State) -> State:
    """A state whose tensors of a DTensor's shape are cut as it is."""
    from torch.distributed.tensor import distribute_tensor

    if not is_dtensor(param):
        return state

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != param.shape:
            return value
        return distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)

    return {key: cut(value) for key, value in state.items()}


def _is_whole(key: str, param: Tensor) -> bool:
    """Whether an entry is kept as a whole by one process."""
    return key not in _COUNTERS and not (key == _LOCAL and in_parts(param))


def _described(value: Any) -> tuple[str, Any, Any]:
    if isinstance(value, Tensor):
        return "tensor", tuple(value.shape), value.dtype
    return "plain", value, None


def _mesh(shared: SharedParameters, param: Tensor) -> tuple[DeviceMesh, list[Placement]]:
    """Over which processes a parameter's state is cut, and how."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard

    if not is_dtensor(param):
        mesh = DeviceMesh.from_group(shared.process_group, shared.exchange.device.type)
        return mesh, [Shard(0)]
    placements: list[Placement] = [Replicate()] * param.device_mesh.ndim
    sharded = [i for i, place in enumerate(param.placements) if not place.is_replicate()]
    if sharded:
        placements[sharded[0]] = Shard(0)
    return param.device_mesh, placements
