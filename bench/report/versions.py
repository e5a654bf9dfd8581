"""The table of other releases of torch and Triton."""

from __future__ import annotations

from bench.report.markdown import results, table
from bench.versions import TESTS


def versions() -> str:
    """Tests with other releases of torch and Triton, and the kernels that spill registers there."""
    lines, notes = [], []
    for row in results("versions"):
        counts = [str(row[name]) for name in ("passed", "failed", "skipped")]
        spills = ", ".join(f"`{name}` {count}" for name, count in row["spills"].items())
        checkpoint = row["checkpoint"] or "yes"
        lines.append([row["torch"], row["triton"], checkpoint, *counts, spills or "none"])
        pair = f"- torch {row['torch']}, Triton {row['triton']}:"
        left_out = [f"`{path}`" for path in TESTS if path not in row["tests"]]
        if left_out:
            notes.append(f"{pair} without {', '.join(left_out)}\n")
        by_reason: dict[str, list[str]] = {}
        for test, why in row["failures"].items():
            by_reason.setdefault(why, []).append(test)
        notes += [
            f"{pair} failed: `{tests[0]}`"
            + (f" and {len(tests) - 1} more" if tests[1:] else "")
            + f": {why}\n"
            for why, tests in by_reason.items()
        ]
    headings = (
        "torch", "Triton", "import, step, checkpoint", "tests passed", "failed", "skipped",
        "spills",
    )  # fmt: skip
    return table(headings, lines) + "".join(["\n", *notes] if notes else [])
