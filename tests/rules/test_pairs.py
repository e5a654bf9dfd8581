"""Every update rule with every format, as `pairs.md` has it, in one process."""

from __future__ import annotations

import io

import pytest
import torch
from pairs import LR, TABLE, formats_of, groups, numbers, table
from torch import Tensor, nn

from lowbit_muon import RULES, Muon
from lowbit_muon.state.stored import RULE_PREFIX

# The first two are stepped as a batch.
SHAPES = ((16, 24), (16, 24), (24, 16))
STEPS = 2


class Run:
    """An optimizer with a group of matrices for each format that a rule goes with."""

    def __init__(self, rule: str, weights: list[Tensor] | None = None) -> None:
        self.formats = formats_of(rule)
        shapes = SHAPES * len(self.formats)
        starts = weights or [0.1 * numbers(shape, 50 + i) for i, shape in enumerate(shapes)]
        self.params = [nn.Parameter(start.clone()) for start in starts]
        each = [self.params[i : i + len(SHAPES)] for i in range(0, len(shapes), len(SHAPES))]
        pairs = [(rule, name) for name in self.formats]
        self.optimizer = Muon(groups(pairs, each), lr=LR)

    def step(self, number: int, *, other_second: bool = False) -> None:
        """A step with gradients that depend on its number.

        other_second: of the batches alone, with those of another step for each second.
        """
        for index, param in enumerate(self.params):
            if other_second and index % len(SHAPES) > 1:
                continue
            other = other_second and index % len(SHAPES) == 1
            param.grad = numbers(param.shape, 1000 * (number + other) + index)
            if number == 1 and index % len(SHAPES) == 0:
                param.grad.zero_()
        self.optimizer.step()

    def values(self, index: int) -> dict[str, Tensor]:
        """The weight and the state of a matrix."""
        param = self.params[index]
        state = self.optimizer.state[param]
        return {"weight": param.detach()} | {k: torch.as_tensor(v) for k, v in state.items()}

    def assert_same(self, other: Run, indices: range) -> None:
        for index in indices:
            ours, theirs = self.values(index), other.values(index)
            assert ours.keys() == theirs.keys()
            for key, value in theirs.items():
                assert torch.equal(ours[key], value), (self.formats[index // len(SHAPES)], key)


def test_the_table_is_what_the_library_takes() -> None:
    assert TABLE.read_text() == table(), "python tests/rules/pairs.py writes it anew"


@pytest.mark.parametrize("rule", RULES)
def test_every_pair_of_the_table(rule: str) -> None:
    run, apart = Run(rule), Run(rule)
    starts = [param.detach().clone() for param in run.params]
    for number in range(STEPS):
        run.step(number)
        apart.step(number, other_second=True)
    # By itself: all moved, and what is kept is what the rule says.
    for index, (param, start) in enumerate(zip(run.params, starts, strict=True)):
        name = run.formats[index // len(SHAPES)]
        assert bool(param.isfinite().all()), name
        assert not torch.equal(param, start), name
        kept = {key for key in run.optimizer.state[param] if key.startswith(RULE_PREFIX)}
        expected = RULES[rule].state((param.shape[0], param.shape[1]))
        assert kept == {RULE_PREFIX + key for key in expected}, name
    # In a batch: the second has other gradients, the first the same bits.
    run.assert_same(apart, range(0, len(run.params), len(SHAPES)))
    for index in range(1, len(run.params), len(SHAPES)):
        assert not torch.equal(run.params[index], apart.params[index])
    # Saved and loaded.
    file = io.BytesIO()
    weights = [param.detach() for param in run.params]
    torch.save({"weights": weights, "optimizer": run.optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = Run(rule, saved["weights"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    run.step(STEPS)
    resumed.step(STEPS)
    resumed.assert_same(run, range(len(run.params)))
