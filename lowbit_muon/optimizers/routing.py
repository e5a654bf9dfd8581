"""Which parameters Muon takes where there is no model to ask: by names and shapes.

`MuonWithAuxAdam` goes by it when it is given what any optimizer of torch's is, as by trainers that
know only `cls(model.parameters(), **options)`. `param_groups` goes by the model's structure.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from lowbit_muon.optimizers.param_groups import HEAD_NAMES, NOT_AN_OPERATOR, Group
from lowbit_muon.step.options import AUX_DEFAULTS, GROUP_DEFAULTS

# Modules that look vectors up or map to the vocabulary, by a component of their path, and by the
# whole of it (torchtune's output).
_LOOKUPS = re.compile(
    rf"(^|[._])(w[tp]e|{'|'.join(HEAD_NAMES)})([._]|$)|emb|^(output|head)$", re.IGNORECASE
)
_ONLY_AUX = {"betas", "eps", "aux_adam"}  # (eps has another meaning for Muon)
_ONLY_MUON = GROUP_DEFAULTS.keys() - AUX_DEFAULTS.keys()
# Layers are repeated; an embedding and its head, if that is not tied, come once each.
_ONCE, _REPEATED = 2, 4
# Rows of an embedding for each of its columns, at least, where nothing is repeated. (Layers of
# transformers widen by 4 or less, those that are fused by 8.)
_TALL = 5
Member = tuple[str | None, Tensor]


def groups_with_kinds(params: Iterable[Any], *, decays: bool) -> list[Any]:
    """Groups with `use_muon` out of parameters, (name, parameter) pairs or groups of either.

    Groups are as they were given if one of them says `use_muon`. Of others AdamW takes what has
    fewer than two dimensions, or one row or column; depthwise convolutions; what a name calls an
    embedding, head, norm or the like; and what looks like an embedding or a head: taller than wide,
    of a shape that comes at most twice, where others come four times or it is five times as tall as
    wide. Muon takes the rest, three dimensions as a stack of matrices where the last is larger than
    the first. Frozen parameters are left out. Options of a group go on to both of its parts, as far
    as each has them.

    decays: whether parameters of groups that do not say so have weight decay; those that are no
    matrices get a group without.

    Raises TypeError for what is no parameter; ValueError if nothing is to be trained.
    """
    entries = _entries(params)
    if any(isinstance(entry, Mapping) and "use_muon" in entry for entry in entries):
        return entries
    are_groups = entries and all(isinstance(entry, Mapping) for entry in entries)
    given = entries if are_groups else [{"params": entries}]
    members = [_members(group) for group in given]
    shapes = Counter(tuple(param.shape) for part in members for _, param in part if param.ndim == 2)
    if any(name is None for part in members for name, param in part if param.ndim > 1):
        _say_that_it_goes_by_shape()
    made: list[Any] = []
    for group, part in zip(given, members, strict=True):
        own = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        keeps = decays and "weight_decay" not in own
        parts: dict[tuple[bool, bool], list[Member]] = {}
        for member in part:
            uses_muon = _is_for_muon(*member, shapes)
            kind = _is_stack(member[1]) if uses_muon else keeps and member[1].ndim < 2
            parts.setdefault((uses_muon, kind), []).append(member)
        for (uses_muon, kind), chosen in sorted(parts.items(), key=lambda item: not item[0][0]):
            made.append(_group(chosen, own, uses_muon=uses_muon))
            if kind:
                made[-1] |= {"batch_experts": True} if uses_muon else {"weight_decay": 0.0}
    if not made:
        raise ValueError("params: expected at least one parameter to be trained, got none")
    return made


def _entries(params: Iterable[Any]) -> list[Any]:
    """What was given."""
    if isinstance(params, (Tensor, set, str)) or not isinstance(params, Iterable):
        raise TypeError(
            "params: expected a model, an ordered iterable of parameters or of (name, parameter), "
            f"or groups, got {type(params).__name__}"
        )
    return list(params)


def _members(group: Mapping[str, Any]) -> list[Member]:
    """The trainable parameters of a group with their names, as far as they have any."""
    params = group.get("params", ())
    entries = [params] if isinstance(params, Tensor) else list(params)
    names = group.get("param_names") or [None] * len(entries)
    found: list[Member] = []
    for name, entry in zip(names, entries, strict=True):
        if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
            name, param = entry
        else:
            param = entry
        if not isinstance(param, Tensor):
            raise TypeError(
                "params: expected parameters, (name, parameter) pairs or groups of them, got "
                f"{type(param).__name__}"
            )
        if param.requires_grad:
            found.append((name, param))
    return found


def _is_for_muon(name: str | None, param: Tensor, shapes: Counter[tuple[int, ...]]) -> bool:
    if param.ndim < 2 or 1 in (param.shape[0], param.numel() // max(1, param.shape[0])):
        return False
    if param.ndim > 2 and param.shape[1] == 1:  # a depthwise convolution
        return False
    module, _, own_name = (name or "").rpartition(".")
    if NOT_AN_OPERATOR.search(own_name) or _LOOKUPS.search(module):
        return False
    rows, columns = param.shape[0], param.shape[-1]
    if param.ndim > 2 or rows <= columns or shapes[rows, columns] > _ONCE:
        return True
    return max(shapes.values()) < _REPEATED and rows < _TALL * columns


def _is_stack(param: Tensor) -> bool:
    return param.ndim == 3 and param.shape[-1] > param.shape[0]


def _group(members: list[Member], own: Group, *, uses_muon: bool) -> Group:
    others = _ONLY_AUX if uses_muon else _ONLY_MUON
    group = {key: value for key, value in own.items() if key not in others}
    group |= {"params": [param for _, param in members], "use_muon": uses_muon}
    if all(name is not None for name, _ in members):
        group["param_names"] = [name for name, _ in members]
    return group


@functools.cache
def _say_that_it_goes_by_shape() -> None:
    warnings.warn(
        "MuonWithAuxAdam was given parameters without names or a model, and went by their shapes: "
        "matrices to Muon, and to AdamW what looks like an embedding or a head (taller than wide, "
        "and its shape comes at most twice). Pass the model, or its named_parameters(), for more "
        "than a guess; `param_groups` shows what went where. (In transformers' Trainer, whose "
        "learning_rate does not come here, use MuonFactory.)",
        stacklevel=4,
    )
