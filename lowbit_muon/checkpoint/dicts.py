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

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lowbit_muon.backends.tensors import accumulation_dtype, error_context, holds_values
from lowbit_muon.formats.state_format import FORMAT_VERSION
from lowbit_muon.step.options import AUX_OPTIONS, OPTIONS, SCHEDULER_KEYS
from lowbit_muon.step.rules.recipes import resolve_rule

Group = dict[str, Any]
State = dict[str, Any]
StateDict = dict[str, Any]

VERSION_KEY = "format_version"
_TABLE = (*OPTIONS, *AUX_OPTIONS)
_SAVED = [*dict.fromkeys(o.name for o in _TABLE if o.load == "saved"), *SCHEDULER_KEYS]
# What stays as the optimizer was constructed.
_KEPT = {*(o.name for o in _TABLE if o.load != "saved"), "use_muon", "param_names", VERSION_KEY}
_LARGEST_COUNT = 2**31 - 1  # bitsandbytes counts in int32


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
    groups = optimizer.param_groups
    matches = _by_name(groups, saved_groups) or _by_order(groups, saved_groups, saved_states)
    new_groups: list[Group] = []
    new_states: dict[Tensor, State] = {}
    unused = set(saved_states)
    for index, (group, match) in enumerate(zip(groups, matches, strict=True)):
        with error_context(f"parameter group {index}", ValueError):
            new_group = _merged_group(group, match)
            optimizer._check_group(new_group)
        new_groups.append(new_group)
        names = group.get("param_names") or [f"#{i}" for i in range(len(group["params"]))]
        for name, param, (key, saved_group) in zip(
            names, group["params"], match.params, strict=True
        ):
            unused.discard(key)
            # torch.distributed.checkpoint puts {} for what it does not find
            entries = {
                name: value
                for name, value in saved_states.get(key, {}).items()
                if not (isinstance(value, Mapping) and not value)
            }
            if entries:
                with error_context(
                    f"state of parameter {key!r} (group {index}, {name})", ValueError
                ):
                    saved = SavedState(entries, saved_group, _convention(saved_group))
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
            state = optimizer.state.get(param)
            if state and state.get("state_format", {}) is not None:  # of auto, not chosen yet
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
        or not 0 <= number <= _LARGEST_COUNT
        or number != number // 1
    ):
        raise ValueError(
            f"{name}: expected a whole number >= 0, at most {_LARGEST_COUNT}, got {value!r}"
        )
    return int(number)


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
        names, count = group.get("param_names", ()), len(group["params"])
        if "param_names" in group and not (
            isinstance(names, (list, tuple)) and [type(name) for name in names] == [str] * count
        ):
            raise ValueError(
                f"parameter group {index}: param_names: expected {count} strings, got {names!r}"
            )
    keys = [key for group in groups for key in group["params"]]
    if len(set(keys)) < len(keys):
        raise ValueError("param_groups: expected every parameter once, got one several times")
    return _by_key(states, set(keys)), [dict(group) for group in groups]


def _by_key(states: Mapping[Any, Any], known: set[Any]) -> Mapping[Any, Any]:
    """The states by the keys of the groups, which are known.

    torch.distributed.checkpoint makes strings of numbers: it loads what is no tensor into an entry
    "0" beside 0, whose own is old then.
    """
    result: dict[Any, Any] = {}
    for key, entries in sorted(states.items(), key=lambda item: isinstance(item[0], str)):
        is_number = isinstance(key, str) and key.isdecimal() and key not in known
        known_key = int(key) if is_number and int(key) in known else key
        result[known_key] = {**result.get(known_key, {}), **entries}
    return result


@dataclass(frozen=True)
class _Match:
    """What is saved for one of our groups: its options, and (key, saved group) by parameter."""

    groups: list[Group]
    params: list[tuple[Any, Group]]


def _by_name(groups: Sequence[Group], saved_groups: list[Group]) -> list[_Match] | None:
    """What is saved for our groups by the names of parameters; None unless both sides have names.

    Keys that are names go before `param_names`: torch.distributed.checkpoint puts keys in our
    order, but not those. Raises ValueError for other names.
    """
    ours = [[_plain_name(name) for name in group.get("param_names", ())] for group in groups]
    keys = [(key, group) for group in saved_groups for key in group["params"]]
    has_names = all(isinstance(key, str) for key, _ in keys)
    saved_names = (
        [key for key, _ in keys]
        if has_names
        else [name for group in saved_groups for name in group.get("param_names", ())]
    )
    found = dict(zip(map(_plain_name, saved_names), keys, strict=False))
    expected = {name for names in ours for name in names}
    count = sum(len(group["params"]) for group in groups)
    if not keys or len(expected) != count or len(found) != len(keys) != len(saved_names):
        return None
    if expected != set(found):
        if has_names:
            return None
        raise ValueError(
            f"param_names: expected {sorted(expected - set(found)) or 'no more'}, got "
            f"{sorted(set(found) - expected) or 'none of them'}"
        )
    matches = []
    for index, names in enumerate(ours):
        params = [found[name] for name in names]
        members = list({id(group): group for _, group in params}.values())
        matches.append(_Match(members or saved_groups[index : index + 1], params))
    return matches


_WRAPPERS = re.compile(
    r"(^|(?<=\.))(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def _plain_name(name: str) -> str:
    """A parameter's name without what wrappers of modules add to it."""
    return _WRAPPERS.sub("", name)


def _by_order(
    groups: Sequence[Group], saved_groups: list[Group], saved_states: Mapping[Any, Any]
) -> list[_Match]:
    """What is saved for our groups, by their order."""
    return [
        _Match([saved], [(key, saved) for key in _keys_by_parameter(group, saved, saved_states)])
        for group, saved in zip(groups, _matching_groups(groups, saved_groups), strict=True)
    ]


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


def _merged_group(group: Group, match: _Match) -> Group:
    """Our group with the saved options, and the saved parameter keys as its `params`."""
    merged = [{**group, **_saved_options(group, saved)} for saved in match.groups] or [group]
    for other in merged[1:]:
        differing = [name for name in _SAVED if other.get(name) != merged[0].get(name)]
        if differing:
            raise ValueError(
                f"expected parameters that were saved with the same options, got two of {differing}"
            )
    return {**merged[0], "params": [key for key, _ in match.params]}


def _saved_options(group: Group, saved_group: Group) -> Group:
    """What our group takes from a saved one."""
    convention, uses_muon = _convention(saved_group), group.get("use_muon", True)
    if saved_group.get("use_muon", uses_muon) is not uses_muon:
        raise ValueError(f"use_muon: expected {uses_muon}, got {saved_group['use_muon']!r}")
    saved = dict(saved_group)
    if convention == "sum":
        saved |= {"weight_decay": saved["wd"], "adjust_lr_fn": "match_rms_adamw"}
        if not uses_muon:
            saved |= {"betas": saved.get("adamw_betas"), "eps": saved.get("adamw_eps")}
    if convention != "ours":
        known = {*group, *SCHEDULER_KEYS}
        saved = {name: value for name, value in saved.items() if name in known}
    kept = _KEPT | _options_of_other_rule(group, saved_group) if uses_muon else _KEPT
    return {name: value for name, value in saved.items() if name not in kept}


def _options_of_other_rule(group: Group, saved_group: Group) -> set[str]:
    """The options that our group, or the saved one, has by its rule, if these are two rules."""
    rules = [resolve_rule(each.get("rule", "muon")) for each in (group, saved_group)]
    if rules[0] == rules[1]:
        return set()
    return {name for rule in rules for name, _ in rule.options}


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
