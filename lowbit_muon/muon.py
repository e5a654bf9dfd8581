"""Muon with low-bit momentum: a drop-in for `torch.optim.Muon`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, StateDict

from lowbit_muon import checkpoint
from lowbit_muon.backends import check_backend_name, get_backend
from lowbit_muon.backends.base import is_device_backend
from lowbit_muon.checkpoint_momentum import (
    convert_momentum,
    export_momentum,
    torch_muon_group,
)
from lowbit_muon.checks import is_real_number
from lowbit_muon.device_step import DeviceStep, host_counters
from lowbit_muon.diagnosis import Diagnosis, diagnose_matrix
from lowbit_muon.formats import StateFormat
from lowbit_muon.group_step import (
    AdjustLr,
    GroupStep,
    NsDtype,
    check_gradient,
    count_skipped,
    rounding_seed,
    seed_of_step,
)
from lowbit_muon.momentum_state import NonFiniteGradientError
from lowbit_muon.newton_schulz import resolve_coefficients
from lowbit_muon.parameter_state import (
    MatrixView,
    flatten,
    matrix_views,
    read_matrix,
    resolve_group_format,
    write_matrix,
)
from lowbit_muon.presets import resolve_format
from lowbit_muon.quantized_matrix import QuantizedMatrix

# KellerJordan/Muon, muon.py; the defaults of torch.optim.Muon.
DEFAULT_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
DEFAULT_EPS = 1e-7


def outside_compiled_regions(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method at which a region of torch.compile ends, to go on behind it.

    Kernels are called by pointer, which the compiler cannot follow. `torch.compiler.disable` itself
    imports the compiler, and Triton with it, so it waits for the first call.
    """

    @functools.lru_cache(maxsize=1)
    def disabled() -> Callable[..., Any]:
        return torch.compiler.disable(method)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return disabled()(*args, **kwargs)

    return call


class Muon(Optimizer):
    """Muon (MomentUm Orthogonalized by Newton-Schulz) with its momentum in 4 bits or fewer.

    All positional arguments, their defaults and the update rule are those of `torch.optim.Muon`
    (M <- momentum*M + (1 - momentum)*G; Nesterov; decoupled weight decay); the arithmetic is
    float32 where torch uses bfloat16.

    Args:
        params: parameters, named parameters or groups. Two or more dimensions each: a convolution
            kernel [out, in, ...] is taken as the matrix [out, in*...].
        lr: learning rate; may be a one-element tensor.
        weight_decay: decoupled weight decay.
        momentum: decay of the momentum, in [0, 1).
        nesterov: orthogonalise momentum*M + (1 - momentum)*G instead of M.
        ns_coefficients: (a, b, c) of the Newton-Schulz polynomial, a sequence of such triples, one
            for each step, or a name known to `lowbit_muon.newton_schulz`.
        eps: smallest norm that the matrix is divided by before Newton-Schulz.
        ns_steps: Newton-Schulz steps.
        adjust_lr_fn: "original" (or None): lr * sqrt(max(1, rows/columns)), KellerJordan's;
            "match_rms_adamw": lr * 0.2 * sqrt(max(rows, columns)), Moonlight's and MuonQ's.
        state_format: how the momentum is stored: a preset name (`lowbit_muon.PRESETS`) or a
            `StateFormat`.
        ns_input: "exact" orthogonalises the fresh momentum, before it was quantised; "stored" what
            the codes hold, without Nesterov's look-ahead: less work, and quantisation noise in the
            update. Of spectral formats it takes the codes' own matrix, whose polar factor is the
            momentum's, in integer products and without the first Newton-Schulz steps, as far as its
            larger singular values make up for them (two of five with the presets); formats with
            levels that are not whole numbers or with block scales are decoded instead. On a GPU all
            are decoded and take all steps: no work is saved there.
        ns_dtype: dtype of the Newton-Schulz products: "auto" is float32 on CPUs and wherever there
            is no backend for the device, and float16 on GPUs (`lowbit_muon.half_precision`, which
            is closer to float32 than torch's bfloat16).
        stochastic_rounding: round bfloat16 weights stochastically, with bits that depend on `seed`,
            the parameter's number and its step alone. Makes no difference to float32 weights.
        backend: "auto", or a backend by name, which then must be there.
        nonfinite: what to do with a gradient that holds inf or nan: "skip" leaves the parameter and
            its state as they are (counted in its state as "skipped", with one warning; on a GPU,
            where the host does not look, without), "raise" raises NonFiniteGradientError before any
            parameter changes.
        batch_experts: take a parameter [experts, rows, columns] as that many matrices.
        row_splits: row counts of the matrices that are fused in one parameter (query, key and
            value, or heads), each orthogonalised for itself.
        seed: start of the power iteration of formats with low-rank factors.

    A group may override any of these. `state_bytes()` counts what the state really takes.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] | Sequence[Sequence[float]] | str = (
            DEFAULT_COEFFICIENTS
        ),
        eps: float = DEFAULT_EPS,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        *,
        state_format: str | StateFormat = "spectral4",
        ns_input: Literal["exact", "stored"] = "exact",
        ns_dtype: NsDtype = "auto",
        stochastic_rounding: bool = False,
        backend: str = "auto",
        nonfinite: Literal["skip", "raise"] = "skip",
        batch_experts: bool = False,
        row_splits: Sequence[int] | None = None,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "state_format": state_format,
            "ns_input": ns_input,
            "ns_dtype": ns_dtype,
            "stochastic_rounding": stochastic_rounding,
            "backend": backend,
            "nonfinite": nonfinite,
            "batch_experts": batch_experts,
            "row_splits": row_splits,
            "seed": seed,
        }
        check_group(defaults)
        defaults["state_format"] = resolve_format(state_format).to_dict()
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises ValueError or TypeError, with nothing added, for a bad option or a parameter with
        fewer than two dimensions.
        """
        group = {**self.defaults, **param_group}
        check_group(group)
        if "state_format" in param_group:
            # Plain values only, so that a state_dict loads under weights_only=True.
            param_group["state_format"] = resolve_group_format(group).to_dict()
        super().add_param_group(param_group)
        try:
            for param in self.param_groups[-1]["params"]:
                matrix_views(param, self.param_groups[-1])
                if group["stochastic_rounding"] and param.dtype == torch.float16:
                    raise ValueError(
                        "stochastic_rounding: expected bfloat16 (or float32) parameters, got "
                        f"float16 of size {tuple(param.shape)}"
                    )
        except (TypeError, ValueError):
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
        for group in self.param_groups:
            if group["nonfinite"] == "raise":
                self._raise_if_nonfinite(group, range(len(group["params"])))
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def state_bytes(self) -> int:
        """Bytes that the optimizer's state really takes (storage, not elements times bits)."""
        storages = {
            value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        }
        return sum(storages.values())

    @torch.no_grad()
    def diagnose(self) -> list[Diagnosis]:
        """What storing the momentum does to each matrix's update (`lowbit_muon.Diagnosis`).

        After the backward pass, while gradients are there, it is exact for the next step; at other
        times it is an estimate from the stored spectrum. Takes a singular value decomposition and
        two orthogonalisations a matrix, and changes nothing. Parameters without a state, and those
        that AdamW takes, are left out.
        """
        return [found for group in self.param_groups for found in self._diagnose_group(group)]

    def _diagnose_group(self, group: dict[str, Any]) -> Iterator[Diagnosis]:
        step = GroupStep.from_group(group)
        names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
        for name, param in zip(names, group["params"], strict=True):
            state = host_counters(self.state[param]) if param in self.state else {}
            if not state:
                continue
            grad = None if param.grad is None else flatten(param.grad, group)
            if grad is not None and not bool(grad.isfinite().all()):
                grad = None
            views = matrix_views(param, group)
            for index, view in enumerate(views):
                yield diagnose_matrix(
                    read_matrix(state, view, step.state_format),
                    None if grad is None else grad[view.rows],
                    name=name if len(views) == 1 else f"{name}[{index}]",
                    steps=int(state["step"]),
                    skipped=int(state["skipped"]),
                    decay=step.momentum,
                    coefficients=tuple(step.coefficients),
                )

    def state_dict(self) -> StateDict:
        """As torch's, with our format version in each group; tensors and plain values only."""
        state_dict = checkpoint.with_version(super().state_dict())
        state = {key: host_counters(value) for key, value in state_dict["state"].items()}
        return {**state_dict, "state": state}

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state of this class, or of torch.optim.Muon, KellerJordan's or Moonlight's Muon.

        Every dtype is kept; the tensors are copies on the parameters' devices. A momentum stored in
        another format is quantised to this optimizer's own `state_format`, which stays as it is,
        like `backend`, `ns_input`, `nonfinite`, `batch_experts`, `row_splits` and `seed`.

        Raises ValueError naming the group or parameter, before anything changes, for a state that
        does not fit: groups, shapes, dtypes, entries, codes or scales out of range, newer version.
        """
        with checkpoint.converting(self):
            super().load_state_dict(state_dict)

    def export_full_precision(self) -> StateDict:
        """A state dict that torch.optim.Muon loads and continues from.

        Raises ValueError for formats that lose the momentum's size (`normalize`) and for
        Newton-Schulz coefficients that torch.optim.Muon does not take.
        """
        return checkpoint.export(self)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group(group)

    def _convert_state(
        self, param: Tensor, group: dict[str, Any], saved: checkpoint.SavedState
    ) -> dict[str, Any]:
        return convert_momentum(param, group, saved)

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        return torch_muon_group(group)

    def _export_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        return export_momentum(param, group, self.state[param])

    @outside_compiled_regions
    @torch.no_grad()
    def step_parameter(self, group_index: int, index: int) -> None:
        """Step `param_groups[group_index]["params"][index]` alone, as `step` would.

        For hooks that run in the backward pass (`attach_gradient_release`).
        """
        group = self.param_groups[group_index]
        if group["nonfinite"] == "raise":
            self._raise_if_nonfinite(group, [index])
        self._step_parameters(group, [index])

    def _step_group(self, group: dict[str, Any]) -> None:
        self._step_parameters(group, range(len(group["params"])))

    def _step_parameters(self, group: dict[str, Any], indices: Iterable[int]) -> None:
        """Step the parameters of a group with these indices, if they have a gradient."""
        step = GroupStep.from_group(group)
        on_device = DeviceStep(step, group)
        earlier = itertools.takewhile(lambda other: other is not group, self.param_groups)
        first = sum(len(other["params"]) for other in earlier)
        for index in indices:
            param, number = group["params"][index], first + index
            if param.grad is None:
                continue
            grad = check_gradient(param)
            views = matrix_views(param, group)
            state = self._initialized_state(param, step, group, views)
            backend = get_backend(step.backend_name, param.device)
            if is_device_backend(backend):
                on_device.add(param, grad, state, views, backend, number=number)
            else:
                _update_parameter(param, grad, state, views, step, group, number)
        on_device.run()

    def _initialized_state(
        self, param: Tensor, step: GroupStep, group: dict[str, Any], views: list[MatrixView]
    ) -> dict[str, Any]:
        state = self.state[param]
        if not state:
            state.update(step=0, skipped=0)
            for index, view in enumerate(views):
                matrix = QuantizedMatrix.zeros(
                    view.shape, step.state_format, seed=group["seed"] + index, device=param.device
                )
                write_matrix(state, view, matrix)
        return state

    def _raise_if_nonfinite(self, group: dict[str, Any], indices: Iterable[int]) -> None:
        names = group.get("param_names") or range(len(group["params"]))
        for index in indices:
            name, param = names[index], group["params"][index]
            if param.grad is not None and not bool(param.grad.isfinite().all()):
                bad = int((~param.grad.isfinite()).sum())
                raise NonFiniteGradientError(
                    f"gradient of parameter {name!r} {tuple(param.shape)}: expected finite values, "
                    f"got {bad} of {param.grad.numel()} elements inf or nan"
                )


def _update_parameter(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Any],
    views: list[MatrixView],
    step: GroupStep,
    group: dict[str, Any],
    number: int,
) -> None:
    """One parameter on the host; `number` is its place in the optimizer."""
    # A parameter of several matrices is skipped as a whole, so it is checked as a whole first.
    grad = grad.float() if grad.dtype == torch.float64 else grad
    if len(views) > 1 and not bool(grad.isfinite().all()):
        count_skipped(state, param)
        return
    grad, weights = flatten(grad, group), flatten(param, group)
    for index, view in enumerate(views):
        momentum = read_matrix(state, view, step.state_format)
        seed = seed_of_step(rounding_seed(group["seed"], number, index), int(state["step"]))
        try:
            step.update_matrix(weights[view.rows], grad[view.rows], momentum, seed=seed)
        except NonFiniteGradientError:
            count_skipped(state, param)
            return
    state["step"] += 1


def _options() -> Iterator[tuple[str, Callable[[Any], bool], str]]:
    """(name, test, what is expected) for every option of a group."""

    def at_least_zero(value: Any) -> bool:
        return is_real_number(value) and float(value) >= 0

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0

    def boolean(value: Any) -> bool:
        return isinstance(value, bool)

    def row_counts(value: Any) -> bool:
        return value is None or (
            isinstance(value, (list, tuple)) and bool(value) and all(whole(v) for v in value)
        )

    yield "lr", at_least_zero, "a number or one-element tensor >= 0"
    yield "weight_decay", at_least_zero, "a number >= 0"
    yield "momentum", lambda v: at_least_zero(v) and float(v) < 1, "a number in [0, 1)"
    yield "nesterov", boolean, "a bool"
    yield "eps", lambda v: at_least_zero(v) and float(v) > 0, "a number > 0"
    yield "ns_steps", lambda v: whole(v) and 1 <= v < 100, "a whole number from 1 to 99"
    yield (
        "adjust_lr_fn",
        lambda v: v in (None, "original", "match_rms_adamw"),
        "None, 'original' or 'match_rms_adamw'",
    )
    yield "ns_input", lambda v: v in ("exact", "stored"), "'exact' or 'stored'"
    yield (
        "ns_dtype",
        lambda v: v in ("auto", "float32", "float16", "bfloat16"),
        "'auto', 'float32', 'float16' or 'bfloat16'",
    )
    yield "stochastic_rounding", boolean, "a bool"
    yield "nonfinite", lambda v: v in ("skip", "raise"), "'skip' or 'raise'"
    yield "batch_experts", boolean, "a bool"
    yield "row_splits", row_counts, "None or a sequence of row counts"
    yield "seed", whole, "a whole number >= 0"


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError or TypeError naming the first bad option of a group."""
    for name, test, expected in _options():
        if not test(group[name]):
            raise ValueError(f"{name}: expected {expected}, got {group[name]!r}")
    resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    resolve_group_format(group)
    check_backend_name(group["backend"])
