"""A Muon parameter's state: checked, copied, or converted from another layout or format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.codes import Terms
from lowbit_muon.backends.packing import unpack
from lowbit_muon.backends.tensors import (
    accumulation_dtype,
    check_tensor,
    error_context,
    holds_values,
)
from lowbit_muon.checkpoint.dicts import (
    Group,
    SavedState,
    State,
    own_copy,
    whole_number,
)
from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.codebook import Codebook, CodeLayout
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.state.codec import SMALLEST_NORM
from lowbit_muon.state.codecs.coded import Coded
from lowbit_muon.state.format_choice import choose_format
from lowbit_muon.state.gradients import LARGEST_NORM, NORM_EPS, frobenius_norm
from lowbit_muon.state.parameter import (
    MatrixView,
    assemble,
    flatten,
    matrix_entries,
    matrix_shape,
    matrix_views,
    momentum_format,
    quantized_state,
    resolve_group_format,
    rule_keys,
    write_matrix,
)
from lowbit_muon.state.placement import local_part, shape_only
from lowbit_muon.state.rounding import Compensation
from lowbit_muon.state.stored import RULE_PREFIX, QuantizedMatrix, StoredBatch
from lowbit_muon.state.update_error import rotated_sample
from lowbit_muon.step.batches import host_counters
from lowbit_muon.step.options import LAYOUT_OPTIONS, OPTIONS
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.step.rules.rule import UpdateRule

# Of a state of ours: a step keeps norms below LARGEST_NORM, and codes may decode to somewhat more.
_LARGEST_OWN = 1e3 * LARGEST_NORM
_SLACK = 1.05  # for rounding, half precision in the encoder included


def convert_momentum(param: Tensor, group: Group, saved: SavedState) -> State:
    """A Muon parameter's state in the group's own format, from any layout; {} if it has none."""
    views = matrix_views(param, group)
    if saved.convention == "ours":
        entries = dict(saved.entries)
        kept = _remainder(param, group, entries.pop("remainder", None))
        converted = _converted(param, group, views, entries, saved.group)
        return converted | kept if converted else {}
    momentum = _foreign_momentum(param, group, saved)
    if momentum is None:
        return {}
    state_format, choice = _own_format(group, views, momentum)
    momentum = momentum / _average_factor(group)
    entries = quantized_state(momentum, state_format, views, group)
    entries |= _rule_state(param, group, views, {})
    counts = {"step": 0, "skipped": 0} | matrix_entries(param, group)
    return counts | choice | entries | _remainder(param, group, None)


def _remainder(param: Tensor, group: Group, saved: object) -> State:
    """What the group's weights are compensated with, from a state that may have none."""
    if not (group["compensation"] and Compensation.applies_to(param)):
        return {}
    if saved is None:
        return {"remainder": torch.zeros(param.shape, dtype=torch.int8, device=param.device)}
    found = check_tensor("remainder", saved, torch.int8, tuple(param.shape))
    if bool((found == -128).any()):
        raise ValueError("remainder: expected values from -127 to 127, got -128")
    return {"remainder": own_copy(found, param.device)}


def _converted(
    param: Tensor, group: Group, views: list[MatrixView], entries: State, saved_group: Group
) -> State:
    """Of a state in our layout: a copy, or quantised again for another format or other matrices."""
    missing = [name for name in LAYOUT_OPTIONS if name not in saved_group]
    if missing:
        raise ValueError(f"expected the options {missing} in the saved group, got none")
    _check_layout(saved_group)
    source_views, saved_format = matrix_views(param, saved_group), resolve_group_format(saved_group)
    auto = saved_format if isinstance(saved_format, AutoFormat) else None
    if auto is not None and isinstance(entries.get("state_format"), Tensor):
        packed, stored = entries.pop("state_format"), _possible_keys(auto, source_views)
        entries = {key: value for key, value in entries.items() if key not in stored}
        entries |= _unpacked(auto, source_views, packed)
        if "state_format" not in entries:
            return {}  # a format is chosen with the first gradient
    source = momentum_format(saved_group, entries)
    asked = whole_number("asked", entries.pop("asked", None)) if auto is not None else 0
    entries.pop("state_format", None)
    _check_matrix_entries(param, entries, saved_group)
    saved_rule = resolve_rule(saved_group["rule"])
    state = _checked_copy(param, entries, source, source_views, group["backend"], saved_rule)
    target = resolve_group_format(group)
    keeps = source in target.formats if isinstance(target, AutoFormat) else source == target
    factor = 1.0 if source.normalize else _average_factor(saved_group) / _average_factor(group)
    kept = state if source_views == views else {}
    of_rule = _rule_state(param, group, views, kept)
    if keeps and source_views == views and factor == 1:
        for key in rule_keys(state, views):
            del state[key]
        return state | of_rule | matrix_entries(param, group) | _choice(target, source, asked)
    momentum = assemble(param, source_views, source, state, group["backend"]) * factor
    counts = {name: state[name] for name in ("step", "skipped")} | matrix_entries(param, group)
    if isinstance(target, AutoFormat) and not bool(momentum.any()):
        return counts | {"asked": 0, "state_format": None} | of_rule  # chosen with a gradient
    loses_size = isinstance(target, AutoFormat) or not target.normalize
    if source.normalize and loses_size and bool(momentum.any()):
        if param.grad is None or not bool(param.grad.isfinite().all()):
            name = "auto" if isinstance(target, AutoFormat) else target.name
            raise ValueError(
                f"{_unknown_size(source)}; '{name}' needs it: expected a finite gradient to take "
                "it from, so load between backward() and step()"
            )
        _give_size(momentum, flatten(param.grad, saved_group), source_views, group["momentum"])
        momentum /= _average_factor(group)
    momentum = momentum.reshape(matrix_shape(param, group))
    state_format, choice = _own_format(group, views, momentum)
    return counts | choice | quantized_state(momentum, state_format, views, group) | of_rule


def _average_factor(group: Group) -> float:
    """What a group's momentum is multiplied by to be an average of gradients."""
    weights = resolve_rule(group["rule"]).momentum.weights(group["momentum"], nesterov=False)
    return (1 - group["momentum"]) / weights.grad


def _rule_state(
    param: Tensor, group: Group, views: Sequence[MatrixView], state: Mapping[str, Any]
) -> State:
    """What a group's rule keeps beside the momentum: of a state that has all of it, else zeros.

    A part would not do: averages and the count of their steps belong together.
    """
    rule, found = resolve_rule(group["rule"]), {}
    for view in views:
        layout = {view.prefix + RULE_PREFIX + n: k for n, k in rule.state(view.shape).items()}
        values = {key: value for key in layout if isinstance(value := state.get(key), Tensor)}
        fits = len(values) == len(layout) and all(
            (tuple(value.shape), value.dtype) == layout[key] for key, value in values.items()
        )
        for key, kept in layout.items():
            zeros = torch.zeros(kept.shape, dtype=kept.dtype, device=param.device)
            found[key] = values[key] if fits else zeros
    return found


def pack_auto_state(param: Tensor, group: Group, state: State) -> State:
    """A state of an automatic choice as it is saved: its momentum is one tensor `state_format`.

    uint8 [4 + bytes of the largest candidate]: the number of the chosen candidate plus one, int32,
    or 0 before the first gradient; then the bytes of the stored tensors, and zeros. Its size does
    not depend on the choice, so torch.distributed.checkpoint can load it into another state. Keys
    of stored tensors are there, with 0: torch 2.9 reads a flattened state by the keys in memory.
    """
    auto, views = resolve_group_format(group), matrix_views(shape_only(param), group)
    assert isinstance(auto, AutoFormat)
    chosen = None if state["state_format"] is None else momentum_format(group, state)
    if chosen is not None and chosen not in auto.formats:
        return state  # the option has been changed since
    number = 0 if chosen is None else 1 + auto.formats.index(chosen)
    packed = torch.zeros(_packed_bytes(auto, views), dtype=torch.uint8)
    parts = [torch.tensor([number], dtype=torch.int32)]
    if chosen is not None:
        parts += [state[key].to("cpu", meta.dtype) for key, meta in _layout(chosen, views)]
    values = torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])
    packed[: len(values)] = values
    no_tensors = dict.fromkeys(_possible_keys(auto, views), 0)
    packed = packed.to(local_part(param).device)
    of_rule = _rule_state(local_part(param), group, views, state)
    return host_counters(state) | no_tensors | of_rule | {"state_format": packed}


def _unpacked(auto: AutoFormat, views: list[MatrixView], packed: Tensor) -> State:
    """The entries that `pack_auto_state` has packed; {} where nothing was chosen yet."""
    check_tensor("state_format", packed, torch.uint8, (_packed_bytes(auto, views),))
    packed = packed.detach().cpu()
    number = int(packed[:4].clone().view(torch.int32))
    if not 0 <= number <= len(auto.formats):
        raise ValueError(
            f"state_format: expected the number of one of {len(auto.formats)} candidates, or 0, "
            f"got {number}"
        )
    if number == 0:
        return {}
    chosen = auto.formats[number - 1]
    entries: State = {"state_format": chosen.to_dict()}
    start = 4
    for key, meta in _layout(chosen, views):
        stop = start + meta.numel() * meta.itemsize
        entries[key] = packed[start:stop].clone().view(meta.dtype).view(meta.shape)
        start = stop
    return entries


def _layout(state_format: StateFormat, views: list[MatrixView]) -> Iterator[tuple[str, Tensor]]:
    """(key, meta tensor) of all stored tensors of a parameter."""
    for view in views:
        zeros = QuantizedMatrix.zeros(view.shape, state_format, seed=0, device=torch.device("meta"))
        yield from ((view.prefix + role, tensor) for role, tensor in zeros.tensors.items())


def _possible_keys(auto: AutoFormat, views: list[MatrixView]) -> list[str]:
    return [key for candidate in auto.formats for key, _ in _layout(candidate, views)]


def _packed_bytes(auto: AutoFormat, views: list[MatrixView]) -> int:
    return 4 + max(
        sum(meta.numel() * meta.itemsize for _, meta in _layout(candidate, views))
        for candidate in auto.formats
    )


def _check_matrix_entries(param: Tensor, entries: State, saved_group: Group) -> None:
    """Take out what says which matrix the state belongs to. Raises ValueError for another one."""
    expected = matrix_entries(param, saved_group)
    found = {name: whole_number(name, entries.pop(name, None)) for name in expected}
    if found != expected:
        raise ValueError(
            f"expected the momentum of {expected['rows']} x {expected['columns']} elements, got "
            f"that of {found['rows']} x {found['columns']}"
        )


def _give_size(
    momentum: Tensor,  # [rows, columns], norm one in every view
    grad: Tensor,  # [rows, columns]
    views: list[MatrixView],
    decay: float,
) -> None:
    """Multiply a momentum without size so that an average goes on where the normalised sum was.

    That would take decay * M + G/||G|| next, an average takes decay * M' + (1 - decay) * G: with
    M' = (1 - decay) * ||G|| * M they are parallel, and so are both updates.
    """
    for view in views:
        norm = float(frobenius_norm(grad[view.rows])) + NORM_EPS
        momentum[view.rows] *= (1 - decay) * norm


def _check_layout(saved_group: Group) -> None:
    """Raise ValueError unless the options say how parameters are cut into matrices."""
    experts, splits = saved_group["batch_experts"], saved_group["row_splits"]
    if not isinstance(experts, bool):
        raise ValueError(f"batch_experts: expected a bool, got {experts!r}")
    if splits is not None and not (
        isinstance(splits, (list, tuple)) and all(type(n) is int and n >= 0 for n in splits)
    ):
        raise ValueError(f"row_splits: expected None or a sequence of row counts, got {splits!r}")


def _own_format(
    group: Group, views: list[MatrixView], momentum: Tensor
) -> tuple[StateFormat, State]:
    """The format that a momentum [rows, columns] gets in a group, and what the state says of it."""
    target = resolve_group_format(group)
    if isinstance(target, StateFormat):
        return target, {}
    samples = [rotated_sample(momentum[view.rows]) for view in views]
    coefficients = resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    chosen, _ = choose_format(target, samples, coefficients, backend=group["backend"])
    return chosen, _choice(target, chosen, 0)


def _choice(target: StateFormat | AutoFormat, chosen: StateFormat, asked: int) -> State:
    if isinstance(target, StateFormat):
        return {}
    return {"state_format": chosen.to_dict(), "asked": asked}


def torch_muon_group(group: Group) -> Group:
    """The options of a group that torch.optim.Muon has. Raises ValueError for its one limit."""
    coefficients = group["ns_coefficients"]
    if isinstance(coefficients, str) or any(isinstance(c, Sequence) for c in coefficients):
        raise ValueError(
            "ns_coefficients: expected one triple (a, b, c), which is all that torch.optim.Muon "
            f"takes, got {coefficients!r}"
        )
    return {option.name: group[option.name] for option in OPTIONS if option.load == "saved"}


def export_momentum(param: Tensor, group: Group, state: State) -> State:
    """`momentum_buffer`: float32, the parameter's shape, M <- momentum*M + (1 - momentum)*G."""
    state_format = momentum_format(group, state)
    if state_format.normalize:
        raise ValueError(f"state_format: {_unknown_size(state_format)}; it cannot be exported")
    momentum = assemble(param, matrix_views(param, group), state_format, state, group["backend"])
    return {"momentum_buffer": momentum.view(param.shape) * _average_factor(group)}


def _checked_copy(
    param: Tensor,
    entries: Mapping[str, Any],
    state_format: StateFormat,
    views: list[MatrixView],
    backend: str,
    rule: UpdateRule,
) -> State:
    """A state in our own layout, copied to the parameter's device after checking all of it."""
    rest = dict(entries)
    state: State = {name: whole_number(name, rest.pop(name, None)) for name in ("step", "skipped")}
    for view in views:
        found = [key for key in rest if isinstance(key, str) and key.startswith(view.prefix)]
        tensors = {key.removeprefix(view.prefix): rest.pop(key) for key in found}
        with error_context(f"matrix {view.prefix}{list(view.shape)}"):
            rule_state = rule.state(view.shape)
            matrix = QuantizedMatrix.from_tensors(view.shape, state_format, tensors, rule_state)
            matrix.tensors = {
                role: own_copy(value, param.device) for role, value in matrix.tensors.items()
            }
            _check_values(matrix, backend)
        write_matrix(state, view, matrix)
    if rest:
        raise ValueError(f"expected nothing else in the state, got {sorted(map(repr, rest))}")
    return state


def _check_values(matrix: QuantizedMatrix, backend: str) -> None:
    """Raise ValueError unless every code stands for a level and the decoded matrix is finite."""
    f = matrix.state_format
    if not f.is_dense and matrix.shape[0] * matrix.shape[1]:
        _check_codes(matrix, "codes", max(matrix.shape), f.code_book(), f.code_layout())
        if f.has_factors:
            for role, length in zip(("left_codes", "right_codes"), matrix.shape, strict=True):
                _check_codes(matrix, role, length, f.factor_code_book(), f.factor_layout())
    largest = LARGEST_NORM * _SLACK if f.is_dense else _LARGEST_OWN
    _check_size(matrix.dequantize(backend), "codes and scales", largest)
    for role, (largest, reason) in _largest_values(matrix, backend).items():
        values = matrix.tensors.get(role)  # factors of an empty matrix are not there
        found = float(values.max()) if values is not None and values.numel() else 0.0
        if found > largest:
            raise ValueError(f"{role}: expected at most {largest:.6g}, {reason}, got {found:g}")


def _largest_values(matrix: QuantizedMatrix, backend: str) -> dict[str, tuple[float, str]]:
    """How large the positive tensors of a stored matrix may be, and why."""
    f, m = matrix.state_format, min(matrix.shape)
    if f.is_dense:
        return {}
    # In the code domain a matrix of norm one has entries of at most one: those of `spectral` are
    # bounded by the largest singular value, and companding keeps [-1, 1]. Where squares underflow,
    # the spectral operator is that of zeros, 1/shift.
    unit = _SLACK if f.stores_norm else _LARGEST_OWN
    reason = "of a momentum of norm one" if f.stores_norm else "of a momentum that steps go on from"
    layout = f.code_layout()
    gain = max(1.0, 1 / f.shift(m)) if f.spectral else 1.0
    limits = {"scales": (layout.clip * unit * gain, reason)}
    if f.has_factors:
        clip = f.factor_layout().clip
        limits["left_scales"] = (clip * _SLACK, "of orthonormal columns")
        limits["right_scales"] = (clip * unit, reason)
    if f.stores_norm:
        largest = 1.0 if f.normalize else LARGEST_NORM
        limits["norm"] = (largest * _SLACK, "the largest that a step leaves")
    if f.spectral:
        # (a - b)^2 <= 2 a^2 + 2 b^2 for each value a of Y and b of its code. Of a block's values
        # the scale tells the RMS, or the largest.
        stored = StoredBatch([matrix], get_backend(backend, matrix.device))
        assert isinstance(stored.codec, Coded)
        y = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
        codes = stored.backend.accumulate(y, Terms(codes=stored.codec.codes(stored)))
        n = max(matrix.shape)
        size = m * n if stored.codec.single_scale else layout.effective_block(n)
        scales = matrix.tensors["scales"].to(accumulation_dtype(matrix.device))
        values = scales.div(layout.clip).square().sum() * size
        noise = 2 * (float(values) + float(codes.sum())) * _SLACK + SMALLEST_NORM
        limits["noise"] = (noise, "the largest error that these codes can have")
    return limits


def has_momentum(entries: Mapping[str, Any]) -> bool:
    """Whether a state, ours, holds more than the zeros of a parameter that had no gradient yet."""
    if entries.get("step", 1) != 0:
        return bool(entries)  # what was loaded from another optimizer has no steps either, but ..
    sizes = ("norm", "scales", "dense", "state_format")
    found = (value for key, value in entries.items() if str(key).rpartition(".")[2] in sizes)
    return any(isinstance(value, Tensor) and bool(value.any()) for value in found)


def _check_size(momentum: Tensor, what: str, largest: float) -> None:
    norm = float(torch.linalg.vector_norm(momentum, dtype=accumulation_dtype(momentum.device)))
    if not norm <= largest:
        raise ValueError(
            f"expected {what} of a finite matrix of norm up to {largest:g}, got norm {norm:g}"
        )


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
    shapes = (param.shape, (param.shape[0], math.prod(param.shape[1:])))
    if not holds_values(buffer) or buffer.shape not in shapes:
        got = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
        raise ValueError(f"momentum_buffer: expected shape {tuple(param.shape)}, got {got}")
    if not buffer.is_floating_point() or not bool(buffer.isfinite().all()):
        raise ValueError(f"momentum_buffer: expected finite values, got {buffer.dtype} with others")
    momentum = buffer.detach().to(param.device, torch.float32).reshape(matrix_shape(param, group))
    _check_size(momentum, "momentum_buffer", LARGEST_NORM)
    return momentum * (1 - group["momentum"]) if saved.convention == "sum" else momentum


def _unknown_size(state_format: StateFormat) -> str:
    return (
        f"'{state_format.name}' divides the momentum by its norm in every step, so the size of the "
        "momentum is not known"
    )
