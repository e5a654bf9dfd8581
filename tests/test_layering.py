"""The house that CONTRIBUTING.md draws: folders are rooms, and imports point down only."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lowbit_muon

PACKAGE = Path(__file__).parents[1] / "lowbit_muon"

# The rooms from the ground up; a room may import from those before it.
FLOORS = (
    "formats",
    "backends",
    "linalg",
    "state",
    "step",
    "checkpoint",
    "distributed",
    "optimizers",
    "tools",
    "examples",
)
# No code: what users read.
OTHER_FOLDERS = {"guides"}
FILES_AT_THE_ROOT = {"__init__", "__main__"}


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """The folder of a module, or its own name at the root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The first component below lowbit_muon of all that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module == "lowbit_muon":
                found |= {alias.name for alias in node.names}
            elif node.module.startswith("lowbit_muon."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("lowbit_muon.")}
    return found


@pytest.mark.parametrize("path", module_files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = room(path)
    if own in FILES_AT_THE_ROOT | OTHER_FOLDERS:
        return
    for imported in imported_rooms(path) - {own}:
        if own == "tools" and imported in ("__version__", "MuonWithAuxAdam"):
            continue
        if own == "examples" and imported in lowbit_muon.__all__:  # as users import it
            continue
        assert FLOORS.index(imported) < FLOORS.index(own), f"{own} imports {imported} from above"


def test_every_module_has_a_room() -> None:
    rooms = {room(path) for path in module_files()}
    assert rooms - FILES_AT_THE_ROOT - OTHER_FOLDERS == set(FLOORS)
    assert {path.stem for path in PACKAGE.glob("*.py")} == FILES_AT_THE_ROOT


def test_formats_have_no_tensors() -> None:
    for path in (PACKAGE / "formats").glob("*.py"):
        assert "import torch" not in path.read_text(), path


def test_kernels_name_no_optimizer_and_optimizers_no_device() -> None:
    kernels = [*(PACKAGE.parent / "csrc").rglob("*.*"), *(PACKAGE / "backends").rglob("*.py")]
    for path in kernels:
        if path.suffix in (".cpp", ".hpp", ".inl", ".cu", ".cuh", ".py"):
            # The package's own name ("lowbit_muon") is not the optimizer's.
            text = re.sub("lowbit_?-?muon", "", path.read_text(), flags=re.IGNORECASE)
            assert not re.search(r"\bmuon|newton|nesterov", text, flags=re.IGNORECASE), path
    for folder in ("step", "optimizers"):
        for path in (PACKAGE / folder).glob("*.py"):
            assert not re.search(r"[\"'](cuda|cpu)[\"']", path.read_text()), path
