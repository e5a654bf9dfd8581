"""The examples: they learn, and one that was killed and resumed ends as if it had not been."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import processes
import pytest

# Example, libraries it needs, method after which a checkpoint is complete.
EXAMPLES = {
    "trainer": (("transformers", "accelerate"), "transformers.Trainer._save_checkpoint"),
    "accelerate": (("transformers", "accelerate"), "accelerate.Accelerator.save_state"),
    "peft": (("transformers", "accelerate", "peft"), "transformers.Trainer._save_checkpoint"),
    "sft": (("transformers", "trl"), "transformers.Trainer._save_checkpoint"),
    "lightning": (("transformers", "lightning"), "lightning.pytorch.Trainer.save_checkpoint"),
}


# PEFT and TRL train by transformers' Trainer; test_fsdp2_example.py resumes by Accelerate.
LONG = ("accelerate", "peft", "sft")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.long] if n in LONG else []) for n in EXAMPLES]
)
def test_a_killed_run_ends_like_one_that_was_not(name: str, tmp_path: Path) -> None:
    libraries, saved = EXAMPLES[name]
    missing = [library for library in libraries if importlib.util.find_spec(library) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    example = f"example_{name}"
    whole = processes.finish(example, tmp_path / "whole")
    processes.kill_after(saved, example, tmp_path / "killed")
    rest = processes.finish(example, tmp_path / "killed", resume=True)
    assert whole.losses[-1] < whole.losses[0]
    processes.assert_resumed(whole, rest)
