"""`state_format="auto"`: the formats to choose from and the rule of the choice; no tensors."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit_muon.formats.presets import resolve_format
from lowbit_muon.formats.state_format import StateFormat, is_finite_number

# The Pareto front of bits and error after Newton-Schulz (`python -m bench.fidelity`).
_CANDIDATES = ("spectral2", "spectral3", "spectral4", "spectral8")


@dataclass(frozen=True)
class AutoFormat:
    """Each parameter's momentum in the first of these formats whose error is small enough.

    Attributes:
        target_error: largest error of the update after Newton-Schulz, relative, in the Frobenius
            norm, if the momentum is stored once (`Diagnosis.direction_error`); above 0. Of momentum
            of SmolLM2-135M `spectral4` has 0.145, `spectral3` 0.27 (`python -m
            bench.fidelity_training`). Of a parameter of several matrices the worst counts.
        candidates: preset names or formats, from the smallest to the largest. The last is taken
            where none is good enough. Formats that differ in rank are candidates like any other.
        recheck_every: steps between two measurements of a parameter. It is measured in its first
            step, and since momentum needs a while to fill, after 1, 2, 4, .. steps as well. A
            measurement takes about as long as two or three steps, and on a GPU the host waits.
    """

    target_error: float = 0.2
    candidates: tuple[StateFormat | str, ...] = _CANDIDATES
    recheck_every: int = 200

    def __post_init__(self) -> None:
        if not is_finite_number(self.target_error) or not self.target_error > 0:
            raise ValueError(f"target_error: expected a number > 0, got {self.target_error!r}")
        whole = isinstance(self.recheck_every, int) and not isinstance(self.recheck_every, bool)
        if not whole or self.recheck_every < 1:
            raise ValueError(
                f"recheck_every: expected a whole number >= 1, got {self.recheck_every!r}"
            )
        if not isinstance(self.candidates, (tuple, list)) or not self.candidates:
            raise ValueError(f"candidates: expected a sequence of formats, got {self.candidates!r}")
        for state_format in self.formats:
            if state_format.normalize:
                raise ValueError(
                    "candidates: expected formats that keep the momentum's size, got "
                    f"'{state_format.name}', which normalises it"
                )

    @property
    def formats(self) -> tuple[StateFormat, ...]:
        """The candidates, resolved."""
        return tuple(resolve_format(candidate) for candidate in self.candidates)

    def is_due(self, steps: int) -> bool:
        """Whether a parameter is measured again before the step that follows `steps` steps."""
        return steps % self.recheck_every == 0 or steps & (steps - 1) == 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for state dicts."""
        return {
            "target_error": float(self.target_error),
            "candidates": [state_format.to_dict() for state_format in self.formats],
            "recheck_every": self.recheck_every,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AutoFormat:
        """Inverse of `to_dict`. Raises ValueError naming an unknown, missing or bad field."""
        expected = {"target_error", "candidates", "recheck_every"}
        if set(values) != expected or not isinstance(values["candidates"], (list, tuple)):
            raise ValueError(
                f"state_format: expected {sorted(expected)} of an automatic choice, "
                f"got {sorted(map(str, values))}"
            )
        candidates = tuple(StateFormat.from_dict(fields) for fields in values["candidates"])
        return cls(values["target_error"], candidates, values["recheck_every"])


def resolve_format_option(
    value: str | StateFormat | AutoFormat | Mapping[str, Any],
) -> StateFormat | AutoFormat:
    """What the option `state_format` of an optimizer means; a mapping is what `to_dict` made.

    Raises ValueError for an unknown name or a bad field and TypeError for anything that is no
    format.
    """
    if isinstance(value, Mapping):
        return _from_dict(value)
    if value == "auto":
        return AutoFormat()
    return value if isinstance(value, AutoFormat) else resolve_format(value)


@functools.lru_cache(maxsize=256)
def format_of_json(text: str) -> StateFormat | AutoFormat:
    """`resolve_format_option` of plain values, once for each of them.

    Optimizers keep formats as plain dicts and ask for them in every step. As JSON, 1, 1.0 and True
    are three values, where they would be one as keys of a dict.
    """
    return resolve_format_option(json.loads(text))


def _from_dict(values: Mapping[str, Any]) -> StateFormat | AutoFormat:
    return (AutoFormat if "candidates" in values else StateFormat).from_dict(values)
