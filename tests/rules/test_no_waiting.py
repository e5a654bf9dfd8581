"""No stage makes a host wait for a device, but those that say so."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_device_step import give_gradients, on_device, parameters
from test_device_waits import NoWaiting
from wide import has_codes, wide

from lowbit_muon import RULES, Muon
from lowbit_muon.step.rules.direction import ExactPolar, SoftClip
from lowbit_muon.step.rules.gradient import PolarFactor

__all__ = ["on_device"]  # a fixture

# Singular value and eigenvalue decompositions do.
WAITING = (ExactPolar, SoftClip, PolarFactor)
BOTH_WIDTHS = {
    **RULES,
    **{f"{name}, 32 bits": wide(rule) for name, rule in RULES.items() if has_codes(rule)},
}
ON_DEVICES = [
    name
    for name, rule in BOTH_WIDTHS.items()
    if not any(isinstance(stage, WAITING) for stage in rule.stages())
]


@pytest.mark.parametrize("name", ON_DEVICES)
def test_a_rule_never_waits_for_the_device(name: str, on_device: Callable[[], None]) -> None:
    on_device()
    params = parameters(torch.bfloat16)
    optimizer = Muon(params, torch.tensor(0.01), rule=BOTH_WIDTHS[name], stochastic_rounding=True)
    give_gradients(params, 0)
    optimizer.step()  # creates the state
    give_gradients(params, 1)
    with NoWaiting(), torch.no_grad():
        optimizer._step_parameters(optimizer.param_groups[0], range(len(params)))
