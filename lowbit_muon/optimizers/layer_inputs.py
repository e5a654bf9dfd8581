"""What linear layers read, for update rules that look at it: Newton-Muon."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowbit_muon.backends.modes import outside_compiled_regions, plain_modes
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.step_hooks import check_process_group
from lowbit_muon.state.parameter import MatrixView, matrix_views, parameter_names
from lowbit_muon.state.placement import is_dtensor, local_part, shape_only
from lowbit_muon.state.stored import RULE_PREFIX
from lowbit_muon.step.rules.inputs import InputWhitened
from lowbit_muon.step.rules.recipes import resolve_rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class _Layer:
    """A linear layer, and what it has read since the last step."""

    number: int
    name: str
    module: nn.Linear
    param: Tensor
    stage: InputWhitened
    views: list[MatrixView]
    products: Tensor | None = None  # float32 [columns, columns], the sum of x x^T
    count: int = 0
    is_silent: bool = False  # as has been said

    def see(self, x: Tensor) -> None:
        if is_dtensor(x):
            raise ValueError(
                f"layer {self.name!r}: expected a plain tensor, since its rule looks at what it "
                "reads, got a DTensor; with tensor parallelism give its weight another rule"
            )
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        if self.products is None:
            self.products = rows.mT @ rows
        else:
            self.products.addmm_(rows.mT, rows)
        self.count += len(rows)


class _Hook:
    """Hears one layer. A copy, as of a copied model, hears nothing."""

    def __init__(self, inputs: LayerInputs | None = None, layer: _Layer | None = None) -> None:
        self._inputs = None if inputs is None else weakref.ref(inputs)
        self._layer = layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> None:
        inputs = None if self._inputs is None else self._inputs()
        if inputs is not None and self._layer is not None:
            inputs.see(self._layer, module, args, kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class LayerInputs:
    """Collects what layers read, for rules that whiten by it; made by `attach_layer_inputs`."""

    def __init__(
        self, optimizer: Muon, layers: list[_Layer], process_group: ProcessGroup | None
    ) -> None:
        self._optimizer = optimizer
        self._layers = layers
        self._process_group = process_group
        self._steps = 0
        self._resume()
        self._handles = [
            layer.module.register_forward_pre_hook(_Hook(self, layer), with_kwargs=True)
            for layer in layers
        ]
        self._handles.append(optimizer.register_load_state_dict_post_hook(self._resume))
        optimizer.layer_inputs = self

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose inputs are collected."""
        return [layer.name for layer in self._layers]

    def detach(self) -> None:
        """Take everything away again; the optimizer refuses to step by such a rule without it."""
        for handle in self._handles:
            handle.remove()
        if self._optimizer.layer_inputs is self:
            self._optimizer.layer_inputs = None

    def covers(self, param: Tensor) -> bool:
        """Whether this is the weight of one of the layers."""
        return any(layer.param is param for layer in self._layers)

    @outside_compiled_regions
    def see(
        self, layer: _Layer, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """For the layer's hook: add up what it reads, if the next step takes it."""
        if module.training and torch.is_grad_enabled() and self._is_due(layer):
            with torch.no_grad(), plain_modes():
                layer.see(args[0] if args else kwargs["input"])

    def _is_due(self, layer: _Layer) -> bool:
        """Whether the next step takes a layer's inputs."""
        due = (self._steps + layer.number) % layer.stage.every == 0
        return due and layer.param.requires_grad and bool(layer.stage.state(layer.views[0].shape))

    def take(self) -> None:
        """For the optimizer's step, when nothing more can be refused: take what was read."""
        due = [layer for layer in self._layers if self._is_due(layer)]
        if self._process_group is not None:
            for layer in due:
                self._share(layer, self._process_group)
        if any(layer.count for layer in due):
            self._optimizer.prepare_states()
        for layer in due:
            self._keep(layer)
        self._warn_of_silent_layers(due)
        # as parameters count their steps
        self._steps += any(layer.param.grad is not None for layer in self._layers)
        for layer in self._layers:
            layer.products, layer.count = None, 0

    def _share(self, layer: _Layer, group: ProcessGroup) -> None:
        """The sums of all processes."""
        device = local_part(layer.param).device
        if layer.products is None:
            columns = layer.views[0].shape[1]
            layer.products = torch.zeros(columns, columns, device=device)
        count = torch.tensor(layer.count, device=device)
        dist.all_reduce(layer.products, group=group)
        dist.all_reduce(count, group=group)
        layer.count = int(count)

    def _keep(self, layer: _Layer) -> None:
        """In the state of the matrices that this process keeps.

        With an automatic format there is none before the first gradient. What is not finite has no
        usable gradient, either.
        """
        if not layer.count:
            return
        assert layer.products is not None
        moment = layer.products / layer.count
        if not bool(moment.isfinite().all()):
            return
        for prefix, state in self._states(layer):
            for name, value in layer.stage.taken(state, moment).items():
                self._optimizer.state[layer.param][prefix + name].copy_(value)

    def _states(self, layer: _Layer) -> list[tuple[str, dict[str, Tensor]]]:
        """(prefix of its keys, what the stage keeps) of each matrix that this process keeps."""
        state, found = self._optimizer.state.get(layer.param, {}), []
        for view in layer.views:
            prefix = view.prefix + RULE_PREFIX
            kept = {name: state.get(prefix + name) for name in layer.stage.state(view.shape)}
            if all(isinstance(value, Tensor) for value in kept.values()):
                found.append((prefix, kept))
        return found

    def _warn_of_silent_layers(self, due: list[_Layer]) -> None:
        silent = [layer for layer in due if not (layer.count or layer.is_silent)]
        # (an expert without tokens has none, either)
        silent = [layer for layer in silent if _has_gradient(layer.param)]
        for layer in silent:
            layer.is_silent = True
        if silent:
            warnings.warn(
                f"layer inputs: {silent[0].name} has read nothing in its turn, and its gradients "
                "are not whitened until it does. Inputs are "
                "collected only where the layer itself is called, in training mode: the output "
                "projection of nn.MultiheadAttention is not",
                stacklevel=3,
            )

    def _resume(self, *_: object) -> None:
        """Go on where the optimizer's state is."""
        states = [self._optimizer.state.get(layer.param, {}) for layer in self._layers]
        counts = [int(state.get("step", 0)) + int(state.get("skipped", 0)) for state in states]
        self._steps = max(counts)


def _has_gradient(param: Tensor) -> bool:
    return param.grad is not None and bool(local_part(param.grad).any())


def attach_layer_inputs(
    model: nn.Module, optimizer: Muon, *, process_group: ProcessGroup | None = None
) -> LayerInputs:
    """Collect what linear layers read, for an optimizer whose rule whitens gradients by it.

    Newton-Muon (arXiv 2604.01472) is such a rule, and steps only with this::

        optimizer = Muon(matrices, rule=newton_muon())
        attach_layer_inputs(model, optimizer)
        ...                          # train as ever

    In every `every`-th step of the rule the product x^T x of what a layer has read since the last
    step is added up in its forward pass, in training mode and where gradients are enabled, with
    gradient accumulation over all its batches. Layers take turns, the first of them in the first
    step, so that few products are held at a time. In other steps nothing is done. What comes of it
    is state of the optimizer: saved, loaded and, where processes share parameters, kept by each
    matrix's owner. Compile a model after attaching; its graph breaks at these layers.

    Args:
        model: owner of the layers, as the optimizer knows it (after `fully_shard`), wrapped in
            DistributedDataParallel if it will be.
        optimizer: a Muon or MuonWithAuxAdam. Copies of it, and what is loaded from a pickle, have
            to be attached anew.
        process_group: processes that train on different data with the same weights, or with parts
            of them (DistributedDataParallel, FSDP2): means are of all of them, and each has to
            step as often as the others.

    Returns what is attached: `layers`, `detach()`. Where it raises, nothing is attached.

    Raises:
        TypeError: arguments of another type.
        ValueError: no group has such a rule; a parameter of it is not the weight of one `nn.Linear`
            of the model; the optimizer has layer inputs already; several processes take part and
            process_group is None.
    """
    if not isinstance(optimizer, Muon):
        raise TypeError(f"optimizer: expected a Muon, got {type(optimizer).__name__}")
    if optimizer.layer_inputs is not None:
        raise ValueError("optimizer: expected one without layer inputs; detach() its own first")
    layers = _find_layers(model, optimizer)
    if not layers:
        raise ValueError(
            "optimizer: expected a group whose rule looks at what layers read, as newton_muon() of "
            "lowbit_muon.step.rules.recipes does, got none"
        )
    params = [layer.param for layer in layers]
    check_process_group(model, optimizer, params, process_group, "means are those of all of them")
    return LayerInputs(optimizer, layers, process_group)


def _find_layers(model: nn.Module, optimizer: Muon) -> list[_Layer]:
    readers: dict[Tensor, list[nn.Linear]] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear):
            readers.setdefault(module.weight, []).append(module)
    layers: list[_Layer] = []
    for group in optimizer.param_groups:
        stage = resolve_rule(group["rule"]).gradient if "rule" in group else None
        if not isinstance(stage, InputWhitened) or group.get("use_muon") is False:
            continue
        for name, param in zip(parameter_names(group), group["params"], strict=True):
            modules = readers.get(param, [])
            if len(modules) != 1:
                raise ValueError(
                    f"parameter {name!r}: expected the weight of one nn.Linear of the model, since "
                    f"its rule looks at what that reads, got that of {len(modules)}; give it "
                    "another rule"
                )
            views = matrix_views(shape_only(param), group)
            layers.append(_Layer(len(layers), name, modules[0], param, stage, views))
    return layers
