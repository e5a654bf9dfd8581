"""The parameters of an optimizer's group that several processes share, and one step of them."""

from __future__ import annotations

import abc
import dataclasses
from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowbit_muon.backends import get_backend
from lowbit_muon.distributed.agreement import (
    check_agreement,
    exchange_context,
    gather_objects,
    usable_gradients,
)
from lowbit_muon.distributed.exchange import Arrived, Exchange, Unit, step_in_rounds
from lowbit_muon.distributed.ownership import assign_owners, cost, rounds
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.state.gradients import NonFiniteGradientError, count_skipped
from lowbit_muon.state.parameter import (
    ParameterStep,
    check_parameter,
    flatten,
    matrix_views,
    momentum_format,
    parameter_names,
    resolve_group_format,
)
from lowbit_muon.state.placement import (
    is_dtensor,
    local_part,
    local_shard,
    shape_only,
    sharded_group,
)
from lowbit_muon.state.rounding import (
    Compensation,
    Rounding,
    exact_weight,
    rounding_seed,
    seed_of_step,
    update_weight,
)
from lowbit_muon.state.stored import orient
from lowbit_muon.step.batches import step_parameters
from lowbit_muon.step.options import OPTIONS, UpdateDtype
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.step.rules.weight_decay import Rates
from lowbit_muon.step.update import StepOptions, update_scale

Group = dict[str, Any]
State = dict[str, Any]
States = MutableMapping[Tensor, State]  # of parameters

# Elements that a process computes between two exchanges: 16 MiB of float32, so that what is on its
# way is small beside a model, and an exchange large beside its latency.
ROUND_ELEMENTS = 2**22


class SharedParameters(abc.ABC):
    """Parameters of one group over the processes of one process group.

    Each matrix has an owner, which keeps its momentum. Counters are kept everywhere. Making one is
    a collective operation, and raises ValueError on all processes if they disagree.
    """

    def __init__(
        self,
        group: Group,
        indices: Sequence[int],  # of the parameters in the group
        process_group: dist.ProcessGroup,
        update_dtype: UpdateDtype,
        load: list[int],  # what each process owns already; what it gets here is added
    ) -> None:
        self.indices = list(indices)
        self.names = [parameter_names(group)[index] for index in indices]
        self.process_group = process_group
        self.params: list[Tensor] = [group["params"][index] for index in indices]
        device = local_part(self.params[0]).device
        self.exchange = Exchange(process_group, device, update_dtype)
        self._usable: list[bool | None] | None = None
        self._owners: dict[tuple[int, int], int] = {}  # ranks, by index in the group and matrix
        self._check(group)
        self._assign(group, load)

    @abc.abstractmethod
    def _assign(self, group: Group, load: list[int]) -> None:
        """Choose owners and rounds; a collective operation."""

    def _check(self, group: Group) -> None:
        """Raise ValueError on all processes for what any of them cannot do."""
        values = {**group, "update_dtype": self.exchange.update_dtype}
        options = {option.name: values[option.name] for option in OPTIONS if option.agreed}
        descriptions = [
            {"name": name, "size": tuple(param.shape), "dtype": param.dtype, **options}
            for name, param in zip(self.names, self.params, strict=True)
        ]
        problems = [_problem(param, group) for param in self.params]
        gathered = gather_objects((descriptions, problems), self.process_group, self.names)
        check_agreement([theirs for theirs, _ in gathered])
        for _, theirs in gathered:
            for name, problem in zip(self.names, theirs, strict=True):
                if problem:
                    raise ValueError(f"{name}: {problem}")

    def owner(self, index: int, matrix: int) -> int:
        """The rank that keeps the momentum of a matrix of the group's parameter `index`."""
        return self._owners[index, matrix]

    def check_gradients_finite(self, group: Group) -> None:
        """Find which gradients the next step takes (`usable_gradients`), before anything changes.

        Raises NonFiniteGradientError where the group asks for it.
        """
        grads = [None if p.grad is None else local_part(p.grad) for p in self.params]
        usable = usable_gradients(grads, self.names, self.exchange.device, self.process_group)
        bad = [name for name, finite in zip(self.names, usable, strict=True) if finite is False]
        if bad and group["nonfinite"] == "raise":
            raise NonFiniteGradientError(
                f"gradient of parameter {bad[0]!r}: expected finite values on all processes, got "
                "inf or nan"
            )
        self._usable = usable

    def _start(self, group: Group, states: States) -> list[int]:
        """Places in `indices` of what is stepped; what is not finite is counted as skipped."""
        usable, self._usable = self._usable, None
        assert usable is not None  # `check_gradients_finite` comes first
        for param, finite in zip(self.params, usable, strict=True):
            if finite is False:
                count_skipped(states[param], param)
        return [position for position, finite in enumerate(usable) if finite]


class ReplicatedParameters(SharedParameters):
    """Parameters that every process has as a whole, with gradients that were averaged already.

    As in ZeRO stage 1 (arXiv 1910.02054) a parameter's owner updates it, and sends its weights.
    """

    def _assign(self, group: Group, load: list[int]) -> None:
        views = [matrix_views(shape_only(param), group) for param in self.params]
        costs = [sum(cost(view.shape) for view in each) for each in views]
        sizes = [param.numel() for param in self.params]
        self.owners = assign_owners(costs, self.exchange.world_size, load=load)
        self._owners = {
            (index, matrix): owner
            for index, owner, each in zip(self.indices, self.owners, views, strict=True)
            for matrix in range(len(each))
        }
        self.rounds = rounds(costs, sizes, self.owners, ROUND_ELEMENTS)

    def step(self, group: Group, states: States, update: Callable[[list[int]], None]) -> None:
        """One step; `update` steps owned parameters by their indices in the group."""
        active = set(self._start(group, states))
        sending: list[Callable[[], None]] = []
        for members in self.rounds:
            positions = [position for position in members if position in active]
            owned = [p for p in positions if self.owners[p] == self.exchange.rank]
            update([self.indices[position] for position in owned])
            for position in positions:
                if position not in owned:
                    states[self.params[position]]["step"] += 1
            for wait in sending:
                wait()
            sending = [self._broadcast(position) for position in positions]
        for wait in sending:
            wait()

    def _broadcast(self, position: int) -> Callable[[], None]:
        """Start to send weights from their owner; the result waits for them."""
        weight, owner = local_part(self.params[position].detach()), self.owners[position]
        is_owner = owner == self.exchange.rank
        if is_owner:
            others = self.exchange.world_size - 1
            self.exchange.bytes_sent += weight.numel() * weight.dtype.itemsize * others
        names, sent = [self.names[position]], weight.contiguous()  # gloo takes no notice of strides
        with exchange_context(names):
            work = dist.broadcast(sent, group=self.process_group, group_src=owner, async_op=True)

        def wait() -> None:
            with exchange_context(names):
                work.wait()
            if not is_owner and sent is not weight:
                weight.copy_(sent)

        return wait


class ShardedParameters(SharedParameters):
    """Parameters of which every process has a part, as FSDP2 and tensor parallelism leave them."""

    def _assign(self, group: Group, load: list[int]) -> None:
        shards = gather_objects(
            [local_shard(param, _row_dims(param, group)) for param in self.params],
            self.process_group,
            self.names,
        )
        self._views = [matrix_views(shape_only(param), group) for param in self.params]
        # The first row, in this process's part of the parameter, of what it has of each matrix.
        self._local_starts: list[list[int]] = []
        units: list[Unit] = []
        for position, (param, views) in enumerate(zip(self.params, self._views, strict=True)):
            dtype = torch.float32 if param.dtype == torch.float64 else param.dtype
            held = [0]
            for matrix, view in enumerate(views):
                parts = tuple(
                    of_rank[position].rows_within(view.rows.start, view.rows.stop)
                    for of_rank in shards
                )
                units.append(
                    Unit(self.names[position], position, matrix, view.shape, -1, parts, dtype)
                )
                held.append(held[-1] + parts[self.exchange.rank].shape[0])
            self._local_starts.append(held)
        costs = [cost(unit.shape) for unit in units]
        sizes = [unit.shape[0] * unit.shape[1] for unit in units]
        fixed = [_only_holder(unit) for unit in units]
        owners = assign_owners(costs, self.exchange.world_size, fixed, load)
        self.units = [
            dataclasses.replace(unit, owner=owner)
            for unit, owner in zip(units, owners, strict=True)
        ]
        self.rounds = rounds(costs, sizes, owners, ROUND_ELEMENTS)
        self._owners = {
            (self.indices[unit.parameter], unit.matrix): unit.owner for unit in self.units
        }

    def step(self, group: Group, states: States, first: int) -> None:
        """One step; first: number of the group's first parameter.

        An owner has no weights: it steps zeros by -1, which leaves the update. A rule that looks at
        them as a whole, or whose step is not proportional to the learning rate, has them sent to
        the owner; what comes back is what they moved by.
        """
        active = set(self._start(group, states))
        options = StepOptions.from_group(group)
        needs_weights = options.rule.needs_weights
        if not needs_weights:
            options = dataclasses.replace(options, lr=-1.0, weight_decay=0.0)
        backend = get_backend(group["backend"], self.exchange.device)
        f = momentum_format(group, {})

        def part(unit: Unit) -> Tensor:
            grad = self.params[unit.parameter].grad
            assert grad is not None
            return self._rows(flatten(local_part(grad).resolve_neg(), group), unit)

        def weight(unit: Unit) -> Tensor:
            return self._exact_part(unit, group, states)

        def compute(owned: list[Arrived]) -> list[tuple[Unit, Tensor]]:
            weights = [
                torch.zeros(unit.shape, dtype=torch.float32, device=grad.device)
                if whole is None
                else whole.clone()
                for unit, grad, whole in owned
            ]
            steps = []
            for (unit, grad, _), weight in zip(owned, weights, strict=True):
                param = self.params[unit.parameter]
                view = self._views[unit.parameter][unit.matrix]
                view = dataclasses.replace(view, rows=slice(0, unit.shape[0]))
                number = first + self.indices[unit.parameter]
                # The counters of a copy: a parameter's own count its matrices together. Weights are
                # rounded where they lie.
                copy = {key: v for key, v in states[param].items() if key != "remainder"}
                steps.append(ParameterStep(weight, grad, copy, [view], number, f, backend))
            step_parameters(steps, options, group)
            return [
                (unit, weight if whole is None else whole - weight)
                for (unit, _, whole), weight in zip(owned, weights, strict=True)
            ]

        def apply(unit: Unit, change: Tensor) -> None:
            self._apply(unit, change, group, states, first)

        taken = active
        if options.rule.sampling is not None:
            sampling, seed = options.rule.sampling, group["seed"]
            counted = {p: states[self.params[p]] for p in active}
            taken = {
                p for p, c in counted.items() if sampling.takes(seed, int(c["step"] + c["skipped"]))
            }
        chosen = [[self.units[i] for i in members] for members in self.rounds]
        chosen = [[unit for unit in units if unit.parameter in taken] for units in chosen]
        step_in_rounds(
            self.exchange,
            [units for units in chosen if units],
            part=part,
            weight=weight if needs_weights else None,
            compute=compute,
            apply=apply,
        )
        for position in active:
            states[self.params[position]]["step"] += 1

    def _rows(self, local: Tensor, unit: Unit) -> Tensor:
        """The rows of this process's part of a parameter, 2-D, that belong to a unit."""
        start, stop = self._local_starts[unit.parameter][unit.matrix :][:2]
        return local[start:stop]

    def _compensation(self, unit: Unit, group: Group, states: States) -> Compensation | None:
        """What rounding left over of this process's part of a unit, if that is kept."""
        state = states[self.params[unit.parameter]]
        if "remainder" not in state:
            return None
        rest = flatten(local_part(state["remainder"]), group)
        return Compensation(orient(self._rows(rest, unit)))

    def _rounding(self, unit: Unit, group: Group, states: States, first: int) -> Rounding | None:
        """How this process's part of a unit is rounded, if not to the nearest."""
        param = self.params[unit.parameter]
        if not (group["stochastic_rounding"] and param.dtype == torch.bfloat16):
            return self._compensation(unit, group, states)
        start = rounding_seed(group["seed"], first + self.indices[unit.parameter], unit.matrix)
        # Parts of a matrix lie at the same positions in their processes' memory.
        start += 0x165667B1 * self.exchange.rank
        seed = seed_of_step(start, int(states[param]["step"]))
        return torch.tensor(seed, dtype=torch.int32, device=local_part(param).device)

    def _exact_part(self, unit: Unit, group: Group, states: States) -> Tensor:
        """This process's part of a unit's weights, float32 [rows, columns]."""
        local = local_part(self.params[unit.parameter].detach())
        weight = self._rows(flatten(local, group), unit)
        exact = exact_weight(orient(weight), self._compensation(unit, group, states))
        return exact if exact.shape == weight.shape else exact.mT

    def _apply(self, unit: Unit, change: Tensor, group: Group, states: States, first: int) -> None:
        """W <- (1 - lr*wd) W - lr*change, or as the rule decays, for this process's part."""
        if not change.numel():
            return
        param, rule = self.params[unit.parameter], resolve_rule(group["rule"])
        local = local_part(param.detach())
        matrix = flatten(local, group)
        weight = orient(self._rows(matrix, unit))
        rounding = self._rounding(unit, group, states, first)
        lr, decays = float(group["lr"]), rule.weight_decay
        scale = rule.step_size.factor * update_scale(group["adjust_lr_fn"], unit.shape)
        rates = Rates(lr, group["weight_decay"], scale)
        decay, step_size = decays.factor(rates), lr
        if rule.needs_weights:  # what the weights move by, all in all
            decay, step_size = 1.0, 1.0
        elif decays.reads_weights:
            change, step_size = change * lr, 1.0
            decays.add(orient(change), exact_weight(weight, rounding), rates)
        backend = get_backend(group["backend"], weight.device)
        update_weight(weight, orient(change), decay, step_size, rounding, backend)
        if matrix.data_ptr() != local.data_ptr():
            local.copy_(matrix.view(local.shape))


def _row_dims(param: Tensor, group: Group) -> int:
    """How many of a parameter's dimensions are rows of its matrix (`flatten`)."""
    return param.ndim - 1 if group["batch_experts"] else 1


def _only_holder(unit: Unit) -> int | None:
    """The rank that has all of a matrix, as with experts in parallel; None without one."""
    size = unit.shape[0] * unit.shape[1]
    holders = [rank for rank, shard in enumerate(unit.shards) if shard.numel == size]
    return holders[0] if len(holders) == 1 and size else None


def _problem(param: Tensor, group: Group) -> str:
    """Why a parameter cannot be shared, or nothing."""
    if not isinstance(resolve_group_format(group), StateFormat):
        # A checkpoint is loaded into a state that is there, and this one's sizes may change.
        return "expected a fixed state_format where several processes share, got 'auto'"
    try:
        local_shard(param, _row_dims(param, group))
        check_parameter(param, group)
    except (TypeError, ValueError) as error:
        return str(error)
    return ""


Shared = ReplicatedParameters | ShardedParameters


class Sharing:
    """What of an optimizer's groups is shared with other processes, found once for each group."""

    def __init__(self, process_group: dist.ProcessGroup | None, update_dtype: UpdateDtype) -> None:
        self.process_group = process_group
        self._update_dtype = update_dtype
        self._by_group: dict[
            int, tuple[list[Tensor], list[Shared]]
        ] = {}  # by the number of the group
        self._loads: dict[dist.ProcessGroup, list[int]] = {}  # what its processes own, in cost

    def of(self, number: int, group: Group) -> list[Shared]:
        """The shared parameters of a Muon group, by process group.

        Parameters in parts are shared by the processes that hold the parts, others by the process
        group of the optimizer, if it has one. Collective where a group's parameters are new, since
        frameworks put others in the place of those that an optimizer was made with.

        Raises ValueError where only some of them are others: owners, and with them momentum, would
        change.
        """
        params, shared = self._by_group.get(number, ([], []))
        if _same(params, group["params"]):
            return shared
        if {id(param) for param in params} & {id(param) for param in group["params"]}:
            raise ValueError(
                f"params: expected group {number}, which processes share, to keep its parameters; "
                "add others with add_param_group"
            )
        shared = self._share(group)
        self._by_group[number] = (list(group["params"]), shared)
        return shared

    def find(self, param: Tensor) -> tuple[Shared, int] | None:
        """The shared parameters that a parameter belongs to, and its index in its group."""
        for params, shared in self._by_group.values():
            for part in shared:
                for index in part.indices:
                    if params[index] is param:
                        return part, index
        return None

    def _share(self, group: Group) -> list[Shared]:
        sharded: dict[dist.ProcessGroup, list[int]] = defaultdict(list)
        replicated: list[int] = []
        for index, param in enumerate(group["params"]):
            holders = sharded_group(param) if is_dtensor(param) else None
            if holders is not None:
                sharded[holders].append(index)
            elif self.process_group is not None:
                replicated.append(index)
        shared: list[Shared] = [
            ShardedParameters(
                group, indices, process_group, self._update_dtype, self._load(process_group)
            )
            for process_group, indices in sharded.items()
        ]
        if replicated and self.process_group is not None:
            load = self._load(self.process_group)
            shared.append(
                ReplicatedParameters(
                    group, replicated, self.process_group, self._update_dtype, load
                )
            )
        return shared

    def _load(self, process_group: dist.ProcessGroup) -> list[int]:
        return self._loads.setdefault(process_group, [0] * process_group.size())


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))
