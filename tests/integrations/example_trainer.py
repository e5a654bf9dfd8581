"""transformers.Trainer: pass the optimizer and its scheduler, ready made.

Weight decay and learning rates are those of the groups; Trainer does not read its own. It logs the
rate of the first group, which is Muon's.
"""

from __future__ import annotations

import sys

from tiny_llama import make_examples, make_model
from torch import nn
from transformers import Trainer, TrainingArguments, get_cosine_schedule_with_warmup

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

STEPS = 6


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the newest checkpoint. Returns the loss of every step and the model."""
    model = make_model()
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.02, aux_lr=3e-3, weight_decay=0.1))
    scheduler = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=output_dir,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_grad_norm=1.0,
            bf16=True,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=make_examples(24),
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
