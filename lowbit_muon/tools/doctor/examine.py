"""All matrices of one optimizer, diagnosed, with progress: each takes an SVD."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console

from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.tools.console import Progress
from lowbit_muon.tools.doctor.saved_state import AuxState
from lowbit_muon.tools.plan.plans import Plan


@dataclass(frozen=True)
class Examined:
    """What was found in one optimizer; needs: what a run with it holds, see `needs`."""

    optimizer: str
    rows: list[Diagnosis]
    aux: AuxState
    remarks: tuple[str, ...]
    needs: tuple[Plan, ...] = ()
    changes: tuple[str, ...] = ()  # after which it is ours: lines of a diff, and sentences


def diagnose_with_progress(muon: Muon, console: Console) -> list[Diagnosis]:
    """As `muon.diagnose()`, parameter by parameter."""
    parts = list(_parts(muon))
    rows: list[Diagnosis] = []
    with Progress(console, "parameters diagnosed:", len(parts)) as progress:
        for part in parts:
            rows += part.diagnose()
            progress.advance()
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
