"""QK-clip: weights of queries and keys are scaled down where attention logits get too large."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from lowbit_muon.backends.modes import outside_compiled_regions, plain_modes
from lowbit_muon.backends.tensors import is_real_number
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.param_groups import _without_wrappers, _wrapper_prefix
from lowbit_muon.optimizers.qk_attention import (
    FindProjections,
    HeadRows,
    QKProjections,
    find_projections,
    largest_logits,
    recorder_of,
    unwatch,
    watch,
)
from lowbit_muon.optimizers.step_hooks import check_process_group
from lowbit_muon.state.placement import (
    FSDP1_ADVICE,
    in_parts,
    is_of_fsdp1,
    local_part,
    local_shard,
)
from lowbit_muon.state.rounding import Compensation
from lowbit_muon.step.rules.gains import RowGains
from lowbit_muon.step.rules.recipes import resolve_rule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass
class _ScaledParameter:
    """A weight or bias, and the powers of the heads' factors that its outputs are scaled by."""

    name: str
    param: Tensor
    output_dim: int  # the dimension that counts outputs
    parts: list[tuple[HeadRows, float]] = field(default_factory=list)

    def factors(self, gamma: Tensor) -> Tensor:
        """One for each output that this process holds, in float32; gamma: [heads]."""
        outputs = self.param.shape[self.output_dim]
        factors = torch.ones(outputs, dtype=torch.float32, device=gamma.device)
        for rows, exponent in self.parts:
            power = torch.where(gamma == 1, gamma, gamma.pow(exponent))
            runs = (rows.heads, rows.size), (rows.stride or rows.size, 1), rows.start
            factors.as_strided(*runs).copy_(power[:, None])
        shard = local_shard(self.param, 1)
        if self.output_dim:
            return factors[shard.left : shard.right]
        factors = factors[shard.top : shard.bottom]
        return factors if self.param.ndim == 1 else factors[:, None]

    def scale(self, gamma: Tensor, state: Mapping[str, Any]) -> None:
        """Scale the weights, with what rounding left over of them, if the state keeps that."""
        local = local_part(self.param)
        factors = self.factors(gamma.to(local.device))
        remainder = state.get("remainder")
        if remainder is None:
            local.mul_(factors)
        else:
            Compensation(remainder).scale(local, factors)


@dataclass
class _Layer:
    """An attention layer: its largest logits since the last step, and what is scaled by them."""

    name: str
    module: nn.Module
    heads: int
    key_heads: int
    scaled: list[_ScaledParameter]
    largest: Tensor  # float32 [heads], -inf where nothing was seen
    was_recorded: bool = False

    def clip(self, threshold: float, states: Mapping[Tensor, Any]) -> None:
        """Scale the weights, unless the host can see that there is nothing to do."""
        gamma = head_factors(self.largest, threshold)
        if _on_host(gamma) and bool((gamma == 1).all()):
            return
        for scaled in self.scaled:
            scaled.scale(gamma, states.get(scaled.param, {}))


def _on_host(tensor: Tensor) -> bool:
    """Whether the host waits for nothing when it reads this."""
    return tensor.is_cpu


def head_factors(largest: Tensor, threshold: float) -> Tensor:
    """threshold / largest where that is below one, and exactly one elsewhere; float32 [heads].

    One, too, for logits that are inf or nan: their step has no usable gradient.
    """
    return torch.where(_is_clipped(largest, threshold), threshold / largest, 1.0)


def _is_clipped(largest: Tensor, threshold: float) -> Tensor:
    return (largest > threshold) & largest.isfinite()


class QKClip:
    """Clips attention logits after each step of an optimizer; made by `attach_qk_clip`."""

    def __init__(
        self,
        optimizer: Optimizer,
        layers: list[_Layer],
        threshold: float,
        process_group: ProcessGroup | None,
    ) -> None:
        self._optimizer = optimizer
        self._layers = {layer.name: layer for layer in layers}
        self._of_module = {layer.module: layer for layer in layers}
        self._threshold = threshold
        self._process_group = process_group
        self._last: dict[str, Tensor] = {}
        self._steps = 0
        watch(self._of_module, self)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    @property
    def layers(self) -> list[str]:
        """Names of the attention layers that are clipped."""
        return list(self._layers)

    @property
    def max_logits(self) -> dict[str, Tensor]:
        """The largest logit of each head before the last step, before clipping; empty before one.

        By the layer's name, float32 [heads], on the layer's device; -inf where no logit was seen.
        """
        return dict(self._last)

    @property
    def clipped_heads(self) -> int:
        """How many heads the last step clipped. On a GPU the host waits for it."""
        return sum(int(_is_clipped(last, self._threshold).sum()) for last in self._last.values())

    def detach(self) -> None:
        """Take everything away again: weights are clipped no more."""
        self._handle.remove()
        unwatch([module for module in self._of_module if recorder_of(module) is self])

    @outside_compiled_regions
    def record(
        self,
        layer: str | nn.Module,
        query: Tensor,
        key: Tensor,
        *,
        scale: float | None = None,
        causal: bool = False,
        mask: Tensor | None = None,
        window: int | None = None,
    ) -> None:
        """Look for the largest logits of a layer; to be called in its forward pass.

        transformers' models do so by themselves. Costs the product of queries and keys once more,
        in blocks that are not kept; the host waits for nothing. A layer in evaluation mode, or
        without gradients, is passed over. In a region of torch.compile the graph breaks here.

        Args:
            layer: the attention module, or its name.
            query: [batch, heads, queries, size], as it is multiplied with the keys (after RoPE).
            key: [batch, key heads, keys, size].
            scale: of the logits; default size ** -0.5.
            causal: query i of n sees keys up to i + (keys - n).
            mask: bool, True where a key is seen, or float, added to logits; [batch or 1, heads or
                1, queries, keys] or, of keys alone, [batch, keys]. What an additive mask lowers by
                10,000 and more is hidden; less makes no difference here. With as many keys as
                queries a position that no query sees is padding, and its own query left out.
            window: query i sees no keys up to i - window.

        Raises ValueError for a layer that is not clipped here, or other sizes than its own;
        TypeError for a mask that is no tensor, as flex attention's.
        """
        found = self._layers.get(layer) if isinstance(layer, str) else self._of_module.get(layer)
        if found is None:
            given = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
            raise ValueError(f"layer: expected one of {self.layers} or its module, got {given}")
        if not (found.module.training and torch.is_grad_enabled()):
            return
        _check_logits(found, query, key, scale, causal, mask)
        with torch.no_grad():
            new = largest_logits(query, key, scale=scale, causal=causal, mask=mask, window=window)
            found.largest = torch.maximum(found.largest.to(new.device), new)
        found.was_recorded = True

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        self._steps += 1
        if self._steps == 2:  # the first may have been one that only makes states
            self._warn_of_silent_layers()
        with plain_modes():
            if self._process_group is not None:
                self._share(self._process_group)
            for name, layer in self._layers.items():
                self._last[name] = layer.largest
                layer.clip(self._threshold, self._optimizer.state)
                layer.largest = torch.full_like(layer.largest, -torch.inf)

    def _share(self, group: ProcessGroup) -> None:
        """The largest logits of all processes, in one exchange."""
        layers = list(self._layers.values())
        device = layers[0].largest.device
        largest = torch.cat([layer.largest.to(device) for layer in layers])
        largest.nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)  # nan has no order
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        parts = largest.split([layer.heads for layer in layers])
        for layer, part in zip(layers, parts, strict=True):
            layer.largest = part.clone()

    def _warn_of_silent_layers(self) -> None:
        silent = [name for name, layer in self._layers.items() if not layer.was_recorded]
        if silent:
            warnings.warn(
                f"QK-clip: {silent[0]} ({len(silent)} of {len(self._layers)} layers) has reported "
                "no logits in two steps and is not clipped. transformers' models report where they "
                "use its attention interface, and in training mode; other layers have to call "
                "record() in their forward pass",
                stacklevel=2,
            )


def attach_qk_clip(
    model: nn.Module,
    optimizer: Optimizer,
    threshold: float = 100.0,
    *,
    alpha: float = 0.5,
    find: FindProjections = find_projections,
    process_group: ProcessGroup | None = None,
) -> QKClip:
    """Keep attention logits below `threshold` by scaling weights after each step (MuonClip).

    QK-clip of Kimi K2 (arXiv 2507.20534, section 2.1): where the largest logit S of a head, since
    the last step and after the softmax's scale, is above the threshold t, its queries and keys are
    scaled by gamma = t / S in product. Heads below it keep their weights bit for bit::

        clip = attach_qk_clip(model, optimizer)
        ...                          # train as ever
        clip.max_logits, clip.clipped_heads

    - MHA: queries take gamma ** alpha, keys gamma ** (1 - alpha).
    - MLA: the same for the parts without position; the rotary queries take gamma and the rotary
      key, which the heads share, stays as it is.
    - GQA and MQA: the paper has no rule. A key head that several query heads share stays as it is,
      as MLA's shared key does, and each query head takes its own gamma. Megatron-LM scales all
      heads of a group by the smallest gamma, and with it heads that are below the threshold.

    Biases are scaled with the weights, and with `Muon(compensation=True)` what rounding left over
    of the weights, too. The momentum stays as it is. Nothing makes the host wait for a GPU.

    transformers' models (5.1 and newer) report their logits by themselves, with eager, SDPA or
    FlashAttention: the method `get_interface` of its `AttentionInterface` is replaced while any
    clip is attached. Their configuration stays as it is. (In FlashAttention, logits between
    sequences that are packed into one row count, too.) Attention of your own calls
    `clip.record(self, query, key, causal=True)` in its forward pass. All forward passes in training
    mode since the last step count, with gradient accumulation those of all its batches. Compile a
    model after attaching; its graph breaks where logits are recorded.

    Args:
        model: owner of the attention layers, as the optimizer knows it (after `fully_shard`).
        optimizer: any of torch's; it has to have the weights of the projections. Copies of it, and
            what is loaded from a pickle, do not clip.
        threshold: of the logits, > 0. Kimi K2 takes 100.
        alpha: the queries' share of a clip, in [0, 1]; 0.5 in the paper.
        find: a function of name and module that returns the `QKProjections` of an attention layer
            and None for all others. The default knows common models of transformers.
        process_group: processes that train on different data with the same weights, or with parts
            of them (DistributedDataParallel, FSDP2): the largest logit is that of all. Each
            of them has to step as often as the others.

    Returns the attached clip: `max_logits`, `clipped_heads`, `record()`, `detach()`.
    Where it raises, nothing is attached.

    Raises:
        TypeError: arguments, or projections, of another type.
        ValueError: no attention layer was found; threshold or alpha are out of range; queries or
            keys are normalised behind their projections (Qwen3); heads do not fit a projection; a
            weight is frozen, not the optimizer's, flattened by FSDP1 or shared by two layers, or
            its rule has gains of rows (muown), which would undo the clip; a layer has a clip
            already; several processes take part and process_group is None, or Muon keeps
            `compensation` of weights of which each process has a copy.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected a torch Optimizer, got {type(optimizer).__name__}")
    if not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise TypeError(
            f"optimizer: expected one with hooks of its own, got {type(optimizer).__name__}, which "
            "wraps one (Accelerate's has it as .optimizer)"
        )
    if not (is_real_number(threshold) and float(threshold) > 0):
        raise ValueError(f"threshold: expected a number > 0, got {threshold!r}")
    if not (is_real_number(alpha) and 0 <= float(alpha) <= 1):
        raise ValueError(f"alpha: expected a number in [0, 1], got {alpha!r}")
    layers = list(_find_layers(model, find, float(alpha)))
    if not layers:
        raise ValueError(
            f"model: expected attention layers with projections that are known, got none in "
            f"{type(model).__name__}; say where they are with find=..."
        )
    _check_parameters(layers, optimizer)
    _check_processes(model, optimizer, layers, process_group)
    return QKClip(optimizer, layers, float(threshold), process_group)


def _find_layers(model: nn.Module, find: FindProjections, alpha: float) -> Iterator[_Layer]:
    prefix = _wrapper_prefix(model)
    for path, module in model.named_modules():
        name = _without_wrappers(path, prefix) or type(module).__name__
        found = find(name, module)
        if found is None:
            continue
        if not isinstance(found, QKProjections):
            raise TypeError(
                f"{name}: expected QKProjections or None from find, got {type(found).__name__}"
            )
        if recorder_of(module) is not None:
            raise ValueError(f"{name}: expected a layer without QK-clip; detach() its own first")
        yield _make_layer(name, module, found, alpha)


def _make_layer(name: str, module: nn.Module, found: QKProjections, alpha: float) -> _Layer:
    query, key, rotary = found.query, found.key, found.query_rotary
    for role, rows in ("query", query), ("key", key), ("query_rotary", rotary):
        if rows is not None:
            _check_rows(f"{name}: {role}", rows)
    if query.heads % key.heads or (rotary is not None and rotary.heads != query.heads):
        raise ValueError(
            f"{name}: expected a number of key heads that divides that of query heads, and as many "
            f"rotary ones, got {query.heads} query, {key.heads} key"
            + ("" if rotary is None else f" and {rotary.heads} rotary heads")
        )
    shared = key.heads < query.heads
    parts = [(query, 1.0)] if shared else [(query, alpha), (key, 1 - alpha)]
    if rotary is not None:
        parts.append((rotary, 1.0))
    scaled: dict[Tensor, _ScaledParameter] = {}
    for rows, exponent in parts:
        for own_name, param, dim in _parameters(rows.projection):
            full_name = f"{name}.{_name_in(module, rows.projection)}.{own_name}"
            one = scaled.setdefault(param, _ScaledParameter(full_name, param, dim))
            one.parts.append((rows, exponent))
    device = local_part(next(iter(scaled)).detach()).device
    largest = torch.full((query.heads,), -torch.inf, dtype=torch.float32, device=device)
    return _Layer(name, module, query.heads, key.heads, list(scaled.values()), largest)


def _parameters(projection: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """(own name, parameter, dimension of its outputs) of a projection."""
    weight, bias = projection.weight, projection.bias
    assert isinstance(weight, Tensor)
    yield "weight", weight, 0 if isinstance(projection, nn.Linear) else 1
    if isinstance(bias, Tensor):
        yield "bias", bias, 0


def _name_in(module: nn.Module, projection: nn.Module) -> str:
    names = (name for name, child in module.named_modules() if child is projection)
    return next(names, type(projection).__name__)


def _check_rows(place: str, rows: HeadRows) -> None:
    """Raise for projections that cannot be scaled, and heads that do not fit them."""
    if not isinstance(rows, HeadRows):
        raise TypeError(f"{place}: expected HeadRows, got {type(rows).__name__}")
    projection = rows.projection
    if not isinstance(projection, nn.Linear) and type(projection).__name__ != "Conv1D":
        raise TypeError(
            f"{place}: expected a projection that is an nn.Linear or transformers' Conv1D, got "
            f"{type(projection).__module__}.{type(projection).__name__}"
        )
    weight = projection._parameters.get("weight")
    if weight is None or not weight.is_floating_point() or weight.ndim != 2:
        raise TypeError(
            f"{place}: expected a projection with a weight of its own, two-dimensional and floating"
            f" point, got {'none' if weight is None else f'{weight.dtype} {tuple(weight.shape)}'}"
        )
    sizes = (rows.heads, rows.size, rows.start + 1, rows.stride or rows.size)
    outputs = weight.shape[0 if isinstance(projection, nn.Linear) else 1]
    end = rows.start + (rows.heads - 1) * sizes[3] + rows.size
    if min(sizes) < 1 or sizes[3] < rows.size or end > outputs:
        raise ValueError(
            f"{place}: expected heads within the {outputs} outputs of its projection, got "
            f"{rows.heads} of {rows.size}, {sizes[3]} apart, from {rows.start} on"
        )


def _check_parameters(layers: list[_Layer], optimizer: Optimizer) -> None:
    groups = {param: group for group in optimizer.param_groups for param in group["params"]}
    seen: dict[Tensor, str] = {}
    for layer in layers:
        for scaled in layer.scaled:
            name, param = scaled.name, scaled.param
            if is_of_fsdp1(param):
                raise ValueError(f"{name}: {FSDP1_ADVICE}")
            if not param.requires_grad:
                raise ValueError(f"{name}: expected a parameter that is trained, got a frozen one")
            if param.ndim == 2 and param not in groups:
                raise ValueError(f"{name}: expected a parameter of the optimizer, got another one")
            rule = groups[param].get("rule") if param in groups else None
            if isinstance(optimizer, Muon) and rule and _restores_rows(rule):
                raise ValueError(
                    f"{name}: expected a rule that takes weights as they are, got "
                    f"'{rule['name']}', whose gains would bring their rows back"
                )
            if param in seen:
                raise ValueError(
                    f"{name}: expected a parameter of one layer, got one that is {seen[param]}, too"
                )
            seen[param] = name


def _restores_rows(rule: Mapping[str, Any]) -> bool:
    return isinstance(resolve_rule(rule).gains, RowGains)


def _check_processes(
    model: nn.Module, optimizer: Optimizer, layers: list[_Layer], process_group: object
) -> None:
    scaled = [scaled for layer in layers for scaled in layer.scaled]
    shared = isinstance(optimizer, Muon) and optimizer.is_shared()
    params = [one.param for one in scaled]
    check_process_group(model, optimizer, params, process_group, "all have to clip alike")
    options = {param: group for group in optimizer.param_groups for param in group["params"]}
    for one in scaled:
        compensated = options.get(one.param, {}).get("compensation", False)
        copied = shared and not in_parts(one.param)
        if compensated and copied and Compensation.applies_to(one.param):
            raise ValueError(
                f"{one.name}: expected no compensation where processes have copies of a weight, "
                "since only one of them keeps what rounding left over, and the copies would differ"
            )


def _check_logits(
    layer: _Layer, query: Tensor, key: Tensor, scale: object, causal: bool, mask: object
) -> None:
    sizes = tuple(query.shape), tuple(key.shape)
    fits = len(sizes[0]) == len(sizes[1]) == 4 and sizes[0][::3] == sizes[1][::3]
    if not (fits and sizes[0][1] == layer.heads and sizes[1][1] in (layer.key_heads, layer.heads)):
        raise ValueError(
            f"{layer.name}: expected queries [batch, {layer.heads}, positions, size] and keys "
            f"[batch, {layer.key_heads}, positions, size], got {sizes[0]} and {sizes[1]}"
        )
    if causal and query.shape[2] > key.shape[2]:
        raise ValueError(
            f"{layer.name}: expected at least as many keys as causal queries, got {sizes[1]} for "
            f"{sizes[0]}"
        )
    if scale is not None and not (is_real_number(scale) and float(scale) > 0):
        raise ValueError(f"{layer.name}: expected a scale > 0, got {scale!r}")
    if mask is not None and not isinstance(mask, Tensor):
        raise TypeError(
            f"{layer.name}: expected a mask that is a tensor, got {type(mask).__name__}; of "
            "transformers' attention, eager, SDPA and FlashAttention can be clipped"
        )
    if mask is not None:
        whole = sizes[0][:3] + sizes[1][2:3]
        shape = tuple(mask.shape) if mask.ndim != 2 else (mask.shape[0], 1, 1, mask.shape[1])
        if len(shape) != 4 or any(size not in (1, n) for size, n in zip(shape, whole, strict=True)):
            raise ValueError(
                f"{layer.name}: expected a mask that fits logits of size {whole}, got "
                f"{tuple(mask.shape)}"
            )
