"""Muon and AdamW as one optimizer, with the parameter groups of KellerJordan's MuonWithAuxAdam."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lowbit_muon.backends.modes import plain_modes
from lowbit_muon.checkpoint.adam import convert_adam, read_moments
from lowbit_muon.checkpoint.dicts import VERSION_KEY, SavedState
from lowbit_muon.distributed.agreement import on_every_part
from lowbit_muon.distributed.state_dicts import shard_like, whole_state
from lowbit_muon.formats.state_format import FORMAT_VERSION
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.param_groups import muon_param_groups
from lowbit_muon.optimizers.routing import groups_with_kinds
from lowbit_muon.state.diagnosis import Diagnosis
from lowbit_muon.state.gradients import count_skipped
from lowbit_muon.state.parameter import parameter_names, refuse_gradient
from lowbit_muon.state.placement import is_dtensor, local_part, shape_only
from lowbit_muon.step.options import (
    AUX_DEFAULTS,
    AUX_OPTIONS,
    GROUP_DEFAULTS,
    AuxAdam,
    MuonOptions,
    check_keys,
    check_loaded,
    check_values,
    plain_options,
    plain_value,
)
from lowbit_muon.step.rules.recipes import resolve_rule

if TYPE_CHECKING:
    from typing_extensions import Unpack

# KellerJordan/Muon, muon.py, MuonWithAuxAdam.
MUON_DEFAULTS: dict[str, Any] = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0}
_ARGUMENTS = ("lr", "weight_decay", "momentum", "aux_lr", "aux_adam")
_8BIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST_FLOAT16 = 2.0**-24
_PROBE_ELEMENTS = 4096  # the smallest tensor whose state bitsandbytes keeps in 8 bits


class MuonWithAuxAdam(Muon):
    """Muon for the matrices and AdamW for the other parameters, stepped and saved as one.

    Takes a model, whose structure says which is which (`muon_param_groups`, for more options); or
    the groups of KellerJordan's MuonWithAuxAdam as they are, dicts with `use_muon` True (defaults
    lr=0.02, momentum=0.95, weight_decay=0) or False (lr=3e-4, betas=(0.9, 0.95), eps=1e-10,
    weight_decay=0). Like there, Muon scales its update by sqrt(max(1, rows/columns)) and uses
    Nesterov momentum; unlike there, parameters of three dimensions are flattened like convolutions
    unless the group says `batch_experts`. With adjust_lr_fn="match_rms_adamw" updates have AdamW's
    size, and one rate serves all parameters, as for AdamW.

    Args:
        params: the model; groups as above; or what other optimizers take: parameters, named
            parameters, or groups without `use_muon`. Of these Muon takes the matrices that neither
            by name nor by shape look like embeddings or heads (`optimizers.routing`), with one
            warning where there are no names. A group with `use_muon` may also set any option that a
            group of `Muon` may, the others `nonfinite` and `aux_adam`; other keys are treated as
            there. The dicts are copied.
        lr: learning rate of Muon's groups that do not set it. None: 0.02.
        weight_decay: of groups that do not set it, of both kinds. None: 0, or what the rule says
            for Muon's. Where this optimizer makes the groups, biases, norms and other vectors have
            none.
        momentum: of Muon's groups that do not set it. None: 0.95, or what the rule says.
        aux_lr: learning rate of AdamW's groups that do not set it. None: `lr` where that serves
            AdamW, too (adjust_lr_fn="match_rms_adamw", by itself or brought by the rule), else
            3e-4.
        aux_adam: "adamw8bit": bitsandbytes' AdamW8bit, about 2 bytes an element (it keeps tensors
            of fewer than 4096 elements in float32, 8 bytes); "adamw": torch.optim.AdamW; "auto":
            8 bits where bitsandbytes is installed and works on the parameters' device and dtype,
            else torch.optim.AdamW, with one warning that says why. For float16 parameters
            torch.optim.AdamW has an eps of 6e-8 at least, since a smaller one is zero there.
        nesterov, ns_coefficients, ns_steps, adjust_lr_fn, rule, state_format, ns_input, ns_dtype:
            as for `Muon`, for the groups that do not set them.
        stochastic_rounding, compensation, backend, batch_experts, row_splits, seed, offload: as for
            `Muon`, for the groups that do not set them.
        process_group, update_dtype: as for `Muon`; AdamW's state is not shared.
        nonfinite: as for `Muon`, for both kinds of parameters.

    Raises:
        ValueError, TypeError: naming the option or group, what was expected and what came.
        RuntimeError: aux_adam="adamw8bit" where bitsandbytes does not work.
    """

    _usual: ClassVar[dict[str, Any]] = {**GROUP_DEFAULTS, **MUON_DEFAULTS}

    def __init__(
        self,
        params: nn.Module | ParamsT,
        lr: float | Tensor | None = None,
        weight_decay: float | None = None,
        momentum: float | None = None,
        *,
        aux_lr: float | Tensor | None = None,
        aux_adam: AuxAdam = "auto",
        **options: Unpack[MuonOptions],
    ) -> None:
        for name in options.keys() - MuonOptions.__annotations__.keys():
            raise TypeError(
                f"{name}: expected an option of all groups "
                f"({', '.join((*_ARGUMENTS, *MuonOptions.__annotations__))}); "
                "eps and betas are set in the groups"
            )
        given = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        defaults = MUON_DEFAULTS | {name: v for name, v in given.items() if v is not None}
        aux = {"weight_decay": defaults["weight_decay"], "aux_adam": aux_adam}
        check_values(AUX_OPTIONS, aux)
        aux["lr"] = resolve_aux_lr(defaults["lr"], aux_lr, options)
        self.aux_adam = aux_adam
        self._aux_defaults = aux
        self._engines: dict[str, Optimizer] = {}
        if isinstance(params, nn.Module):
            decay = defaults["weight_decay"]
            groups = muon_param_groups(
                params,
                lr=defaults["lr"],
                aux_lr=aux["lr"],
                aux_weight_decay=decay,
                no_decay=bool(decay),
            )
        else:
            groups = groups_with_kinds(params, decays=bool(defaults["weight_decay"]))
        super().__init__(
            groups, defaults["lr"], weight_decay=weight_decay, momentum=momentum, **options
        )

    def __getstate__(self) -> dict[str, Any]:
        own = {"aux_adam": self.aux_adam, "_aux_defaults": self._aux_defaults}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_engines", {})

    @plain_modes()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which must say `use_muon`; see the class.

        Raises ValueError, TypeError or RuntimeError, with nothing added, for a bad option.
        """
        uses_muon = param_group.get("use_muon") if isinstance(param_group, dict) else None
        if not isinstance(uses_muon, bool):
            raise ValueError(
                "param_groups: expected dicts with use_muon True or False, as muon_param_groups "
                "makes them from a model (to add those of a module that was frozen: for group in "
                "muon_param_groups(module): optimizer.add_param_group(group)), got "
                f"use_muon={uses_muon!r}"
            )
        if uses_muon:
            super().add_param_group(param_group)
            return
        check_keys(AUX_OPTIONS, param_group)
        own = {"nonfinite": self.defaults["nonfinite"], **self._aux_defaults}
        group = plain_options({**AUX_DEFAULTS, **own, **param_group})
        if isinstance(group["lr"], Tensor):  # schedulers fill it in place
            group["lr"] = group["lr"].clone()
        group[VERSION_KEY] = FORMAT_VERSION
        check_values(AUX_OPTIONS, group)
        options = set(group)
        Optimizer.add_param_group(self, group)
        for name in set(group) - options - {"param_names"}:
            del group[name]  # torch fills in the defaults, which are those of Muon's groups
        try:
            group["aux_adam"] = _resolve_kind(group["aux_adam"], group["params"])
        except Exception:
            del self.param_groups[-1]
            raise

    def _step_parameters(
        self, group: dict[str, Any], indices: Iterable[int], first: int = 0
    ) -> None:
        if group["use_muon"]:
            super()._step_parameters(group, indices, first)
            return
        params = [group["params"][index] for index in indices]
        params = [param for param in params if param.grad is not None]
        self._leave_8bit_if_sharded(group)
        for param in params:
            if not self.state[param]:
                self.state[param].update(self._fresh_state(param, group), skipped=0)
        finite = []
        for param, is_usable in zip(params, _usable(params, group["aux_adam"]), strict=True):
            if is_usable:
                finite.append(param)
            else:
                count_skipped(self.state[param], param)
        # torch's AdamW keeps moments of float16 in float16, where smaller an eps is zero.
        narrow = [p for p in finite if p.dtype == torch.float16 and group["aux_adam"] == "adamw"]
        wide = [param for param in finite if all(param is not other for other in narrow)]
        self._step_engine(group, wide, group["eps"])
        self._step_engine(group, narrow, max(group["eps"], SMALLEST_FLOAT16))

    def _check_parameters(self, group: dict[str, Any], indices: Sequence[int]) -> None:
        if group["use_muon"]:
            super()._check_parameters(group, indices)
            return
        for index in indices:
            param = group["params"][index]
            if param.grad is None:
                continue
            refuse_gradient(group, index, "AdamW")
            state = self.state.get(param, {})
            for key in ("exp_avg", "state1"):
                if key in state and state[key].shape != param.shape:
                    raise ValueError(
                        f"parameter {parameter_names(group)[index]!r}: expected the size of its "
                        f"state, {tuple(state[key].shape)}, got {tuple(param.shape)}; a parameter "
                        "that was resized needs a new optimizer"
                    )

    def _step_engine(self, group: dict[str, Any], params: list[Tensor], eps: float) -> None:
        if params:
            engine = self._engine(group["aux_adam"], params)
            engine.param_groups = [{**_engine_group(engine, group, params), "eps": eps}]
            # bitsandbytes gives parameters other memory unless rows follow each other in theirs.
            memories = [(p, p.data) for p in params if not p.is_contiguous()]
            _step_without_hooks(engine)
            for param, memory in memories:
                if param.data_ptr() != memory.data_ptr():
                    param.data = memory.copy_(param)

    def _prepare_unshared(self, group: dict[str, Any]) -> None:
        if group["use_muon"]:
            super()._prepare_unshared(group)
            return
        self._leave_8bit_if_sharded(group)
        for param in group["params"]:
            if param.requires_grad and not self.state.get(param):
                self.state[param].update(self._fresh_state(param, group), skipped=0)

    def _leave_8bit_if_sharded(self, group: dict[str, Any]) -> None:
        """Use torch's AdamW where a framework has made DTensors of parameters.

        Raises ValueError where 8 bits were asked for.
        """
        if group["aux_adam"] == "adamw8bit" and any(map(is_dtensor, group["params"])):
            _resolve_kind(self.aux_adam, group["params"])
            group["aux_adam"] = "adamw"

    def _diagnose_group(self, group: dict[str, Any]) -> Iterator[Diagnosis]:
        return super()._diagnose_group(group) if group["use_muon"] else iter(())

    def _engine(self, kind: str, params: list[Tensor]) -> Optimizer:
        """An optimizer that works on our state. It has none of its own but bitsandbytes' tables."""
        if kind not in self._engines:
            self._engines[kind] = _create_engine(kind, params)
        engine = self._engines[kind]
        engine.state = self.state
        return engine

    def _fresh_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step, as the engine lays it out."""
        if group["aux_adam"] == "adamw":
            return {
                "step": torch.tensor(0.0, dtype=torch.float32),
                "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
                "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
            }
        engine = cast(Any, self._engine(group["aux_adam"], [param]))
        engine.state = {param: {}}
        engine.param_groups = [_engine_group(engine, group, [param])]
        engine.init_state(engine.param_groups[0], param, 0, 0)
        return {
            key: value.contiguous() if isinstance(value, Tensor) else value
            for key, value in engine.state[param].items()
        }

    def export_full_precision(self) -> dict[str, Any]:
        """A state dict in the layout of KellerJordan's SingleDeviceMuonWithAuxAdam, in float32.

        Its groups have no place for other options than theirs (Nesterov, scaling, steps).
        Raises ValueError for formats that lose the momentum's size (`normalize`).
        """
        return super().export_full_precision()

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["use_muon"]:
            super()._check_group(group)
        else:
            check_loaded(AUX_OPTIONS, group)

    def _convert_state(
        self, param: Tensor, group: dict[str, Any], saved: SavedState
    ) -> dict[str, Any]:
        if group["use_muon"]:
            return super()._convert_state(param, group, saved)
        entries, whole = whole_state(saved.entries), shape_only(param)
        saved = dataclasses.replace(saved, entries=entries)
        state = convert_adam(whole, saved, self._fresh_state(whole, group))
        if state and not int(state["step"]) and not state["skipped"]:
            return {}  # as of Muon's
        return shard_like(param, state)

    def _export_group(self, group: dict[str, Any]) -> dict[str, Any]:
        aux = [option.name for option in AUX_OPTIONS if option.load == "saved"]
        names = MUON_DEFAULTS if group["use_muon"] else aux
        return {name: group[name] for name in (*names, "use_muon")}

    def _export_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        if group["use_muon"]:
            return super()._export_state(param, group)
        moments = read_moments(param, self.state[param])
        return {
            "step": moments.step,
            "exp_avg": moments.first.to(torch.float32, copy=True),
            "exp_avg_sq": moments.second.to(torch.float32, copy=True),
        }


def resolve_aux_lr(
    lr: float | Tensor, aux_lr: float | Tensor | None, options: Mapping[str, Any]
) -> float | Tensor:
    """AdamW's rate beside Muon's `lr`, where it is not given; see `MuonWithAuxAdam`.

    options: of Muon's groups, `adjust_lr_fn` and `rule` among them or not. Raises ValueError for a
    bad rate or rule.
    """
    if aux_lr is None:
        brought = dict(resolve_rule(options.get("rule", "muon")).options).get("adjust_lr_fn")
        scale = options.get("adjust_lr_fn") or brought
        return lr if scale == "match_rms_adamw" else AUX_DEFAULTS["lr"]
    try:
        check_values(AUX_OPTIONS, {"lr": plain_value(aux_lr)})
    except ValueError as error:
        raise ValueError(f"aux_{error}") from None
    return aux_lr


def _resolve_kind(kind: AuxAdam, params: Sequence[Tensor]) -> str:
    """ "adamw" or "adamw8bit". Raises if 8 bits were asked for and do not work."""
    for param in params:
        if not param.is_floating_point():
            raise ValueError(f"params: expected floating point parameters, got {param.dtype}")
    if kind == "adamw":
        return kind
    strange = [param.dtype for param in params if param.dtype not in _8BIT_DTYPES]
    if any(map(is_dtensor, params)):
        if kind == "auto":
            return "adamw"
        raise ValueError(
            "aux_adam: 'adamw8bit' keeps blocks of 256 elements, which shards cut apart; expected "
            "'adamw' or 'auto' for DTensors"
        )
    if kind == "auto":
        devices = {param.device.type for param in params}
        return "adamw8bit" if not strange and all(map(_works_or_warn, devices)) else "adamw"
    if strange:
        raise ValueError(
            f"aux_adam: 'adamw8bit' takes float32, bfloat16 and float16, got {strange[0]}"
        )
    for param in params:
        reason = _8bit_problem(param.device.type)
        if reason is not None:
            raise RuntimeError(f"aux_adam: 'adamw8bit' is not available: {reason}")
    return kind


@functools.cache
def _works_or_warn(device_type: str) -> bool:
    reason = _8bit_problem(device_type)
    if reason is not None:
        warnings.warn(
            "lowbit_muon uses torch.optim.AdamW (8 bytes of state for a float32 element) instead "
            f'of 8-bit AdamW: {reason}; aux_adam="adamw" chooses it without this warning',
            RuntimeWarning,
            stacklevel=2,
        )
    return reason is None


@functools.cache
def _8bit_problem(device_type: str) -> str | None:
    """Why bitsandbytes cannot step a parameter on a device, or None if it just did."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    # Its import may report on 4-bit kernels, which are not used here.
    logger.setLevel(logging.ERROR)
    try:
        param = torch.zeros(_PROBE_ELEMENTS, device=device_type, requires_grad=True)
        param.grad = torch.ones_like(param)
        _step_without_hooks(_create_engine("adamw8bit", [param], lr=1.0))
        moved = float(param.detach().mean())
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "bitsandbytes":
            return "bitsandbytes is not installed (pip install bitsandbytes)"
        return f"{type(error).__name__}: {error}"
    finally:
        logger.setLevel(level)
    # The first step of Adam is lr * sign(gradient), here -1.
    return None if abs(moved + 1) < 0.1 else f"its first step went {moved} instead of -1"


def _create_engine(kind: str, params: list[Tensor], lr: float = 0.0) -> Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(params, lr=lr)
    import bitsandbytes

    return cast(Optimizer, bitsandbytes.optim.AdamW8bit(params, lr=lr))


def _step_without_hooks(engine: Optimizer) -> None:
    """One step, without torch's hooks for all optimizers, which are called for the user's own."""
    step: Any = type(engine).step
    # torch wraps the method of a class whose objects call hooks (Optimizer._patch_step_function)
    (step.__wrapped__ if getattr(step, "hooked", False) else step)(engine)


def _engine_group(engine: Optimizer, group: dict[str, Any], params: list[Tensor]) -> dict[str, Any]:
    """The options of a group as plain numbers, with what else the engine expects in a group."""
    return {
        **engine.defaults,
        "params": params,
        "lr": float(group["lr"]),
        "betas": tuple(float(beta) for beta in group["betas"]),
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def _usable(params: Sequence[Tensor], kind: str) -> list[bool]:
    """Whether each gradient and its squares are finite in the dtype of the moments.

    A device is asked once for all of its gradients.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for param in params:
        assert param.grad is not None
        # 8-bit moments are computed in float32.
        dtype = param.dtype if kind == "adamw" else torch.float32
        limit = math.sqrt(torch.finfo(dtype).max)
        local = local_part(param.grad)
        fits = torch.ones((), dtype=torch.bool, device=local.device)
        if local.numel():
            # In a dtype that holds the limit: in another it would be inf. (nan is below nothing)
            largest = torch.linalg.vector_norm(local, ord=math.inf)
            fits = largest.to(torch.promote_types(dtype, torch.float32)) <= limit
        fits = on_every_part(param.grad, fits)
        found.setdefault(fits.device, []).append(fits)
    usable = {device: iter(torch.stack(values).tolist()) for device, values in found.items()}
    return [next(usable[local_part(param).device]) for param in params]
