"""A step over the Triton kernels never makes the host wait, as far as torch's operations tell."""

from __future__ import annotations

import pytest
import torch
from test_device_waits import NoWaiting
from torch import nn

from lowbit_muon import Muon


@pytest.mark.parametrize(
    "name", ["spectral4", "mulaw4", pytest.param("linear8", marks=pytest.mark.long)]
)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    weight = nn.Parameter(torch.randn(6, 140).bfloat16())
    optimizer = Muon(
        [weight], state_format=name, backend="triton", ns_dtype="float16", stochastic_rounding=True
    )
    for _ in range(2):  # the first creates the state and the tables
        weight.grad = torch.randn(6, 140).bfloat16()
        with torch.no_grad():
            if optimizer.state:
                with NoWaiting():
                    optimizer._step_parameters(optimizer.param_groups[0], [0])
            else:
                optimizer.step()
    assert int(optimizer.state_dict()["state"][0]["step"]) == 2
