"""The state of shared parameters in a state dict: tensors that torch.distributed.checkpoint knows.

In memory a stored matrix is whole and lies on its owner; other processes have None under its keys,
since torch reads a flattened state dict by the keys in memory. Saved it is a DTensor, cut by its
rows over the processes, so that every process saves a part under the same keys, and a checkpoint
loads on another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_muon.distributed.agreement import exchange_context
from lowbit_muon.distributed.sharing import SharedParameters
from lowbit_muon.state.parameter import MatrixView, matrix_views, momentum_format, prepare_state
from lowbit_muon.state.placement import in_parts, is_dtensor, shape_only
from lowbit_muon.state.rounding import Compensation
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.rules.recipes import resolve_rule

if TYPE_CHECKING:
    from torch.distributed.tensor import DeviceMesh, DTensor, Placement

Group = dict[str, Any]
State = dict[str, Any]

_REMAINDER = "remainder"  # lies beside the weights, in shards like theirs


def prepare_shared_state(
    state: State, param: Tensor, group: Group, shared: SharedParameters, index: int
) -> None:
    """Make what is missing of a shared parameter's state; index: of the parameter in its group."""
    views = matrix_views(shape_only(param), group)
    owned = [shared.owner(index, matrix) == shared.exchange.rank for matrix in range(len(views))]
    rule = resolve_rule(group["rule"])
    prepare_state(state, param, group, views, owned, rule.state)
    main = "dense" if momentum_format(group, {}).is_dense else "codes"
    if any(view.prefix + main not in state for view in views):
        for key, _ in _layout(param, group, views):
            state.setdefault(key, None)


def sharded_states(
    shared: SharedParameters, group: Group, states: Mapping[Tensor, State]
) -> dict[Tensor, State]:
    """The states of shared parameters as every process saves them; a collective operation.

    Tensors of more than one element are DTensors, cut by their first dimension.
    """
    # Imported here and below, where tensors are distributed: it takes half a second.
    from torch.distributed.tensor import DTensor, distribute_tensor

    result: dict[Tensor, State] = {}
    device = shared.exchange.device
    for index, name, param in zip(shared.indices, shared.names, shared.params, strict=True):
        state = states[param]
        mesh, placements = _mesh(shared, param)
        layout = dict(_layout(param, group, matrix_views(shape_only(param), group)))
        everywhere = sorted(state.keys() - layout.keys() - {_REMAINDER})
        saved: State = {key: int(state[key]) for key in everywhere}  # counts
        for key, (matrix, meta) in layout.items():
            owner = shared.owner(index, matrix)
            if owner == shared.exchange.rank:
                full = state[key].to(device, copy=True)  # ours goes on changing
            else:
                full = torch.empty(meta.shape, dtype=meta.dtype, device=device)
            with exchange_context([name]):
                dist.broadcast(full, group=shared.process_group, group_src=owner)
            if full.numel() > 1:
                full = distribute_tensor(full, mesh, placements, src_data_rank=None)
            saved[key] = full
        if _REMAINDER in state and in_parts(param):
            saved[_REMAINDER] = DTensor.from_local(
                state[_REMAINDER].clone(),
                param.device_mesh,
                param.placements,
                shape=param.shape,
                stride=param.stride(),
                run_check=False,
            )
        result[param] = saved
    return result


def _layout(
    param: Tensor, group: Group, views: Sequence[MatrixView]
) -> Iterator[tuple[str, tuple[int, Tensor]]]:
    """(key, (matrix, meta tensor)) of what one process keeps of a shared parameter's state."""
    meta, rule = torch.device("meta"), resolve_rule(group["rule"])
    for matrix, view in enumerate(views):
        zeros = QuantizedMatrix.zeros(
            view.shape,
            momentum_format(group, {}),
            seed=0,
            device=meta,
            rule_state=rule.state(view.shape),
        )
        for role, tensor in zeros.tensors.items():
            yield view.prefix + role, (matrix, tensor)
    if group["compensation"] and Compensation.applies_to(param) and not in_parts(param):
        yield _REMAINDER, (0, torch.empty(param.shape, dtype=torch.int8, device=meta))


def whole_state(entries: Mapping[str, Any]) -> State:
    """A saved state with whole tensors; a collective operation where they are DTensors."""
    return {  # in one order on all processes
        key: entries[key].full_tensor() if is_dtensor(entries[key]) else entries[key]
        for key in sorted(entries, key=str)
    }


def owned_state(
    state: State, param: Tensor, group: Group, shared: SharedParameters, index: int
) -> State:
    """Of a parameter's whole state, what this process keeps; None for what others do."""
    views = matrix_views(shape_only(param), group)
    owned = dict(state)
    for key, (matrix, _) in _layout(param, group, views):
        if shared.owner(index, matrix) != shared.exchange.rank:
            owned[key] = None
    if _REMAINDER in owned and in_parts(param):
        owned[_REMAINDER] = _sharded(owned[_REMAINDER], param).to_local().clone()
    return owned


def shard_like(param: Tensor, state: State) -> State:
    """A state whose tensors of a DTensor's shape are sharded as it is."""
    if not is_dtensor(param):
        return state
    return {
        key: _sharded(value, param)
        if isinstance(value, Tensor) and value.shape == param.shape
        else value
        for key, value in state.items()
    }


def _sharded(tensor: Tensor, param: DTensor) -> DTensor:
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def _mesh(shared: SharedParameters, param: Tensor) -> tuple[DeviceMesh, list[Placement]]:
    """Over which processes a parameter's state is cut, and how."""
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard

    if not is_dtensor(param):
        mesh = DeviceMesh.from_group(shared.process_group, shared.exchange.device.type)
        return mesh, [Shard(0)]
    placements: list[Placement] = [Replicate()] * param.device_mesh.ndim
    sharded = [i for i, each in enumerate(param.placements) if not each.is_replicate()]
    if sharded:
        placements[sharded[0]] = Shard(0)
    return param.device_mesh, placements
