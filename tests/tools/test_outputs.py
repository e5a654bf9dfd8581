"""What a command writes and prints: checked before its work, held by one run, never lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from lowbit_muon import Muon
from lowbit_muon.tools import info, progress
from lowbit_muon.tools.cli import main
from lowbit_muon.tools.console import plain_console, printable
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune import command as finetune_command
from lowbit_muon.tools.finetune import training
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore
from lowbit_muon.tools.finetune.settings import FinetuneSettings
from lowbit_muon.tools.output import locked, write_json

TINY = [
    "finetune", "--model=tiny", "--steps=2", "--tokens-per-step=64", "--sequence-length=32",
    "--held-out-tokens=64", "--sample-tokens=0", "--no-eval-before", "--threads=1",
]  # fmt: skip
FULL = Path("/dev/full")  # a device on which nothing has room


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("worked before the outputs were checked")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a file, a config, weights and an optimizer's state; nothing may be computed."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder").mkdir()
    Path("config.json").write_text("{}")
    optimizer = Muon([("w", nn.Parameter(torch.ones(8, 4)))])
    torch.save(optimizer.state_dict(), "state.pt")
    for name in (
        "benchmark.command.measure", "plan.command.read_model", "doctor.command.read_checkpoint",
        "finetune.command.finetune", "finetune.command.compare",
    ):  # fmt: skip
        monkeypatch.setattr(f"lowbit_muon.tools.{name}", refuse)


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    "arguments",
    [
        *([*command, f"--json={path}"]
          for command in (["bench", "--device=cpu"], ["plan", "config.json", "--device-memory=1GB"],
                          ["doctor", "state.pt"])
          for path in ("folder", "file/x.json", "x" * 300, "/proc/x/y", "a\0b", "")),
        ["bench", "--device=cpu", "--plot=file/x.svg"],
        ["bench", "--device=cpu", "--csv=file/x.csv"],
        ["doctor", "state.pt", "--plot=file/x.svg"],
        ["plan", "config.json", "--device-memory=1GB", "--json=config.json"],
        ["doctor", "state.pt", "--json=state.pt"],
        ["doctor", "state.pt", "--json=folder/../state.pt"],
        ["doctor", "state.pt", "--json=a.svg", "--plot=a.svg"],
        *([*TINY, *more, f"--out={path}"]
          for more in ([], ["--compare=fp32"], ["--save-every=0"])
          for path in ("file", "file/x", "x" * 300, "/proc/x", "a\0b")),
    ],
)  # fmt: skip
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    option = "--json" if "--plot=a.svg" in arguments else arguments[-1].split("=")[0]
    assert error.startswith(f"lowbit-muon: {option}: expected a ")
    assert error.count("\n") == 1
    assert Path("config.json").read_text() == "{}"


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("name", ["result.json", "loss.png", "loss.svg", "checkpoints"])
def test_what_a_run_writes_at_its_end_is_tried_before(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path("folder") / name
    path.write_text("") if name == "checkpoints" else path.mkdir()
    assert main([*TINY, "--out=folder"]) == 2
    assert capsys.readouterr().err.startswith("lowbit-muon: --out: expected a folder")


@pytest.mark.skipif(not FULL.exists(), reason="no such device here")
def test_a_full_disk_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--json: expected a file that can be .* No space left"):
        write_json(FULL, {"a": 1})
    assert not FULL.is_file()
    old = tmp_path / "a.json"
    write_json(old, 1)
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: FULL.write_bytes(b"x"))
    with pytest.raises(UserError, match="No space left"):
        write_json(old, 2)
    monkeypatch.undo()
    assert json.loads(old.read_text()) == 1
    assert list(tmp_path.iterdir()) == [old]


def test_links_are_kept_and_devices_are_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink()
    assert json.loads((tmp_path / "file").read_text()) == 1
    write_json(Path(os.devnull), 1)
    assert not Path(os.devnull).is_file()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("more", [[], ["--compare=fp32"]])
def test_two_runs_do_not_share_a_folder(
    more: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with locked(Path("folder")):
        assert main([*TINY, *more, "--out=folder"]) == 2
    assert "--out: expected a folder of no other run, got folder" in capsys.readouterr().err
    # Released with the first, and a run that is done is not written over.
    monkeypatch.setattr(finetune_command, "finetune", lambda *_: None)
    monkeypatch.setattr(finetune_command, "compare", lambda *_, **__: None)
    assert main([*TINY, *more, "--out=folder"]) == 0


def test_a_finished_run_without_checkpoints_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*TINY, "--save-every=0", f"--out={tmp_path}"]
    assert main(arguments) == 0
    before = (tmp_path / "result.json").read_bytes()
    assert main(arguments) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (tmp_path / "result.json").read_bytes() == before


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": 3}', "[" * 10**5])
def test_a_result_that_is_none_is_passed_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(content)
    assert training.read_result(tmp_path) is None


class Gone(io.StringIO):
    """A log whose disk fills up after some lines."""

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.lines = lines

    def write(self, text: str) -> int:
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_steps_are_saved_when_nothing_can_be_printed_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)  # a line for each step
    settings = FinetuneSettings(
        model="tiny", steps=3, tokens_per_step=32, sequence_length=32, held_out_tokens=64,
        sample_tokens=0, eval_before=False,
    )  # fmt: skip
    # The first two lines say what is trained; the first step's is lost.
    console = Console(file=Gone(2), soft_wrap=True)
    with pytest.raises(OSError, match="No space left"):
        training.finetune(settings, tmp_path, console, None)
    payload, _ = CheckpointStore(tmp_path / "checkpoints").load_newest()
    assert len(payload["history"]["train_loss"]) == 1


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437", "utf-8"])
def test_any_terminal_shows_any_text(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: object) -> int:
        console = plain_console()
        console.print("\u2603 ± \udcff [bold] :smile:")
        print("\u4e2d")
        raise UserError("\u4e2d\n\udcff")

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(info, "run_info", run)
    assert main(["info"]) == 2
    assert b"[bold] :smile:\n" in out.buffer.getvalue()  # type: ignore[attr-defined]
    err.flush()
    shown = err.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert shown.count("\n") == 1
    assert "\\n\\udcff" in shown


def test_a_reader_that_has_gone_ends_nothing() -> None:
    code = (
        "import sys; from lowbit_muon.tools.console import plain_console\n"
        "c = plain_console()\nfor _ in range(9999): c.print('x' * 99)\n"
        "print('done', file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b"done\n"
    assert process.returncode == 0


def test_messages_are_one_line_of_bearable_length() -> None:
    assert printable("a\n\x1b[31m\udcff\u4e2d") == "a\\n\\x1b[31m\\udcff\u4e2d"
    assert len(printable("x" * 10**6)) < 3000


LIMITS: list[tuple[str, Any]] = [
    ("seed", 2**61), ("seed", -1), ("weight_decay", 1e38), ("weight_decay", float("nan")),
    ("threads", 100_000), ("lr", 1e308), ("aux_lr", float("inf")), ("adamw_lr", -1.0),
    ("steps", 10**30), ("tokens_per_step", 2**40), ("sequence_length", 2**30),
    ("sample_tokens", 10**9), ("warmup", 10**30), ("eval_every", 10**30), ("momentum", 1.5),
    ("held_out_tokens", 10**30), ("prompt", "\udcff"),
]  # fmt: skip


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(("name", "value"), LIMITS)
def test_numbers_out_of_range_name_their_option(
    name: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    option = "--" + name.replace("_", "-")
    assert main([*TINY, f"{option}={value}"]) == 2
    assert capsys.readouterr().err.startswith(f"lowbit-muon: {option}: expected ")


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--threads=100000"], ["bench", "--repeats=" + "9" * 30],
        ["bench", "--shapes=1000000000x1000000000"], ["bench", "--shapes=" + "9" * 5000 + "x1"],
        ["bench", "--seconds=inf"], ["doctor", "state.pt", "--worst=" + "9" * 5000],
        ["doctor", "a.py", "--steps=-1"], [*TINY, "--steps=" + "9" * 5000],
        ["plan", "config.json", "--device-memory=" + "9" * 400 + "GiB"],
        ["plan", "config.json", "--device-memory=1GiB", "--activations=-1"],
    ],
)  # fmt: skip
def test_arguments_out_of_range_are_argparses(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("seeds", "bound"), [(0, ">= 1"), (10**9, "<= 1000")])
def test_seeds_of_a_comparison(seeds: int, bound: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--compare=fp32", f"--seeds={seeds}"]) == 2
    assert f"--seeds: expected a whole number {bound}, got {seeds}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [{"settings": None}, {"settings": {"new": 1}}, {"model": {}}, {"optimizer": {}},
     {"history": {"a": 1}}],
)  # fmt: skip
def test_a_checkpoint_of_something_else_is_one_sentence(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*TINY, f"--out={tmp_path}"]) == 0
    store = CheckpointStore(tmp_path / "checkpoints")
    payload, _ = store.load_newest()
    store.save(3, {**payload, **changes})
    capsys.readouterr()
    assert main(["finetune", "--resume", f"--out={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lowbit-muon: --out: expected ")
    assert error.count("\n") == 1
