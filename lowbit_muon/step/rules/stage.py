"""What all stages of an update rule have in common, and what they see of a step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.state.stored import RuleState

StageT = TypeVar("StageT", bound="Stage")

# Below the square of anything that a matrix of norm one has, and a float32.
TINY = 1e-30
# Name of the count that is kept for stages which ask for it (`Stage.needs_age`).
AGE = "age"
AXES = ("row", "column", "long", "short")
BITS = (8, 32)


@dataclass(frozen=True)
class Stage:
    """One stage of an `UpdateRule`: a frozen dataclass whose fields are numbers, strings and bools.

    A subclass with a `kind` of its own is known to `from_dict` from its definition on. Numbers are
    not negative; whole ones are at least one, unless zero is the default, "bits" 8 or 32, and what
    has "beta" in its name, of an average, is below one. `check` is for what else has to hold.

    Attributes:
        kind: its name among the choices of its stage.
        needs_size: it looks at the size of the momentum, which some formats do not keep.
        needs_momentum: it looks at what the direction map is given (`Matrices.momentum`).
        needs_weights: it looks at the weights as a whole, not element by element.
        needs_rate: the step it leads to is not proportional to the learning rate.
        needs_inputs: it looks at what layers read (`optimizers.layer_inputs`).
        needs_age: it looks at how many steps the rule's state has taken (`Matrices.age`).
        reads_state: names of what another stage of the rule has to keep for it.
    """

    kind: ClassVar[str] = ""
    needs_size: ClassVar[bool] = False
    needs_momentum: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    needs_rate: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    needs_age: ClassVar[bool] = False
    reads_state: ClassVar[tuple[str, ...]] = ()
    _kinds: ClassVar[dict[tuple[type, str], type[Stage]]] = {}

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            place = next(base for base in cls.__mro__ if Stage in base.__bases__)
            Stage._kinds[place, cls.kind] = cls

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            _check_field(self.kind, each, getattr(self, each.name))
        self.check()

    def check(self) -> None:
        """Raise ValueError for a field that makes no sense (its type is checked already)."""

    def state(self, shape: tuple[int, int]) -> RuleState:
        """What it keeps of a matrix [rows, columns], by name.

        No two stages of a rule may have the same names.
        """
        return {}

    def to_dict(self) -> dict[str, Any]:
        """Plain values only."""
        return {"kind": self.kind, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls: type[StageT], values: object) -> StageT:
        """Inverse of `to_dict`. Raises ValueError naming an unknown kind, or a bad field."""
        if not isinstance(values, Mapping):
            raise ValueError(f"expected a mapping of fields, got {values!r}")
        kinds = {kind: found for (stage, kind), found in Stage._kinds.items() if stage is cls}
        fields = dict(values)
        found = kinds.get(fields.pop("kind", None))
        if found is None:
            raise ValueError(f"kind: expected one of {sorted(kinds)}, got {values.get('kind')!r}")
        unknown = set(fields) - {each.name for each in dataclasses.fields(found)}
        if unknown:
            raise ValueError(f"{found.kind}: unknown fields {sorted(map(str, unknown))}")
        made = found(**fields)
        assert isinstance(made, cls)
        return made


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """Raise ValueError unless a condition holds."""
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _check_field(kind: str, field: dataclasses.Field[Any], value: Any) -> None:
    """Raise ValueError unless a value can be that of a stage's field (`Stage`)."""
    name, default = f"{kind}: {field.name}", field.default
    if isinstance(default, bool):
        expect(isinstance(value, bool), name, "a bool", value)
    elif field.name == "bits":
        check_bits(name, value)
    elif field.type in ("int", int):
        least = 0 if default == 0 else 1
        expect(type(value) is int and value >= least, name, f"a whole number >= {least}", value)
    elif is_real_number(default):
        below, numbers = (1, "in [0, 1)") if "beta" in field.name else (math.inf, ">= 0")
        good = is_real_number(value) and 0 <= value < below
        expect(good, name, f"a number {numbers}", value)


def check_bits(name: str, bits: object) -> None:
    """Raise ValueError unless a stage can keep a number for each element in so many bits."""
    expect(type(bits) is int and bits in BITS, name, f"one of {BITS}", bits)


@dataclass
class Matrices:
    """A batch of b matrices of one shape in the middle of a step, as stages see them.

    All have the parameter's orientation, and all numbers of a matrix are float32 [b, 1, 1].

    Attributes:
        shape: (rows, columns).
        read_grads: makes `grads` for the stages that look at them; most rules have none.
        size: Frobenius norms of what the direction map is given.
        steps: how many steps each parameter has taken, with this one.
        lr, weight_decay, beta: options of the group; beta is its `momentum`.
        state: what stages keep, [b, ..] by name (`Stage.state`); to be replaced, not changed.
        momentum: what the direction map was given, float32 [b, rows, columns], scaled to norm one;
            only where a stage asks for it (`Stage.needs_momentum`).
        weights: before the step, float32 [rows, columns] each, with what rounding left over of
            them; only where a stage asks for them (`Stage.needs_weights`).
        beside: what a stage took out of the momentum, for another to add to the direction.
        numbers: places of the parameters in the optimizer.
        rate: what stages multiply the learning rate by, [b, 1, 1], or [b, 1, columns].
    """

    shape: tuple[int, int]
    read_grads: Callable[[], Tensor]
    size: Tensor
    steps: Tensor
    lr: float | Tensor
    weight_decay: float
    beta: float
    state: dict[str, Tensor] = field(default_factory=dict)
    momentum: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)
    beside: Tensor | None = None
    numbers: Sequence[int] = ()
    rate: Tensor | None = None

    @functools.cached_property
    def grads(self) -> Tensor:
        """Gradients [b, rows, columns], any float dtype, zeros where they are refused."""
        return self.read_grads()

    @property
    def age(self) -> Tensor:
        """How many steps the rule's state has taken, with this one, float32 [b, 1, 1].

        Less than `steps` where an optimizer with another rule took the first of them.
        """
        return self.state[AGE]

    def due(self, every: int, since: int = 0) -> tuple[list[int], list[int]]:
        """Of the matrices: whose first step it is, and whose turn, every `every` steps behind
        `since`. A GPU's host waits for it.

        Parameters take turns in different steps: their age and number add up to a multiple, so that
        no step has all decompositions.
        """
        if self.age.is_meta:
            return [], []
        ages = [int(age) for age in self.age.view(-1).tolist()]
        first = [index for index, age in enumerate(ages) if age == 1]
        again = [
            index
            for index, (age, number) in enumerate(zip(ages, self.numbers, strict=True))
            if age > 1 and (age - since + number) % every == 0
        ]
        return first, again

    def multiply_rate(self, factor: Tensor) -> None:
        """Multiply the learning rate, for this step alone."""
        self.rate = factor if self.rate is None else self.rate * factor

    def averaged(self, name: str, value: Tensor, beta: float) -> Tensor:
        """state[name] <- beta * state[name] + (1 - beta) * value, which is returned."""
        self.state[name] = torch.lerp(value, self.state[name], beta)
        return self.state[name]


def norm(x: Tensor) -> Tensor:
    """Frobenius norms of [b, rows, columns], float32 [b, 1, 1]."""
    return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float32)


def times(x: Tensor, factors: Tensor) -> Tensor:
    """x * factors, float32: in the place of a float32 x, in one pass over one in half precision.

    factors: float32 [b, 1, 1], [b, rows, 1] or [b, 1, columns].
    """
    return x.mul_(factors) if x.dtype == torch.float32 else x * factors


def mixed(bits: Any) -> Any:
    """The finaliser of MurmurHash3, but for its last shift; of an int below 2^32, or int64 tensors.

    The higher of its 32 bits look random.
    """
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits


def uniform(steps: Tensor, rows: int, columns: int) -> Tensor:
    """Numbers in [-1, 1) that look random, float32 [b, rows, columns]; steps: [b, 1, 1].

    Signs alone would do for large matrices; of those of 12 x 12 one in four is singular.
    """
    place = torch.arange(rows * columns, dtype=torch.int64, device=steps.device)
    bits = mixed((place.view(1, rows, columns) + steps.long() * 0x9E3779B1) & 0xFFFFFFFF)
    return (bits >> 8).float() * 2.0**-23 - 1


def dimension(axis: str, shape: tuple[int, int]) -> int:
    """Of [b, rows, columns], the dimension that runs along an axis: whose index tells its members.

    axis: "row" for one value a row, "column" for one a column, "long" for whichever there are more
    of (rows of a square matrix), "short" for the other.
    """
    rows, columns = shape
    if axis == "long":
        axis = "row" if rows >= columns else "column"
    elif axis == "short":
        axis = "column" if rows >= columns else "row"
    return 1 if axis == "row" else 2
