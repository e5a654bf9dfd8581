"""PEFT: LoRA and DoRA. Their two matrices go to Muon, DoRA's magnitudes to AdamW.

The rate of Muon alone rises over the first steps (update-strength warm-up): a schedule for each
group, made from the schedule of all.
"""

from __future__ import annotations

import sys

from peft import LoraConfig, get_peft_model
from tiny_llama import make_examples, make_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

STEPS, WARMUP = 6, 4


def decay(step: int) -> float:
    """The schedule of all groups: down to zero in a straight line."""
    return 1 - step / STEPS


def warm_decay(step: int) -> float:
    """The same, from nothing to full strength over the first steps."""
    return min(1.0, (step + 1) / WARMUP) * decay(step)


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the newest checkpoint. Returns the loss of every step and the model."""
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), config)
    optimizer = MuonWithAuxAdam(muon_param_groups(model, lr=0.02, aux_lr=3e-3))
    schedules = [warm_decay if group["use_muon"] else decay for group in optimizer.param_groups]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=output_dir,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            per_device_train_batch_size=4,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=make_examples(24),
        optimizers=(optimizer, LambdaLR(optimizer, schedules)),
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
