"""Checkpoints against kill -9, flipped bits and missing bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.checkpoint import CheckpointStore

KILLS = 50 if os.environ.get("FUZZ") else 12  # `make fuzz` sets it

# Forks before each save, so that one import of torch serves all. The child kills itself just
# before its n-th call that changes the disk; n runs over all of them, until a save completes.
KILL_AT_EVERY_POINT = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from lowbit_muon.tools.finetune import checkpoint

torch.set_num_threads(1)
store = checkpoint.CheckpointStore(Path(sys.argv[1]))

def payload(step):
    return {"step": step, "weight": torch.full((256, 64), float(step))}

def killed_save(step, call):
    calls = 0
    def guarded(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper
    os.fsync, os.rename = guarded(os.fsync), guarded(os.rename)
    os.mkdir, shutil.rmtree = guarded(os.mkdir), guarded(shutil.rmtree)
    torch.save = guarded(torch.save)
    store.save(step, payload(step))

for step in (0, 1):
    store.save(step, payload(step))
newest, call, kills = 1, 0, 0
while True:
    call += 1
    child = os.fork()
    if child == 0:
        killed_save(newest + 1, call)
        os._exit(0)
    finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found, messages = store.load_newest()
    assert not messages, messages
    assert found["step"] in (newest, newest + 1), (call, found["step"])
    assert not finished or found["step"] == newest + 1
    assert torch.equal(found["weight"], payload(found["step"])["weight"])
    newest = found["step"]
    if finished:
        break
    kills += 1
print(kills)
"""

KILL_AT_RANDOM_TIMES = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from lowbit_muon.tools.finetune import checkpoint

torch.set_num_threads(1)
store = checkpoint.CheckpointStore(Path(sys.argv[1]))
draw = random.Random(0)
newest, cut_short = -1, 0
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        step = newest
        while True:
            step += 1
            store.save(step, {"step": step, "weight": torch.full((512, 512), float(step))})
    while not store.checkpoints():
        time.sleep(0.01)
    time.sleep(draw.uniform(0.0, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cut_short += any(store.folder.glob(".partial-*"))
    found, messages = store.load_newest()
    assert not messages, messages
    assert found["step"] >= newest, (found["step"], newest)
    assert bool((found["weight"] == found["step"]).all())
    newest = found["step"]
print(cut_short)
"""


def run_script(script: str, folder: Path, *args: int) -> int:
    command = [sys.executable, "-c", script, str(folder), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_kill_before_any_write_loses_nothing(tmp_path: Path) -> None:
    # mkdir, torch.save, three fsyncs, rename, fsync of the parent, removal of the oldest; and the
    # removal of what the kill before left behind
    assert run_script(KILL_AT_EVERY_POINT, tmp_path) >= 8


def test_a_kill_at_any_time_loses_nothing(tmp_path: Path) -> None:
    # Saving is all that the child does, so most of the kills must fall into a save.
    assert run_script(KILL_AT_RANDOM_TIMES, tmp_path, KILLS) >= KILLS // 4


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        store.save(step, {"step": step, "weight": torch.full((64, 64), float(step))})
    return store


def test_the_newest_two_are_kept_and_the_newest_is_loaded(store: CheckpointStore) -> None:
    assert [path.name for path in store.checkpoints()] == ["step-00000020", "step-00000030"]
    payload, messages = store.load_newest()
    assert payload["step"] == 30
    assert torch.equal(payload["weight"], torch.full((64, 64), 30.0))
    assert messages == []


@pytest.mark.parametrize("position", [0, 0.5, 0.999])
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_one_flipped_byte_falls_back_to_the_checkpoint_before(
    store: CheckpointStore, name: str, position: float
) -> None:
    path = store.checkpoints()[-1] / name
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 0x40
    path.write_bytes(data)
    payload, messages = store.load_newest()
    assert payload["step"] == 20
    assert len(messages) == 1
    assert "step-00000030 is damaged" in messages[0]
    # Set aside: the next save and load do not meet it again.
    store.save(30, {"step": 30, "weight": torch.zeros(1)})
    assert store.load_newest()[0]["step"] == 30


@pytest.mark.parametrize("kept", [0, 1, 1000])
@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_truncated_file_falls_back(store: CheckpointStore, name: str, kept: int) -> None:
    path = store.checkpoints()[-1] / name
    data = path.read_bytes()
    path.write_bytes(data[: min(kept, len(data) - 1)])
    assert store.load_newest()[0]["step"] == 20


def test_a_missing_file_falls_back(store: CheckpointStore) -> None:
    (store.checkpoints()[-1] / "state.pt").unlink()
    assert store.load_newest()[0]["step"] == 20


def test_all_damaged_names_each(store: CheckpointStore) -> None:
    for path in store.checkpoints():
        (path / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000030 is damaged .*; .*step-00000020 is"):
        store.load_newest()


def test_nothing_saved_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to resume from: no checkpoint in"):
        CheckpointStore(tmp_path).load_newest()


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot save checkpoint .*step-00000001"):
        CheckpointStore(tmp_path / "file").save(1, {})


def test_another_format_version_is_refused(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowbit_muon.tools.finetune.checkpoint.FORMAT_VERSION", 99)
    with pytest.raises(UserError, match="expected checkpoint format 99, got 1"):
        store.load_newest()
