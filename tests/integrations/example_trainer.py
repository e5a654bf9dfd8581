"""transformers.Trainer: pass the optimizer and its scheduler, ready made.

    python example_trainer.py FOLDER [--resume] [--model tiny|smollm2] [--steps N]

Weight decay and learning rates are those of the groups; Trainer does not read its own. It logs the
rate of the first group, which is Muon's.
"""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

STEPS = 6
# Rates for random weights, and for pretrained ones, whose updates are scaled to AdamW's size.
RATES: dict[str, dict[str, Any]] = {
    "tiny": {"lr": 0.02, "aux_lr": 3e-3},
    "smollm2": {"lr": 2e-4, "aux_lr": 1e-4, "adjust_lr_fn": "match_rms_adamw"},
}
# Sequences at once, and how many such batches a step adds up.
BATCHES = {"tiny": (4, 2), "smollm2": (1, 2)}


def main(
    output_dir: str, resume: bool = False, model: str = "tiny", steps: int = STEPS
) -> tuple[list[float], nn.Module]:
    """Train, or go on from the newest checkpoint. Returns the loss of every step and the model."""
    if model == "smollm2":
        from smollm2_llama import make_examples, make_model
    else:
        from tiny_llama import make_examples, make_model
    batch_size, accumulated = BATCHES[model]
    network = make_model()
    groups = muon_param_groups(network, weight_decay=0.1, **RATES[model])
    optimizer = MuonWithAuxAdam(groups)
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, steps)
    trainer = Trainer(
        network,
        TrainingArguments(
            output_dir=output_dir,
            max_steps=steps,
            save_steps=max(1, steps // 2),
            logging_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulated,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=make_examples(max(24, steps * batch_size * accumulated)),
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, network


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="an example of transformers.Trainer")
    parser.add_argument("output_dir", help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest")
    parser.add_argument("--model", choices=tuple(RATES), default="tiny")
    parser.add_argument("--steps", type=int, default=STEPS)
    print(main(**vars(parser.parse_args()))[0])
