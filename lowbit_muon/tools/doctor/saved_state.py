"""A Muon without weights, with the momentum of a saved state, so that it can be diagnosed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.checkpoint.dicts import VERSION_KEY, whole_number
from lowbit_muon.checkpoint.momentum import has_momentum
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.step.options import LAYOUT_OPTIONS
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.plan.plans import TORCH_MUON

Group = dict[str, Any]

FULL_PRECISION_FORMAT = "spectral4"  # what Muon's default would make of another Muon's momentum
_ELEMENTS_IN_A_BYTE = 4  # most; no code has less than two bits
_MOMENTUM_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Entries of an AdamW's state: torch's, bitsandbytes', Moonlight's.
_ADAM_ENTRIES = {"exp_avg", "state1", "moment1"}


@dataclass(frozen=True)
class AuxState:
    """The state of the parameters that AdamW takes, in numbers."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class SavedOptimizer:
    """A saved optimizer: its matrices in a Muon, the rest counted, and what to know of both."""

    name: str
    muon: Muon
    aux: AuxState
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _MuonPart:
    """What Muon takes of one saved group: keys of the parameters that have a momentum."""

    group: Group
    keys: list[Any]
    names: list[str]
    is_ours: bool


def is_muon_state(state_dict: Mapping[str, Any]) -> bool:
    """Whether it is the state of a Muon, ours or another that keeps a `momentum_buffer`."""
    states = state_dict["state"]
    return any(
        (VERSION_KEY in group and group.get("use_muon", True))
        or any(_is_foreign(states.get(key) or {}, group) for key in group.get("params", ()))
        for group in state_dict["param_groups"]
    )


def _is_foreign(entries: Mapping[str, Any], group: Group) -> bool:
    return "momentum_buffer" in entries and "dampening" not in group  # which SGD's groups have


def is_torch_muon(state_dict: Mapping[str, Any]) -> bool:
    """Whether every group is of torch.optim.Muon: no other has options of these names."""
    return all(
        VERSION_KEY not in group and {"ns_coefficients", "adjust_lr_fn"} <= group.keys()
        for group in state_dict["param_groups"]
    )


def describe(state_dict: Mapping[str, Any]) -> str:
    """What a state is that is not Muon's, for a message."""
    entries = {str(name) for state in state_dict["state"].values() for name in state}
    return f"entries {', '.join(sorted(entries))}" if entries else "no state of any parameter"


def rebuild(state_dict: Mapping[str, Any], state_format: str | None) -> SavedOptimizer:
    """A Muon that has loaded the momentum of a saved state.

    Its parameters have the right shapes and no values. state_format: stored in this one, instead of
    the one that it was saved in. Raises UserError.
    """
    try:
        return _rebuild(state_dict, state_format)
    except (TypeError, ValueError) as error:
        raise UserError(str(error)) from None


def _rebuild(state_dict: Mapping[str, Any], state_format: str | None) -> SavedOptimizer:
    states = state_dict["state"]
    parts = [_muon_part(i, group, states) for i, group in enumerate(state_dict["param_groups"])]
    parts = [part for part in parts if part.keys]
    if not parts:
        raise UserError("state: expected a momentum, got none: it was saved before the first step")
    muon = Muon([_new_group(part, states, state_format) for part in parts])
    muon.load_state_dict(
        {
            "state": {key: states[key] for part in parts for key in part.keys},
            "param_groups": [
                {**part.group, "params": part.keys, "param_names": part.names} for part in parts
            ],
        }
    )
    aux = _aux_state(state for state in states.values() if _is_aux(state))
    is_ours = all(part.is_ours for part in parts)
    name = _name(is_ours, state_dict)
    return SavedOptimizer(name, muon, aux, tuple(_remarks(is_ours, state_format)))


def _muon_part(index: int, group: Group, states: Mapping[Any, Any]) -> _MuonPart:
    is_ours = VERSION_KEY in group
    keys = group["params"]
    names = group.get("param_names") or [f"group {index}, #{i}" for i in range(len(keys))]
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"parameter group {index}: expected names in param_names, got {names!r}")
    if len(names) != len(keys):
        raise UserError(
            f"parameter group {index}: expected {len(keys)} param_names, got {len(names)}"
        )
    uses_muon = group.get("use_muon", True)
    chosen = [
        (key, name)
        for key, name in zip(keys, names, strict=True)
        if uses_muon and has_momentum(states.get(key) or {}) and not _is_aux(states[key])
    ]
    for key, name in chosen:
        _check_tensors(states[key], name)
    return _MuonPart(group, [key for key, _ in chosen], [name for _, name in chosen], is_ours)


def _check_tensors(entries: Mapping[str, Any], name: str) -> None:
    """Raise UserError for what no optimizer saves: tensors without values of their own.

    A view that repeats its values may be larger than any memory.
    """
    for entry, value in entries.items():
        if not isinstance(value, Tensor):
            continue
        dense = value.layout == torch.strided and not (value.is_meta or value.is_quantized)
        if not dense or value.numel() * value.itemsize > value.untyped_storage().nbytes():
            raise UserError(
                f"state of {name}: {entry}: expected a dense tensor with all its values, got "
                f"{tuple(value.shape)}"
            )
        if value.is_floating_point() and not _is_finite(value):
            raise UserError(f"state of {name}: {entry}: expected finite values, got inf or nan")


def _is_finite(value: Tensor) -> bool:
    return value.itemsize == 1 or bool(value.isfinite().all())  # of 8 bits, not all can say it


def _is_aux(entries: Mapping[str, Any]) -> bool:
    return not _ADAM_ENTRIES.isdisjoint(entries)


def _new_group(part: _MuonPart, states: Mapping[Any, Any], state_format: str | None) -> Group:
    params = []
    for key, name in zip(part.keys, part.names, strict=True):
        find = _stored_shape if part.is_ours else _buffer_shape
        # Never written, so that no memory is taken for it.
        params.append(torch.empty(find(states[key], part.group, name)))
    # How a parameter is cut into matrices and stored stays as an optimizer is constructed; all
    # other options come with the saved group.
    options = {option: part.group[option] for option in LAYOUT_OPTIONS if option in part.group}
    if not part.is_ours:
        options = {"state_format": FULL_PRECISION_FORMAT}
    if state_format is not None:
        options["state_format"] = state_format
    return {"params": params, "param_names": part.names, **options}


def _stored_shape(entries: Mapping[str, Any], group: Group, name: str) -> tuple[int, ...]:
    """A shape that is cut into the same matrices as the parameter's, which a state of ours tells.

    It has the rows and columns of the parameter as one matrix. In a stack of experts keys begin
    with the number of their matrix, all of which have as many rows.
    """
    try:
        rows, columns = (whole_number(key, entries.get(key)) for key in ("rows", "columns"))
    except ValueError as error:
        raise UserError(f"state of {name}: {error}") from None
    sizes = (value.nbytes for value in entries.values() if isinstance(value, Tensor))
    if rows * columns > _ELEMENTS_IN_A_BYTE * sum(sizes):
        raise UserError(
            f"state of {name}: expected the momentum of {rows} x {columns} elements, got less"
        )
    heads = {str(key).partition(".")[0] for key in entries}
    numbers = {head for head in heads if head.isdecimal()}
    if not numbers or group.get("row_splits") is not None:
        return rows, columns
    return len(numbers), rows // len(numbers), columns


def _buffer_shape(entries: Mapping[str, Any], _: Group, name: str) -> torch.Size:
    buffer = entries.get("momentum_buffer")
    if not isinstance(buffer, Tensor) or buffer.dtype not in _MOMENTUM_DTYPES:
        got = ", ".join(map(str, entries)) if buffer is None else getattr(buffer, "dtype", buffer)
        raise UserError(f"state of {name}: expected a momentum_buffer of floats, got {got}")
    return buffer.shape


def aux_state_of(muon: Muon) -> AuxState:
    """Of a living optimizer."""
    aux = [group for group in muon.param_groups if not group.get("use_muon", True)]
    states = (muon.state.get(param) for group in aux for param in group["params"])
    return _aux_state(state for state in states if state)


def _aux_state(states: Iterable[Mapping[str, Any]]) -> AuxState:
    found = list(states)
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in found
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return AuxState(len(found), sum(storages.values()))


def _name(is_ours: bool, state_dict: Mapping[str, Any]) -> str:
    if not is_ours:
        return TORCH_MUON if is_torch_muon(state_dict) else "another Muon"
    mixed = any("use_muon" in group for group in state_dict["param_groups"])
    return "MuonWithAuxAdam" if mixed else "Muon"


def _remarks(is_ours: bool, state_format: str | None) -> list[str]:
    chosen = state_format or FULL_PRECISION_FORMAT
    if not is_ours:
        return [
            "The saved momentum is in full precision: the rows say what storing it in "
            f"{chosen} would do."
        ]
    if state_format is not None:
        return [f"The saved momentum was decoded and stored again in {state_format}."]
    return []
