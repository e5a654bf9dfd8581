"""For transformers' Trainer and what is built on it: the optimizer in one line, gradient release.

Nothing here imports transformers before it is there.
"""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowbit_muon.optimizers.gradient_release import GradientRelease, attach_gradient_release
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam, resolve_aux_lr
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.step.rules.recipes import RULES, resolve_rule

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

# What `muon_param_groups` takes beside the model; the rest goes to the optimizer.
_OF_GROUPS = inspect.signature(muon_param_groups).parameters.keys() - {"model", "adjust_lr_fn"}


class MuonFactory:
    """Makes a `MuonWithAuxAdam` of a model and `TrainingArguments`, where a trainer calls it.

    Trainer(..., args=args, optimizer_cls_and_kwargs=(MuonFactory, {"training_args": args})) is all
    that transformers 5 needs. It is axolotl's `BaseOptimizerFactory` as well, and serves wherever
    else a model and TrainingArguments are at hand: MuonFactory()(model, args).
    """

    def __call__(
        self, model: nn.Module, training_args: TrainingArguments | None = None, **options: Any
    ) -> MuonWithAuxAdam:
        """The optimizer of a model.

        Args:
            model: parameters are routed by its structure, see `muon_param_groups`.
            training_args: learning_rate is the rate of all parameters, weight_decay that of
                matrices, embeddings and heads (biases, norms and other vectors have none), as with
                Trainer's AdamW, whose betas and epsilon (adam_*) go to the auxiliary AdamW. A
                weight_decay of 0, Trainer's default, leaves that of matrices to the rule.
            options: of `muon_param_groups` and `MuonWithAuxAdam`; they go before training_args.
                Unless adjust_lr_fn or a rule other than "muon" is given, adjust_lr_fn is
                "match_rms_adamw", with which updates have the size of AdamW's. With another scale
                learning_rate is that of the matrices alone, and `aux_lr` 3e-4 where it is not set.
                Unless stochastic_rounding or compensation is given, stochastic_rounding is True
                for a model with bfloat16 weights (and none in float16), most of whose updates
                rounding to nearest would lose at rates of fine-tuning: `bench.bf16_weights`, and
                arXiv 2010.06192. The auxiliary AdamW rounds to nearest all the same.

        Raises:
            ValueError: neither training_args nor lr; other bad options as the two say.
        """
        if training_args is None and "lr" not in options:
            raise ValueError(
                "training_args: expected the TrainingArguments, whose learning_rate Trainer does "
                'not pass on (optimizer_cls_and_kwargs=(MuonFactory, {"training_args": args})), or '
                "lr, got neither"
            )
        if resolve_rule(options.get("rule", "muon")) == RULES["muon"]:
            options.setdefault("adjust_lr_fn", "match_rms_adamw")
        if not {"stochastic_rounding", "compensation"} & options.keys():
            dtypes = {param.dtype for param in model.parameters()}
            options["stochastic_rounding"] = (
                torch.bfloat16 in dtypes and torch.float16 not in dtypes
            )
        given = {**_options_of(training_args), **options}
        of_groups = {name: given.pop(name) for name in _OF_GROUPS & given.keys()}
        of_groups["aux_lr"] = resolve_aux_lr(of_groups["lr"], of_groups.get("aux_lr"), given)
        return MuonWithAuxAdam(muon_param_groups(model, **of_groups), **given)


def _options_of(args: TrainingArguments | None) -> dict[str, Any]:
    """Options of `muon_param_groups` that Trainer's arguments mean."""
    if args is None:
        return {}
    return {
        "lr": args.learning_rate,
        "weight_decay": args.weight_decay or None,  # Trainer's default is no choice
        "aux_weight_decay": args.weight_decay,
        "no_decay": True,
        "aux_betas": (args.adam_beta1, args.adam_beta2),
        "aux_eps": args.adam_epsilon,
    }


def release_gradients(trainer: Trainer) -> None:
    """Let a Trainer update each parameter in the backward pass and free its gradient there.

    Call it before `trainer.train()`; see `attach_gradient_release`. gradient_accumulation_steps and
    max_grad_norm are Trainer's own: gradients add up until the last pass of a step, and are clipped
    by a running norm, which is logged as grad_norm. Resuming works as without.

    Raises ValueError for fp16, whose GradScaler looks at all gradients first. What
    `attach_gradient_release` refuses is refused when training begins.
    """
    from transformers import TrainerCallback

    if trainer.args.fp16:
        raise ValueError("trainer: expected training in bf16 or float32, got fp16=True")

    class Attach(TrainerCallback):
        """Attaches the hooks while Trainer trains."""

        release: GradientRelease | None = None

        def on_train_begin(self, args: TrainingArguments, *_: Any, **parts: Any) -> None:
            optimizer = parts["optimizer"]
            while not isinstance(optimizer, MuonWithAuxAdam) and hasattr(optimizer, "optimizer"):
                optimizer = optimizer.optimizer  # Accelerate wraps it
            norm = args.max_grad_norm or math.inf  # the norm is logged without clipping, too
            self.release = attach_gradient_release(parts["model"], optimizer, max_norm=norm)

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if self.release is not None:
                self.release.remove()

    attach = Attach()
    trainer.add_callback(attach)
    usual = trainer.accelerator.clip_grad_norm_

    def clip_grad_norm_(parameters: Any, max_norm: float, norm_type: int = 2) -> Any:
        release = attach.release
        norm = None if release is None else release.gradient_norm
        return usual(parameters, max_norm, norm_type) if norm is None else norm

    trainer.accelerator.clip_grad_norm_ = clip_grad_norm_
