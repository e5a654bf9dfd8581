"""Muon with low-bit momentum: a drop-in for `torch.optim.Muon`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.modes import outside_compiled_regions, plain_modes
from lowbit_muon.backends.tensors import error_context
from lowbit_muon.checkpoint import dicts as checkpoint
from lowbit_muon.checkpoint.momentum import (
    convert_momentum,
    export_momentum,
    has_momentum,
    pack_auto_state,
    torch_muon_group,
)
from lowbit_muon.distributed.agreement import (
    is_usable_everywhere,
    on_every_part,
    redistribute_gradients,
)
from lowbit_muon.distributed.sharing import ReplicatedParameters, Shared, Sharing
from lowbit_muon.distributed.state_dicts import (
    owned_state,
    prepare_shared_state,
    sharded_states,
    whole_state,
)
from lowbit_muon.formats.auto import AutoFormat
from lowbit_muon.formats.state_format import FORMAT_VERSION, StateFormat
from lowbit_muon.linalg.coefficients import Coefficients
from lowbit_muon.optimizers.lost_updates import watch_lost_updates
from lowbit_muon.state.diagnosis import Diagnosis, diagnose_parameter
from lowbit_muon.state.format_choice import revise_format
from lowbit_muon.state.gradients import NonFiniteGradientError, describe
from lowbit_muon.state.offload import finish_copies
from lowbit_muon.state.parameter import (
    ParameterStep,
    check_parameter,
    check_parameter_step,
    keep_on_host,
    matrix_views,
    momentum_format,
    parameter_names,
    prepare_state,
    resolve_group_format,
    stored_keys,
)
from lowbit_muon.state.placement import is_dtensor, local_part, shape_only
from lowbit_muon.step.batches import host_counters, step_parameters
from lowbit_muon.step.options import (
    AUX_DEFAULTS,
    DEFAULT_EPS,
    GROUP_DEFAULTS,
    OPTIONS,
    AdjustLr,
    NonFinite,
    NsDtype,
    NsInput,
    UpdateDtype,
    apply_rule,
    check_keys,
    check_loaded,
    check_rule,
    check_values,
    plain_options,
)
from lowbit_muon.step.rules.recipes import resolve_rule
from lowbit_muon.step.rules.rule import RULE_OPTIONS, UpdateRule
from lowbit_muon.step.update import StepOptions, check_ns_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from lowbit_muon.optimizers.layer_inputs import LayerInputs


def _any_dtensor(params: Sequence[Tensor]) -> bool:
    return any(type(param) is not nn.Parameter and is_dtensor(param) for param in params)


class Muon(Optimizer):
    """Muon (MomentUm Orthogonalized by Newton-Schulz) with its momentum in 4 bits or fewer.

    All positional arguments, their defaults and the update rule are those of `torch.optim.Muon`
    (M <- momentum*M + (1 - momentum)*G; Nesterov; decoupled weight decay); the arithmetic is
    float32 where torch uses bfloat16.

    Args:
        params: parameters, named parameters or groups. Two or more dimensions each: a convolution
            kernel [out, in, ...] is taken as the matrix [out, in*...].
        lr: learning rate; may be a one-element tensor.
        weight_decay: decoupled weight decay. None: 0.1.
        momentum: decay of the momentum, in [0, 1). None: 0.95.
        nesterov: orthogonalise momentum*M + (1 - momentum)*G instead of M. None: True.
        ns_coefficients: (a, b, c) of the Newton-Schulz polynomial, a sequence of such triples, one
            for each step, or a name known to `lowbit_muon.linalg.newton_schulz`. None: "muon".
        eps: smallest norm that the matrix is divided by before Newton-Schulz.
        ns_steps: Newton-Schulz steps. None: 5.
        adjust_lr_fn: "original" (or None): lr * sqrt(max(1, rows/columns)), KellerJordan's;
            "match_rms_adamw": lr * 0.2 * sqrt(max(rows, columns)), Moonlight's and MuonQ's;
            "spectral_unclamped": lr * sqrt(rows/columns), Bernstein's (torch 2.14 and newer);
            "megatron": lr * sqrt(max(rows, columns)); "none": lr.
        rule: what is done with the momentum: a name (of `lowbit_muon.RULES`, or "pion(2)" and the
            like, `step.rules.recipes.resolve_rule`) or an `UpdateRule`. What a rule says of
            momentum, nesterov, ns_coefficients, ns_steps, adjust_lr_fn and weight_decay
            (`UpdateRule.options`) goes where they are None and the group does not set them; it
            shows what came of it.
        state_format: how the momentum is stored: a preset name (`lowbit_muon.PRESETS`), a
            `StateFormat`, or "auto" or an `AutoFormat`, which choose for each parameter the fewest
            bits that keep the error of its update below a target, and look again every so often.
        ns_input: "exact" orthogonalises the fresh momentum, before it was quantised; "stored" what
            the codes hold, without Nesterov's look-ahead: less work, and quantisation noise in the
            update. Of spectral formats it takes the codes' own matrix, whose polar factor is the
            momentum's, in integer products (on GPUs in half precision). Its small singular values
            are larger, which saves first Newton-Schulz steps: with the presets two of five up to 22
            rows on the short side, one up to 906. Formats with levels that are not whole numbers
            or with block scales are decoded instead.
        ns_dtype: dtype of the Newton-Schulz products: "auto" is bfloat16 on CPUs that multiply it
            (AVX512_BF16), float16 on GPUs, and float32 elsewhere, all closer to float32 than
            torch's bfloat16 (`linalg.newton_schulz`). It goes for a spectral format's encoder, too.
            CPUs take "bfloat16" only where that is so: with 256 rows or more on the short side,
            and for some products in float32; "float32" is the same bits on every such processor.
        stochastic_rounding: round bfloat16 weights stochastically, with bits that depend on `seed`,
            the parameter's number and its step alone. Makes no difference to float32 weights.
        backend: "auto", or a backend by name, which then must be there.
        compensation: keep what rounding leaves over of bfloat16 and float16 weights in 8 bits, one
            more byte of state an element, and add it before the next update: as if the weights had
            8 more bits. Not together with `stochastic_rounding`, which takes no memory. Makes no
            difference to float32 weights.
        nonfinite: what to do with a gradient that holds inf or nan, or is so large (a norm above
            1e15) that squares of it might leave float32: "skip" leaves the parameter and its state
            as they are (counted in its state as "skipped", with one warning; on a GPU,
            where the host does not look, without), "raise" raises NonFiniteGradientError before any
            parameter changes.
        batch_experts: take a parameter [experts, rows, columns] as that many matrices.
        row_splits: row counts of the matrices that are fused in one parameter (query, key and
            value, or heads), each orthogonalised for itself.
        seed: of stochastic rounding, of the layers that Drop-Muon draws, and of the start of the
            power iteration of formats with low-rank factors.
        offload: on a GPU, keep the stored momentum in pinned host memory. A step brings it to the
            GPU and back in batches, each while the one before is being computed: two batches are on
            the GPU at a time. Its updates are the same. On CPUs it makes no difference.
        process_group: processes of torch.distributed that have the same parameters and gradients,
            as under DistributedDataParallel: each parameter is stepped by one of them, which keeps
            its momentum and sends its weights to the others. Parameters that are DTensors (FSDP2,
            tensor parallelism) are shared by the processes that hold their parts, with or without
            it. `step`, `state_dict` and `load_state_dict` are to be called on all of them.
        update_dtype: of updates on their way to the parts of DTensors: "float32", "bfloat16" or
            "int8", with a scale for each row.

    A group may set any of these but `process_group` and `update_dtype`. Its other keys stay where
    they are, with one warning for each; a key that is close to an option's name, or is an option of
    another library that would change the update, is refused. `state_bytes()` counts what the state
    really takes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    # A group's options where neither it, nor the constructor, nor its rule has values for them.
    _usual: ClassVar[dict[str, Any]] = GROUP_DEFAULTS
    # What `attach_layer_inputs` has attached; copies of the optimizer have none.
    layer_inputs: LayerInputs | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | None = None,
        momentum: float | None = None,
        nesterov: bool | None = None,
        ns_coefficients: Coefficients | None = None,
        eps: float = DEFAULT_EPS,
        ns_steps: int | None = None,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        rule: str | UpdateRule = "muon",
        state_format: str | StateFormat | AutoFormat = "spectral4",
        ns_input: NsInput = "exact",
        ns_dtype: NsDtype = "auto",
        stochastic_rounding: bool = False,
        compensation: bool = False,
        backend: str = "auto",
        nonfinite: NonFinite = "skip",
        batch_experts: bool = False,
        row_splits: Sequence[int] | None = None,
        seed: int = 0,
        offload: bool = False,
        process_group: ProcessGroup | None = None,
        update_dtype: UpdateDtype = "float32",
    ) -> None:
        given = plain_options(locals())  # the arguments: one for each row of the table
        self._given = frozenset(name for name in RULE_OPTIONS if given[name] is not None)
        given |= {name: self._usual[name] for name in RULE_OPTIONS if name not in self._given}
        check_values(OPTIONS, given)
        self._sharing = Sharing(process_group, update_dtype)
        defaults = {option.name: given[option.name] for option in OPTIONS if option.in_group}
        defaults["state_format"] = resolve_group_format(defaults).to_dict()
        defaults["rule"] = resolve_rule(rule).to_dict()
        super().__init__(params, defaults)
        watch_lost_updates(self)

    @plain_modes()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        The dict is copied. Raises ValueError or TypeError, with nothing added, for a bad option, a
        key that is taken for one, or a parameter with fewer than two dimensions.
        """
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict, got {type(param_group).__name__}")
        check_keys(OPTIONS, param_group)
        group = plain_options({**self.defaults, **param_group})
        group[checkpoint.VERSION_KEY] = FORMAT_VERSION
        check_values(OPTIONS, group)
        # Plain values only, so that a state_dict loads under weights_only=True.
        group["state_format"] = resolve_group_format(group).to_dict()
        group = apply_rule(group, self._given | param_group.keys())
        super().add_param_group(group)
        try:
            for name, param in zip(parameter_names(group), group["params"], strict=True):
                matrix_views(shape_only(param), group)
                with error_context(f"parameter {name!r}"):
                    check_parameter(param, group)
                if group["stochastic_rounding"] and param.dtype == torch.float16:
                    raise ValueError(
                        "stochastic_rounding: expected bfloat16 (or float32) parameters, got "
                        f"float16 of size {tuple(param.shape)}"
                    )
        except Exception:
            del self.param_groups[-1]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @outside_compiled_regions
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One optimisation step. `closure` reevaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with plain_modes():
            if closure is None and not any(self.state.values()) and self._only_makes_states():
                self.prepare_states()
                return None
            for group in self.param_groups:
                self._check_parameters(group, range(len(group["params"])))
            for group in self.param_groups:
                if _any_dtensor(group["params"]):
                    redistribute_gradients(group["params"])
                shared = self._shared(group)
                if group["nonfinite"] == "raise":
                    self._check_finite(group, self._unshared(group, shared))
                for part in shared:
                    part.check_gradients_finite(group)
            if self.layer_inputs is not None:
                self._finish_copies()
                self.layer_inputs.take()
            first = 0
            for group in self.param_groups:
                shared = self._shared(group)
                count = len(group["params"])
                own = self._unshared(group, shared) if shared else range(count)
                self._step_parameters(group, own, first)
                for part in shared:
                    self._step_shared(group, part, first)
                first += count
        return loss

    def __repr__(self) -> str:
        """A line a group: its kind and size, its rate, and what is not at its default."""
        lines = [f"  {self._describe_group(group)}," for group in self.param_groups]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def _describe_group(self, group: dict[str, Any]) -> str:
        usual = AUX_DEFAULTS if group.get("use_muon") is False else self._usual
        values = {name: group[name] for name in usual if name in group}
        plain = {"state_format", "rule"} & values.keys()
        values |= {name: values[name].get("name", "auto") for name in plain}
        always = ("lr", "weight_decay", "state_format")
        shown = [
            f"{name}={value!r}"
            for name, value in values.items()
            if name in always or value != usual[name]
        ]
        kind = "AdamW" if group.get("use_muon") is False else "Muon"
        size = sum(param.numel() for param in group["params"])
        return f"{kind}: {len(group['params'])} parameters, {size:,} elements, {', '.join(shown)}"

    def state_bytes(self) -> int:
        """Bytes that the optimizer's state really takes here (storage, not elements times bits)."""
        tensors = (
            local_part(value)
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )
        storages = (tensor.untyped_storage() for tensor in tensors)
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def state_formats(self) -> dict[str, StateFormat]:
        """The format of each momentum by its parameter's name, or number in its group, so far."""
        return {
            name: momentum_format(group, self.state[param])
            for group in self.param_groups
            if group.get("use_muon", True)
            for name, param in zip(parameter_names(group), group["params"], strict=True)
            if stored_keys(self.state.get(param, {}), matrix_views(shape_only(param), group))
        }

    @torch.no_grad()
    @plain_modes()
    def diagnose(self) -> list[Diagnosis]:
        """What storing the momentum does to each matrix's update (`lowbit_muon.Diagnosis`).

        After the backward pass, while gradients are there, it is exact for the next step; at other
        times it is an estimate from the stored spectrum. Takes a singular value decomposition and
        two orthogonalisations a matrix, and changes nothing. Parameters without a state, and those
        that AdamW takes, are left out.
        """
        self._finish_copies()
        return [found for group in self.param_groups for found in self._diagnose_group(group)]

    def __getstate__(self) -> dict[str, Any]:
        if self.is_shared():
            raise TypeError(
                "a Muon whose parameters several processes share cannot be copied or pickled; save "
                "its state_dict"
            )
        self._finish_copies()
        return {**super().__getstate__(), "_given": self._given}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_sharing", Sharing(None, "float32"))

    def _finish_copies(self) -> None:
        """Before the state is read on the host: wait for what is still being brought back there."""
        groups = [group for group in self.param_groups if group.get("offload")]
        for device in {param.device for group in groups for param in group["params"]}:
            finish_copies(device)

    def _diagnose_group(self, group: dict[str, Any]) -> Iterator[Diagnosis]:
        options = StepOptions.from_group(group)
        weights = options.weights.buffer, options.weights.grad
        for name, param in zip(parameter_names(group), group["params"], strict=True):
            state = host_counters(self.state.get(param, {}))
            if has_momentum(state):
                yield from diagnose_parameter(
                    param, state, group, name, weights, options.coefficients
                )

    @plain_modes()
    def state_dict(self) -> StateDict:
        """As torch's, with our format version in each group; tensors and plain values only.

        Missing states are in it as zeros, so that it has the same keys before and after the first
        step, and on all processes, as torch.distributed.checkpoint needs; the optimizer does not
        keep them. Of parameters shared between processes the tensors are DTensors, in shards: save
        them with torch.distributed.checkpoint, which loads them on any number of processes.
        """
        self._finish_copies()
        own = self.state
        # A copy: frameworks that replace parameters ask for a state dict before they do.
        self.state = defaultdict(dict, own)
        try:
            self.prepare_states()
            return self._complete_state_dict()
        finally:
            self.state = own

    def _complete_state_dict(self) -> StateDict:
        saved: dict[Tensor, dict[str, Any]] = {}
        for group in self.param_groups:
            for part in self._shared(group):
                saved |= sharded_states(part, group, self.state)
            if group.get("use_muon", True) and isinstance(resolve_group_format(group), AutoFormat):
                for param in group["params"]:
                    if self.state.get(param):
                        saved[param] = pack_auto_state(param, group, self.state[param])
        state_dict = super().state_dict()
        state = {key: host_counters(value) for key, value in state_dict["state"].items()}
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        state |= {key: saved[param] for key, param in enumerate(params) if param in saved}
        groups = list(map(plain_options, state_dict["param_groups"]))
        return {**state_dict, "state": state, "param_groups": groups}

    @plain_modes()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class, or of torch.optim.Muon, KellerJordan's or Moonlight's Muon.

        Every dtype is kept; the tensors are copies on the parameters' devices. A momentum stored in
        another format is quantised to this optimizer's own `state_format`, which stays as it is,
        like `backend`, `ns_input`, `nonfinite`, `batch_experts`, `row_splits` and `seed`. A format
        that normalises the momentum ("muonq4") has lost its size: it loads into others between
        `backward()` and `step()`, where the gradients give it one (but not into DTensors).

        Raises ValueError naming the group or parameter, before anything changes, for a state that
        does not fit: groups, shapes, dtypes, entries, codes or scales out of range, newer version.
        """
        for group in self.param_groups:
            self._shared(group)  # found before, since it takes all processes
        with checkpoint.converting(self):
            super().load_state_dict(state_dict)

    @plain_modes()
    def export_full_precision(self) -> StateDict:
        """A state dict that torch.optim.Muon loads and continues from.

        Raises ValueError for formats that lose the momentum's size (`normalize`), for Newton-Schulz
        coefficients that torch.optim.Muon does not take, and where momentum lies on several
        processes.
        """
        if self.is_shared():
            raise ValueError(
                "export_full_precision: expected an optimizer of one process; load the state_dict "
                "of this one into such"
            )
        self._finish_copies()
        return checkpoint.export(self)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_loaded(OPTIONS, group)
        check_rule(group)

    def _convert_state(
        self, param: Tensor, group: dict[str, Any], saved: checkpoint.SavedState
    ) -> dict[str, Any]:
        entries, whole = whole_state(saved.entries), shape_only(param)
        state = convert_momentum(whole, group, dataclasses.replace(saved, entries=entries))
        if not has_momentum(state) and not state.get("skipped"):
            return {}  # there was no gradient so far: the first one makes the state
        shared = self._sharing.find(param)
        if shared is not None:
            state = owned_state(state, param, group, *shared)
        if group["offload"]:
            keep_on_host(state, matrix_views(whole, group))
        return state

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return torch_muon_group(group)

    def _export_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return export_momentum(param, group, self.state[param])

    @outside_compiled_regions
    @torch.no_grad()
    @plain_modes()
    def step_parameter(self, group_index: int, index: int) -> None:
        """Step `param_groups[group_index]["params"][index]` alone, as `step` would.

        For hooks that run in the backward pass (`attach_gradient_release`).
        """
        group = self.param_groups[group_index]
        if self.layer_inputs is not None:
            raise ValueError(
                "rule: expected one that does not look at what layers read, since that is taken "
                "when step() is called, got a step of one parameter"
            )
        self._check_parameters(group, [index])
        if group["nonfinite"] == "raise":
            self._check_finite(group, [index])
        first = sum(len(earlier["params"]) for earlier in self.param_groups[:group_index])
        self._step_parameters(group, [index], first)

    def is_shared(self) -> bool:
        """Whether other processes take part in its steps."""
        return any(
            self._sharing.process_group is not None or _any_dtensor(group["params"])
            for group in self.param_groups
            if group.get("use_muon", True)
        )

    def _shared(self, group: dict[str, Any]) -> list[Shared]:
        """The parameters of a group that other processes share; empty without any."""
        takes_part = self._sharing.process_group is not None
        if not (takes_part or _any_dtensor(group["params"])) or not group.get("use_muon", True):
            return []
        index = next(index for index, other in enumerate(self.param_groups) if other is group)
        return self._sharing.of(index, group)

    def _unshared(self, group: dict[str, Any], shared: Iterable[Shared]) -> Sequence[int]:
        """Indices of the parameters that this process steps without any other."""
        taken = {index for part in shared for index in part.indices}
        return [index for index in range(len(group["params"])) if index not in taken]

    def _step_shared(self, group: dict[str, Any], part: Shared, first: int) -> None:
        self._prepare_shared(group, part)
        if isinstance(part, ReplicatedParameters):
            step = functools.partial(self._step_parameters, group, first=first)
            part.step(group, self.state, step)
        else:
            part.step(group, self.state, first)

    def _step_parameters(
        self, group: dict[str, Any], indices: Iterable[int], first: int = 0
    ) -> None:
        """Step the parameters of a group with these indices, if they have a gradient.

        first: the place in the optimizer of the group's first parameter.
        """
        auto, options = resolve_group_format(group), StepOptions.from_group(group)
        steps = []
        for index in indices:
            param = group["params"][index]
            if param.grad is None:
                continue
            whole, weight, grad = param, param, param.grad
            if _any_dtensor([param]):
                whole, weight, grad = shape_only(param), local_part(param), local_part(param.grad)
            views = matrix_views(whole, group)
            if isinstance(auto, AutoFormat):
                if group["offload"]:
                    finish_copies(grad.device)  # of what is about to be read
                name = parameter_names(group)[index]
                weights = options.weights.buffer, options.weights.grad
                revise_format(auto, grad, self.state[param], views, group, name, weights)
            state = self.state[param]
            if "rows" not in state or isinstance(auto, AutoFormat):
                prepare_state(
                    state, param, group, views, rule_state=resolve_rule(group["rule"]).state
                )
            f = auto if isinstance(auto, StateFormat) else momentum_format(group, state)
            backend = get_backend(group["backend"], grad.device)
            steps.append(ParameterStep(weight, grad, state, views, first + index, f, backend))
        step_parameters(steps, options, group)

    def _only_makes_states(self) -> bool:
        """Whether this step is meant to make states and no more.

        torch.distributed.checkpoint takes one with zero gradients and a learning rate of 0, if
        there is no state yet. It must leave no trace, or training would go on from another state.
        """
        if any(float(group["lr"]) for group in self.param_groups):
            return False
        params = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        grads = [param.grad for param in params if param.grad is not None]
        if any(grad.is_sparse for grad in grads):
            return False
        zeros = [on_every_part(grad, ~local_part(grad).any()) for grad in grads]
        return bool(zeros) and all(map(bool, zeros))

    @plain_modes()
    def prepare_states(self) -> None:
        """Make the states that are missing, as the first steps would."""
        for group in self.param_groups:
            for part in self._shared(group):
                self._prepare_shared(group, part)
            self._prepare_unshared(group)

    def _prepare_shared(self, group: dict[str, Any], part: Shared) -> None:
        """States on every process: of its own matrices, and counters of the others."""
        for index, param in zip(part.indices, part.params, strict=True):
            prepare_shared_state(self.state[param], param, group, part, index)

    def _prepare_unshared(self, group: dict[str, Any]) -> None:
        """States of the parameters of a group that are not shared, and that are trained."""
        is_auto = isinstance(resolve_group_format(group), AutoFormat)
        for index in self._unshared(group, self._shared(group)):
            param = group["params"][index]
            if not param.requires_grad or self.state.get(param):
                continue
            views = [] if is_auto else matrix_views(shape_only(param), group)
            rule = resolve_rule(group["rule"])
            prepare_state(self.state[param], param, group, views, rule_state=rule.state)
            if is_auto:  # a format is chosen with the first gradient
                self.state[param].update(asked=0, state_format=None)

    def _check_parameters(self, group: dict[str, Any], indices: Sequence[int]) -> None:
        """Raise what a step of these parameters would raise, before any changes."""
        if group["ns_dtype"] not in ("auto", "float32"):
            for device in {local_part(param).device for param in group["params"]}:
                check_ns_dtype(group, get_backend(group["backend"], device))
        rule = StepOptions.from_group(group).rule if "rule" in group else None
        if rule is not None and rule.gradient is not None and rule.gradient.needs_inputs:
            inputs, params = self.layer_inputs, group["params"]
            if inputs is None or not all(map(inputs.covers, params)):
                raise ValueError(
                    f"rule: '{rule.name}' looks at what layers read, expected "
                    "attach_layer_inputs(model, optimizer) before the first step, for all "
                    "parameters of such a rule"
                )
        for index in indices:
            param = group["params"][index]
            if param.grad is not None:
                check_parameter_step(self.state.get(param, {}), group, index)

    def _check_finite(self, group: dict[str, Any], indices: Sequence[int]) -> None:
        """Raise NonFiniteGradientError for the first gradient that would be skipped."""
        names = parameter_names(group)
        for index in indices:
            name, param = names[index], group["params"][index]
            if param.grad is not None and not is_usable_everywhere(param.grad):
                raise NonFiniteGradientError(
                    f"gradient of parameter {name!r} {tuple(param.shape)}: "
                    f"{describe(local_part(param.grad))}"
                )
