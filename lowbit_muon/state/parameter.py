"""The matrices of one parameter and where their stored momentum lies in its state."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.tensors import accumulation_dtype, check_memory, error_context
from lowbit_muon.formats.auto import AutoFormat, format_of_json, resolve_format_option
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.placement import (
    FSDP1_ADVICE,
    ZERO_ADVICE,
    in_parts,
    is_flattened,
    local_part,
)
from lowbit_muon.state.rounding import Compensation
from lowbit_muon.state.stored import (
    ROLES,
    RULE_PREFIX,
    QuantizedMatrix,
    RuleState,
    quantize,
)


@dataclass(frozen=True)
class MatrixView:
    """One matrix of a parameter: rows `rows` of its 2-D view [all rows, columns]."""

    rows: slice
    shape: tuple[int, int]
    prefix: str  # of its keys in the parameter's state


@dataclass(frozen=True)
class ParameterStep:
    """A parameter that is to be stepped, or anything that is stepped like one."""

    param: Tensor
    grad: Tensor  # of the parameter's shape
    state: dict[str, Any]
    views: list[MatrixView]
    number: int  # its place in the optimizer
    state_format: StateFormat
    backend: Backend
    taken: Tensor | None = None  # bool, whether it is to be stepped, if the host does not know


def parameter_names(group: dict[str, Any]) -> list[str]:
    """Names of a group's parameters, or their numbers in it."""
    return group.get("param_names") or [str(index) for index in range(len(group["params"]))]


def flatten(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """The parameter (or its gradient) as one matrix: [out, in*...] or [experts*out, in].

    A view where the order of its memory allows that; convolutions in channels_last are copied.
    """
    if tensor.ndim == 2:
        return tensor
    if group["batch_experts"]:
        return tensor.flatten(0, -2)
    return tensor.flatten(1)


def part_of(tensor: Tensor, view: MatrixView, group: dict[str, Any]) -> Tensor:
    """One matrix of a parameter (or its gradient) [rows, ...], always a view of its memory.

    It has the parameter's own other dimensions: `flatten(1)` makes a matrix of it.
    """
    if tensor.ndim == 2 or not group["batch_experts"]:
        return tensor[view.rows]
    if group["row_splits"] is not None:
        return flatten(tensor, group)[view.rows]  # `check_parameter` sees to it that it is a view
    number, place = view.rows.start // tensor.shape[-2], []
    for size in reversed(tensor.shape[:-2]):
        number, index = divmod(number, size)
        place.append(index)
    return tensor[tuple(reversed(place))]


def matrix_shape(param: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of what `flatten` makes of a parameter."""
    row_dims = param.ndim - 1 if group["batch_experts"] else 1
    return math.prod(param.shape[:row_dims]), math.prod(param.shape[row_dims:])


def matrix_views(param: Tensor, group: dict[str, Any]) -> list[MatrixView]:
    """The matrices of a parameter. Raises ValueError for a shape the group's options do not fit."""
    if param.ndim < 2:
        remedy = "give it to AdamW, as MuonWithAuxAdam with muon_param_groups does"
        if is_flattened(param):
            remedy = FSDP1_ADVICE
        elif "deepspeed" in sys.modules:
            remedy = ZERO_ADVICE
        elif "use_muon" in group:
            remedy = "put it into a group with use_muon=False, as muon_param_groups does"
        raise ValueError(
            "params: expected parameters of 2 or more dimensions, got one of size "
            f"{tuple(param.shape)}; {remedy}"
        )
    rows, columns = matrix_shape(param, group)
    if group["row_splits"] is not None:
        sizes = list(group["row_splits"])
    elif group["batch_experts"] and param.ndim > 2:
        sizes = [param.shape[-2]] * math.prod(param.shape[:-2])
    else:
        return [MatrixView(slice(0, rows), (rows, columns), "")]
    if sum(sizes) != rows:
        raise ValueError(
            f"row_splits: expected sizes that add up to {rows} rows, got {tuple(sizes)} "
            f"for a parameter of size {tuple(param.shape)}"
        )
    views, start = [], 0
    for index, size in enumerate(sizes):
        views.append(MatrixView(slice(start, start + size), (size, columns), f"{index}."))
        start += size
    return views


def matrix_entries(param: Tensor, group: dict[str, Any]) -> dict[str, int]:
    """What a parameter's state says of the matrix it belongs to, since codes do not tell."""
    return dict(zip(("rows", "columns"), matrix_shape(param, group), strict=True))


def check_parameter_step(state: Mapping[str, Any], group: dict[str, Any], index: int) -> None:
    """Raise for a gradient that no step takes, or a state of another size or device (ValueError).

    See `refuse_gradient`. TypeError for a parameter whose strides have become such that no step can
    write to it.
    """
    param = group["params"][index]
    grad = param.grad
    plain = type(grad) is Tensor and grad.layout == torch.strided and grad.is_floating_point()
    if not plain or grad.shape != param.shape:
        refuse_gradient(group, index, "Muon")
    if group["batch_experts"] and group["row_splits"] is not None:
        with error_context(f"parameter {parameter_names(group)[index]!r}"):
            check_parameter(param, group)
    if "rows" not in state:
        return
    expected, stored = matrix_shape(param, group), (state["rows"], state["columns"])
    if stored != expected:
        raise ValueError(
            f"parameter {parameter_names(group)[index]!r}: expected the size that its momentum was "
            f"stored with, {stored[0]} x {stored[1]}, got {expected[0]} x {expected[1]}; a "
            "parameter that was resized or pruned needs a new optimizer"
        )
    if group["offload"]:
        return
    for role in ("codes", "dense", "0.codes", "0.dense"):
        if state.get(role) is not None and state[role].device != param.device:
            raise ValueError(
                f"parameter {parameter_names(group)[index]!r}: expected the device of its "
                f"momentum, {state[role].device}, got {param.device}; load the optimizer's "
                "state_dict after the model was moved"
            )


def refuse_gradient(group: dict[str, Any], index: int, optimizer: str) -> None:
    """Raise for a gradient that no step takes, whatever its values.

    RuntimeError, as torch.optim does, for one that is sparse or complex, TypeError for others that
    do not lie in memory by strides, ValueError for another size than the parameter's.
    """
    param = group["params"][index]
    grad, name = param.grad, f"gradient of parameter {parameter_names(group)[index]!r}"
    if grad.is_complex():
        raise RuntimeError(f"{name}: {optimizer} does not support complex parameters")
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name}: {optimizer} does not support sparse gradients")
    if grad.shape != param.shape:
        expected, got = tuple(param.shape), tuple(grad.shape)
        raise ValueError(f"{name}: expected size {expected}, got {got}")
    with error_context(name):
        check_memory(local_part(grad))


def check_parameter(param: Tensor, group: dict[str, Any]) -> None:
    """Raise TypeError for a parameter, or a part of one, that a step could not write to."""
    local = local_part(param.detach())
    if local.is_complex():
        return  # refused by `step`, as torch.optim.Muon does
    check_memory(local)
    if torch._debug_has_internal_overlap(local) == 1 or local.is_neg():
        raise TypeError(
            f"expected elements with memory of their own, got size {tuple(local.shape)} with "
            f"strides {local.stride()}{' as the negative of others' if local.is_neg() else ''}"
        )
    cut = group["batch_experts"] and group["row_splits"] is not None
    if cut and local.numel() and flatten(local, group).data_ptr() != local.data_ptr():
        raise TypeError(
            f"expected a parameter that can be viewed as a matrix with row_splits and "
            f"batch_experts, got size {tuple(local.shape)} with strides {local.stride()}"
        )


def write_matrix(state: dict[str, Any], view: MatrixView, matrix: QuantizedMatrix) -> None:
    """Put a stored matrix into a parameter's state, one key for each of its tensors."""
    state.update({view.prefix + role: tensor for role, tensor in matrix.tensors.items()})


def read_matrix(
    state: Mapping[str, Any],
    view: MatrixView,
    state_format: StateFormat,
    device: torch.device | None = None,
) -> QuantizedMatrix:
    """The stored matrix of a view; its tensors are those of the state, or copies on `device`."""
    keys = ((role, view.prefix + role) for role in ROLES)
    tensors = {role: state[key].to(device) for role, key in keys if key in state}
    for key in state:
        if key.startswith(view.prefix + RULE_PREFIX):
            tensors[key.removeprefix(view.prefix)] = state[key].to(device)
    return QuantizedMatrix(state_format, view.shape, tensors)


def stored_keys(state: Mapping[str, Any], views: Sequence[MatrixView]) -> list[str]:
    """The keys of all tensors of stored matrices in a parameter's state.

    What an update rule keeps beside them is not among them (`rule_keys`).
    """
    keys = (view.prefix + role for view in views for role in ROLES)
    return [key for key in keys if state.get(key) is not None]  # which another process keeps


def rule_keys(state: Mapping[str, Any], views: Sequence[MatrixView]) -> list[str]:
    """The keys of what an update rule keeps of a parameter's matrices."""
    prefixes = tuple(view.prefix + RULE_PREFIX for view in views)
    return [key for key in state if key.startswith(prefixes) and state[key] is not None]


def resolve_group_format(group: Mapping[str, Any]) -> StateFormat | AutoFormat:
    """The format of a group, which may be a name, an object or its plain dict."""
    value = group["state_format"]
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):  # an object, or a dict that is not plain
        return resolve_format_option(value)
    return format_of_json(text)


def momentum_format(group: dict[str, Any], state: Mapping[str, Any]) -> StateFormat:
    """The format of a parameter's momentum: its group's, or what was chosen for it.

    Raises ValueError if nothing was chosen yet.
    """
    found = resolve_group_format(group)
    if isinstance(found, StateFormat):
        return found
    chosen = state.get("state_format")
    resolved = resolve_group_format(state) if isinstance(chosen, Mapping) else None
    if not isinstance(resolved, StateFormat):
        raise ValueError(f"state_format: expected what was chosen for the parameter, got {chosen}")
    return resolved


def assemble(
    param: Tensor,
    views: list[MatrixView],
    state_format: StateFormat,
    state: Mapping[str, Any],
    backend: str,
) -> Tensor:
    """The stored momentum of a parameter, decoded: float32 [rows, columns]."""
    shape = (sum(view.shape[0] for view in views), views[0].shape[1])
    momentum = torch.empty(shape, dtype=torch.float32, device=param.device)
    for view in views:
        matrix = read_matrix(state, view, state_format, param.device)
        momentum[view.rows] = matrix.dequantize(backend)
    return momentum


def quantized_state(
    momentum: Tensor,  # [rows, columns]
    state_format: StateFormat,
    views: list[MatrixView],
    group: dict[str, Any],
) -> dict[str, Any]:
    """A momentum as entries of a parameter's state."""
    state: dict[str, Any] = {}
    for index, view in enumerate(views):
        part = momentum[view.rows]
        if state_format.normalize:
            norm = float(torch.linalg.vector_norm(part, dtype=accumulation_dtype(part.device)))
            part = part / norm if norm > 0 else part
        matrix = quantize(part, state_format, seed=group["seed"] + index, backend=group["backend"])
        write_matrix(state, view, matrix)
    return state


def prepare_state(
    state: dict[str, Any],
    param: Tensor,
    group: dict[str, Any],
    views: list[MatrixView],
    own: Sequence[bool] | None = None,
    rule_state: Callable[[tuple[int, int]], RuleState] | None = None,
) -> None:
    """Make what is missing of a parameter's state.

    own: which of its matrices this process keeps, if others keep the rest. rule_state: of a
    matrix's shape, what the group's update rule keeps beside its momentum.
    """
    local = local_part(param)
    for name in ("step", "skipped"):
        state.setdefault(name, 0)
    if "rows" not in state:
        state.update(matrix_entries(param, group))
    for index, view in enumerate(views):
        kept_here = own is None or own[index]
        if not kept_here or view.prefix + "codes" in state or view.prefix + "dense" in state:
            continue
        matrix = QuantizedMatrix.zeros(
            view.shape,
            momentum_format(group, state),
            seed=group["seed"] + index,
            device=local.device,
            backend=group["backend"],
            rule_state=None if rule_state is None else rule_state(view.shape),
        )
        write_matrix(state, view, matrix)
    # Remainders lie beside the weights: with the owner of whole ones, and with every part.
    here = own is None or any(own) or in_parts(param)
    kept = here and group["compensation"] and Compensation.applies_to(param)
    if kept and "remainder" not in state:
        # In the order of rows and columns, however the weights lie.
        state["remainder"] = torch.zeros(local.shape, dtype=torch.int8, device=local.device)
    if group["offload"]:
        keep_on_host(state, views)


def keep_on_host(state: dict[str, Any], views: Sequence[MatrixView]) -> None:
    """Move a parameter's stored matrices to host memory, pinned if there is an accelerator."""
    for key in (*stored_keys(state, views), *rule_keys(state, views)):
        if state[key].device.type != "cpu":
            host = state[key].cpu()
            state[key] = host.pin_memory() if torch.accelerator.is_available() else host
