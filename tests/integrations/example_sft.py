"""TRL's SFTTrainer: it makes the optimizer itself, from the groups in `params`.

Its scheduler then comes from the arguments and scales the rates of all groups alike.
"""

from __future__ import annotations

import sys

from datasets import Dataset
from tiny_llama import VOCABULARY, make_examples, make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from lowbit_muon import MuonWithAuxAdam, muon_param_groups

STEPS = 6


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Every token is the word of its number. Take your model's tokenizer in its place."""
    words = {str(number): number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="0", pad_token="1")


def main(output_dir: str, resume: bool = False) -> tuple[list[float], nn.Module]:
    """Train, or go on from the newest checkpoint. Returns the loss of every step and the model."""
    model = make_model()
    groups = muon_param_groups(model, lr=0.02, aux_lr=3e-3, weight_decay=0.1)
    trainer = SFTTrainer(
        model,
        args=SFTConfig(
            output_dir=output_dir,
            max_steps=STEPS,
            save_steps=STEPS // 2,
            logging_steps=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            bf16=True,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=Dataset.from_list(
            [{"input_ids": example["input_ids"].tolist()} for example in make_examples(24)]
        ),
        processing_class=make_tokenizer(),
        optimizer_cls_and_kwargs=(
            MuonWithAuxAdam,
            {"params": groups, "state_format": "spectral4"},
        ),
    )
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


if __name__ == "__main__":
    print(main(sys.argv[1], resume="--resume" in sys.argv)[0])
