"""What to change in code that uses torch.optim.Muon: the lines, and what is different then."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.step.options import GROUP_DEFAULTS
from lowbit_muon.step.rules.rule import RULE_OPTIONS

_TO_THE_END = 10**6  # of a line, its end included
_OURS = "lowbit_muon.Muon"
_THEIRS = {"torch.optim.Muon", "torch.optim._muon.Muon"}
# What an option of ours that torch's Muon does not have says of another default behaviour.
_BEHAVIOUR = {
    "state_format": "torch keeps the momentum in the gradient's dtype",
    "ns_dtype": "torch's Newton-Schulz is in bfloat16",
    "nonfinite": "torch takes a gradient with inf or nan into momentum and weight",
}

_EXAMPLE = """\
import torch

optimizer = torch.optim.Muon(params)
optimizer.load_state_dict(state)
"""


@dataclass(frozen=True)
class _Edit:
    """Text in the place of a line's characters from start to end."""

    line: int
    start: int
    end: int
    text: str


def changes(source: str, name: str) -> list[str]:
    """A unified diff, as lines, after which a Python source uses our Muon; [] if nothing changes.

    It knows names as imports give them (`from torch.optim import Muon as M`, `optim.Muon`), not
    those that a program puts together. Raises SyntaxError.
    """
    # Columns of the syntax tree count bytes.
    lines = source.encode().splitlines(keepends=True)
    for edit in sorted(_edits(ast.parse(source)), key=lambda e: (e.line, e.start), reverse=True):
        line = lines[edit.line - 1]
        lines[edit.line - 1] = line[: edit.start] + edit.text.encode() + line[edit.end :]
    after = b"".join(lines).decode()
    diff = difflib.unified_diff(
        source.splitlines(), after.splitlines(), name, name, n=1, lineterm=""
    )
    return list(diff)


def _edits(tree: ast.Module) -> Iterator[_Edit]:
    known: dict[str, str] = {}  # what names that imports give stand for
    imports: dict[str, ast.stmt] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                known[local] = alias.name if alias.asname else local
                imports.setdefault(local, node)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                local = alias.asname or alias.name
                known[local] = f"{node.module}.{alias.name}"
                imports.setdefault(local, node)
            yield from _edits_of_import(node)
    roots = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.lineno == node.end_lineno:
            root, _, rest = ast.unparse(node).partition(".")
            if f"{known.get(root)}.{rest}" in _THEIRS:
                yield _Edit(node.lineno, node.col_offset, node.end_col_offset or 0, _OURS)
                roots.append(root)
    if roots:
        first = imports[roots[0]]
        text = "import lowbit_muon\n" + " " * first.col_offset
        yield _Edit(first.lineno, first.col_offset, first.col_offset, text)


def _edits_of_import(node: ast.ImportFrom) -> Iterator[_Edit]:
    ours = [a for a in node.names if f"{node.module}.{a.name}" in _THEIRS]
    if not ours or node.end_lineno is None or node.end_col_offset is None:
        return
    others = [alias for alias in node.names if alias not in ours]
    text = ast.unparse(ast.ImportFrom("lowbit_muon", ours, 0))
    if others:
        kept = ast.unparse(ast.ImportFrom(node.module, others, 0))
        text = f"{kept}\n{' ' * node.col_offset}{text}"
    if node.end_lineno == node.lineno:
        yield _Edit(node.lineno, node.col_offset, node.end_col_offset, text)
        return
    # Names in parentheses, over several lines.
    yield _Edit(node.lineno, node.col_offset, _TO_THE_END, text)
    for line in range(node.lineno + 1, node.end_lineno):
        yield _Edit(line, 0, _TO_THE_END, "")
    yield _Edit(node.end_lineno, 0, node.end_col_offset, "")


def example_changes() -> list[str]:
    """`changes` of a script as it may be, where there is only its checkpoint."""
    return changes(_EXAMPLE, "a script")


def differences() -> list[str]:
    """Sentences on what our Muon does otherwise than torch.optim.Muon by default."""
    theirs = inspect.signature(torch.optim.Muon).parameters
    ours = inspect.signature(Muon).parameters
    usual = {name: argument.default for name, argument in ours.items()}
    # None leaves it to the rule, and a rule that says nothing to these.
    usual |= {n: GROUP_DEFAULTS[n] for n in RULE_OPTIONS if n != "adjust_lr_fn"}
    found = [
        f"{name} is {theirs[name].default!r} in torch and {usual[name]!r} here."
        for name in theirs
        if name in usual and theirs[name].default != usual[name]
    ]
    found += [f"{name}: there is no such option here." for name in theirs if name not in ours]
    same = ", ".join(name for name in theirs if name in ours)
    found = found or [f"The arguments of torch.optim.Muon stay, with their defaults ({same})."]
    options = [f"{name}={ours[name].default!r} ({_BEHAVIOUR[name]})" for name in _BEHAVIOUR]
    return [
        *found,
        f"Different by default: {', '.join(options)}.",
        "A state_dict of torch.optim.Muon loads as it is: optimizer.load_state_dict(state).",
    ]
