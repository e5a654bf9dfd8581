"""Every option of a fine-tune in one place: defaults, help texts, checks, methods by name.

A method is a format ("spectral4"), an update rule and a format ("normuon+spectral4"), or an AdamW.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.step.options import GROUP_DEFAULTS, check_rule
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.tools.arguments import MOST, MOST_THREADS
from lowbit_muon.tools.errors import UserError

ADAMW_METHODS = ("adamw", "adamw8bit")
FORMATS = (*PRESETS, "auto")
MUON = "muon"
# Options that default to the rule's own, and what they are where it has none.
BESIDE_RULES = {
    "momentum": 0.95,
    "nesterov": True,
    "weight_decay": 0.1,
    "adjust_lr_fn": "match_rms_adamw",
}
# MuonQ as published (arXiv 2605.11396) orthogonalises the momentum itself.
FORMATS_WITHOUT_NESTEROV = ("muonq4",)
LEAST = {"steps": 1, "tokens_per_step": 1, "sequence_length": 2, "held_out_tokens": 1}
# Beyond these a seed is none of torch's generators (`text._order` multiplies it), a batch or an
# attention matrix fits no memory, and a number times another is no float32.
LARGEST = {
    "seed": 2**32 - 1,
    "threads": MOST_THREADS,
    "sequence_length": 2**17,
    "tokens_per_step": 2**27,
    "sample_tokens": 2**13,
    "weight_decay": 1e6,
}
_MOST_NUMBER = 1e30
# These change how a run is watched or stored, not which numbers it computes.
FREE_ON_RESUME = (
    "threads",
    "eval_before",
    "eval_every",
    "save_every",
    "sample_tokens",
    "prompt",
)


def _option(
    default: Any, help_text: str, choices: tuple[str, ...] = (), *, metavar: str | None = None
) -> Any:
    metadata = {
        "help": help_text, "choices": choices, "metavar": metavar, "kind": type(default)
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def _rules_own(name: str, help_text: str) -> Any:
    """An option that is None where the rule's own value goes for it."""
    usual = BESIDE_RULES[name]
    text = f"{help_text} (default: the rule's own, or {usual})"
    metadata = {"help": text, "choices": (), "metavar": None, "kind": type(usual)}
    return dataclasses.field(default=None, metadata=metadata)


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run computes. Raises UserError for a value that makes no sense."""

    model: str = _option(
        "smollm2", "pretrained model; tiny is a random one for tests", ("smollm2", "tiny")
    )
    text: str = _option("", "plain text file to train on (the King James Bible excerpt if not set)")
    held_out_tokens: int = _option(16384, "tokens never trained on, spread over the text")
    optimizer: str = _option("muon", "muon, or AdamW for all parameters", ("muon", *ADAMW_METHODS))
    format: str = _option("spectral4", "how Muon's momentum is stored", FORMATS)
    rule: str = _option(
        MUON, "what is done with the momentum: lowbit_muon.RULES", tuple(RULES), metavar="NAME"
    )
    lr: float = _option(
        2e-4,
        "Muon's learning rate: matched to AdamW's update size, but for rules that bring a scale of "
        "their own (adjust_lr_fn, in the guide on rules) or step relative to the weights (muonh): "
        "then it is the rule's as published, and this default may be far from it",
    )
    aux_lr: float = _option(1e-4, "AdamW's learning rate for embedding and norms beside Muon")
    aux_adam: str = _option(
        "auto", "AdamW beside Muon; auto: in 8 bits where possible", ("auto", *ADAMW_METHODS)
    )
    adamw_lr: float = _option(1e-4, "learning rate of the matrices with --optimizer adamw*")
    weight_decay: float | None = _rules_own("weight_decay", "weight decay of the matrices")
    momentum: float | None = _rules_own("momentum", "Muon's momentum")
    nesterov: bool | None = _rules_own("nesterov", "Nesterov momentum; muonq4 never uses it")
    schedule: str = _option("constant", "learning rate after the warm-up", ("constant", "linear"))
    warmup: int = _option(3, "steps of linear warm-up")
    steps: int = _option(16, "optimizer steps")
    tokens_per_step: int = _option(512, "tokens for each step")
    sequence_length: int = _option(256, "tokens in a sequence, in training and evaluation")
    precision: str = _option(
        "fp32", "products of the model; bf16 is faster on CPUs that have it", ("fp32", "bf16")
    )
    gradient_release: bool = _option(
        False, "update each matrix in the backward pass and free its gradient there"
    )
    seed: int = _option(0, "order of the training sequences, start of the power iterations")
    eval_before: bool = _option(True, "held-out loss and sample before the first step")
    eval_every: int = _option(0, "held-out loss every N steps; 0: only before and after")
    save_every: int = _option(8, "checkpoint every N steps and at the end; 0: never")
    sample_tokens: int = _option(40, "length of the text sample before and after; 0: none")
    prompt: str = _option("", "start of the text sample (taken from the held-out text if not set)")
    threads: int = _option(
        0, "CPU threads of a process; 0: PyTorch's choice, or its share of the cores under torchrun"
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            low, kind = LEAST.get(name, 0), field.metadata["kind"]
            if value is None and field.default is None:
                continue
            if field.metadata["choices"]:
                allowed = field.metadata["choices"]
                _expect(value in allowed, name, f"one of {', '.join(allowed)}", value)
            elif kind in (bool, str):
                _expect(isinstance(value, kind), name, f"a value of type {kind.__name__}", value)
            else:
                whole = kind is int
                most = LARGEST.get(name, MOST if whole else _MOST_NUMBER)
                number = isinstance(value, int if whole else (int, float))
                number = number and not isinstance(value, bool)
                bound = f"<= {most}" if number and value > most else f">= {low}"
                expected = f"a {'whole number' if whole else 'number'} {bound}"
                _expect(number and low <= value <= most, name, expected, value)
        _expect(_is_text(self.prompt), "prompt", "text that UTF-8 can encode", self.prompt)
        momentum = self.muon_options["momentum"]
        _expect(momentum < 1, "momentum", "a number in [0, 1)", momentum)
        self._check_rule()
        _expect(
            self.tokens_per_step % self.sequence_length == 0,
            "tokens_per_step",
            f"a multiple of --sequence-length {self.sequence_length}",
            self.tokens_per_step,
        )
        _expect(
            not self.gradient_release or self.precision == "fp32",
            "precision",
            "fp32 with --gradient-release, whose updates run within the model's backward pass",
            self.precision,
        )

    def _check_rule(self) -> None:
        """Raise UserError, with `Muon`'s sentence, where the rule does not go with the rest."""
        if self.optimizer != MUON:
            expected = f"{MUON} with --optimizer {self.optimizer}"
            _expect(self.rule == MUON, "rule", expected, self.rule)
            return
        group = {**GROUP_DEFAULTS, **self.muon_options, "state_format": self.format}
        try:
            check_rule({**group, "rule": self.rule})
        except ValueError as error:
            raise UserError(f"--{error}") from None

    def check_processes(self, count: int) -> None:
        """Raise UserError unless so many processes can share a run with these settings."""
        if count == 1:
            return
        _expect(
            self.sequences_per_step % count == 0,
            "tokens_per_step",
            f"sequences of --sequence-length {self.sequence_length} for each of {count} processes "
            f"alike, a multiple of {self.sequence_length * count}",
            self.tokens_per_step,
        )
        fixed = self.optimizer != MUON or self.format != "auto"
        _expect(fixed, "format", f"a fixed one with {count} processes", self.format)
        if self.gradient_release:
            raise UserError(
                f"--gradient-release: expected one process, got {count}, whose gradients are "
                "averaged after the backward pass"
            )

    @property
    def sequences_per_step(self) -> int:
        return self.tokens_per_step // self.sequence_length

    @property
    def muon_options(self) -> dict[str, Any]:
        """Options of the matrices' groups: as given, or the rule's own, or those beside rules."""
        own = dict(RULES[self.rule].options)
        given = {name: getattr(self, name, None) for name in BESIDE_RULES}
        options = {
            name: own.get(name, usual) if given[name] is None else given[name]
            for name, usual in BESIDE_RULES.items()
        }
        options["nesterov"] = options["nesterov"] and self.format not in FORMATS_WITHOUT_NESTEROV
        return options

    def in_force(self, name: str) -> Any:
        """The value of an option, whoever it is from."""
        return self.muon_options.get(name, getattr(self, name, None))

    @property
    def method(self) -> str:
        """The run's name in a comparison: the state format, with its rule, or the AdamW variant."""
        if self.optimizer != MUON:
            return self.optimizer
        return self.format if self.rule == MUON else f"{self.rule}+{self.format}"

    def learning_rate_factor(self, step: int) -> float:
        """Factor of the learning rates in step 0, 1, ...: warm-up, then constant or down to 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if self.schedule == "constant" or step < self.warmup:
            return warm
        return (self.steps - step) / max(1, self.steps - self.warmup)

    def with_method(self, name: str) -> FinetuneSettings:
        """These settings for a method by name: FORMAT, RULE+FORMAT, `adamw` or `adamw8bit`."""
        if name in ADAMW_METHODS:
            return dataclasses.replace(self, optimizer=name, rule=MUON)
        rule, plus, state_format = name.rpartition("+")
        if state_format not in FORMATS:
            known = ", ".join((*FORMATS, *ADAMW_METHODS))
            raise UserError(
                f"--compare: expected names out of {known}, formats also as RULE+FORMAT; got "
                f"{name!r}"
            )
        if plus and rule not in RULES:
            raise UserError(
                f"--compare: expected RULE+FORMAT with a rule out of {', '.join(RULES)}; got "
                f"{name!r}"
            )
        return dataclasses.replace(self, optimizer=MUON, rule=rule or MUON, format=state_format)

    def to_arguments(self) -> list[str]:
        """Command-line arguments that give these settings."""
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            flag = option_flag(field.name)
            if isinstance(value, bool):
                arguments.append(flag if value else "--no-" + flag[2:])
            else:
                arguments.append(f"{flag}={value}")
        return arguments


def option_flag(name: str) -> str:
    """The command-line flag of a field: tokens_per_step -> --tokens-per-step."""
    return "--" + name.replace("_", "-")


def resumed_settings(saved: Any, given: Mapping[str, Any]) -> FinetuneSettings:
    """The settings of an interrupted run, `saved`, with those `given` now that may change.

    A constant schedule may also get more steps. Raises UserError for any other change.
    """
    try:
        start = FinetuneSettings(**saved)
    except (TypeError, UserError) as error:
        raise UserError(f"--out: expected a run of this version's settings: {error}") from None
    free = FREE_ON_RESUME + (("steps",) if start.schedule == "constant" else ())
    for name, value in given.items():
        if name not in free and value != start.in_force(name):
            raise UserError(
                f"{option_flag(name)}: the run being resumed has {start.in_force(name)!r}, got "
                f"{value!r}; leave the option out to continue it"
            )
    return dataclasses.replace(start, **given)


def _is_text(value: str) -> bool:
    """Whether it has none of the half letters that arguments in another encoding become."""
    return value.encode("utf-8", "ignore").decode("utf-8") == value


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise UserError(f"{option_flag(name)}: expected {expected}, got {got!r}")
