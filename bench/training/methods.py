"""What is compared: fp32 Muon, every way of storing its momentum, and AdamW."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from bench.peer_formats import MUONQ_TORCH_MOMENTUM
from lowbit_muon import (
    PRESETS,
    RULES,
    MuonWithAuxAdam,
    StateFormat,
    UpdateRule,
    attach_layer_inputs,
    muon_param_groups,
    quantize,
)
from lowbit_muon.step.options import AuxAdam
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.tools.finetune.settings import ADAMW_METHODS

BASELINE = "fp32"
MUONQ_BASELINE = "fp32, MuonQ's rule"
AUX_LR = 3e-3  # of embeddings, head, norms and biases, by torch.optim.AdamW in every Muon method
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1  # of matrices, torch.optim.Muon's default


@dataclass(frozen=True)
class Method:
    """A way to train: Muon with a state format, or AdamW.

    tuned_as: the method whose best learning rate it takes, itself for one with an update rule of
    its own. A format is a replacement only if it works at the rate that suits fp32.
    baseline: the method that keeps a full momentum under the same update rule.
    rule: of the matrices; "" for Muon with updates of AdamW's size.
    """

    name: str
    state_format: str | StateFormat | None  # None: AdamW
    nesterov: bool = True
    tuned_as: str = BASELINE
    baseline: str = BASELINE
    rule: str = ""


def _formats(*names: str) -> list[Method]:
    return [Method(name, name) for name in names]


def shifted(name: str, shift: float) -> Method:
    """A spectral format with this shift in matrices of all sizes."""
    new = f"{name}, c = {shift:g}"
    return Method(new, dataclasses.replace(PRESETS[name], name=new, spectral_shift=shift))


# Update rules with three learning rates or more to choose from, about those published, or those
# that make updates of the same size: trained where they are asked for.
_USUAL, _MATCHED = (2e-2, 4e-2, 8e-2), (5e-3, 1e-2, 2e-2)
_LOWER = (1e-2, *_USUAL)
_POLAR_EXPRESS = "muon with polar_express"
RULE_RATES = {
    **dict.fromkeys(("muon", "normuon", "cautious_decay", "cautious_muon", "turbo_muon"), _USUAL),
    **dict.fromkeys((_POLAR_EXPRESS, "dion_muon", "normuon_speedrun"), _LOWER),
    **dict.fromkeys(("nanochat", "muon_plus"), _LOWER),
    **dict.fromkeys(("moonlight", "muonclip"), _MATCHED),
    "muoneq": (*_MATCHED, 4e-2),
    "adamuon": (1.25e-3, 2.5e-3, 5e-3),
    **dict.fromkeys(("namo", "namo_d"), (*_LOWER, 0.16)),
    "muonh": (1.25e-2, 2.5e-2, 5e-2),
    "scion": (4e-4, 8e-4, 1.6e-3),
    "adago": (5e-2, 0.1, 0.2, 0.4),
    **dict.fromkeys(("polargrad", "polargrad_polar_first"), (3e-2, 0.1, 0.3)),
    **dict.fromkeys(("drop_muon", "soap_muon", "mousse", "newton_muon()"), _USUAL),
    "aro": _MATCHED,
    "cosmos": (1e-2, 2e-2, 4e-2),
    "conda": (5e-3, 1e-2, 2e-2),
    "soap": (1e-3, 3e-3, 1e-2),
    # Without a polar factor the large directions of a matrix move most: lower rates.
    **dict.fromkeys(("lion", "signum"), (1e-4, 3e-4, 1e-3)),
    **dict.fromkeys(("rmnp", "pion(2)"), (1e-3, 3e-3, 1e-2)),
    **dict.fromkeys(("auon", "spectra"), (1.0, 3.0, 10.0)),
    "auon_hybrid": _USUAL,
}
# Rules whose other states are kept in 8 bits, to be compared with float32.
CODED_STATES = ("soap", "soap_muon", "conda", "cosmos", "aro", "mousse")


def wide_states(rule: str) -> str:
    """Name of the method that trains a rule with all of its states in float32."""
    return f"{rule}, float32 states"


TRAINED_RULES = {
    **RULES,
    **{rule: resolve_rule(rule) for rule in ("pion(2)", "newton_muon()")},
    **{wide_states(rule): RULES[rule].with_state_bits(32) for rule in CODED_STATES},
    # What dion_muon, normuon_speedrun and nanochat have in common.
    _POLAR_EXPRESS: UpdateRule(_POLAR_EXPRESS, options=(("ns_coefficients", "polar_express"),)),
}


def _of_rules() -> Iterator[Method]:
    """Each rule with its momentum in float32, under its own name, and in `spectral4`."""
    for rule in RULE_RATES:
        yield Method(rule, BASELINE, tuned_as=rule, baseline=rule, rule=rule)
        yield Method(f"{rule}, spectral4", "spectral4", tuned_as=rule, baseline=rule, rule=rule)
        if rule in CODED_STATES:
            wide = wide_states(rule)
            yield Method(wide, BASELINE, tuned_as=rule, baseline=wide, rule=wide)


# Trained where they are asked for, too.
SHIFTS = {
    "spectral4": (0.01, 0.03, 0.06, 0.1, 0.2, 0.3),
    "spectral3": (0.01, 0.03, 0.06, 0.1, 0.2),
    "spectral2": (0.03, 0.06, 0.1, 0.2),
}
METHODS = {
    method.name: method
    for method in (
        *_formats(BASELINE, "linear8", "spectral8", "spectral4", "spectral3", "spectral2"),
        *_formats("mulaw4", "mulaw8", "nf4"),
        Method(MUONQ_TORCH_MOMENTUM.name, MUONQ_TORCH_MOMENTUM),
        # As published: normalised gradients and momentum, no Nesterov; another update rule. And
        # that rule with the momentum in other formats, to tell the rule from the storage.
        *(
            Method(
                "muonq4" if name == "muonq4" else f"{name}, MuonQ's rule",
                dataclasses.replace(PRESETS[name], name=name, normalize=True),
                nesterov=False,
                tuned_as="muonq4",
                baseline=MUONQ_BASELINE,
            )
            for name in ("fp32", "spectral4", "muonq4")
        ),
        *(Method(n, None, tuned_as=ADAMW_METHODS[0]) for n in ADAMW_METHODS),
        *(shifted(name, shift) for name, shifts in SHIFTS.items() for shift in shifts),
        *_of_rules(),
    )
}
DEFAULT_METHODS = tuple(
    name for name, method in METHODS.items() if ", c = " not in name and not method.rule
)
GRIDS = {
    BASELINE: (1.25e-3, 2.5e-3, 5e-3, 1e-2, 2e-2),
    "muonq4": (5e-3, 1e-2, 2e-2, 4e-2),
    "adamw": (3.125e-4, 6.25e-4, 1.25e-3, 2.5e-3, 5e-3),
    **RULE_RATES,
}


def make_optimizer(model: nn.Module, method: Method, lr: float, seed: int) -> MuonWithAuxAdam:
    """The optimizer over all parameters; lr is that of the matrices.

    Muon's updates are scaled to AdamW's size (0.2 sqrt(max(m, n)), Moonlight, arXiv 2502.16982,
    equation 4). Only the matrices' state differs between the Muon methods. Other rules have their
    own scale.
    """
    own: dict[str, Any] = {}
    if not method.rule:
        own = {"nesterov": method.nesterov, "adjust_lr_fn": "match_rms_adamw"}
    rule = TRAINED_RULES[method.rule or "muon"]
    if "weight_decay" not in dict(rule.options):
        own["weight_decay"] = WEIGHT_DECAY
    groups = muon_param_groups(
        model,
        lr=lr,
        aux_lr=AUX_LR,
        aux_betas=ADAM_BETAS,
        **own,
    )
    if method.state_format is not None:
        optimizer = MuonWithAuxAdam(
            groups,
            rule=rule,
            state_format=method.state_format,
            aux_adam="adamw",
            seed=seed,
        )
        if rule.needs("inputs"):
            attach_layer_inputs(model, optimizer)
        return optimizer
    return MuonWithAuxAdam(
        [_adamw_group(group, lr) for group in groups], aux_adam=cast(AuxAdam, method.name)
    )


def _adamw_group(group: dict[str, Any], lr: float) -> dict[str, Any]:
    if not group["use_muon"]:
        return group
    kept = {name: group[name] for name in ("params", "param_names", "weight_decay")}
    return {**kept, "use_muon": False, "lr": lr, "betas": ADAM_BETAS}


def bits(method: Method) -> float | None:
    """Bits of momentum an element of a 128x512 matrix; None for AdamW."""
    if method.state_format is None:
        return None
    return quantize(torch.zeros(128, 512), method.state_format).bits_per_element
