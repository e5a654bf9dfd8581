"""How far a reader walks to follow one step: the files and functions that it goes through."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import lowbit_muon
from lowbit_muon import Muon
from lowbit_muon.backends.cpu.adapter import unavailable_reason

PACKAGE = Path(lowbit_muon.__file__).parent
PREFIX = f"{PACKAGE}{os.sep}"
KERNELS = str(PACKAGE / "backends" / "cpu" / "adapter.py")
MOST_FILES, MOST_FUNCTIONS = 15, 80

Walk = dict[str, set[tuple[int, str]]]  # file -> (first line, name) of its functions


def walk(state_format: str) -> Walk:
    """What the third step of one 96x160 matrix goes through: caches are warm."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.randn(96, 160, generator=generator))
    optimizer = Muon([param], lr=0.02, state_format=state_format)
    param.grad = torch.randn(96, 160, generator=generator)
    optimizer.step()
    optimizer.step()
    found: Walk = defaultdict(set)

    def profile(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        # <lambda>, <genexpr> and <listcomp> belong to the function around them, and what
        # dataclasses generate lies in the file "<string>".
        if event == "call" and code.co_filename.startswith(PREFIX) and code.co_name[0] != "<":
            found[code.co_filename].add((code.co_firstlineno, code.co_name))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(before)
    return found


def described(found: Walk) -> str:
    """Its length, then each file with its functions in their order."""
    functions = sum(map(len, found.values()))
    lines = [
        f"expected <= {MOST_FILES} files and <= {MOST_FUNCTIONS} functions, "
        f"got {len(found)} and {functions}:"
    ]
    for name in sorted(found):
        names = ", ".join(name for _, name in sorted(found[name]))
        lines.append(f"{Path(name).relative_to(PACKAGE)} ({len(found[name])}): {names}")
    return "\n".join(lines)


def check(found: Walk) -> None:
    assert len(found) <= MOST_FILES, described(found)
    assert sum(map(len, found.values())) <= MOST_FUNCTIONS, described(found)


@pytest.mark.skipif(unavailable_reason() is not None, reason="the C++ extension was not built")
@pytest.mark.parametrize("state_format", ["spectral4", "mulaw4", "fp32", "linear8"])
def test_a_step_on_the_host_is_a_short_walk(state_format: str) -> None:
    found = walk(state_format)
    assert KERNELS in found, described(found)
    check(found)


def test_a_step_on_a_device_is_a_short_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    from device_reference import DeviceReference

    from lowbit_muon.optimizers import muon as muon_module

    backend = DeviceReference()
    monkeypatch.setattr(muon_module, "get_backend", lambda *_: backend)
    found = walk("spectral4")
    assert str(PACKAGE / "backends" / "base.py") in found, described(found)
    assert KERNELS not in found, described(found)
    # Torch operations stand in for the kernels of a device: their arithmetic is not the step's.
    for name in ("reference", "packing", "codes", "tensors"):
        found.pop(str(PACKAGE / "backends" / f"{name}.py"), None)
    found.pop(str(PACKAGE / "formats" / "codebook.py"), None)
    check(found)
