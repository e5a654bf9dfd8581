"""The matrices of one parameter and where their stored momentum lies in its state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lowbit_muon.formats import StateFormat
from lowbit_muon.presets import resolve_format
from lowbit_muon.quantized_matrix import QuantizedMatrix


@dataclass(frozen=True)
class MatrixView:
    """One matrix of a parameter: rows `rows` of its 2-D view [all rows, columns]."""

    rows: slice
    shape: tuple[int, int]
    prefix: str  # of its keys in the parameter's state


def flatten(tensor: Tensor, group: dict[str, Any]) -> Tensor:
    """The parameter (or its gradient) as one matrix, a view: [out, in*...] or [experts*out, in]."""
    if tensor.ndim == 2:
        return tensor
    if group["batch_experts"]:
        return tensor.flatten(0, -2)
    return tensor.flatten(1)


def matrix_views(param: Tensor, group: dict[str, Any]) -> list[MatrixView]:
    """The matrices of a parameter. Raises ValueError for a shape the group's options do not fit."""
    if param.ndim < 2:
        raise ValueError(
            "params: expected parameters of 2 or more dimensions, got one of size "
            f"{tuple(param.shape)}; give it to AdamW (MuonWithAuxAdam does)"
        )
    flat = flatten(param.detach(), group)
    rows, columns = flat.shape
    if flat.data_ptr() != param.data_ptr():
        raise ValueError(
            f"params: expected a parameter that can be viewed as a matrix, got size "
            f"{tuple(param.shape)} with strides {param.stride()}"
        )
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


def write_matrix(state: dict[str, Any], view: MatrixView, matrix: QuantizedMatrix) -> None:
    """Put a stored matrix into a parameter's state, one key for each of its tensors."""
    state.update({view.prefix + role: tensor for role, tensor in matrix.tensors.items()})


def read_matrix(
    state: dict[str, Any], view: MatrixView, state_format: StateFormat
) -> QuantizedMatrix:
    """The stored matrix of a view; its tensors are those of the state, not copies."""
    tensors = {
        key.removeprefix(view.prefix): value
        for key, value in state.items()
        if isinstance(value, Tensor) and key.startswith(view.prefix)
    }
    return QuantizedMatrix(state_format, view.shape, tensors)


def resolve_group_format(group: dict[str, Any]) -> StateFormat:
    """The format of a group, which may be a name, a `StateFormat` or its plain dict."""
    value = group["state_format"]
    return StateFormat.from_dict(value) if isinstance(value, dict) else resolve_format(value)
