"""A Muon parameter's state: checked, copied, or converted from another layout or format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.reference import unpack
from lowbit_muon.checkpoint import (
    LAYOUT_OPTIONS,
    Group,
    SavedState,
    State,
    blaming,
    own_copy,
    whole_number,
)
from lowbit_muon.checks import accumulation_dtype
from lowbit_muon.formats import Codebook, CodeLayout, StateFormat
from lowbit_muon.parameter_state import (
    MatrixView,
    flatten,
    matrix_views,
    read_matrix,
    resolve_group_format,
    write_matrix,
)
from lowbit_muon.quantized_matrix import QuantizedMatrix, quantize

_TORCH_MUON_KEYS = (
    "lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps",
    "adjust_lr_fn",
)  # fmt: skip


def convert_momentum(param: Tensor, group: Group, saved: SavedState) -> State:
    """A Muon parameter's state in the group's own format, from any layout; {} if it has none."""
    target, views = resolve_group_format(group), matrix_views(param, group)
    if saved.convention == "ours":
        missing = [name for name in LAYOUT_OPTIONS if name not in saved.group]
        if missing:
            raise ValueError(f"expected the options {missing} in the saved group, got none")
        source, source_views = resolve_group_format(saved.group), matrix_views(param, saved.group)
        state = _checked_copy(param, saved.entries, source, source_views)
        if source == target and source_views == views:
            return state
        if source.normalize and not target.normalize:
            raise ValueError(_unknown_size(source) + f"; '{target.name}' needs it")
        counts = {name: state[name] for name in ("step", "skipped")}
        momentum = _assemble(param, saved.group, state)
    else:
        found = _foreign_momentum(param, group, saved)
        if found is None:
            return {}
        counts, momentum = {"step": 0, "skipped": 0}, found
    return counts | _quantized(momentum, target, views, group)


def torch_muon_group(group: Group) -> Group:
    """The options of a group that torch.optim.Muon has. Raises ValueError for its one limit."""
    coefficients = group["ns_coefficients"]
    if isinstance(coefficients, str) or any(isinstance(c, Sequence) for c in coefficients):
        raise ValueError(
            "ns_coefficients: expected one triple (a, b, c), which is all that torch.optim.Muon "
            f"takes, got {coefficients!r}"
        )
    return {name: group[name] for name in _TORCH_MUON_KEYS}


def export_momentum(param: Tensor, group: Group, state: State) -> State:
    """`momentum_buffer`: float32, the parameter's shape, M <- momentum*M + (1 - momentum)*G."""
    state_format = resolve_group_format(group)
    if state_format.normalize:
        raise ValueError(f"state_format: {_unknown_size(state_format)}; it cannot be exported")
    return {"momentum_buffer": _assemble(param, group, state).view(param.shape)}


def _checked_copy(
    param: Tensor, entries: Mapping[str, Any], state_format: StateFormat, views: list[MatrixView]
) -> State:
    """A state in our own layout, copied to the parameter's device after checking all of it."""
    rest = dict(entries)
    state: State = {name: whole_number(name, rest.pop(name, None)) for name in ("step", "skipped")}
    for view in views:
        found = [key for key in rest if isinstance(key, str) and key.startswith(view.prefix)]
        tensors = {key.removeprefix(view.prefix): rest.pop(key) for key in found}
        with blaming(f"matrix {view.prefix}{list(view.shape)}"):
            matrix = QuantizedMatrix.from_tensors(view.shape, state_format, tensors)
            matrix.tensors = {
                role: own_copy(value, param.device) for role, value in matrix.tensors.items()
            }
            _check_values(matrix)
        write_matrix(state, view, matrix)
    if rest:
        raise ValueError(f"expected nothing else in the state, got {sorted(map(repr, rest))}")
    return state


def _check_values(matrix: QuantizedMatrix) -> None:
    """Raise ValueError unless every code stands for a level and the decoded matrix is finite."""
    f = matrix.state_format
    if not f.is_dense and matrix.shape[0] * matrix.shape[1]:
        _check_codes(matrix, "codes", max(matrix.shape), f.code_book(), f.code_layout())
        if f.has_factors:
            for role, length in zip(("left_codes", "right_codes"), matrix.shape, strict=True):
                _check_codes(matrix, role, length, f.factor_code_book(), f.factor_layout())
    if not bool(matrix.dequantize().isfinite().all()):
        raise ValueError("expected codes and scales of a finite matrix, got inf or nan")


def _check_codes(
    matrix: QuantizedMatrix, role: str, columns: int, book: Codebook, layout: CodeLayout
) -> None:
    if len(book.levels) < 2**layout.bits:
        largest = int(unpack(matrix.tensors[role], layout, columns).max())
        if largest >= len(book.levels):
            raise ValueError(f"{role}: expected codes below {len(book.levels)}, got {largest}")


def _foreign_momentum(param: Tensor, group: Group, saved: SavedState) -> Tensor | None:
    """momentum_buffer as an EMA, float32 [rows, columns]; None if there is none yet."""
    entries = dict(saved.entries)
    if entries.pop("use_muon", True) is not True:
        raise ValueError("use_muon: expected True, got False")
    if not entries:
        return None
    if set(entries) != {"momentum_buffer"}:
        raise ValueError(f"expected 'momentum_buffer', got {sorted(map(repr, entries))}")
    buffer = entries["momentum_buffer"]
    flat = flatten(param.detach(), group)
    shapes = (param.shape, param.detach().flatten(1).shape)
    if not isinstance(buffer, Tensor) or buffer.shape not in shapes:
        got = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
        raise ValueError(f"momentum_buffer: expected shape {tuple(param.shape)}, got {got}")
    if not buffer.is_floating_point() or not bool(buffer.isfinite().all()):
        raise ValueError(f"momentum_buffer: expected finite values, got {buffer.dtype} with others")
    momentum = buffer.to(param.device, torch.float32).reshape(flat.shape)
    return momentum * (1 - group["momentum"]) if saved.convention == "sum" else momentum


def _assemble(param: Tensor, group: Group, state: State) -> Tensor:
    """The stored momentum of a parameter, decoded: float32 [rows, columns]."""
    rows, columns = flatten(param.detach(), group).shape
    momentum = torch.empty(rows, columns, dtype=torch.float32, device=param.device)
    for view in matrix_views(param, group):
        matrix = read_matrix(state, view, resolve_group_format(group))
        momentum[view.rows] = matrix.dequantize()
    return momentum


def _quantized(
    momentum: Tensor, state_format: StateFormat, views: list[MatrixView], group: Group
) -> State:
    state: State = {}
    for index, view in enumerate(views):
        part = momentum[view.rows]
        if state_format.normalize:
            norm = float(torch.linalg.vector_norm(part, dtype=accumulation_dtype(part.device)))
            part = part / norm if norm > 0 else part
        matrix = quantize(part, state_format, seed=group["seed"] + index, backend=group["backend"])
        write_matrix(state, view, matrix)
    return state


def _unknown_size(state_format: StateFormat) -> str:
    return (
        f"'{state_format.name}' divides the momentum by its norm in every step, so the size of the "
        "momentum is not known"
    )
