"""The tables of measurements in README.md, bench/results/README.md and the guides.

    python -m bench.report          writes them between the markers, from bench/results/*.json

A marker is <!-- report: NAME -->, up to <!-- /report -->; a test holds the files to the results.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from bench.gpu.roofline import markdown as paper
from bench.report.fidelity import fidelity, fidelity_training, predictor_values, predictors
from bench.report.kernels import codec, isas, lut_gemm, machine, orthogonalize
from bench.report.markdown import RESULTS, ROOT
from bench.report.preconditioned import preconditioned, rule_states
from bench.report.scaling import rules_on_paper, scaling, scaling_more
from bench.report.steps import bf16_weights, memory_limits, rules, step
from bench.report.training import gallery, training, training_rules, training_shifts
from bench.report.versions import versions

# The figures that users look for first, and all of them.
FILES = (
    ROOT / "README.md",
    RESULTS / "README.md",
    *sorted((ROOT / "lowbit_muon" / "guides").glob("*.md")),
)
# A block is named as the function that makes it.
BLOCKS: dict[str, Callable[[], str]] = {
    "paper": paper,
    **{
        made.__name__: made
        for made in (
            fidelity, fidelity_training, predictors, predictor_values,
            step, rules, memory_limits, bf16_weights, preconditioned, rule_states,
            training, training_shifts, training_rules, gallery,
            codec, lut_gemm, isas, orthogonalize, machine,
            scaling, scaling_more, rules_on_paper, versions,
        )
    },
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- report: (\w+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)


def fill(text: str) -> str:
    """The text with every block written anew. Raises KeyError for a block that is not known."""
    return _BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[4], text)


def blocks(text: str) -> set[str]:
    """The names of the blocks in a text."""
    return {found[2] for found in _BLOCK.finditer(text)}
