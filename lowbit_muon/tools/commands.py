"""The commands of `lowbit-muon`. A new one is an entry here and its `add_command`.

Nothing is imported: `lowbit-muon --help` shows them at once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """What `--help` says of a command, and the module whose `add_command` has its options."""

    help: str
    module: str


COMMANDS = {
    "info": Command("versions, backends, instruction set and threads", "info"),
    "finetune": Command("fine-tune a pretrained language model", "finetune.command"),
    "plan": Command("memory of training a model, by optimizer", "plan.command"),
    "bench": Command("time a step and its parts against torch's optimizers", "benchmark.command"),
    "doctor": Command("what storing the momentum does to each matrix's update", "doctor.command"),
}
