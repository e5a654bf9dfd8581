"""Random options, formats, shapes, dtypes and gradients, valid and not, through both optimizers.

What is asked of a case is known before it runs: an option with a value of `BAD_OPTIONS` must be
refused by its name with nothing changed, and a case without one must step. `make fuzz` runs 10,000
cases, the test suite a few of them, always the same.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from test_checkpoint import assert_same, through_file
from torch import Tensor, nn

from lowbit_muon import (
    PRESETS,
    AutoFormat,
    Muon,
    MuonWithAuxAdam,
    StateFormat,
    muon_param_groups,
)
from lowbit_muon.state.parameter import matrix_views, momentum_format, read_matrix
from lowbit_muon.state.stored import QuantizedMatrix
from lowbit_muon.step.rules.rule import RULE_OPTIONS

# (cases, tests that they are shared among, for pytest-xdist)
CASES, SHARDS = (10_000, 20) if os.environ.get("FUZZ") else (160, 1)

NAN, INF = float("nan"), float("inf")
NOT_NUMBERS = (None, "0.1", True, NAN, INF, -INF, 10**400, [0.1], 1j, torch.tensor([0.1, 0.2]))
NOT_BOOLS = (None, 0, 1, "True", 1.0)
NOT_COUNTS = (None, True, -1, 1.5, 2.0, NAN, "1", [1])

# What each option of a group must refuse.
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (*NOT_NUMBERS, -1e-3, torch.tensor(NAN), torch.tensor(1), 1e39),
    "weight_decay": (*NOT_NUMBERS[1:], -0.1, 1e39),
    "momentum": (*NOT_NUMBERS[1:], -0.1, 1, 1.0, 1e30),
    "nesterov": NOT_BOOLS[1:],
    "ns_coefficients": (
        3, "septic", [], (1.0, 2.0), (1.0, NAN, 2.0), (1.0, 2.0, 10**400), [[1, 2, 3], [1]],
    ),
    "eps": (*NOT_NUMBERS, 0, -1e-7, 1e39),
    "ns_steps": (*NOT_COUNTS[1:], 0, 100, 10**400),
    "adjust_lr_fn": ("rms", 1, [], torch.ones(2)),
    "state_format": (
        "spectral5", 4, None, ["spectral4"], "", {"name": "x"}, {"name": "x", "bits": 4, "hue": 1},
    ),
    "ns_input": ("both", None, 1, []),
    "ns_dtype": ("float8", None, torch.float32, []),
    "stochastic_rounding": NOT_BOOLS,
    "compensation": NOT_BOOLS,
    "offload": NOT_BOOLS,
    "backend": ("tpu", None, 1, []),
    "nonfinite": ("ignore", None, True, []),
    "batch_experts": NOT_BOOLS,
    "row_splits": ((), (1, -1), (1.0, 2), (True, 3), "12", 3, [None]),
    "seed": (*NOT_COUNTS, 2**62),
}  # fmt: skip
BAD_AUX_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (*NOT_NUMBERS, -1e-3, torch.tensor(NAN), torch.tensor(1)),
    "betas": (None, 0.9, (0.9,), (0.9, 1.0), (NAN, 0.9), ("0.9", 0.9), (0.9, 10**400)),
    "eps": (*NOT_NUMBERS, -1e-8),
    "weight_decay": (*NOT_NUMBERS, -0.1),
    "nonfinite": BAD_OPTIONS["nonfinite"],
    "aux_adam": ("adam", None, 1, []),
    "use_muon": (None, 1, "yes"),
}
# As the error names them where that is not the option's own name.
ALSO_NAMED = {
    # a StateFormat's plain dict is read field by field
    "state_format": "format",
}

GOOD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (0, 1e-3, 0.02, 1, 1e-30, 1e10, torch.tensor(0.02), torch.tensor([1e-3]).double()),
    "weight_decay": (0, 0.1, 1, 1e10),
    "momentum": (0, 0.0, 0.5, 0.95, 1 - 2**-20),
    "nesterov": (True, False),
    "ns_coefficients": (
        (3.4445, -4.7750, 2.0315), "muon", "polar_express", ((3, -3, 1), [2, -1.5, 0.5]),
    ),
    "eps": (1e-7, 1e-30, 1, 1e30),
    "ns_steps": (1, 2, 5, 12, 99),
    "adjust_lr_fn": (None, "original", "match_rms_adamw"),
    "ns_input": ("exact", "stored"),
    "ns_dtype": ("auto", "float32"),
    "stochastic_rounding": (False, True),
    "compensation": (False, True),
    "offload": (False, True),
    "backend": ("auto", "reference"),
    "nonfinite": ("skip", "raise"),
    "seed": (0, 1, 2**31, 2**62 - 1),
}  # fmt: skip
GOOD_AUX_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": GOOD_OPTIONS["lr"],
    "betas": ((0.9, 0.95), [0, 0.0], (torch.tensor(0.5), 0.999)),
    "eps": (1e-10, 1e-3),
    "weight_decay": GOOD_OPTIONS["weight_decay"],
    "nonfinite": GOOD_OPTIONS["nonfinite"],
    "aux_adam": ("auto", "adamw"),
}
LARGEST_SANE = 1  # learning rate and weight decay up to which weights must stay finite
LARGEST_GRADIENT = 3e38

# What each field of a StateFormat must refuse, whatever the other fields say.
BAD_FIELDS: dict[str, tuple[Any, ...]] = {
    "name": ("", None, 4, ["x"]),
    "bits": (*NOT_COUNTS, 0, 1, 5, 4.0, 64, 10**400),
    "codebook": ("mulaw", None, 1, []),
    "mu": (*NOT_NUMBERS, 0, -1, 1e-300, 1e300),
    "exponent": (*NOT_NUMBERS, 0, -1),
    "tread": ("flat", None, []),
    "table": (
        [0.0, 1.0], 3, "01", (0.0, NAN), (0.0,), (0.0, 0.0), (1.0, 0.0), (0.0, "1"), (0, 1e300),
    ),
    "granularity": ("column", None, []),
    "block_size": NOT_COUNTS,
    "statistic": ("mean", None, []),
    "clip": (*NOT_NUMBERS, 0, -1, 1e300),
    "snap_levels": NOT_BOOLS,
    "companded_scale": NOT_BOOLS,
    "factor_rank": NOT_COUNTS,
    "factor_divisor": NOT_COUNTS,
    "factor_bits": (*NOT_COUNTS, 0, 4.0, 16),
    "residual_after": ("never", None, []),
    "spectral": NOT_BOOLS,
    "spectral_shift": (*NOT_NUMBERS[1:], 0, -1, 1e-300, 0.0049, 1e300),  # None: by size
    "rotate": NOT_BOOLS,
    "normalize": NOT_BOOLS,
}  # fmt: skip

SHAPES = (
    (0, 5), (5, 0), (1, 1), (1, 7), (7, 1), (2, 2), (3, 5), (5, 3), (8, 64), (65, 9), (17, 130),
    (2, 3, 4), (3, 5, 2), (4, 1, 1), (0, 3, 4), (2, 0, 3), (4, 3, 3, 3), (2, 1, 3, 2), (33, 33),
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gradients(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Callable[[], Tensor | None]]:
    """Every kind of gradient, by name. Norms of "huge" ones leave what Muon and AdamW take."""

    def normal() -> Tensor:
        return torch.randn(shape).to(dtype)

    def spoiled(value: float) -> Tensor:
        grad = normal()
        if grad.numel():
            grad.view(-1)[grad.numel() // 2] = value
        return grad

    largest = 6e4 if dtype == torch.float16 else LARGEST_GRADIENT
    return {
        "normal": normal,
        "zero": lambda: torch.zeros(shape, dtype=dtype),
        "tiny": lambda: (torch.randn(shape) * 1e-38).to(dtype),
        "mixed": lambda: (torch.randn(shape) * 10 ** (8 * torch.rand(shape) - 4)).to(dtype),
        "permuted": lambda: torch.randn(shape[::-1]).to(dtype).permute(*range(len(shape))[::-1]),
        "expanded": lambda: torch.tensor(0.3, dtype=dtype).expand(shape),
        "strided": lambda: torch.randn(*shape, 2).to(dtype)[..., 0],
        "huge": lambda: (torch.randn(shape).sign() * largest).to(dtype),
        "inf": lambda: spoiled(INF),
        "nan": lambda: spoiled(NAN),
        "none": lambda: None,
    }


GRADIENTS = tuple(gradients((1,), torch.float32))


@st.composite
def formats(draw: st.DrawFn) -> StateFormat:
    """Any format that `StateFormat` has to accept."""
    bits = draw(st.sampled_from((2, 3, 4, 8, 16, 32)))
    fields: dict[str, Any] = {
        "normalize": draw(st.booleans()),
        "rotate": draw(st.booleans()),
        "statistic": draw(st.sampled_from(("rms", "absmax"))),
        "clip": draw(st.sampled_from((1.0, 2.7, 0.1, 1e-6, 10.0))),
        "tread": draw(st.sampled_from(("mid_rise", "mid_tread"))),
        "granularity": draw(st.sampled_from(("tensor", "row", "block"))),
        "residual_after": draw(st.sampled_from(("stored", "exact"))),
    }
    if fields["granularity"] == "block":
        fields["block_size"] = draw(st.sampled_from((1, 3, 64, 2**40)))
    codebook = draw(st.sampled_from(("mu_law", "linear", "power_law", "table")))
    kind = draw(st.sampled_from(("plain", "companded", "factors", "spectral")))
    if bits >= 16:
        kind = "plain"
    elif kind == "companded":
        codebook = "mu_law"
        fields |= {"companded_scale": True, "clip": min(fields["clip"], 1.0)}
    elif kind == "spectral":
        shift = draw(st.sampled_from((0.03, 0.1, 0.005, 1e6)))
        fields |= {"spectral": True, "spectral_shift": shift}
    if kind in ("factors", "companded"):
        rank = draw(st.sampled_from(("factor_rank", "factor_divisor")))
        fields |= {rank: draw(st.sampled_from((1, 2, 16, 1000)))}
        fields |= {"factor_bits": draw(st.sampled_from((2, 3, 4, 8)))}
    fields |= {"codebook": codebook}
    if codebook == "mu_law":
        fields |= {"mu": draw(st.sampled_from((2.0, 255.0, 1e-6, 1e6)))}
    elif codebook == "power_law":
        fields |= {"exponent": draw(st.sampled_from((0.5, 1.0, 0.1, 4.0)))}
    elif codebook == "table":
        fields |= {"table": draw(st.sampled_from(((-1.0, 1.0), (-3.0, 0.0, 0.5), (0.0, 1e-3, 1))))}
    # Levels stay distinct as int8 in few of these, and integer kernels are for those.
    distinct = codebook == "linear" or (codebook == "mu_law" and fields["mu"] == 2.0)
    distinct = distinct and bits != 8 and fields.get("factor_bits") != 8
    fields |= {"snap_levels": distinct and draw(st.booleans())}
    return StateFormat("drawn", bits, **fields)


@dataclass(frozen=True)
class Drawn:
    """Options and the names of those that must be refused."""

    options: dict[str, Any]
    bad: frozenset[str]


NOTHING = Drawn({}, frozenset())


@st.composite
def options(
    draw: st.DrawFn, good: dict[str, tuple[Any, ...]], bad: dict[str, tuple[Any, ...]]
) -> Drawn:
    names = draw(st.lists(st.sampled_from(sorted(good)), max_size=6, unique=True))
    chosen = {name: draw(st.sampled_from(good[name])) for name in names}
    if not draw(st.integers(0, 3)):
        name = draw(st.sampled_from(sorted(bad)))
        return Drawn(chosen | {name: draw(st.sampled_from(bad[name]))}, frozenset({name}))
    return Drawn(chosen, frozenset())


@st.composite
def muon_options(draw: st.DrawFn) -> Drawn:
    drawn = draw(options(GOOD_OPTIONS, BAD_OPTIONS))
    auto = AutoFormat(0.3, ("spectral3", "mulaw4", "linear8"), 2)
    named = st.sampled_from((*sorted(PRESETS), "auto", auto))
    state_format = draw(st.one_of(named, formats()))
    return Drawn({"state_format": state_format} | drawn.options, drawn.bad)


@dataclass(frozen=True)
class Case:
    """An optimizer to build, and what to do with it."""

    kind: str  # "muon" with options as arguments, "group" in a group, "aux", "overrides"
    muon: Drawn
    aux: Drawn
    shapes: tuple[tuple[int, ...], ...]  # of Muon's parameters
    dtype: torch.dtype
    steps: tuple[tuple[str, str], ...]  # (gradient of the even parameters, of the odd ones)
    between: tuple[str, ...]  # what happens before each step
    later: Drawn  # options of a group that is added later


@st.composite
def cases(draw: st.DrawFn) -> Case:
    muon = draw(muon_options())
    kind = draw(st.sampled_from(("muon", "group", "aux", "overrides")))
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3).map(tuple))
    cut = draw(st.sampled_from(("no", "no", "experts", "splits")))
    if kind != "overrides" and cut == "experts":
        muon = Drawn({"batch_experts": True} | muon.options, muon.bad)
    elif kind != "overrides" and cut == "splits":
        rows = draw(st.integers(0, shapes[0][0]))
        splits = draw(st.permutations((rows, 0, shapes[0][0] - rows)))
        muon = Drawn({"row_splits": splits} | muon.options, muon.bad)
    grads = st.sampled_from(GRADIENTS)
    between = st.sampled_from(("nothing", "nothing", "file", "deepcopy", "add_group"))
    count = draw(st.integers(1, 3))
    return Case(
        kind=kind,
        muon=muon,
        aux=draw(options(GOOD_AUX_OPTIONS, BAD_AUX_OPTIONS)) if kind == "aux" else NOTHING,
        shapes=shapes,
        dtype=draw(st.sampled_from(DTYPES)),
        steps=tuple((draw(grads), draw(grads)) for _ in range(count)),
        between=tuple(draw(between) for _ in range(count)),
        later=draw(muon_options()),
    )


def refused_names(
    drawn: Drawn, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype
) -> set[str]:
    """The options that an optimizer of these parameters must refuse."""
    names = set(drawn.bad)
    if drawn.options.get("stochastic_rounding") is True and dtype == torch.float16:
        names.add("stochastic_rounding")
    both = ("stochastic_rounding", "compensation")
    if all(drawn.options.get(name) is True for name in both):
        names.add("compensation")
    splits = drawn.options.get("row_splits")
    if "row_splits" not in names and splits is not None:
        names |= {"row_splits"} if any(sum(splits) != shape[0] for shape in shapes) else set()
    return names


def build(case: Case, matrices: list[nn.Parameter], vectors: list[nn.Parameter]) -> Muon:
    if case.kind == "muon":
        return Muon(matrices, **case.muon.options)
    if case.kind == "group":
        return Muon([{"params": matrices, **case.muon.options}])
    if case.kind == "aux":
        groups = [
            {"params": matrices, "use_muon": True, **case.muon.options},
            {"params": vectors, "use_muon": False, **case.aux.options},
        ]
        return MuonWithAuxAdam(groups, aux_adam="adamw")
    model = nn.Module()
    for index, param in enumerate(matrices):
        model.register_parameter(f"w{index}", param)
    model.register_parameter("gain", vectors[0])
    # a matrix that Muon takes for certain, so that the pattern matches
    return MuonWithAuxAdam(
        muon_param_groups(model, overrides={"w*": case.muon.options}), aux_adam="adamw"
    )


def named(error: Exception, names: set[str]) -> bool:
    candidates = names | {ALSO_NAMED[name] for name in names if name in ALSO_NAMED}
    return any(re.search(rf"\b{name}\b", str(error)) for name in candidates)


def check_case(case: Case) -> None:
    shapes = (*case.shapes, (3, 4)) if case.kind == "overrides" else case.shapes
    matrices = [nn.Parameter(torch.randn(shape).to(case.dtype)) for shape in shapes]
    vectors = [nn.Parameter(torch.randn(5).to(case.dtype))]
    refused = refused_names(case.muon, shapes, case.dtype) | case.aux.bad
    if refused:
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            build(case, matrices, vectors)
        assert named(caught.value, refused), (refused, caught.value)
        return
    optimizer = build(case, matrices, vectors)
    for kinds, action in zip(case.steps, case.between, strict=True):
        optimizer = act(optimizer, action, case)
        checked_step(optimizer, kinds)
        check_state(optimizer)
        through_a_file(optimizer)


def act(optimizer: Muon, action: str, case: Case) -> Muon:
    """Something that must leave the optimizer as it is, but for a group that was added."""
    before = copy.deepcopy(optimizer.state_dict())
    if action == "add_group":
        added = nn.Parameter(torch.randn(3, 4).to(case.dtype))
        group = {"params": [added], **case.later.options}
        if isinstance(optimizer, MuonWithAuxAdam):
            group["use_muon"] = True
        if "param_names" in optimizer.param_groups[0]:
            group["param_names"] = [f"later.{len(optimizer.param_groups)}"]
        refused = refused_names(case.later, ((3, 4),), case.dtype)
        # what the optimizer's own options, which the group inherits, do not fit
        inherited = {**optimizer.defaults, **case.later.options}
        refused |= refused_names(Drawn(inherited, case.later.bad), ((3, 4),), case.dtype)
        if refused:
            with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
                optimizer.add_param_group(group)
            assert named(caught.value, refused), (refused, caught.value)
            assert_same(optimizer.state_dict(), before)
        else:
            optimizer.add_param_group(group)
            states = optimizer.state_dict()["state"]  # those of the new group come last
            assert_same({key: states[key] for key in before["state"]}, before["state"])
        return optimizer
    if action == "nothing":
        return optimizer
    other = copy.deepcopy(optimizer) if action == "deepcopy" else through_a_file(optimizer)
    assert_same(other.state_dict(), before)
    return other


def through_a_file(optimizer: Muon) -> Muon:
    """A copy with a state that was saved and loaded."""
    other = copy.deepcopy(optimizer)
    other.state.clear()
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert_same(other.state_dict(), optimizer.state_dict())
    # what only zeros were made for is made again by the first gradient
    if all(int(state["step"]) or state["skipped"] for state in optimizer.state.values() if state):
        assert other.state_bytes() == optimizer.state_bytes()
    return other


def checked_step(optimizer: Muon, kinds: tuple[str, str]) -> None:
    """One step with gradients of these kinds, and what it must and must not do."""
    params = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    kind_of = {}
    for index, (_, param) in enumerate(params):
        kind = kinds[index % 2]
        param.grad = gradients(tuple(param.shape), param.dtype)[kind]()
        # no element to spoil
        kind_of[param] = "zero" if not param.numel() and kind != "none" else kind
    grads = [None if p.grad is None else p.grad.clone() for _, p in params]
    weights = [param.detach().clone() for _, param in params]
    states = [copy.deepcopy(optimizer.state.get(param, {})) for _, param in params]
    # A first step of zeros at a rate of zero, as torch.distributed.checkpoint makes it.
    only_makes_states = (
        not any(states)
        and not any(float(group["lr"]) for group in optimizer.param_groups)
        and any(grad is not None for grad in grads)
        and not any(bool(grad.any()) for grad in grads if grad is not None)
    )
    # float16 has no values beyond what the momentum can be
    beyond = {p: ("inf", "nan") if p.dtype == torch.float16 else ("inf", "nan", "huge")
              for _, p in params}  # fmt: skip
    raises = any(g["nonfinite"] == "raise" and kind_of[p] in beyond[p] for g, p in params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if raises:
            with pytest.raises(ValueError, match=r"gradient of parameter .* expected finite"):
                optimizer.step()
        else:
            optimizer.step()
    if {"inf", "nan", "huge", "mixed"} & set(kind_of.values()):
        caught = [w for w in caught if "held inf or nan" not in str(w.message)]
    assert not caught, [str(w.message) for w in caught]
    for (group, param), grad, weight, state in zip(params, grads, weights, states, strict=True):
        same_bits(param.grad, grad)
        kind, now = kind_of[param], optimizer.state.get(param, {})
        if raises or (kind == "none" and not only_makes_states):
            same_bits(param, weight)
            assert_same(dict(now), state)
        elif only_makes_states:
            same_bits(param, weight)
            assert (int(now["step"]), now["skipped"]) == (0, 0)
        elif kind in ("inf", "nan") or int(now["step"]) == int(state.get("step", 0)):
            # AdamW squares "mixed" ones, up to 1e4, in float16 if the parameter is
            squared = not group.get("use_muon", True) and param.dtype == torch.float16
            assert kind in ("inf", "nan", "huge") or (kind == "mixed" and squared)
            same_bits(param, weight)
            assert now["skipped"] == state.get("skipped", 0) + 1
            if state and state.get("state_format", {}) is not None:  # of auto, chosen by now
                asked = {"asked": now["asked"]} if "asked" in now else {}
                assert_same({**now, "skipped": 0}, {**state, **asked, "skipped": 0})
            assert int(now["step"]) == int(state.get("step", 0))
        else:
            assert int(now["step"]) == int(state.get("step", 0)) + 1
            assert now["skipped"] == state.get("skipped", 0)
            sane = max(float(group["lr"]), float(group["weight_decay"])) <= LARGEST_SANE
            if sane:
                assert bool(param.isfinite().all()), (kind, group)


def same_bits(a: Tensor | None, b: Tensor | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    a, b = (t.detach().clone(memory_format=torch.contiguous_format) for t in (a, b))
    assert torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


def check_state(optimizer: Muon) -> None:
    """Everything is finite, decodes to finite values, and takes the bytes its format says."""
    total, seen = 0, set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            for name, value in state.items():
                if isinstance(value, Tensor):
                    assert bool(value.isfinite().all()), name
                    if value.data_ptr() not in seen:
                        total += value.numel() * value.element_size()
                    seen.add(value.data_ptr())
            if not state or not group.get("use_muon", True):
                continue
            expected = 0
            if state.get("state_format", {}) is None:  # of auto, not chosen yet
                continue
            state_format = momentum_format(group, state)
            for view in matrix_views(param, group):
                stored = read_matrix(state, view, state_format)
                assert bool(stored.dequantize().isfinite().all())
                assert stored.shape == view.shape
                zeros = QuantizedMatrix.zeros(
                    view.shape, state_format, seed=0, device=torch.device("meta")
                )
                expected += sum(t.numel() * t.element_size() for t in zeros.tensors.values())
            expected += param.numel() if "remainder" in state else 0
            tensors = [value for value in state.values() if isinstance(value, Tensor)]
            assert sum(t.numel() * t.element_size() for t in tensors) == expected
    assert optimizer.state_bytes() == total


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_options_are_refused_by_name_or_step(shard: int) -> None:
    def run(case: Case) -> None:
        torch.manual_seed(0)
        check_case(case)

    without_files = settings(
        max_examples=CASES // SHARDS,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    seed(shard)(without_files(given(cases())(run)))()


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_every_bad_option_is_refused_by_name(name: str) -> None:
    kinds = ("muon", "group", "aux", "overrides")
    for kind, value in itertools.product(kinds, BAD_OPTIONS[name]):
        if kind == "overrides" and name in ("batch_experts", "row_splits"):
            continue  # no options of an override
        bad = Drawn({name: value}, frozenset({name}))
        check_case(Case(kind, bad, NOTHING, ((3, 4),), torch.float32, (), (), NOTHING))


@pytest.mark.parametrize("name", [n for n in RULE_OPTIONS if n != "adjust_lr_fn"])
def test_none_leaves_an_option_to_the_rule_as_an_argument_alone(name: str) -> None:
    none = {name: None}
    check_case(
        Case("muon", Drawn(none, frozenset()), NOTHING, ((3, 4),), torch.float32, (), (), NOTHING)
    )
    for kind in ("group", "overrides"):
        bad = Drawn(none, frozenset({name}))
        check_case(Case(kind, bad, NOTHING, ((3, 4),), torch.float32, (), (), NOTHING))


@pytest.mark.parametrize("name", BAD_AUX_OPTIONS)
def test_every_bad_adamw_option_is_refused_by_name(name: str) -> None:
    for value in BAD_AUX_OPTIONS[name]:
        bad = Drawn({name: value}, frozenset({name}))
        check_case(Case("aux", NOTHING, bad, ((3, 4),), torch.float32, (), (), NOTHING))


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_every_bad_field_of_a_format_is_refused_by_name(name: str) -> None:
    for preset, value in itertools.product(PRESETS.values(), BAD_FIELDS[name]):
        with pytest.raises(ValueError, match=name):
            dataclasses.replace(preset, **{name: value})


def test_fields_that_do_not_go_together_are_refused_by_name() -> None:
    def refused(name: str, *args: Any, **fields: Any) -> None:
        with pytest.raises(ValueError, match=name):
            StateFormat("x", *args, **fields)

    # an uncoded state has nowhere to keep these
    refused("spectral", 32, spectral=True)
    refused("companded_scale", 16, companded_scale=True)
    refused("factor_rank", 32, factor_rank=2)
    refused("factor_divisor", 16, factor_divisor=16)
    # what is wrong with the factors' codes alone
    levels = tuple(range(16))
    refused("table: .* 2 to 4", 4, codebook="table", table=levels, factor_rank=1, factor_bits=2)
    refused("snap_levels", 4, mu=2.0, factor_rank=1, factor_bits=8)
    # levels that float32 does not tell apart, with and without snapping
    refused("exponent", 3, codebook="power_law", exponent=1e3, snap_levels=False)
    refused("table", 2, codebook="table", table=(0.0, 1.0, 1 + 1e-12), snap_levels=False)
    refused("table", 2, codebook="table", table=(0.0, -0.0))
    for change in ({"table": 5}, {"hue": 1, 2: 3}):
        with pytest.raises(ValueError, match=r"table|hue"):
            StateFormat.from_dict({"name": "x", "bits": 4, **change})
    # exp overflows
    refused("clip", 4, companded_scale=True, snap_levels=False, clip=1e3)
