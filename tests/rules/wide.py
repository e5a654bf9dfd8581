"""Rules that keep in float32 what they usually keep in eight bits."""

from __future__ import annotations

import dataclasses
from typing import Any

from lowbit_muon import UpdateRule


def wide(rule: UpdateRule) -> UpdateRule:
    """The rule with 32 bits in all of its stages that have a choice."""

    def widened(stage: Any) -> Any:
        if isinstance(stage, tuple):
            return tuple(map(widened, stage))
        return dataclasses.replace(stage, bits=32) if hasattr(stage, "bits") else stage

    stages = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)}
    del stages["name"], stages["options"]
    return dataclasses.replace(rule, **{name: widened(stage) for name, stage in stages.items()})


def has_codes(rule: UpdateRule) -> bool:
    """Whether a stage keeps something in eight bits."""
    return wide(rule) != rule
