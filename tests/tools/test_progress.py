"""Progress: a bar on a terminal and, in every command, a line every so often in a log."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from lowbit_muon.examples import convnet, nanochat
from lowbit_muon.tools import commands, progress
from lowbit_muon.tools.benchmark import peaks
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.console import Progress
from lowbit_muon.tools.progress import LOG_SECONDS, LogLines


class Clock:
    """Time goes on by so many seconds whenever it is asked for."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.now = seconds, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


def test_a_line_is_shown_when_it_is_time_for_one() -> None:
    shown: list[str] = []
    lines = LogLines(shown.append, Clock(LOG_SECONDS / 4))
    for number in range(1, 17):
        lines.offer(str(number))
    assert shown == ["4", "8", "12", "16"]


def test_short_work_is_silent() -> None:
    shown: list[str] = []
    lines = LogLines(shown.append, Clock(LOG_SECONDS / 4))
    for number in range(3):
        lines.offer(str(number))
    assert not shown


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_or_lines(terminal: bool) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=120)
    with Progress(console, "step", 9, done=2, clock=Clock(LOG_SECONDS)) as shows:
        shows.note("half of it")
        shows.advance("loss 2.5")
        shows.advance()
    shown = file.getvalue()
    if terminal:
        assert "4/9" in shown
        assert "step 3/9  loss" not in shown
    else:
        assert shown == "step 2/9  half of it\nstep 3/9  loss 2.5\nstep 4/9\n"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is always time for another line."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)


FINETUNE = [
    "finetune", "--model=tiny", "--steps=2", "--tokens-per-step=64", "--sequence-length=32",
    "--held-out-tokens=64", "--sample-tokens=0", "--threads=1", "--save-every=0",
]  # fmt: skip
CONFIG = '{"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 4, "vocab_size": 300}'
# A command of each kind and what its log has to say on its way; `info` is done at once.
COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "finetune": (
        [*FINETUNE, "--out=run"],
        [
            r"step 0/2  evaluated 1/\d+ pieces of held-out text",
            r"step 0/2  sequence 1/2, loss \d",
            r"step 1/2  loss \d\.\d{4}  [\d,]+ tokens/s  state \d\.\d MiB",
            r"step 2/2  loss ",
        ],
    ),
    "plan": (
        ["plan", "config.json", "--device-memory=1GiB", "--device=cpu"],
        [r"read config\.json \(gpt2\)", "looking for the most that a step with spectral4 holds"],
    ),
    "bench": (
        ["bench", "--shapes=8x8", "--format=fp32", "--repeats=1", "--device=cpu"],
        [r"8x8, rounds: 0/2  orthogonalize", r"8x8, rounds: 1/2  step fp32", "8x8, rounds: 2/2"],
    ),
    "doctor": (["doctor", "train.py", "--steps=2"], ["parameters diagnosed: 1/1"]),
}
SCRIPT = """
import torch
from lowbit_muon import Muon
param = torch.nn.Parameter(torch.ones(4, 8))
optimizer = Muon([param])
for _ in range(3):
    param.grad = torch.randn(4, 8)
    optimizer.step()
"""


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_is_silent_in_a_log(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "plan":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(peaks, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(peaks, "PRODUCT_SIZES", {"cpu": 32})
    Path("config.json").write_text(CONFIG)
    Path("train.py").write_text(SCRIPT)
    arguments, expected = COMMANDS[name]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    for line in expected:
        assert re.search(f"^{line}", shown, re.MULTILINE), line


def test_commands_with_a_log_are_all() -> None:
    assert {*COMMANDS, "info"} == set(commands.COMMANDS)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("train", [nanochat.train, convnet.train])
def test_examples_say_where_they_are(
    train: Callable[[str, float, int, int], object], capsys: pytest.CaptureFixture[str]
) -> None:
    train("spectral4", 1e-3, 2, 0)
    assert capsys.readouterr().out == "Muon, 4 bits: step 0 of 2\nMuon, 4 bits: step 1 of 2\n"
