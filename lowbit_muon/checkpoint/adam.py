"""An AdamW parameter's state: checked, copied, or converted between exact and 8-bit.

Entries, with the parameter's shape unless stated:
  exact       step, exp_avg, exp_avg_sq                torch.optim.AdamW, KellerJordan
  8 bits      step, state1, state2 uint8; qmap1, qmap2 float32 [256]; absmax1, absmax2 float32, one
              for each 256 elements; value = qmap[code] * absmax            bitsandbytes
  small       step, state1, state2 float32             bitsandbytes below 4096 elements
  Moonlight   use_muon, step, moment1, moment2
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit_muon.backends.tensors import accumulation_dtype, check_tensor, holds_values
from lowbit_muon.checkpoint.dicts import SavedState, State, own_copy, whole_number

BLOCK_SIZE = 256  # bitsandbytes, optim/optimizer.py
_SLACK = 1.01  # for rounding in bfloat16
_MOMENT_NAMES = (("exp_avg", "exp_avg_sq"), ("state1", "state2"), ("moment1", "moment2"))
_CODE_ENTRIES = ("qmap1", "qmap2", "absmax1", "absmax2")


@dataclass(frozen=True)
class Moments:
    """AdamW's state in full precision: float32 or float64, the parameter's shape."""

    step: int
    first: Tensor
    second: Tensor


def convert_adam(param: Tensor, saved: SavedState, fresh: State) -> State:
    """`fresh`, the state of a parameter before its first step, filled with what was saved.

    The same layout is copied bit for bit. Raises ValueError; returns {} if nothing was saved yet.
    """
    entries = dict(saved.entries)
    skipped = whole_number("skipped", entries.pop("skipped", 0))
    if entries.pop("use_muon", False) is not False:
        raise ValueError("use_muon: expected False, got True")
    if not entries:
        return {}
    moments = read_moments(param, entries)
    _check_range(moments, _names(entries), fresh[_names(fresh)[0]].dtype)
    state = {**fresh, "skipped": skipped}
    if isinstance(fresh["step"], Tensor):
        fresh["step"].fill_(moments.step)
    else:
        state["step"] = moments.step
    stored = [name for name in fresh if name in (*_names(fresh), *_CODE_ENTRIES)]
    if all(_same_layout(entries.get(name), fresh[name]) for name in stored):
        for name in stored:
            if not name.startswith("qmap"):
                fresh[name].copy_(entries[name].detach())
            elif not torch.equal(entries[name].to(param.device), fresh[name]):
                # All parameters share one codebook; another version might have another.
                state[name] = own_copy(entries[name], param.device)
        return state
    for index, values in enumerate((moments.first, moments.second)):
        target = fresh[_names(fresh)[index]]
        if target.dtype == torch.uint8:
            number = index + 1
            _store_8bit(values, target, fresh[f"qmap{number}"], fresh[f"absmax{number}"])
        else:
            target.copy_(values)
    return state


def read_moments(param: Tensor, entries: Mapping[str, Any]) -> Moments:
    """The moments in any of the layouts. Raises ValueError naming the entry."""
    names = _names(entries)
    coded = isinstance(entries[names[0]], Tensor) and entries[names[0]].dtype == torch.uint8
    expected = {"step", *names, *(_CODE_ENTRIES if coded else ())}
    if set(entries) - {"skipped"} != expected:
        raise ValueError(f"expected entries {sorted(expected)}, got {sorted(map(str, entries))}")
    values = []
    for name, index in zip(names, "12", strict=True):
        value = entries[name]
        if coded:
            value = _load_8bit(param, name, entries, index)
        elif not holds_values(value) or value.shape != param.shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{name}: expected shape {tuple(param.shape)}, got {got}")
        elif not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{name}: expected finite floating point values, got others")
        wide = value.dtype == torch.float64
        dtype = accumulation_dtype(param.device) if wide else torch.float32
        values.append(value.detach().to(param.device, dtype))
    first, second = values
    if bool((second < 0).any()):
        raise ValueError(f"{names[1]}: expected values >= 0, got {float(second.min())}")
    return Moments(whole_number("step", entries["step"]), first, second)


def _check_range(moments: Moments, names: tuple[str, str], dtype: torch.dtype) -> None:
    """Raise ValueError for moments that no gradient whose square is finite can leave.

    dtype: of the moments that they become; 8 bits are decoded to float32.
    """
    largest = torch.finfo(dtype if dtype.is_floating_point else torch.float32).max
    limits = (math.sqrt(largest) * _SLACK, largest)
    for name, values, limit in zip(names, (moments.first, moments.second), limits, strict=True):
        found = float(torch.linalg.vector_norm(values, math.inf)) if values.numel() else 0.0
        if not found <= limit:
            raise ValueError(f"{name}: expected values up to {limit:g}, got {found:g}")


def _names(entries: Mapping[str, Any]) -> tuple[str, str]:
    for names in _MOMENT_NAMES:
        if set(names) <= set(entries):
            return names
    raise ValueError(f"expected the moments of AdamW, got {sorted(map(str, entries))}")


def _same_layout(saved: object, fresh: Tensor) -> bool:
    return isinstance(saved, Tensor) and saved.dtype == fresh.dtype and saved.shape == fresh.shape


def _load_8bit(param: Tensor, name: str, entries: Mapping[str, Any], index: str) -> Tensor:
    blocks = -(-param.numel() // BLOCK_SIZE)
    codes = check_tensor(name, entries[name], torch.uint8, tuple(param.shape))
    qmap = check_tensor(f"qmap{index}", entries[f"qmap{index}"], torch.float32, (256,))
    absmax = check_tensor(f"absmax{index}", entries[f"absmax{index}"], torch.float32, (blocks,))
    for entry, values in ((f"qmap{index}", qmap), (f"absmax{index}", absmax)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{entry}: expected finite values, got inf or nan")
    if bool((qmap.diff() < 0).any()) or bool((qmap.abs() > 1).any()):
        raise ValueError(f"qmap{index}: expected ascending values from -1 to 1, got others")
    if bool((absmax < 0).any()):
        raise ValueError(f"absmax{index}: expected values >= 0, got {float(absmax.min())}")
    scales = absmax.repeat_interleave(BLOCK_SIZE)[: param.numel()]
    return (qmap[codes.flatten().long()] * scales).view(param.shape)


def _store_8bit(values: Tensor, codes: Tensor, qmap: Tensor, absmax: Tensor) -> None:
    from bitsandbytes.functional import quantize_blockwise

    found, state = quantize_blockwise(values.float().contiguous(), code=qmap, blocksize=BLOCK_SIZE)
    codes.copy_(found)
    absmax.copy_(state.absmax)
