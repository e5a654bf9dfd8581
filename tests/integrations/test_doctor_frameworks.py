"""`lowbit-muon doctor` on the examples: a running script, and the checkpoint that it has saved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import TIMEOUT

from lowbit_muon.tools.cli import main

SAVED, STOPPED = 3, 5  # steps: every example saves after the third


def read(path: Path) -> dict[str, Any]:
    (found,) = json.loads(path.read_text())["optimizers"]
    result: dict[str, Any] = found
    return result


@pytest.mark.parametrize(
    ("name", "package", "checkpoint"),
    [
        ("trainer", "transformers", "checkpoint-3"),
        pytest.param("peft", "peft", "checkpoint-3", marks=pytest.mark.long),
        pytest.param("accelerate", "accelerate", "state", marks=pytest.mark.long),
        pytest.param("lightning", "lightning", "epoch=0.ckpt", marks=pytest.mark.long),
    ],
)
def test_a_script_and_its_checkpoint(
    name: str, package: str, checkpoint: str, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    script = Path(__file__).with_name(f"example_{name}.py")
    running, saved, output = tmp_path / "running.json", tmp_path / "saved.json", tmp_path / "output"
    output.mkdir()
    # In a process of its own: these libraries warn among themselves.
    command = [
        sys.executable,
        "-m",
        "lowbit_muon.tools.cli",
        "doctor",
        script,
        f"--steps={STOPPED}",
    ]
    done = subprocess.run(
        [*command, f"--json={running}", "--", output],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert main(["doctor", str(output / checkpoint), f"--json={saved}"]) == 0
    for found, steps, with_gradient in (
        (read(running), STOPPED - 1, True),
        (read(saved), SAVED, False),
    ):
        rows = found["matrices"]
        assert found["optimizer"] == "MuonWithAuxAdam"
        assert len(rows) == (28 if name == "peft" else 14)
        assert {row["steps"] for row in rows} == {steps}
        assert {row["with_gradient"] for row in rows} == {with_gradient}
    for row, later in zip(read(saved)["matrices"], read(running)["matrices"], strict=True):
        assert (row["name"], row["shape"]) == (later["name"], later["shape"])
