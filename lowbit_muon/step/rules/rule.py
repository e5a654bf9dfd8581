"""`UpdateRule`: what is done with a momentum, as `StateFormat` says how it is stored."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowbit_muon.state.stored import Kept, RuleState
from lowbit_muon.step.rules.constraint import Constraint
from lowbit_muon.step.rules.direction import Direction, Polar
from lowbit_muon.step.rules.gains import Gains
from lowbit_muon.step.rules.gradient import GradientTransform
from lowbit_muon.step.rules.momentum import Momentum
from lowbit_muon.step.rules.precondition import Preconditioner
from lowbit_muon.step.rules.sampling import Sampling
from lowbit_muon.step.rules.scaling import Scaling
from lowbit_muon.step.rules.stage import AGE, Stage, check_bits, expect
from lowbit_muon.step.rules.step_size import StepSize
from lowbit_muon.step.rules.weight_decay import OfGains, WeightDecay

# A group's options that a rule may bring values of its own for.
RULE_OPTIONS = (
    "momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn", "weight_decay",
)  # fmt: skip
_OPTIONAL = ("sampling", "gains", "gradient", "constraint")
# The stages of Muon itself.
_MOMENTUM, _POLAR, _STEP_SIZE, _WEIGHT_DECAY = Momentum(), Polar(), StepSize(), WeightDecay()


@dataclass(frozen=True)
class UpdateRule:
    """What a step does with a momentum: stages in a fixed order, each with a default.

    Frozen and hashable; `to_dict`/`from_dict` round-trip. `dataclasses.replace` makes another of
    one in `RULES`.

    Attributes:
        name: for tables and messages.
        gradient: what a gradient goes through first, or None.
        momentum: how the momentum takes a gradient.
        precondition: what the momentum goes through before it is made a direction, in turn.
        direction: the map from a momentum to a direction.
        scaling: what the direction is scaled by, in turn.
        step_size: how far weights move.
        weight_decay: what of the weights is taken off.
        constraint: where weights are brought back to, or None.
        options: ((name, value), ...) of `RULE_OPTIONS`: what a group's options are where nobody has
            set them.
        gains: what weights are the product of, beside directions, which are then the weights of all
            other stages; or None. It comes before `gradient`.
        sampling: which parameters a step takes, or None for all. It comes first.
    """

    name: str
    gradient: GradientTransform | None = None
    momentum: Momentum = _MOMENTUM
    precondition: tuple[Preconditioner, ...] = ()
    direction: Direction = _POLAR
    scaling: tuple[Scaling, ...] = ()
    step_size: StepSize = _STEP_SIZE
    weight_decay: WeightDecay = _WEIGHT_DECAY
    constraint: Constraint | None = None
    options: tuple[tuple[str, Any], ...] = ()
    gains: Gains | None = None
    sampling: Sampling | None = None

    def __post_init__(self) -> None:
        expect(isinstance(self.name, str) and bool(self.name), "name", "a string", self.name)
        for field, (kind, several) in _STAGES.items():
            value = getattr(self, field)
            if several:
                good = isinstance(value, tuple) and all(isinstance(each, kind) for each in value)
                expect(good, field, f"a tuple of {kind.__name__} stages", value)
            else:
                optional = field in _OPTIONAL and value is None
                expect(optional or isinstance(value, kind), field, f"a {kind.__name__}", value)
        names = [name for stage in self.stages() for name in stage.state((1, 1))]
        names += [AGE] if self.needs("age") else []
        expect(len(set(names)) == len(names), "stages", "states of different names", names)
        for stage in self.stages():
            missing = set(stage.reads_state) - set(names)
            expect(not missing, stage.kind, f"stages that keep {sorted(missing)}", names)
        of_gains = isinstance(self.weight_decay, OfGains)
        if self.gains is not None:
            expect(of_gains, "weight_decay", "OfGains() with gains", self.weight_decay)
            expect(self.gradient is None, "gradient", "None with gains", self.gradient)
        else:
            expect(not of_gains, "gains", "a Gains for its OfGains weight decay", None)
        good = all(name in RULE_OPTIONS for name, _ in self.options)
        expect(good, "options", f"values of {', '.join(RULE_OPTIONS)}", self.options)

    def stages(self) -> Iterator[Stage]:
        """All stages in their order."""
        for field in _STAGES:
            value = getattr(self, field)
            if isinstance(value, tuple):
                yield from value
            elif value is not None:
                yield value

    @functools.cached_property
    def is_fused(self) -> bool:
        """Whether a step is W <- decay * W - lr * scale * polar(u), without an update matrix."""
        return (
            self.gains is None
            and self.gradient is None
            and not self.precondition
            and not self.scaling
            and self.constraint is None
            and type(self.direction) is Polar
            and type(self.step_size) is StepSize
            and not self.weight_decay.reads_weights
        )

    @functools.cached_property
    def takes_stored(self) -> bool:
        """Whether a direction of what the codes hold serves (`ns_input="stored"`)."""
        return (
            type(self.direction) is Polar
            and not self.precondition
            and not (self.needs("momentum") or self.needs("size"))
        )

    @functools.cached_property
    def reads_weights(self) -> bool:
        """Whether a stage looks at the weights."""
        return self.weight_decay.reads_weights or bool(self.needs("weights"))

    @functools.cached_property
    def needs_weights(self) -> bool:
        """Whether a step takes the whole weights, or is not proportional to the learning rate."""
        return bool(self.needs("weights") or self.needs("rate"))

    def needs(self, what: str) -> str:
        """The kind of the first stage that needs something (`Stage`), or an empty string."""
        return next((s.kind for s in self.stages() if getattr(s, f"needs_{what}")), "")

    def state(self, shape: tuple[int, int]) -> RuleState:
        """What its stages keep of a matrix [rows, columns], by name."""
        kept = {n: kept for stage in self.stages() for n, kept in stage.state(shape).items()}
        return kept | ({AGE: Kept((1, 1))} if self.needs("age") else {})

    def with_state_bits(self, bits: int) -> UpdateRule:
        """The rule, keeping 8 or 32 bits per element of its state beside the momentum.

        Of stages that leave the choice, which have 8 by default; others stay. A checkpoint of other
        bits loads with that state starting anew. Raises ValueError for other numbers.
        """
        check_bits(f"{self.name}: bits", bits)
        changed: dict[str, Any] = {
            name: tuple(_in_bits(stage, bits) for stage in getattr(self, name))
            if several
            else _in_bits(getattr(self, name), bits)
            for name, (_, several) in _STAGES.items()
        }
        return dataclasses.replace(self, **changed)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: the name, and what differs from the defaults."""
        values: dict[str, Any] = {"name": self.name}
        for name in _STAGES:
            value = getattr(self, name)
            if value != getattr(UpdateRule, name):  # the field's default
                several = isinstance(value, tuple)
                values[name] = [each.to_dict() for each in value] if several else value.to_dict()
        if self.options:
            values["options"] = json.loads(json.dumps(dict(self.options)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> UpdateRule:
        """Inverse of `to_dict`. Raises ValueError naming an unknown, missing or bad field."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown or "name" not in values:
            raise ValueError(
                f"rule: expected a name and stages, unknown {sorted(map(str, unknown))}"
            )
        made = dict(values)
        for field in made.keys() & _STAGES.keys():
            kind, several = _STAGES[field]
            try:
                given = made[field]
                made[field] = (
                    tuple(map(kind.from_dict, given))
                    if several and isinstance(given, Sequence)
                    else kind.from_dict(given)
                )
            except (TypeError, ValueError) as error:
                raise ValueError(f"rule: {field}: {error}") from None
        options = made.get("options", {})
        expect(isinstance(options, Mapping), "rule: options", "a mapping", options)
        made["options"] = tuple((name, _hashable(value)) for name, value in options.items())
        return cls(**made)


def _in_bits(stage: Any, bits: int) -> Any:
    return dataclasses.replace(stage, bits=bits) if hasattr(stage, "bits") else stage


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


# Field -> (class of its stage, whether it holds several), in the order of a step.
_STAGES: dict[str, tuple[type[Stage], bool]] = {
    "sampling": (Sampling, False),
    "gains": (Gains, False),
    "gradient": (GradientTransform, False),
    "momentum": (Momentum, False),
    "precondition": (Preconditioner, True),
    "direction": (Direction, False),
    "scaling": (Scaling, True),
    "step_size": (StepSize, False),
    "weight_decay": (WeightDecay, False),
    "constraint": (Constraint, False),
}
