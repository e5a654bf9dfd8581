"""The optimizers that a fine-tune compares, all over the same groups of parameters."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.step.options import AuxAdam
from lowbit_muon.tools.errors import UserError
from lowbit_muon.tools.finetune.processes import Processes
from lowbit_muon.tools.finetune.settings import MUON, FinetuneSettings

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-8


def build_optimizer(
    model: nn.Module, settings: FinetuneSettings, process_group: dist.ProcessGroup | None = None
) -> MuonWithAuxAdam:
    """The optimizer that the settings name, over all parameters of the model.

    The AdamW methods are torch.optim.AdamW and bitsandbytes' AdamW8bit on the matrices as well.
    process_group: over which the momentum of the matrices is shared.
    Raises UserError if bitsandbytes is asked for and does not work.
    """
    groups = muon_param_groups(
        model,
        lr=settings.lr,
        aux_lr=settings.aux_lr,
        aux_betas=ADAM_BETAS,
        aux_eps=ADAM_EPS,
        aux_weight_decay=0.0,
    )
    try:
        if settings.optimizer == MUON:
            own = settings.muon_options  # in the groups, where they go before the rule's
            return MuonWithAuxAdam(
                [{**group, **own} if group["use_muon"] else group for group in groups],
                rule=settings.rule,
                state_format=settings.format,
                aux_adam=cast(AuxAdam, settings.aux_adam),
                seed=settings.seed,
                process_group=process_group,
            )
        return MuonWithAuxAdam(
            [_adamw_group(group, settings) for group in groups],
            aux_adam=cast(AuxAdam, settings.optimizer),
        )
    except RuntimeError as error:
        option = "--aux-adam" if settings.optimizer == MUON else "--optimizer"
        raise UserError(f"{option}: {error}") from None


def _adamw_group(group: dict[str, Any], settings: FinetuneSettings) -> dict[str, Any]:
    if not group["use_muon"]:
        return group
    return {
        "params": group["params"],
        "param_names": group["param_names"],
        "use_muon": False,
        "lr": settings.adamw_lr,
        "betas": ADAM_BETAS,
        "eps": ADAM_EPS,
        "weight_decay": settings.in_force("weight_decay"),
    }


def count_matrices(optimizer: MuonWithAuxAdam) -> int:
    """How many parameters Muon takes."""
    return sum(len(group["params"]) for group in optimizer.param_groups if group["use_muon"])


def count_formats(optimizer: MuonWithAuxAdam, processes: Processes) -> dict[str, int]:
    """How many of Muon's parameters are stored in each format, the most frequent first."""
    names = [state_format.name for state_format in optimizer.state_formats().values()]
    return dict(Counter(itertools.chain(*processes.gather(names))).most_common())
