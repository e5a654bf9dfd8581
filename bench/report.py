"""README's tables of measurements, from the results in bench/results.

    python -m bench.report          writes them between README's markers

A marker is <!-- report: NAME -->, up to <!-- /report -->; a test holds README to the results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.fidelity import pareto_front
from bench.gpu.roofline import markdown as paper

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = ROOT / "README.md"
_BLOCK = re.compile(r"(<!-- report: (\w+) -->\n)(.*?)(<!-- /report -->)", re.DOTALL)


def results(name: str) -> Any:
    """The results of one benchmark."""
    return json.loads((RESULTS / f"{name}.json").read_text())["results"]


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def fidelity() -> str:
    """Real momentum, quantised once."""
    formats = results("fidelity")["formats"]
    front = pareto_front(formats)
    rows = [
        [
            f"**`{name}`**" if name in front else f"`{name}`",
            f"{row['bits']:.2f}",
            *(f"{row[figure]:.3f}" for figure in ("momentum", "update", "polar")),
            f"{row['angle']:.1f}",
        ]
        for name, row in sorted(formats.items(), key=lambda item: item[1]["update"])
    ]
    return table(("", "bits", "momentum", "update", "polar factor", "angle, degrees"), rows)


def fidelity_training() -> str:
    """Momentum of a fine-tune, in closed loop."""
    found = {name: row for name, row in results("fidelity_training").items() if "_" not in name}
    formats = {name: row for name, row in found.items() if isinstance(row, dict)}
    published = formats["muonq4"]["update"]
    rows = []
    for name, row in formats.items():
        # muonq4's own normalisation makes its steps another sequence
        closed = ["", ""] if name == "muonq4" else [f"{row['closed']:.3f}", f"{row['cosine']:.3f}"]
        figures = [f"{row['bits']:.2f}", f"{row['momentum']:.3f}", f"{row['update']:.3f}"]
        rows.append([f"`{name}`", *figures, f"{row['update'] / published:.2f}", *closed])
    return table(("", "bits", "momentum", "update", "x `muonq4`", "closed", "cosine"), rows)


def step() -> str:
    """One optimizer step, in ratios."""
    runs = [
        {row["optimizer"]: row for row in results(name)["rows"]}
        for name in ("step", "step_without_bf16", "step_1024x4096")
    ]
    usual, without_bf16, wide = runs
    rows = []
    for name, row in usual.items():
        peer = name in ("torch.optim.Muon", "fp32 Newton-Schulz")
        rows.append(
            [
                name if peer else f"ours, `{name}`",
                f"{row['against full']:.2f}",
                f"{row['against shipped']:.2f}",
                f"{without_bf16[name]['against shipped']:.2f}",
                f"{wide[name]['against full']:.2f}",
                f"{row['state bytes'] / 2**20:.1f}",
                f"{row['peak / largest matrix']:.1f}",
            ]
        )
    headings = (
        "", "x fp32 Newton-Schulz", "x torch.optim.Muon as shipped",
        "same, oneDNN without bf16 units", "1024x4096: x fp32", "state MiB",
        "peak / largest matrix",
    )  # fmt: skip
    return table(headings, rows)


def lut_gemm() -> str:
    """Products of codes, times as fast as torch.mm of the decoded float32 matrix."""
    times = results("lut_gemm")["times"]
    names = [name for name in times[0]["seconds"] if not name.endswith(": torch.mm")]

    def ratio(run: dict[str, Any], name: str) -> str:
        baseline = run["seconds"][f"{name.split(':')[0]}: torch.mm"]
        return f"{baseline / run['seconds'][name]:.1f}"

    shapes = ["x".join(map(str, run["shape"])) for run in times]
    return table(("", *shapes), ([name, *(ratio(run, name) for run in times)] for name in names))


BLOCKS: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "fidelity_training": fidelity_training,
    "step": step,
    "lut_gemm": lut_gemm,
    "paper": paper,
}


def fill(text: str) -> str:
    """The text with every block written anew. Raises KeyError for a block that is not known."""
    return _BLOCK.sub(lambda found: found[1] + BLOCKS[found[2]]() + found[4], text)


def blocks(text: str) -> set[str]:
    """The names of the blocks in a text."""
    return {found[2] for found in _BLOCK.finditer(text)}


if __name__ == "__main__":
    README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
