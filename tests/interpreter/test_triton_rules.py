"""Steps of update rules over the Triton kernels, in the interpreter, against the reference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit_muon import Muon
from lowbit_muon.state.stored import RULE_PREFIX

# Vectors of rows, weights in masks, moments in eight bits, a weight decay of one, a sphere.
RULES = {
    "normuon": (6, 20),
    "cautious_decay": (18, 5),
    "adamuon": (6, 20),
    "scion": (18, 5),
    "muonh": (6, 20),
}
STEPS, NS_STEPS = 2, 2


def numbers(rule: str, seed: int) -> Tensor:
    return torch.randn(RULES[rule], generator=torch.Generator().manual_seed(seed))


def trained(backend: str) -> Muon:
    """An optimizer with a group of one matrix for each rule, after two steps."""
    groups = [{"params": [nn.Parameter(numbers(rule, 0))], "rule": rule} for rule in RULES]
    options = {"state_format": "linear8", "ns_dtype": "float32", "ns_steps": NS_STEPS}
    optimizer = Muon(groups, lr=0.01, backend=backend, **options)
    for step in range(1, STEPS + 1):
        for rule, group in zip(RULES, optimizer.param_groups, strict=True):
            group["params"][0].grad = numbers(rule, step)
        optimizer.step()
    return optimizer


def test_rules_step_as_with_the_reference() -> None:
    found, expected = trained("triton"), trained("reference")
    # A step of Newton-Schulz is three products of 20 terms or fewer, each with an error of
    # (20 + 8) 2^-23 (see `bench.gpu.correctness.check_dense_products`), and two of them lift what
    # is small by a^2 = 3.4445^2 at most. AdaMuon divides by elements, of which the smallest of 120
    # is some hundredth of their root mean square: ten times that in the norm.
    bound = 10 * 3.4445**2 * NS_STEPS * 3 * (20 + 8) * 2.0**-23
    assert bound < 2.5e-3
    for rule, ours, theirs in zip(RULES, found.param_groups, expected.param_groups, strict=True):
        (param,), (other,) = ours["params"], theirs["params"]
        moved = float((other - numbers(rule, 0)).detach().norm())
        assert float((param - other).detach().norm()) <= bound * moved, rule
        state = found.state[param]
        assert state.keys() == expected.state[other].keys()
        for key, value in expected.state[other].items():
            kept = torch.as_tensor(state[key])
            if not key.startswith(RULE_PREFIX):  # of gradients alone, by kernels that are exact
                assert torch.equal(kept, torch.as_tensor(value)), (rule, key)
            elif value.dtype == torch.uint8:  # logarithms: a rounding may go to the next code
                assert int((kept.int() - value.int()).abs().max()) <= 1, (rule, key)
            else:  # squares
                torch.testing.assert_close(kept, value, rtol=2 * bound, atol=0)
