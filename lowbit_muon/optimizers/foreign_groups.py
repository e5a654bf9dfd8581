"""Parameter groups of other libraries' optimizers as groups of `MuonWithAuxAdam`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lowbit_muon.backends.tensors import error_context
from lowbit_muon.step.options import (
    AUX_OPTIONS,
    DEFAULT_COEFFICIENTS,
    DEFAULT_EPS,
    OPTIONS,
    SCHEDULER_KEYS,
    Option,
    why_refused,
)
from lowbit_muon.step.rules.momentum import TwoDecays
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.scaling import FixedNorm, VectorMoment
from lowbit_muon.step.rules.stage import expect
from lowbit_muon.step.rules.weight_decay import Cautious

Group = dict[str, Any]

# What any group may have, and keeps.
_KEPT = {"params", "param_names", "name", *SCHEDULER_KEYS}
_REQUIRED = object()


def from_groups(
    source: str, groups: Iterable[Any] | Mapping[str, Any], **arguments: Any
) -> list[Group]:
    """Groups for `MuonWithAuxAdam` that step as another library's optimizer steps its own.

    Where no group is for AdamW, they serve `Muon`, too. What its groups leave out is written into
    ours with that library's own defaults.

    Args:
        source: whose groups. "torch": torch.optim.Muon; "kellerjordan": KellerJordan/Muon, with
            `use_muon`; "normuon": zichongli5/NorMuon, with `use_muon` and `beta2`; "moonlight":
            MoonshotAI/Moonlight, whose arguments `muon_params` and `adamw_params` stand for
            groups; "dion": Muon and NorMuon of microsoft/dion, with `algorithm` "muon", "normuon",
            "lion" or "adamw"; "nanochat": karpathy/nanochat, with `kind` "muon" or "adamw".
        groups: as its constructor takes them. A group of dion with `num_heads` becomes one for each
            number of rows.
        arguments: what its constructor is given beside them: the defaults of its groups.

    Raises:
        ValueError, TypeError: naming the group and the key, what was expected and what came; for
            keys without a counterpart, too.
    """
    expect(source in _LIBRARIES, "source", f"one of {sorted(_LIBRARIES)}", source)
    library = _LIBRARIES[source]
    known = {name: None for kind in library.kinds.values() for name in kind.defaults}
    for name, value in arguments.items():
        expect(library.has_defaults, name, f"no argument, since {source}'s groups say all", value)
        _check_key(name, value, known, OPTIONS, f"an argument of {source}'s optimizer")
    made: list[Group] = []
    for number, group in enumerate(_as_mappings(groups)):
        with error_context(f"{source}: group {number}"):
            for kind, own in library.split(group):
                made += library.kinds[kind].translated(own, arguments)
    for group in made:
        if isinstance(group["lr"], Tensor):  # which schedulers fill in place
            group["lr"] = group["lr"].clone()
    return made


@dataclass(frozen=True)
class _Kind:
    """Groups of one kind: the defaults of their keys, and what these are among our options."""

    defaults: Mapping[str, Any]
    translate: Callable[[Group], Group]
    uses_muon: bool = True

    def translated(self, group: Mapping[str, Any], arguments: Mapping[str, Any]) -> list[Group]:
        """Our groups. Raises ValueError for an unknown key, or one that is missing."""
        table = OPTIONS if self.uses_muon else AUX_OPTIONS
        for key, value in group.items():
            if key not in _KEPT:
                _check_key(key, value, self.defaults, table, "a key of such a group")
        passed = {name: value for name, value in arguments.items() if name in self.defaults}
        values = {**self.defaults, **passed, **group, **_parameters(group)}
        for key in self.defaults:
            expect(values[key] is not _REQUIRED, key, "a value in each such group", None)
        kept = {key: value for key, value in values.items() if key in _KEPT}
        made = {**kept, "use_muon": self.uses_muon, **self.translate(values)}
        heads = made.pop("num_heads", None)
        return [made] if heads is None else list(_by_heads(made, heads))


@dataclass(frozen=True)
class _Library:
    """How an optimizer tells the kinds of its groups apart.

    Attributes:
        kinds: by the value of a group's key, or by the name of a list of parameters.
        key: the key; empty where there is one kind, or lists.
        usual: its value in groups that do not have it.
        lists: a group holds a list of parameters for each kind, in the place of "params".
        has_defaults: its constructor takes defaults for its groups.
    """

    kinds: Mapping[Any, _Kind]
    key: str = ""
    usual: Any = None
    lists: bool = False
    has_defaults: bool = True

    def split(self, group: Mapping[str, Any]) -> Iterator[tuple[Any, Group]]:
        """(kind, group without what said so)."""
        if self.lists:
            others = {key: value for key, value in group.items() if key not in self.kinds}
            lists = {kind: list(group.get(kind) or ()) for kind in self.kinds}
            good = any(lists.values()) and "params" not in others
            expect(good, "params", f"lists of parameters called {list(self.kinds)}", [*others])
            for kind, params in lists.items():
                if params:
                    yield kind, {**others, "params": params}
            return
        own = dict(group)
        kind = own.pop(self.key, self.usual)
        known = [each for each in self.kinds if each is not None]
        expect(kind in self.kinds, self.key, f"one of {known}", kind)
        yield kind, own


def _as_mappings(groups: Iterable[Any] | Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Groups, of one group or of parameters alone, too."""
    if isinstance(groups, Mapping):
        return [groups]
    listed = list(groups)
    if all(isinstance(group, Mapping) for group in listed):
        return listed
    return [{"params": listed}]


def _parameters(group: Mapping[str, Any]) -> Group:
    """A group's parameters as a list, with the names that they were given with."""
    given = group.get("params")
    params = [given] if isinstance(given, Tensor) else list(given or ())
    if params and all(isinstance(each, tuple) for each in params):
        return {"params": [p for _, p in params], "param_names": [name for name, _ in params]}
    good = given is not None and all(isinstance(each, Tensor) for each in params)
    expect(good, "params", "parameters", given)
    return {"params": params}


def _check_key(
    key: str, value: Any, known: Iterable[str], table: Sequence[Option], expected: str
) -> None:
    """Raise ValueError for a key that is not known, with what it is here."""
    if key in known:
        return
    hint = why_refused(table, key)
    if key in {option.name for option in table}:
        hint = "set it in the groups that are returned, or in MuonWithAuxAdam"
    expected = f"{expected} ({', '.join(known)})"
    raise ValueError(f"{key}: expected {expected}, got {value!r}{hint and f'; {hint}'}")


def _by_heads(group: Group, heads: int) -> Iterator[Group]:
    """A group for each number of rows, cut into heads: equal parts of a parameter's rows."""
    good = isinstance(heads, int) and not isinstance(heads, bool) and heads >= 1
    expect(good, "num_heads", "None or a whole number >= 1", heads)
    by_rows: dict[int, list[int]] = {}
    for index, param in enumerate(group["params"]):
        rows = param.shape[0] if param.ndim else 0
        fits = param.ndim == 2 and rows % heads == 0
        expect(fits, "num_heads", "a divisor of the rows of every matrix", (heads, [*param.shape]))
        by_rows.setdefault(rows, []).append(index)
    lists = [key for key in ("params", "param_names") if key in group]
    for rows, indices in by_rows.items():
        members: Group = {key: [group[key][i] for i in indices] for key in lists}
        yield {**group, **members, "row_splits": (rows // heads,) * heads if heads > 1 else None}


def _stacked(values: Group, dimensions: Iterable[int]) -> bool:
    """Whether parameters of so many dimensions are stacks of matrices; ValueError if some are."""
    found = {param.ndim for param in values["params"]} - {2}
    stacks = found & set(dimensions)
    expect(not stacks or stacks == found, "params", "stacks apart from convolutions", sorted(found))
    return bool(stacks)


_MANY = range(3, 9)  # dimensions


# torch.optim.Muon, whose options are ours


def _same(values: Group) -> Group:
    return {key: value for key, value in values.items() if key not in _KEPT}


_TORCH = _Kind(
    {
        "lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True,
        "ns_coefficients": DEFAULT_COEFFICIENTS, "eps": DEFAULT_EPS, "ns_steps": 5,
        "adjust_lr_fn": None,
    },
    _same,
)  # fmt: skip


# KellerJordan/Muon and zichongli5/NorMuon: parameters of three dimensions are stacks there


def _kellerjordan(values: Group) -> Group:
    return {**_same(values), "batch_experts": _stacked(values, [3])}


def _normuon(values: Group) -> Group:
    rule = replace(RULES["normuon"], scaling=(VectorMoment(beta=values.pop("beta2")),))
    return {**_kellerjordan(values), "rule": rule}


_KELLERJORDAN = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
_ADAM = _Kind(
    {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}, _same, uses_muon=False
)


# MoonshotAI/Moonlight, examples/toy_train.py: one set of arguments for both kinds


def _moonlight(values: Group) -> Group:
    options = {name: values[name] for name in ("lr", "momentum", "nesterov", "ns_steps")}
    return {
        **options,
        "weight_decay": values["wd"],
        "adjust_lr_fn": "match_rms_adamw",
        "rule": RULES["moonlight"],
    }


def _moonlight_adamw(values: Group) -> Group:
    return {
        "lr": values["lr"],
        "betas": values["adamw_betas"],
        "eps": values["adamw_eps"],
        "weight_decay": values["wd"],
    }


_MOONLIGHT = {
    "lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5,
    "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8,
}  # fmt: skip


# karpathy/nanochat, nanochat/optim.py: its optimizer has no defaults


def _nanochat(values: Group) -> Group:
    options = {name: values[name] for name in ("lr", "momentum", "ns_steps", "weight_decay")}
    moment = VectorMoment("long", values["beta2"] or 0.0)
    return {
        **options,
        "nesterov": True,
        "ns_coefficients": "polar_express",
        "adjust_lr_fn": "original",
        "batch_experts": _stacked(values, _MANY),
        "rule": replace(RULES["nanochat"], scaling=(FixedNorm(), moment)),
    }


_NANOCHAT_MUON = dict.fromkeys(("lr", "momentum", "ns_steps", "beta2", "weight_decay"), _REQUIRED)
_NANOCHAT_ADAMW = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), _REQUIRED)


# microsoft/dion, dion/muon.py, dion/normuon.py and dion/megabatch_base.py

# (all of these have to be at their defaults, or make no difference to an update)
_DION_OTHERS = {
    "distributed_mesh": None, "newton_schulz_func": None, "use_triton": False,
    "use_gram_newton_schulz": False, "step": 0,
}  # fmt: skip
_DION = {
    "lr": 0.01, "mu": 0.95, "weight_decay": 0.01, "cautious_wd": False, "epsilon": 1e-8,
    "nesterov": False, "adjust_lr": "spectral_norm", "flatten": False, "use_polar_express": True,
    "num_heads": None, "split_sizes": None, "betas": None, "beta1": None, "beta2": None,
    **_DION_OTHERS,
}  # fmt: skip
_ADJUST = {"spectral_norm": "spectral_unclamped", "rms_norm": "match_rms_adamw", None: "none"}


def _dion(values: Group, rule: UpdateRule = RULES["dion_muon"]) -> Group:
    _check_dion(values)
    adjust, sizes = values["adjust_lr"], values["split_sizes"]
    expect(adjust in _ADJUST, "adjust_lr", f"one of {list(_ADJUST)}", adjust)
    both = sizes is not None and values["num_heads"] is not None
    expect(not both, "split_sizes", "None with num_heads", sizes)
    polar = values["use_polar_express"] or values["use_gram_newton_schulz"]
    return {
        "lr": values["lr"],
        "momentum": values["mu"],
        "weight_decay": values["weight_decay"],
        "nesterov": values["nesterov"],
        "eps": values["epsilon"],
        "ns_coefficients": "polar_express" if polar else "quintic",
        "ns_steps": 5,
        "adjust_lr_fn": _ADJUST[adjust],
        "batch_experts": not values["flatten"] and _stacked(values, _MANY),
        "row_splits": None if sizes is None else tuple(sizes),
        "num_heads": values["num_heads"],
        "rule": replace(rule, weight_decay=Cautious()) if values["cautious_wd"] else rule,
    }


def _dion_normuon(values: Group) -> Group:
    moment = VectorMoment(beta=values["muon_beta2"], eps=1e-8)
    return _dion(values, replace(RULES["dion_muon"], name="dion_normuon", scaling=(moment,)))


def _dion_lion(values: Group) -> Group:
    _check_dion(values)
    for param in values["params"]:
        expect(param.ndim >= 2, "algorithm", "'adamw' for vectors", ("lion", param.shape))
    beta, momentum = _betas(values)
    rule = replace(RULES["lion"], momentum=TwoDecays(beta))
    return {
        "lr": values["lr"],
        "momentum": momentum,
        "weight_decay": values["weight_decay"],
        "nesterov": False,
        "adjust_lr_fn": "none",
        "rule": replace(rule, weight_decay=Cautious()) if values["cautious_wd"] else rule,
    }


def _dion_adamw(values: Group) -> Group:
    _check_dion(values)
    cautious = values["cautious_wd"]
    expect(not cautious, "cautious_wd", "False of AdamW, which has no such rule here", cautious)
    return {
        "lr": values["lr"],
        "betas": _betas(values),
        "eps": values["epsilon"],
        "weight_decay": values["weight_decay"],
    }


def _check_dion(values: Group) -> None:
    mesh, function = values["distributed_mesh"], values["newton_schulz_func"]
    expect(mesh is None, "distributed_mesh", "process_group=... of MuonWithAuxAdam", mesh)
    translation = "None, or ns_coefficients in the groups that are returned"
    expect(function is None, "newton_schulz_func", translation, function)


def _betas(values: Group) -> tuple[float, float]:
    """A group's own beta1 and beta2, or the constructor's betas."""
    first, second = values["betas"] or (0.9, 0.95)
    given = values["beta1"], values["beta2"]
    return first if given[0] is None else given[0], second if given[1] is None else given[1]


_LIBRARIES = {
    "torch": _Library({None: _TORCH}),
    "kellerjordan": _Library(
        {True: _Kind(_KELLERJORDAN, _kellerjordan), False: _ADAM},
        key="use_muon",
        has_defaults=False,
    ),
    "normuon": _Library(
        {True: _Kind({**_KELLERJORDAN, "beta2": 0.95}, _normuon), False: _ADAM},
        key="use_muon",
        has_defaults=False,
    ),
    "moonlight": _Library(
        {
            "muon_params": _Kind(_MOONLIGHT, _moonlight),
            "adamw_params": _Kind(_MOONLIGHT, _moonlight_adamw, uses_muon=False),
        },
        lists=True,
    ),
    "nanochat": _Library(
        {
            "muon": _Kind(_NANOCHAT_MUON, _nanochat),
            "adamw": _Kind(_NANOCHAT_ADAMW, _same, uses_muon=False),
        },
        key="kind",
        has_defaults=False,
    ),
    "dion": _Library(
        {
            "muon": _Kind(_DION, _dion),
            "normuon": _Kind({**_DION, "muon_beta2": 0.95}, _dion_normuon),
            "lion": _Kind(_DION, _dion_lion),
            "adamw": _Kind(_DION, _dion_adamw, uses_muon=False),
        },
        key="algorithm",
        usual="muon",
    ),
}
