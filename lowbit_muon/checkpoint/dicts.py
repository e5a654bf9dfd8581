"""State dicts: versioned when saved; checked and converted, all or nothing, when loaded.

This file knows groups and parameters; `checkpoint_momentum` and `checkpoint_adam` know what is in
the state of one parameter. These load:
  ours: `format_version` in every group. A momentum stored in another format, or split into other
    matrices, than the optimizer's own is decoded and quantised again; otherwise it is copied.
  torch.optim.Muon, KellerJordan's Muon: `momentum_buffer`, M <- momentum*M + (1 - momentum)*G.
  Moonlight's Muon: `momentum_buffer`, M <- momentum*M + G; one group for Muon and AdamW.

Learning rate, momentum and the like come from the loaded groups, as in torch; what says how this
optimizer works (`Option.load`) stays as it was constructed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowbit_muon.backends.tensors import accumulation_dtype, holds_values
from lowbit_muon.formats.state_format import FORMAT_VERSION
from lowbit_muon.step.options import AUX_OPTIONS, OPTIONS, SCHEDULER_KEYS

Group = dict[str, Any]
State = dict[str, Any]
StateDict = dict[str, Any]

VERSION_KEY = "format_version"
# What stays as the optimizer was constructed.
_KEPT = {
    *(option.name for option in (*OPTIONS, *AUX_OPTIONS) if option.load != "saved"),
    "use_muon", VERSION_KEY,
}  # fmt: skip
_LARGEST_COUNT = 2**63  # counts are int64 on devices


@dataclass(frozen=True)
class SavedState:
    """One parameter's entries in a state dict, with the options of its group."""

    entries: Mapping[str, Any]
    group: Group
    convention: Literal["ours", "ema", "sum"]


class Checkpointed(Protocol):
    """What loading and exporting ask of an optimizer. Conversions raise ValueError."""

    param_groups: list[Group]
    state: Any

    def register_load_state_dict_pre_hook(self, hook: Any) -> RemovableHandle: ...

    def register_load_state_dict_post_hook(
        self, hook: Any, prepend: bool = False
    ) -> RemovableHandle: ...

    def _check_group(self, group: Group) -> None: ...

    def _convert_state(self, param: Tensor, group: Group, saved: SavedState) -> State: ...

    def _export_group(self, group: Group) -> Group: ...

    def _export_state(self, param: Tensor, group: Group) -> State: ...


def with_version(state_dict: StateDict) -> StateDict:
    """The state dict that `Optimizer.state_dict` made, with our version in each of its groups."""
    for group in state_dict.get("param_groups", ()):  # a user's hook may have rearranged it
        group[VERSION_KEY] = FORMAT_VERSION
    return state_dict


@contextmanager
def converting(optimizer: Checkpointed) -> Iterator[None]:
    """While active, `Optimizer.load_state_dict` takes every layout that this module knows.

    torch's own loading would cast codes and scales to the parameter's dtype, and keep the caller's
    tensors. So the state passes by it: converted in a hook that runs after the user's pre-hooks and
    before torch changes anything, put in place in one that runs before the user's post-hooks.
    """
    converted: dict[Tensor, State] = {}

    def convert(_: object, state_dict: StateDict) -> StateDict:
        groups, states = convert_state_dict(optimizer, state_dict)
        converted.update(states)
        return {**state_dict, "state": {}, "param_groups": groups}

    def put_in_place(_: object) -> None:
        optimizer.state.update(converted)

    handles = (
        optimizer.register_load_state_dict_pre_hook(convert),
        optimizer.register_load_state_dict_post_hook(put_in_place, prepend=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def convert_state_dict(
    optimizer: Checkpointed, state_dict: Mapping[str, Any]
) -> tuple[list[Group], dict[Tensor, State]]:
    """(groups with the saved parameter keys, state by parameter) as the optimizer stores them.

    Changes neither; the result shares no memory with the state dict. Raises ValueError naming the
    group or the parameter, what was expected and what came.
    """
    saved_states, saved_groups = _parts(state_dict)
    saved_groups = _matching_groups(optimizer.param_groups, saved_groups)
    new_groups: list[Group] = []
    new_states: dict[Tensor, State] = {}
    unused = set(saved_states)
    for index, (group, saved_group) in enumerate(
        zip(optimizer.param_groups, saved_groups, strict=True)
    ):
        with blaming(f"parameter group {index}"):
            convention = _convention(saved_group)
            new_group = _merged_group(group, saved_group, convention)
            optimizer._check_group(new_group)
        new_groups.append(new_group)
        names = group.get("param_names") or [f"#{i}" for i in range(len(group["params"]))]
        keys = _keys_by_parameter(group, saved_group, saved_states)
        for name, param, key in zip(names, group["params"], keys, strict=True):
            unused.discard(key)
            if saved_states.get(key):
                with blaming(f"state of parameter {key!r} (group {index}, {name})"):
                    saved = SavedState(saved_states[key], saved_group, convention)
                    new_states[param] = optimizer._convert_state(param, new_group, saved)
    if unused:
        raise ValueError(
            f"state: expected only parameters that are in a group, got {sorted(map(repr, unused))}"
        )
    return new_groups, {param: state for param, state in new_states.items() if state}


def export(optimizer: Checkpointed) -> StateDict:
    """The optimizer's state in full precision, in the layout its `_export_*` methods choose."""
    groups: list[Group] = []
    states: dict[int, State] = {}
    first = 0
    for group in optimizer.param_groups:
        keys = list(range(first, first + len(group["params"])))
        first += len(keys)
        options = optimizer._export_group(group)
        options |= {name: group[name] for name in ("initial_lr", "param_names") if name in group}
        groups.append({**options, "params": keys})
        for key, param in zip(keys, group["params"], strict=True):
            if optimizer.state.get(param):
                states[key] = optimizer._export_state(param, group)
    return {"state": states, "param_groups": groups}


def own_copy(value: Tensor, device: torch.device) -> Tensor:
    """A contiguous copy with storage of its own, of the tensor's exact size."""
    wide = value.dtype == torch.float64
    dtype = accumulation_dtype(device) if wide else value.dtype
    return torch.empty(value.shape, dtype=dtype, device=device).copy_(value.detach())


def whole_number(name: str, value: object) -> int:
    """A step count stored as a number or a one-element tensor. Raises ValueError."""
    number = value.item() if holds_values(value) and value.numel() == 1 else value
    if (
        not isinstance(number, (int, float))
        or isinstance(number, bool)
        or not 0 <= number < _LARGEST_COUNT
        or number != number // 1
    ):
        raise ValueError(f"{name}: expected a whole number >= 0, got {value!r}")
    return int(number)


@contextmanager
def blaming(what: str) -> Iterator[None]:
    """Put the name of what was being read before the message of an error."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error


def _parts(state_dict: Mapping[str, Any]) -> tuple[Mapping[Any, Any], list[Group]]:
    states, groups = (state_dict.get(name) for name in ("state", "param_groups"))
    if not isinstance(states, Mapping) or not isinstance(groups, Sequence):
        raise ValueError(
            "state_dict: expected a mapping 'state' and a sequence 'param_groups', got "
            f"{type(states).__name__} and {type(groups).__name__}"
        )
    for key, entries in states.items():
        if not isinstance(entries, Mapping):
            raise ValueError(f"state of parameter {key!r}: expected a mapping, got {entries!r}")
    for index, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), Sequence):
            raise ValueError(f"parameter group {index}: expected a mapping with 'params'")
        if not all(isinstance(key, (int, str)) for key in group["params"]):
            raise ValueError(
                f"parameter group {index}: expected numbers or names as 'params', "
                f"got {group['params']!r}"
            )
    return states, [dict(group) for group in groups]


def _matching_groups(groups: Sequence[Group], saved_groups: list[Group]) -> list[Group]:
    """The saved groups, one for each of ours; Moonlight's only group is split."""
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if len(saved_groups) == 1 and "wd" in saved_groups[0] and saved_sizes == [sum(sizes)]:
        keys = iter(saved_groups[0]["params"])
        return [{**saved_groups[0], "params": [next(keys) for _ in range(n)]} for n in sizes]
    if sizes != saved_sizes:
        raise ValueError(
            f"param_groups: expected {len(sizes)} groups of {sizes} parameters, "
            f"got {len(saved_sizes)} of {saved_sizes}"
        )
    return saved_groups


def _convention(saved_group: Group) -> Literal["ours", "ema", "sum"]:
    if VERSION_KEY not in saved_group:
        return "sum" if "wd" in saved_group else "ema"
    version = saved_group[VERSION_KEY]
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"{VERSION_KEY}: expected 1 to {FORMAT_VERSION}, got {version!r}; a newer version of "
            "lowbit_muon may have saved this state"
        )
    return "ours"


def _merged_group(group: Group, saved_group: Group, convention: str) -> Group:
    """Our group with the saved options, and the saved parameter keys as its `params`."""
    uses_muon = group.get("use_muon", True)
    if saved_group.get("use_muon", uses_muon) is not uses_muon:
        raise ValueError(f"use_muon: expected {uses_muon}, got {saved_group['use_muon']!r}")
    names, count = saved_group.get("param_names", ()), len(group["params"])
    if "param_names" in saved_group and not (
        isinstance(names, (list, tuple)) and [type(name) for name in names] == [str] * count
    ):
        raise ValueError(f"param_names: expected {count} strings, got {names!r}")
    saved = dict(saved_group)
    if convention == "sum":
        saved |= {"weight_decay": saved["wd"], "adjust_lr_fn": "match_rms_adamw"}
        if not uses_muon:
            saved |= {"betas": saved.get("adamw_betas"), "eps": saved.get("adamw_eps")}
    if convention != "ours":
        known = {*group, *SCHEDULER_KEYS}
        saved = {name: value for name, value in saved.items() if name in known}
    return {**group, **{name: value for name, value in saved.items() if name not in _KEPT}}


def _keys_by_parameter(
    group: Group, saved_group: Group, saved_states: Mapping[Any, Any]
) -> list[Any]:
    """The saved key of each parameter of a group.

    KellerJordan's distributed MuonWithAuxAdam sorts its Muon parameters by size, largest first. A
    stable sort that leaves all shapes in place moves nothing, so shapes tell the two orders apart.
    """
    keys = list(saved_group["params"])
    if VERSION_KEY in saved_group or saved_group.get("use_muon") is not True:
        return keys
    shapes = [param.shape for param in group["params"]]
    saved_shapes = [_buffer_shape(saved_states.get(key)) for key in keys]
    order = sorted(range(len(shapes)), key=lambda i: shapes[i], reverse=True)

    def fits(shapes_in_order: Iterable[torch.Size]) -> bool:
        pairs = zip(saved_shapes, shapes_in_order, strict=True)
        return all(found is None or found == expected for found, expected in pairs)

    if fits(shapes) or not fits(shapes[i] for i in order):
        return keys
    by_parameter = dict(zip(order, keys, strict=True))
    return [by_parameter[i] for i in range(len(keys))]


def _buffer_shape(entries: Mapping[str, Any] | None) -> torch.Size | None:
    buffer = (entries or {}).get("momentum_buffer")
    return buffer.shape if isinstance(buffer, Tensor) else None
