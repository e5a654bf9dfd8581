"""The options of the optimizers: one table, and what becomes of other keys of a parameter group.

A new option is a row of `OPTIONS`, a keyword argument and a docstring entry of `Muon`, and a line
of `MuonOptions`; a test holds them together.
"""

from __future__ import annotations

import decimal
import difflib
import functools
import numbers
import warnings
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import torch.distributed as dist
from torch import Tensor

from lowbit_muon.backends import check_backend_name
from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.formats.auto import AutoFormat, resolve_format_option
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS, Coefficients, resolve_coefficients
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.step.rules.rule import UpdateRule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

AdjustLr = Literal["original", "match_rms_adamw", "spectral_unclamped", "megatron", "none"]
NsInput = Literal["exact", "stored"]
NsDtype = Literal["auto", "float32", "float16", "bfloat16"]
NonFinite = Literal["skip", "raise"]
UpdateDtype = Literal["float32", "bfloat16", "int8"]
AuxAdam = Literal["auto", "adamw", "adamw8bit"]
Values = Mapping[str, Any]
Check = Callable[[Values, str], object]

# Of KellerJordan/Muon, muon.py, and torch.optim.Muon.
DEFAULT_COEFFICIENTS = NS_COEFFICIENTS["muon"][0]
DEFAULT_EPS = 1e-7
_ROUNDED_LR = 1e-6
LARGEST_NUMBER = 1e30  # Products of options have to stay within float32.


@dataclass(frozen=True)
class Option:
    """A row of the table.

    Attributes:
        check: of (values of all options, name): raises ValueError, TypeError or RuntimeError that
            names the option, what was expected and what came.
        elsewhere: what other libraries call it, separated by spaces.
        load: what `load_state_dict` leaves in a group: the "saved" value, or the optimizer's own,
            which is "kept"; "converted" is kept too, and the state is converted to it.
        agreed: whether processes that share parameters need it alike.
        in_group: whether a group may set it, or the whole optimizer alone.
    """

    name: str
    default: Any
    check: Check
    elsewhere: str = ""
    load: Literal["saved", "kept", "converted"] = "kept"
    agreed: bool = True
    in_group: bool = True


class StateOptions(TypedDict, total=False):
    """Options that every update rule has: how a momentum is kept, and computed with; see `Muon`."""

    state_format: str | StateFormat | AutoFormat
    ns_input: NsInput
    ns_dtype: NsDtype
    stochastic_rounding: bool
    compensation: bool
    backend: str
    nonfinite: NonFinite
    batch_experts: bool
    row_splits: Sequence[int] | None
    seed: int
    offload: bool
    process_group: ProcessGroup | None
    update_dtype: UpdateDtype


class PolarOptions(StateOptions, total=False):
    """With those of rules that orthogonalise, and that their public packages do not have."""

    ns_coefficients: Coefficients | None
    adjust_lr_fn: AdjustLr | None


class MuonOptions(PolarOptions, total=False):
    """What `MuonWithAuxAdam` takes for its Muon groups: see `Muon`.

    All of its options but lr, weight_decay, eps and momentum, which the groups set: the first three
    have another meaning for AdamW.
    """

    nesterov: bool | None
    ns_steps: int | None
    rule: str | UpdateRule


def plain_value(value: Any) -> Any:
    """A value as Python's own types have it: of NumPy, of other sequences, mappings and numbers.

    What a state dict holds has to load under weights_only=True. Tensors stay, and what is no value.
    """
    if value is None or type(value) in (float, int, bool, str) or isinstance(value, Tensor):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if callable(getattr(value, "tolist", None)):
        return plain_value(value.tolist())
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, (numbers.Real, decimal.Decimal)):
        return float(value)
    if isinstance(value, Mapping):
        return {
            plain_value(key): list(plain_value(each)) if type(each) is list else plain_value(each)
            for key, each in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return tuple(map(plain_value, value))
    return value


def plain_options(group: Mapping[Any, Any]) -> dict[Any, Any]:
    """A group with plain values for options, and for what schedulers keep; the rest as it is."""
    return {
        key: plain_value(value) if key in _PLAIN_KEYS else value for key, value in group.items()
    }


def _expect(expected: str, test: Callable[[Any], bool]) -> Check:
    """A check that looks at the option's own value."""

    def check(values: Values, name: str) -> None:
        if not test(values[name]):
            raise ValueError(f"{name}: expected {expected}, got {values[name]!r}")

    return check


def _one_of(*allowed: Any) -> Check:
    *others, last = map(repr, allowed)
    return _expect(f"{', '.join(others)} or {last}", lambda value: value in allowed)


def _is_number(value: Any) -> bool:
    return is_real_number(value) and 0 <= float(value) <= LARGEST_NUMBER


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_sequence(value: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(test, value))


def _is_process_group(value: Any) -> bool:
    return dist.is_available() and isinstance(value, dist.ProcessGroup)


def _check_coefficients(values: Values, name: str) -> None:
    try:
        resolve_coefficients(values[name], values["ns_steps"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"ns_{error}") from None


def _check_compensation(values: Values, name: str) -> None:
    _BOOL(values, name)
    if values[name] and values["stochastic_rounding"]:
        raise ValueError(f"{name}: expected False with stochastic_rounding=True, got True")


_BOOL = _expect("a bool", lambda value: isinstance(value, bool))
_NUMBER = _expect("a number or one-element tensor >= 0, at most 1e30", _is_number)
_BELOW_ONE = _expect("a number in [0, 1)", lambda v: _is_number(v) and float(v) < 1)
_NONFINITE = Option("nonfinite", "skip", _one_of(*get_args(NonFinite)))

# The options that torch.optim.Muon has are loaded with a group. The others say how this optimizer
# works, and stay as it was constructed. Learning rates may come from schedulers that differ.
OPTIONS = (
    Option("lr", 1e-3, _NUMBER, "learning_rate muon_lr matrix_lr", "saved", agreed=False),
    Option("weight_decay", 0.1, _NUMBER, "wd muon_weight_decay", "saved"),
    Option(
        "momentum", 0.95, _BELOW_ONE,
        "mu beta beta1 muon_beta muon_momentum momentum_beta", "saved",
    ),
    Option("nesterov", True, _BOOL, "use_nesterov muon_use_nesterov", "saved"),
    Option(
        "eps", DEFAULT_EPS, _expect("a number > 0", lambda v: _is_number(v) and float(v) > 0),
        "epsilon ns_eps ns_epsilon", "saved",
    ),
    Option(
        "ns_steps", 5,
        _expect("a whole number from 1 to 99", lambda v: _is_whole(v) and 1 <= v < 100),
        "num_ns_steps muon_num_ns_steps backend_steps ns_iterations", "saved",
    ),
    Option(
        "ns_coefficients", DEFAULT_COEFFICIENTS, _check_coefficients,
        "ns_coeffs ns_coefficients_preset coefficient_type muon_coefficient_type use_polar_express",
        "saved",
    ),
    Option(
        "adjust_lr_fn", None, _one_of(None, *get_args(AdjustLr)),
        "adjust_lr use_adjusted_lr scale_mode muon_scale_mode rms_scaling rms_rescaling", "saved",
    ),
    Option("rule", "muon", lambda values, name: resolve_rule(values[name]), load="converted"),
    Option(
        "state_format", "spectral4", lambda values, name: resolve_format_option(values[name]),
        "storage_dtype momentum_dtype state_precision optim_bits", "converted",
    ),
    Option("batch_experts", False, _BOOL, "flatten", "converted"),
    Option(
        "row_splits", None,
        _expect(
            "None or a sequence of row counts", lambda v: v is None or _is_sequence(v, _is_whole)
        ),
        "num_heads split_sizes split_qkv muon_split_qkv qkv_split_shapes ns_split_fn", "converted",
    ),
    Option("ns_input", "exact", _one_of(*get_args(NsInput))),
    Option(
        "ns_dtype", "auto", _one_of(*get_args(NsDtype)), "fp32_matmul_prec muon_fp32_matmul_prec"
    ),
    Option("stochastic_rounding", False, _BOOL),
    Option("compensation", False, _check_compensation, "param_ecc kahan_sum"),
    Option(
        "backend", "auto", lambda values, name: check_backend_name(values[name]), agreed=False
    ),
    _NONFINITE,
    Option(
        "seed", 0,
        _expect("a whole number from 0 to 2**62 - 1", lambda v: _is_whole(v) and v < 2**62),
    ),
    Option("offload", False, _BOOL, agreed=False),
    Option(
        "process_group", None,
        _expect(
            "None or a torch.distributed.ProcessGroup",
            lambda v: v is None or _is_process_group(v),
        ),
        "distributed_mesh pg_collection", agreed=False, in_group=False,
    ),
    Option("update_dtype", "float32", _one_of(*get_args(UpdateDtype)), in_group=False),
)  # fmt: skip
# Of the groups that AdamW takes; the defaults are those of KellerJordan's MuonWithAuxAdam.
AUX_OPTIONS = (
    Option("lr", 3e-4, _NUMBER, "learning_rate adam_lr adamw_lr", "saved"),
    Option(
        "betas", (0.9, 0.95),
        _expect(
            "two numbers in [0, 1)",
            lambda v: _is_sequence(v, lambda b: _is_number(b) and float(b) < 1) and len(v) == 2,
        ),
        "beta1 beta2 adam_betas adamw_betas", "saved",
    ),
    Option("eps", 1e-10, _NUMBER, "epsilon adam_eps adamw_eps", "saved"),
    Option(
        "weight_decay", 0.0, _NUMBER,
        "wd adam_wd adamw_wd adam_weight_decay adamw_weight_decay", "saved",
    ),
    _NONFINITE,
    Option("aux_adam", "auto", _one_of(*get_args(AuxAdam))),
)  # fmt: skip

GROUP_DEFAULTS = {option.name: option.default for option in OPTIONS if option.in_group}
AUX_DEFAULTS = {option.name: option.default for option in AUX_OPTIONS}
LAYOUT_OPTIONS = tuple(option.name for option in OPTIONS if option.load == "converted")

# What torch's schedulers keep in a group.
SCHEDULER_KEYS = (
    "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "max_momentum", "base_momentum",
)  # fmt: skip
# What torch, our state dicts, timm, mmengine, DeepSpeed and Megatron keep there. Where these change
# a learning rate or a weight decay, they do so by themselves.
_FRAMEWORK_KEYS = {
    *SCHEDULER_KEYS, "params", "param_names", "format_version",
    "name", "lr_scale", "lr_mult", "wd_mult", "moe",
    "start_wd", "end_wd", "is_expert_parallel", "is_decoupled_lr", "default_config",
}  # fmt: skip
_PLAIN_KEYS = {*SCHEDULER_KEYS, *GROUP_DEFAULTS, *AUX_DEFAULTS}
# How other libraries say what `use_muon` says, and whose groups have it.
_KIND_KEYS = {"use_muon": "", "is_muon": "", "algorithm": "dion", "kind": "nanochat"}
# What another update rule does here: the keys of other libraries' Muon groups, and that rule.
_ANOTHER_RULE = {
    key: rule
    for keys, rule in (
        (
            "beta2 muon_beta2 beta2_normuon normuon_beta2 normuon_eps normuon normuon_variant",
            "rule='normuon' (NorMuon(..., beta2=...))",
        ),
        (
            "cautious_wd cautious_weight_decay",
            "a rule with weight_decay=Cautious() (dataclasses.replace(RULES[...], ...))",
        ),
        ("cautious caution", "rule='cautious_muon'"),
        ("mu2 adamnorm_eps", "rule='namo' (NAMO(..., mu2=...))"),
        ("col_state_clamp_c", "rule='namo_d' (NAMOD(..., col_state_clamp_c=...))"),
        ("polar_first", "rule='polargrad_polar_first' (PolarGrad(..., polar_first=True))"),
        ("unconstrained norm_kwargs", "rule='scion' (Scion(..., unconstrained=...))"),
        ("use_muonh hyperball_radius hyperball_eps", "rule='muonh' (MuonH(...))"),
    )
    for key in keys.split()
}
# Options that change the update elsewhere and have no counterpart here: of torch.optim, NorMuon,
# microsoft/dion, Emerging-Optimizers and Megatron, heavyball, pytorch-optimizer, adv-optm, optimuon
# and GaLore. None, False and zero turn them off, or these values.
_OFF = {
    "decoupled_weight_decay": True, "weight_decouple": True, "weight_decay_method": "decoupled",
    "extra_scale_factor": 1, "muon_extra_scale_factor": 1, "update_scale": 1,
}  # fmt: skip
_WITHOUT_COUNTERPART = {
    *_OFF,
    *_ANOTHER_RULE,
    "maximize", "foreach", "fused", "capturable", "differentiable", "amsgrad", "dampening",
    "beta3", "fixed_decay", "centered_wd", "rank_fraction",
    "ef_decay", "power_iters", "newton_schulz_func", "ns_method", "ns_reset_steps",
    "ns_norm_scale", "accelerated_ns", "cns_a_bound", "low_rank_ortho", "ortho_rank", "mars",
    "mars_gamma", "approx_mars", "palm", "beta2_scale", "heavyball_momentum", "ecc",
    "warmup_steps", "gradient_clipping", "update_clipping", "grad_clip", "update_clip",
    "qk_clip_threshold", "qk_clip_alpha", "nesterov_coef", "momentum_type",
    "orthogonal_gradient", "spectral_blend", "spectral_normalization", "kappa_p", "use_atan2",
    "nnmf_factor", "factored_2nd", "vector_reshape", "weight_norm", "moment2_method",
    "percentile_clipping", "max_unorm", "update_proj_gap",
    "proj_type",
}  # fmt: skip
# Typing errors in names of the table have 0.8 and more; tags such as "dtype", "steps_done" and
# "backbone" have at most 0.77 (ns_dtype).
_CLOSE = 0.8


def check_values(table: Sequence[Option], values: Values) -> None:
    """Raise ValueError, TypeError or RuntimeError naming the first option with a bad value.

    Options that are not among the values are passed over.
    """
    for option in table:
        if option.name in values:
            option.check(values, option.name)


def apply_rule(group: Values, given: Container[str]) -> dict[str, Any]:
    """A group of Muon whose options are those of its rule where nobody has set them.

    given: the options that were set, by the group or for all of them. Its rule becomes a plain
    dict. Raises ValueError where the rule does not go with another option.
    """
    rule = resolve_rule(group["rule"])
    left = {n: v for n, v in rule.options if n not in given}
    result = {**group, **left, "rule": rule.to_dict()}
    check_rule(result)
    return result


def check_rule(group: Values) -> None:
    """Raise ValueError where a group's rule does not go with another of its options."""
    rule = resolve_rule(group["rule"])
    rule.momentum.weights(float(group["momentum"]), nesterov=group["nesterov"])
    state_format = resolve_format_option(group["state_format"])
    stage = rule.needs("size")
    if stage and isinstance(state_format, StateFormat) and state_format.normalize:
        raise ValueError(
            f"rule: '{rule.name}' needs the momentum's size ({stage}), which '{state_format.name}' "
            "divides out in every step; expected another state_format"
        )
    if group["ns_input"] == "stored" and not rule.takes_stored:
        raise ValueError(
            f"ns_input: expected 'exact' with the rule '{rule.name}', which looks at the momentum "
            "itself, got 'stored'"
        )


def check_loaded(table: Sequence[Option], group: Mapping[str, Any]) -> None:
    """`check_values` of a group that is loaded: what a step went on with, a resume does, too.

    Schedulers end a hair below a learning rate of zero.
    """
    lr = group["lr"]
    rounded = is_real_number(lr) and not isinstance(lr, Tensor) and -_ROUNDED_LR <= lr < 0
    check_values(table, {**group, "lr": 0.0 if rounded else lr})


def check_keys(table: Sequence[Option], group: Mapping[Any, Any]) -> None:
    """Raise ValueError for a key of a new group that asks for what its optimizer would not do.

    Such are options of the whole optimizer, of the other kind of group and of other libraries, and
    misspelt ones. Scripts hang tags of their own on groups: each is warned of once, and stays.
    """
    own = {option.name for option in table if option.in_group}
    kind = "Muon" if table is OPTIONS else "AdamW"
    tags = []
    for key, value in group.items():
        if key in own or key in _FRAMEWORK_KEYS or _asks_for_nothing(table, key, value):
            continue
        problem = why_refused(table, str(key))
        if problem:
            raise ValueError(
                f"{key}: expected an option of {kind} groups, got {value!r}; {problem}"
            )
        tags.append(key)
    for key in tags:
        _warn_of_tag(key)


def _asks_for_nothing(table: Sequence[Option], key: Any, value: Any) -> bool:
    if key == "use_muon":
        return value is (table is OPTIONS)
    if key not in _WITHOUT_COUNTERPART or _find(table, key) is not None:
        return False
    plain = isinstance(value, (bool, int, float, str))
    return value is None or (plain and value == _OFF.get(key, False))


def why_refused(table: Sequence[Option], key: str) -> str:
    """Why a key that is not an option of a group is refused; empty if it is a tag."""
    if key in _KIND_KEYS:
        translated = f"; from_groups({_KIND_KEYS[key]!r}, groups) translates them"
        both = "MuonWithAuxAdam has groups of both kinds, told apart by 'use_muon'"
        return both + (translated if _KIND_KEYS[key] else "")
    found = _find(table, key)
    if found is not None:
        where = "of a group" if found.in_group else "of the whole optimizer"
        return f"it is the option '{found.name}' {where} here"
    if key in _ANOTHER_RULE and table is OPTIONS:
        return f"here it is another update rule: {_ANOTHER_RULE[key]}"
    if key in _WITHOUT_COUNTERPART:
        return "lowbit_muon has no such option"
    found = _find(AUX_OPTIONS if table is OPTIONS else OPTIONS, key)
    if found is not None:
        return f"'{found.name}' is an option of groups with use_muon={table is not OPTIONS}"
    name = key.lower().replace("-", "_")
    close = difflib.get_close_matches(name, [o.name for o in table], cutoff=_CLOSE)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else ""


def _find(table: Sequence[Option], key: str) -> Option | None:
    """The option that this library, or another one, calls by a name."""
    names = ((option, (option.name, *option.elsewhere.split())) for option in table)
    return next((option for option, known in names if key in known), None)


@functools.cache
def _warn_of_tag(key: Any) -> None:
    warnings.warn(
        f"parameter groups: lowbit_muon has no option {key!r}; the key is kept and does nothing",
        UserWarning,
        stacklevel=3,
    )
