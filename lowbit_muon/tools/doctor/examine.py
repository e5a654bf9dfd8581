"""All matrices of one optimizer, diagnosed, with a progress bar: each takes an SVD."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.tools.console import progress_bar
from lowbit_muon.tools.doctor.saved_state import AuxState

PLAIN_SECONDS = 20  # between two lines of progress where there is no terminal


@dataclass(frozen=True)
class Examined:
    """What was found in one optimizer."""

    optimizer: str
    rows: list[Diagnosis]
    aux: AuxState
    remarks: tuple[str, ...]


def diagnose_with_progress(muon: Muon, console: Console) -> list[Diagnosis]:
    """As `muon.diagnose()`, parameter by parameter."""
    parts = list(_parts(muon))
    rows: list[Diagnosis] = []
    shown = time.monotonic()
    with progress_bar(console) as bar:
        task = bar.add_task("diagnosing", total=len(parts), status="")
        for done, part in enumerate(parts, start=1):
            rows += part.diagnose()
            bar.advance(task)
            if not console.is_terminal and time.monotonic() - shown > PLAIN_SECONDS:
                console.print(f"diagnosed {done}/{len(parts)} parameters")
                shown = time.monotonic()
    return rows


def _parts(muon: Muon) -> Iterator[Muon]:
    """For each parameter with a momentum an optimizer of it alone, with the same state."""
    for group in muon.param_groups:
        if not group.get("use_muon", True):
            continue
        names = group.get("param_names") or map(str, range(len(group["params"])))
        for name, param in zip(names, group["params"], strict=True):
            if muon.state.get(param):
                part = Muon([{**group, "params": [param], "param_names": [name]}])
                part.state[param] = muon.state[param]
                yield part
