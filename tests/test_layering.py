"""The dependency direction that CONTRIBUTING.md describes, and who may know what."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lowbit_muon"

# A module may import from its own layer's earlier entries and from the layers before it.
LAYERS = (
    ("formats", "presets"),
    ("checks", "auto_format", "placement", "compiled_regions"),
    ("backends",),
    ("codec",),
    (
        "products",
        "newton_schulz",
        "half_precision",
        "power_iteration",
        "root_iteration",
        "spectral",
    ),
    ("row_source", "quantized_matrix", "momentum_state", "lut_gemm", "parameter_state"),
    ("update_error", "format_choice"),
    ("weight_rounding", "matrix_batch", "batched_update"),
    ("checkpoint",),
    ("checkpoint_momentum", "checkpoint_adam"),
    ("group_options", "host_offload", "group_step", "device_step", "diagnosis"),
    ("distributed",),
    ("parameter_step",),
    ("muon",),
    ("param_groups", "aux_adam"),
    ("integrations",),
    ("finetune",),
    ("plan",),
    ("benchmark",),
    ("doctor",),
    ("cli",),
    ("guides",),
)
ORDER = {name: index for index, layer in enumerate(LAYERS) for name in layer}


def module_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def top_module(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """First components below lowbit_muon that the file imports at module level or inside."""
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
    name = top_module(path)
    if name == "__init__":
        return
    for imported in imported_modules(path):
        if imported == name or imported not in ORDER:
            assert imported == name or imported in ("__version__", "MuonWithAuxAdam"), imported
            continue
        assert ORDER[imported] <= ORDER[name], f"{name} imports {imported} from a later layer"


def test_every_module_has_a_layer() -> None:
    assert {top_module(path) for path in module_files()} - {"__init__"} <= set(ORDER)


def test_kernels_name_no_optimizer_and_optimizers_no_device() -> None:
    kernels = [*(PACKAGE.parent / "csrc").rglob("*.*"), *(PACKAGE / "backends").rglob("*.py")]
    for path in kernels:
        if path.suffix in (".cpp", ".hpp", ".inl", ".cu", ".cuh", ".py"):
            # The package's own name ("lowbit_muon") is not the optimizer's.
            text = re.sub("lowbit_?-?muon", "", path.read_text(), flags=re.IGNORECASE)
            assert not re.search(r"\bmuon|newton|nesterov", text, flags=re.IGNORECASE), path
    for name in ("muon.py", "momentum_state.py", "aux_adam.py"):
        assert not re.search(r"[\"'](cuda|cpu)[\"']", (PACKAGE / name).read_text()), name
