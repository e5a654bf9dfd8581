"""Which update rules go with which formats: the table `pairs.md`, and numbers for all of its pairs.

`python tests/rules/pairs.py` writes the table anew, after a rule or a format has come.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon import PRESETS, RULES, Muon

TABLE = Path(__file__).with_name("pairs.md")
LR = 0.01
RUNS = "yes"
INTRODUCTION = """\
# Update rules and formats

Every pair that says "yes" runs in four ways, each time these tests run: by itself in one process
(weights move and stay finite), in a batch (where the other matrix changes no bit of it), saved and
loaded (the next step is the same to the bit), and shared by two processes of FSDP2 (states are
those of one process to the bit, weights but for roundings): `test_pairs.py`, and of processes
`tests/distributed/test_rules_processes.py`. A number refers to why a pair is refused, in the words
of the error. `python tests/rules/pairs.py` writes this table; a test holds it to the library.
"""


def refusal(rule: str, state_format: str) -> str:
    """Why the optimizer refuses a pair; empty if it takes it."""
    try:
        Muon([nn.Parameter(torch.zeros(2, 2))], rule=rule, state_format=state_format)
    except ValueError as error:
        return str(error)
    return ""


def table() -> str:
    """`pairs.md` as the library has it."""
    reasons: list[str] = []
    lines = [f"| rule | {' | '.join(PRESETS)} |", f"|---|{'---|' * len(PRESETS)}"]
    for rule in RULES:
        cells = []
        for state_format in PRESETS:
            reason = refusal(rule, state_format)
            if reason and reason not in reasons:
                reasons.append(reason)
            cells.append(str(reasons.index(reason) + 1) if reason else RUNS)
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    return "\n".join([INTRODUCTION, *lines, "", *notes, ""])


def formats_of(rule: str) -> list[str]:
    """The formats with which the table says that a rule runs."""
    rows = [line.strip("| ").split(" | ") for line in TABLE.read_text().splitlines()]
    (cells,) = (row[1:] for row in rows if row[0] == rule)
    return [name for name, cell in zip(PRESETS, cells, strict=True) if cell == RUNS]


def numbers(shape: Sequence[int], seed: int) -> Tensor:
    """Of a common part, as gradients have, and noise."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    left, right = (torch.randn(s, generator=generator) for s in ((rows, 2), (2, columns)))
    return left @ right + 0.3 * torch.randn(rows, columns, generator=generator)


def groups(
    pairs: Sequence[tuple[str, str]], params: Sequence[Sequence[nn.Parameter]]
) -> list[dict[str, Any]]:
    """A parameter group of each pair."""
    return [
        {"params": list(some), "rule": rule, "state_format": state_format}
        for (rule, state_format), some in zip(pairs, params, strict=True)
    ]


if __name__ == "__main__":
    TABLE.write_text(table())
