"""Where attention layers keep their queries and keys, and how large their logits get."""

from __future__ import annotations

import functools
import re
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit_muon.backends.modes import outside_compiled_regions

# Logits that exist at a time while the largest is looked for: 16 MiB in float32.
_BLOCK_LOGITS = 2**22
# An additive mask hides what it lowers by this much: models add -1e4, -1e9 or their dtype's least.
_HIDING_BIAS = -1e4
# What models call a norm between the projections and the logits.
_QK_NORM = re.compile(r"^(q|k|qk|query|key)(_head)?_?(layer_?)?norm")
_HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head")


@dataclass(frozen=True)
class HeadRows:
    """Outputs of a projection that belong to heads: `heads` runs of `size`, `stride` apart.

    Attributes:
        projection: nn.Linear (outputs are the rows of its weight) or transformers' Conv1D
            (columns). A bias is scaled with the weight.
        heads: number of heads.
        size: outputs of a head.
        start: the first head's first output.
        stride: from one head's first to the next one's; None for heads that lie side by side, which
            is `size`.
    """

    projection: nn.Module
    heads: int
    size: int
    start: int = 0
    stride: int | None = None


@dataclass(frozen=True)
class QKProjections:
    """What makes the queries and keys of one attention layer, for `attach_qk_clip(find=...)`.

    Attributes:
        query: the queries' heads.
        key: with as many heads as the queries, or fewer (GQA), whose number divides theirs: query
            head h then sees key head h // (query heads / key heads).
        query_rotary: the part of each query that meets a key which all heads share, as the rotary
            part of multi-head latent attention (MLA).
    """

    query: HeadRows
    key: HeadRows
    query_rotary: HeadRows | None = None


FindProjections = Callable[[str, nn.Module], QKProjections | None]


def find_projections(name: str, module: nn.Module) -> QKProjections | None:
    """The projections of an attention layer of a common model; None for any other module.

    Known are `q_proj` and `k_proj`, or `query` and `key`, side by side (Llama, Mistral, Qwen2, OPT,
    Whisper, BERT, ViT); MLA as DeepSeek-V2, V3 and Kimi K2 have it; and the fused projections of
    GPT-2, Phi-3 and GPT-NeoX.

    Raises ValueError, naming the module, where queries or keys are normalised (Qwen3, Gemma 3,
    OLMo 2): their logits do not depend on the scale of the weights.
    """
    found = _find(module)
    if found is None:
        return None
    norms = [child for child, _ in module.named_children() if _QK_NORM.match(child)]
    if norms:
        raise ValueError(
            f"{name}: expected queries and keys that grow with their weights, got "
            f"{type(module).__name__} with {' and '.join(norms)}, behind which the weights' scale "
            "makes no difference; leave such layers out with find=..., they need no clipping"
        )
    return found


def _find(module: nn.Module) -> QKProjections | None:
    fused = _FUSED.get(type(module).__name__)
    if fused is not None:
        return fused(module)
    children = dict(module.named_children())  # wrappers pass on attributes, but not children
    if "kv_b_proj" in children and hasattr(module, "qk_rope_head_dim"):
        return _latent(module)
    for query, key in (("q_proj", "k_proj"), ("query", "key")):
        if query in children and key in children:
            return _separate(module, children[query], children[key])
    return None


def _separate(module: nn.Module, query: Any, key: Any) -> QKProjections | None:
    outputs = getattr(query, "out_features", 0), getattr(key, "out_features", 0)
    size = _first_int(module, _HEAD_SIZES)
    if not size:
        size = outputs[0] // (_first_int(module, _HEAD_COUNTS) or 1)
    heads = [count // size for count in outputs]
    if not size or min(heads) < 1:
        return None
    return QKProjections(HeadRows(query, heads[0], size), HeadRows(key, heads[1], size))


def _latent(module: Any) -> QKProjections:
    """Each head's query is [without position, rotary], and of kv_b_proj's outputs [key, value]."""
    plain, rotary = module.qk_nope_head_dim, module.qk_rope_head_dim
    query = module.q_proj if getattr(module, "q_b_proj", None) is None else module.q_b_proj
    heads = query.out_features // (plain + rotary)
    return QKProjections(
        HeadRows(query, heads, plain, 0, plain + rotary),
        HeadRows(module.kv_b_proj, heads, plain, 0, plain + module.v_head_dim),
        HeadRows(query, heads, rotary, plain, plain + rotary),
    )


def _gpt2(module: Any) -> QKProjections:
    heads, size = module.num_heads, module.head_dim
    if module.is_cross_attention:  # keys and values of the encoder
        return QKProjections(
            HeadRows(module.q_attn, heads, size), HeadRows(module.c_attn, heads, size)
        )
    return _side_by_side(module.c_attn, heads, heads, size)


def _phi3(module: Any) -> QKProjections:
    config = module.config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    return _side_by_side(module.qkv_proj, heads, key_heads, module.head_dim)


def _side_by_side(projection: nn.Module, heads: int, key_heads: int, size: int) -> QKProjections:
    """All queries, then all keys, then all values."""
    return QKProjections(
        HeadRows(projection, heads, size), HeadRows(projection, key_heads, size, heads * size)
    )


def _gpt_neox(module: Any) -> QKProjections:
    """Query, key and value of one head, then those of the next."""
    size, projection = module.head_size, module.query_key_value
    heads = module.config.num_attention_heads
    return QKProjections(
        HeadRows(projection, heads, size, 0, 3 * size),
        HeadRows(projection, heads, size, size, 3 * size),
    )


# By their classes: others give the same names to other orders.
_FUSED: dict[str, Callable[[Any], QKProjections]] = {
    "GPT2Attention": _gpt2,
    "DecisionTransformerGPT2Attention": _gpt2,
    "Phi3Attention": _phi3,
    "GPTNeoXAttention": _gpt_neox,
}


def _first_int(module: nn.Module, names: tuple[str, ...]) -> int | None:
    found = (getattr(module, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)


# Logits


def largest_logits(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """The largest logit of each head, scale * q·k over all batches and positions that are seen.

    At most a block of 16 MiB of logits exists at a time, or those of one query position.

    Args:
        query: [batch, heads, queries, size], any float dtype; products are in it, those of float16
            in float32.
        key: [batch, key heads, keys, size].
        scale: positive; default size ** -0.5.
        causal: query i of n sees keys up to i + (keys - n).
        mask: bool (True is seen) or additive (float), [batch or 1, heads or 1, queries, keys], or
            [batch, keys]. An additive mask only hides: what it adds is not the weights' doing.
            With as many keys as queries, a position that no query sees is padding as a query, too.
        window: query i sees no keys up to i - window.

    Returns float32 [heads], -inf for heads without anything to see.
    """
    batch, heads, rows, size = query.shape
    columns, shift = key.shape[2], key.shape[2] - rows
    query, key = query.detach(), key.detach().transpose(-1, -2)
    if query.dtype == torch.float16:
        query, key = query.float(), key.float()
    seen = None if mask is None else _seen(mask, rows, columns)
    found = torch.full((heads,), -torch.inf, dtype=torch.float32, device=query.device)
    if not batch * rows * columns:
        return found
    height = max(1, _BLOCK_LOGITS // (batch * heads * columns))
    with torch.autocast(query.device.type, enabled=False):
        for start in range(0, rows, height):
            stop = min(start + height, rows)
            last = stop + shift if causal else columns
            # Heads that share a key are rows of one product.
            block = query[:, :, start:stop].reshape(batch, key.shape[1], -1, size)
            logits = (block @ key[..., :last]).view(batch, heads, stop - start, last)
            if seen is not None:
                logits.masked_fill_(~seen[:, :, start:stop, :last], -torch.inf)
            if causal or window is not None:
                hidden = _hidden(start + shift, stop + shift, last, causal, window, query.device)
                logits.masked_fill_(hidden, -torch.inf)
            found = torch.maximum(found, logits.amax((0, 2, 3)).float())
    return found * (size**-0.5 if scale is None else scale)


def _seen(mask: Tensor, rows: int, columns: int) -> Tensor:
    """A mask as bool [batch or 1, heads or 1, queries, keys]."""
    seen = mask > _HIDING_BIAS if mask.is_floating_point() else mask != 0
    if mask.ndim == 2:  # of keys alone
        seen = seen[:, None, None, :]
    seen = seen.expand(-1, -1, rows, -1)
    if rows == columns:
        seen = seen & seen.any(-2)[..., None]
    return seen


def _hidden(
    start: int, stop: int, last: int, causal: bool, window: int | None, device: torch.device
) -> Tensor:
    """Which keys before `last` the queries at these places do not see; bool [queries, keys]."""
    query = torch.arange(start, stop, device=device)[:, None]
    key = torch.arange(last, device=device)
    hidden = key > query if causal else torch.zeros_like(key > query)
    return hidden if window is None else hidden | (key <= query - window)


# transformers


class Recorder(Protocol):
    """What is told of the queries and keys of a layer."""

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
    ) -> None: ...


# Keeps neither alive: nothing is left of models that were dropped. Copies of them have no recorder.
_recorders: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Recorder]] = (
    weakref.WeakKeyDictionary()
)
_replaced: dict[type, Callable[..., Any]] = {}  # methods of transformers, while any is attached


def recorder_of(module: nn.Module) -> Recorder | None:
    """Who is told of this attention layer."""
    found = _recorders.get(module)
    return None if found is None else found()


def watch(modules: Iterable[nn.Module], recorder: Recorder) -> None:
    """Tell `recorder` of each forward pass of these attention layers in training.

    It is told by transformers' attention interface, which all of its newer models call with their
    queries and keys, after RoPE and whatever the implementation; other layers tell it themselves.
    """
    _recorders.update(dict.fromkeys(modules, weakref.ref(recorder)))
    weakref.finalize(recorder, _put_back).atexit = False
    interface = getattr(sys.modules.get("transformers.modeling_utils"), "AttentionInterface", None)
    original = getattr(interface, "get_interface", None)
    if interface is None or original is None or interface in _replaced:
        return

    @functools.wraps(original)
    def get_interface(self: Any, implementation: str, default: Callable[..., Any]) -> Any:
        function = original(self, implementation, default)
        return functools.partial(_attend, function, implementation)

    _replaced[interface] = original
    interface.get_interface = get_interface


def unwatch(modules: Iterable[nn.Module]) -> None:
    """End `watch`."""
    for module in modules:
        _recorders.pop(module, None)
    _put_back()


def _put_back() -> None:
    """Give transformers its method back, if nobody is told of any layer."""
    if any(recorder() is not None for recorder in _recorders.values()):
        return
    for interface, original in _replaced.items():
        interface.get_interface = original  # type: ignore[attr-defined]
    _replaced.clear()


def _attend(
    function: Callable[..., Any],
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    *args: Any,  # value and attention_mask
    **kwargs: Any,
) -> Any:
    """An attention function of transformers, with its largest logits recorded."""
    if module.training and torch.is_grad_enabled():
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        _report(implementation, module, query, key, mask, kwargs)
    return function(module, query, key, *args, **kwargs)


@outside_compiled_regions
def _report(
    implementation: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
) -> None:
    recorder = recorder_of(module)
    if recorder is None:
        return
    flash = "flash" in (implementation or "")
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    # FlashAttention orders time itself, SDPA where there is no mask, and "eager" by masks alone.
    ordered = flash or (mask is None and implementation != "eager")
    causal = bool(causal) and ordered and query.shape[2] > 1
    if causal and not flash:
        key = key[:, :, : query.shape[2]]  # as transformers does for torch's attention
    if isinstance(mask, Tensor) and mask.ndim == 2:  # FlashAttention's, with ones for what is seen
        mask = mask != 0
    window = kwargs.get("sliding_window") if flash else None
    scale = kwargs.get("scaling")
    recorder.record(module, query, key, scale=scale, causal=causal, mask=mask, window=window)
