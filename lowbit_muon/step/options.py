"""The options of a Muon group: which values they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

from lowbit_muon.backends import check_backend_name
from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.state.parameter import resolve_group_format

AdjustLr = Literal["original", "match_rms_adamw"]
NsDtype = Literal["auto", "float32", "float16", "bfloat16"]

LARGEST_NUMBER = 1e30  # Products of options have to stay within float32.


def _options() -> Iterator[tuple[str, Callable[[Any], bool], str]]:
    """(name, test, what is expected) for every option of a group."""

    def at_least_zero(value: Any) -> bool:
        return is_real_number(value) and 0 <= float(value) <= LARGEST_NUMBER

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def boolean(value: Any) -> bool:
        return isinstance(value, bool)

    def row_counts(value: Any) -> bool:
        return value is None or (
            isinstance(value, (list, tuple)) and bool(value) and all(whole(v) for v in value)
        )

    yield "lr", at_least_zero, "a number or one-element tensor >= 0, at most 1e30"
    yield "weight_decay", at_least_zero, "a number >= 0, at most 1e30"
    yield "momentum", lambda v: at_least_zero(v) and float(v) < 1, "a number in [0, 1)"
    yield "nesterov", boolean, "a bool"
    yield "eps", lambda v: at_least_zero(v) and float(v) > 0, "a number > 0"
    yield "ns_steps", lambda v: whole(v) and 1 <= v < 100, "a whole number from 1 to 99"
    yield (
        "adjust_lr_fn",
        lambda v: v in (None, "original", "match_rms_adamw"),
        "None, 'original' or 'match_rms_adamw'",
    )
    yield "ns_input", lambda v: v in ("exact", "stored"), "'exact' or 'stored'"
    yield (
        "ns_dtype",
        lambda v: v in ("auto", "float32", "float16", "bfloat16"),
        "'auto', 'float32', 'float16' or 'bfloat16'",
    )
    yield "stochastic_rounding", boolean, "a bool"
    yield "compensation", boolean, "a bool"
    yield "nonfinite", lambda v: v in ("skip", "raise"), "'skip' or 'raise'"
    yield "batch_experts", boolean, "a bool"
    yield "row_splits", row_counts, "None or a sequence of row counts"
    yield "seed", lambda v: whole(v) and v < 2**62, "a whole number from 0 to 2**62 - 1"
    yield "offload", boolean, "a bool"


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError naming the first bad option of a group."""
    for name, test, expected in _options():
        if not test(group[name]):
            raise ValueError(f"{name}: expected {expected}, got {group[name]!r}")
    if group["compensation"] and group["stochastic_rounding"]:
        raise ValueError("compensation: expected False with stochastic_rounding=True, got True")
    try:
        resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    except (TypeError, ValueError) as error:
        raise type(error)(f"ns_{error}") from None
    resolve_group_format(group)
    check_backend_name(group["backend"])
