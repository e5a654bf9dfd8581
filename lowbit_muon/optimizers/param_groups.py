"""Which parameters of a model Muon takes and which AdamW, read off the model's structure."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.placement import FSDP1_ADVICE, is_flattened, is_of_fsdp1
from lowbit_muon.step.options import (
    AUX_DEFAULTS,
    AUX_OPTIONS,
    GROUP_DEFAULTS,
    OPTIONS,
    AdjustLr,
    check_values,
    plain_options,
    plain_value,
)

Group = dict[str, Any]
Override = str | StateFormat | AutoFormat | Mapping[str, Any]
Overrides = Mapping[str, Override] | Callable[[str, Tensor], Override | None]

# What an override may set, by use_muon; the model says how parameters are cut into matrices.
_OVERRIDABLE = {
    True: set(GROUP_DEFAULTS) - {"batch_experts", "row_splits"},
    False: set(AUX_DEFAULTS),
}
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_NORMS = (
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LocalResponseNorm
)  # fmt: skip
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
# What models call an output head that is not tied to an embedding.
HEAD_NAMES = ("lm_head", "embed_out", "unembed", "unembedding")
# A module of unknown class tells by the name of its own parameter what its shape does not: that it
# is no operator, but a list of vectors, or multiplies element by element, as the decays, steps and
# mixing factors of state-space models do (A_log of Mamba, time_decay and time_maa of RWKV). Their
# low-rank factors are operators again (time_decay_w1), and so is a projection behind an embedding
# (emb_proj of Outlier-Safe Pre-Training, arXiv 2506.19697).
NOT_AN_OPERATOR = re.compile(
    r"^(?!.*(_w\d+|_proj|projection)$)"
    r".*(bias|emb|token|position|norm|decay|(^|_)(logs?|dt|ds|time|mix|maa|faaaa|r_k|"
    r"scales?|gammas?|betas?|alphas?|gains?|temperatures?|lambdas?|slopes?|freqs?|masks?|latents?|"
    r"prompts?|queries|registers?|centroids?|codebooks?|prototypes?|anchors?)(_|\d|$))",
    re.IGNORECASE,
)
# What compiled modules, activation checkpointing and FSDP1 put between a module and its parameters.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass
class _Use:
    """One parameter object and every place in the model that holds it."""

    param: Tensor
    name: str  # in the model, of the first place, without its wrappers
    names: list[str]  # patterns for parameters look into these
    owners: list[tuple[str, nn.Module, str]] = field(default_factory=list)  # path, module, own name

    @property
    def places(self) -> list[str]:
        """What patterns for modules look into."""
        return [*self.names, *(path for path, _, _ in self.owners)]


def muon_param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor = 0.02,
    momentum: float | None = None,
    nesterov: bool | None = None,
    weight_decay: float | None = None,
    adjust_lr_fn: AdjustLr | None = None,
    aux_lr: float | Tensor = 3e-4,
    aux_betas: tuple[float, float] = (0.9, 0.95),
    aux_eps: float = 1e-10,
    aux_weight_decay: float = 0.0,
    aux_patterns: Sequence[str] = (),
    split_heads: Mapping[str, int] | None = None,
    split_fused: Mapping[str, int | Sequence[int]] | None = None,
    overrides: Overrides | None = None,
    no_decay: bool | Sequence[str] = False,
) -> list[Group]:
    """Parameter groups for `MuonWithAuxAdam`: every trainable parameter once, with its name.

    Muon takes the matrices: weights of linear layers and convolutions, and parameters of two and
    more dimensions that modules of unknown classes own. Those of three and more dimensions outside
    a convolution are taken as a stack of matrices (`batch_experts`), as mixture-of-experts layers
    keep them. AdamW takes the rest: embeddings; heads, tied or not (what `get_output_embeddings`
    returns, a linear layer called lm_head or the like, and the last linear layer outside a
    ModuleList if it has as many outputs as an embedding has rows); norms; biases, vectors, scalars
    and matrices with one row or column; depthwise convolutions; and what an unknown module calls
    bias, emb*, token*, position* or norm*, or by a name of elementwise parameters, such as A_log,
    time_decay or layer_scale, unless it ends in _proj or projection. A parametrised weight
    (torch.nn.utils.parametrizations) is taken as its module's own.

    Names are the model's own: the prefixes of torch.compile, DistributedDataParallel, activation
    checkpointing and the like are left out. Patterns are looked for in names with them, too.

    Frozen parameters are left out. A parameter that several modules share is listed once, and goes
    to AdamW if any of its places says so. Heads of classifiers and the first convolution are not
    recognised: name them in `aux_patterns`.

    Args:
        lr, momentum, nesterov, weight_decay, adjust_lr_fn: of the Muon groups. What is None is left
            to `MuonWithAuxAdam` and its rule.
        aux_lr, aux_betas, aux_eps, aux_weight_decay: of the AdamW group.
        aux_patterns: regular expressions; parameters whose name contains a match go to AdamW.
        split_heads: {regular expression: rows of a head}. The matrices of matching modules are cut
            into heads of that many rows, each orthogonalised for itself.
        split_fused: {regular expression: parts}. The matrices of matching modules hold several
            matrices one below the other: as many equal parts, or parts of the given row counts.
        overrides: options of single parameters: {glob pattern of names: a state format, by name (or
            "auto") or as a `StateFormat` (which has bits and rank), or a dict of options}; the
            first pattern that matches counts, and `*` matches dots too. An option reaches the
            matching parameters whose group has it: "lr" and "weight_decay" those of Muon and of
            AdamW, a format Muon's, "betas" AdamW's. Or a function of (name, parameter) that returns
            such a value or None.
        no_decay: parameters whose weight_decay is 0, unless `overrides` say otherwise: regular
            expressions as in aux_patterns, or True for biases, norms, and all else of fewer than
            two dimensions.

    Regular expressions are searched in a module's path ("h.0.attn.c_attn") and in its parameter's
    name ("h.0.attn.c_attn.weight"). A tensor `lr` is copied for each group, since schedulers fill
    it in place.

    Raises ValueError if nothing goes to Muon, a pattern matches nothing, a split does not fit, or
    an override is no option of the parameters that it matches; TypeError for an override of another
    type.
    """
    uses = _trainable(model)
    of_fsdp1 = [use.param for use in uses if is_of_fsdp1(use.param)]
    if of_fsdp1 and all(map(is_flattened, of_fsdp1)):  # they are whole in summon_full_params
        raise ValueError(f"model: expected matrices for Muon, got none; {FSDP1_ADVICE}")
    heads = _output_heads(model)
    to_aux = _Patterns("aux_patterns", aux_patterns)
    undecayed = _Patterns("no_decay", () if isinstance(no_decay, bool) else no_decay)
    splits = _Splits(split_heads or {}, split_fused or {})
    rules = _Overrides(overrides)
    muon: dict[tuple[bool, tuple[int, ...] | None, str], list[_Use]] = {}
    aux: dict[str, list[_Use]] = {"[]": []}  # what has no options of its own comes first
    own_options: dict[str, Group] = {}
    for use in uses:
        is_aux = to_aux.match(use) or _is_aux(use, heads)
        own = rules.options(use, uses_muon=not is_aux)
        if undecayed.match(use) or (no_decay is True and _is_bias_or_norm(use)):
            own = {"weight_decay": 0.0, **own}
        own_key = repr(sorted(own.items()))
        own_options[own_key] = own
        if is_aux:
            aux.setdefault(own_key, []).append(use)
        else:
            muon.setdefault((_is_stack(use), splits.row_splits(use), own_key), []).append(use)
    for patterns in to_aux, undecayed:
        patterns.check_all_matched(model)
    splits.check_all_matched()
    rules.check_all_matched()
    if not muon:
        raise ValueError(
            f"model: expected matrices for Muon, got none among {len(uses)} trainable parameters "
            f"of {type(model).__name__}; use AdamW alone"
        )
    given: Group = {
        "momentum": momentum,
        "nesterov": nesterov,
        "weight_decay": weight_decay,
        "adjust_lr_fn": adjust_lr_fn,
    }
    options: Group = {"use_muon": True, "lr": lr}
    options |= {name: value for name, value in given.items() if value is not None}
    aux_options = {
        "use_muon": False,
        "lr": aux_lr,
        "betas": aux_betas,
        "eps": aux_eps,
        "weight_decay": aux_weight_decay,
    }
    groups = [
        {
            **_members(members),
            **options,
            "batch_experts": stack,
            "row_splits": row_splits,
            **own_options[own_key],
        }
        for (stack, row_splits, own_key), members in muon.items()
    ] + [
        {**_members(members), **aux_options, **own_options.get(own_key, {})}
        for own_key, members in aux.items()
        if members
    ]
    for group in groups:
        if isinstance(group["lr"], Tensor):
            group["lr"] = group["lr"].clone()
    return groups


def _members(uses: list[_Use]) -> Group:
    return {"params": [use.param for use in uses], "param_names": [use.name for use in uses]}


def _trainable(model: nn.Module) -> list[_Use]:
    """Every trainable parameter once, in the model's order, with all its places."""
    prefix = _wrapper_prefix(model)
    uses: dict[Tensor, _Use] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own_name, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if param.requires_grad:
                name = f"{path}.{own_name}" if path else own_name
                clean = _without_wrappers(name, prefix)
                use = uses.setdefault(param, _Use(param, clean, sorted({clean, name})))
                use.owners.append(_owner(model, path, module, own_name, prefix))
    return list(uses.values())


def _owner(
    model: nn.Module, path: str, module: nn.Module, own_name: str, prefix: str
) -> tuple[str, nn.Module, str]:
    """(path, module, own name) of what a parameter is a part of."""
    if isinstance(module, (nn.ParameterDict, nn.ParameterList)):
        own_name = path.rpartition(".")[2]  # its entries have keys for names
    elif isinstance(module, ParametrizationList):  # of <path>.parametrizations.<name>
        path, own_name = path.rpartition(".")[::2]
        path = path.rpartition("parametrizations")[0].removesuffix(".")
        module = model.get_submodule(path)
    return _without_wrappers(path, prefix), module, own_name


def _wrapper_prefix(model: nn.Module) -> str:
    """Of all names in a model that wrappers hold: a module that has one child and nothing else."""
    prefix = ""
    while True:
        children = dict(model.named_children())
        if len(children) != 1 or any(True for _ in model.parameters(recurse=False)):
            return prefix
        ((name, child),) = children.items()
        if name != "module" and name not in _WRAPPERS:
            return prefix
        prefix, model = f"{prefix}{name}.", child


def _without_wrappers(name: str, prefix: str) -> str:
    inner = f"{name}.".removeprefix(prefix).removesuffix(".")
    return ".".join(part for part in inner.split(".") if part not in _WRAPPERS)


def _output_heads(model: nn.Module) -> set[nn.Module]:
    """Modules that map to the vocabulary."""
    modules = list(model.named_modules())
    rows = {module.num_embeddings for _, module in modules if isinstance(module, _EMBEDDINGS)}
    # Layers of a repeated stack are no heads, whatever their size.
    repeated = {
        inner for _, module in modules if isinstance(module, nn.ModuleList)
        for inner in module.modules()
    }  # fmt: skip
    heads: set[nn.Module] = set()
    last = None
    for path, module in modules:
        # The convention of Hugging Face's models.
        find: Callable[[], object] | None = getattr(module, "get_output_embeddings", None)
        found = find() if callable(find) else None
        if isinstance(found, nn.Module):
            heads.update(found.modules())  # PEFT wraps a head: what trains is inside
        if isinstance(module, nn.Linear):
            if path.rpartition(".")[2] in HEAD_NAMES:
                heads.add(module)
            last = module
    if last is not None and last not in repeated and last.out_features in rows:
        heads.add(last)
    return heads


def _is_aux(use: _Use, heads: set[nn.Module]) -> bool:
    if use.param.ndim < 2 or 1 in _matrix_shape(use):
        return True
    return any(_owner_is_aux(module, name, heads) for _, module, name in use.owners)


def _owner_is_aux(module: nn.Module, name: str, heads: set[nn.Module]) -> bool:
    if isinstance(module, (*_EMBEDDINGS, *_NORMS)) or module in heads:
        return True
    if isinstance(module, _CONVOLUTIONS):  # a depthwise one multiplies each channel by itself
        return module.groups > 1 and module.groups == module.in_channels
    if isinstance(module, nn.Linear):
        return False
    kind = type(module).__name__.lower()
    return "norm" in kind or "embedding" in kind or bool(NOT_AN_OPERATOR.search(name))


def _is_bias_or_norm(use: _Use) -> bool:
    norms = (isinstance(m, _NORMS) or "norm" in type(m).__name__.lower() for _, m, _ in use.owners)
    return use.param.ndim < 2 or any(norms)


def _is_stack(use: _Use) -> bool:
    """True if all but the last two dimensions count matrices."""
    inside = (nn.Linear, nn.Bilinear, *_CONVOLUTIONS)
    return use.param.ndim > 2 and not any(isinstance(m, inside) for _, m, _ in use.owners)


def _matrix_shape(use: _Use) -> tuple[int, int]:
    """Rows and columns of the (or one) matrix that Muon would make of the parameter."""
    param = use.param
    if _is_stack(use):
        return param.shape[-2], param.shape[-1]
    return param.shape[0], param[0].numel() if param.shape[0] else 0


class _Patterns:
    """Regular expressions for parameters; remembers which matched."""

    def __init__(self, option: str, patterns: Sequence[str]) -> None:
        if isinstance(patterns, str):
            raise TypeError(f"{option}: expected a sequence of strings, got {patterns!r}")
        self._option = option
        self._patterns = {pattern: re.compile(pattern) for pattern in patterns}
        self._matched: set[str] = set()

    def match(self, use: _Use) -> bool:
        """Whether any pattern matches a parameter."""
        found = {
            p for p, compiled in self._patterns.items() if any(map(compiled.search, use.places))
        }
        self._matched |= found
        return bool(found)

    def check_all_matched(self, model: nn.Module) -> None:
        """Raise ValueError for a pattern that matches no parameter, frozen ones included."""
        prefix = _wrapper_prefix(model)
        for pattern in self._patterns.keys() - self._matched:
            names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            names += [_without_wrappers(name, prefix) for name in names]
            if not any(map(self._patterns[pattern].search, names)):
                raise ValueError(f"{self._option}: {pattern!r} matches no parameter")


class _Overrides:
    """Options of single parameters; remembers what was of use."""

    def __init__(self, overrides: Overrides | None) -> None:
        self._find = overrides if callable(overrides) else None
        rules: Mapping[str, Override] = {}
        if overrides is not None and not callable(overrides):
            rules = overrides
        self._rules = {pattern: _own_options(pattern, value) for pattern, value in rules.items()}
        self._matched: set[str] = set()
        self._used: set[tuple[str, str]] = set()

    def options(self, use: _Use, *, uses_muon: bool) -> Group:
        """Options of the parameter's own, for its group."""
        if self._find is not None:
            found = self._find(use.name, use.param)
            given = {} if found is None else _own_options(use.name, found)
            return _of_kind(given, uses_muon)
        matching = [
            pattern
            for pattern in self._rules
            if any(fnmatch.fnmatchcase(name, pattern) for name in use.names)
        ]
        self._matched.update(matching)
        if not matching:
            return {}
        options = _of_kind(self._rules[matching[0]], uses_muon)
        self._used.update((matching[0], name) for name in options)
        return options

    def check_all_matched(self) -> None:
        """Raise ValueError for a pattern without a parameter, or an option that reached none."""
        for pattern, options in self._rules.items():
            if pattern not in self._matched:
                raise ValueError(f"overrides: {pattern!r} matches no parameter")
            for name in options:
                if (pattern, name) not in self._used:
                    kind = "Muon" if name in _OVERRIDABLE[True] else "AdamW"
                    raise ValueError(
                        f"overrides: {pattern!r} matches no parameter that has {name!r}, an option "
                        f"of {kind}, or an earlier pattern matches them, too"
                    )


def _of_kind(options: Group, uses_muon: bool) -> Group:
    return {name: value for name, value in options.items() if name in _OVERRIDABLE[uses_muon]}


def _own_options(name: str, value: Override) -> Group:
    """An override as options of a group."""
    if isinstance(value, (str, StateFormat, AutoFormat)):
        value = {"state_format": value}
    if not isinstance(value, Mapping):
        raise TypeError(
            f"overrides[{name!r}]: expected a state format or a dict of options, "
            f"got {type(value).__name__}"
        )
    known = _OVERRIDABLE[True] | _OVERRIDABLE[False]
    if set(value) - known:
        raise ValueError(
            f"overrides[{name!r}]: expected options of Muon or AdamW ({', '.join(sorted(known))}), "
            f"got {', '.join(sorted(map(str, set(value) - known)))}"
        )
    options = plain_options(value)
    try:
        check_values(OPTIONS, {**GROUP_DEFAULTS, **_of_kind(options, True)})
        check_values(AUX_OPTIONS, {**AUX_DEFAULTS, **_of_kind(options, False)})
    except (TypeError, ValueError) as error:
        raise type(error)(f"overrides[{name!r}]: {error}") from None
    return options


class _Splits:
    """The row splits a user asked for, by pattern; remembers which patterns matched."""

    def __init__(self, heads: Mapping[str, int], fused: Mapping[str, int | Sequence[int]]) -> None:
        self._rules = [
            *(("split_heads", pattern, plain_value(size)) for pattern, size in heads.items()),
            *(("split_fused", pattern, plain_value(parts)) for pattern, parts in fused.items()),
        ]
        self._matched: set[tuple[str, str]] = set()

    def row_splits(self, use: _Use) -> tuple[int, ...] | None:
        """Row counts of the parts of a parameter, or None for one matrix."""
        found = list(self._matching(use))
        if not found:
            return None
        if len(found) > 1:
            patterns = [f"{option} {pattern!r}" for option, pattern, _ in found]
            raise ValueError(f"{use.name}: expected one split, got {' and '.join(patterns)}")
        option, pattern, parts = found[0]
        self._matched.add((option, pattern))
        rows = use.param.shape[0]
        if use.param.ndim != 2 or any(type(m).__name__ == "Conv1D" for _, m, _ in use.owners):
            raise ValueError(
                f"{option} {pattern!r}: expected matrices with outputs in rows, got {use.name} "
                f"{tuple(use.param.shape)} of {type(use.owners[0][1]).__name__}"
            )
        sizes = _part_sizes(option, parts, rows)
        if sum(sizes) != rows or min(sizes) < 1:
            raise ValueError(
                f"{option} {pattern!r}: expected parts that add up to the {rows} rows of "
                f"{use.name}, got {parts!r}"
            )
        return sizes

    def check_all_matched(self) -> None:
        for option, pattern, _ in self._rules:
            if (option, pattern) not in self._matched:
                raise ValueError(f"{option}: {pattern!r} matches no matrix that Muon takes")

    def _matching(self, use: _Use) -> Iterator[tuple[str, str, int | Sequence[int]]]:
        for rule in self._rules:
            if any(re.search(rule[1], name) for name in use.places):
                yield rule


def _part_sizes(option: str, parts: int | Sequence[int], rows: int) -> tuple[int, ...]:
    """Row counts; they do not add up to `rows` if a single number does not divide it."""
    if not isinstance(parts, int):
        return tuple(parts)
    if parts < 1:
        return (0,)
    size, count = (parts, rows // parts) if option == "split_heads" else (rows // parts, parts)
    return (size,) * max(1, count)
