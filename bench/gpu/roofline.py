"""Estimates on paper: bytes and operations of a step's kernels against an H100's limits.

    python -m bench.gpu.roofline          the tables of guides/gpu.md, in Markdown

Nothing here was measured. The step itself runs on tensors without data (device "meta"), over a
backend that computes nothing and writes down what each call has to read, write and multiply;
torch's own operations in between are counted by what they read and write. A kernel cannot be faster
than the larger of bytes/bandwidth and operations/rate; real ones reach a part of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit_muon import PRESETS, Muon
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.formats.codebook import Codebook, CodeLayout

Unit = Literal["int8", "float16", "tf32x3", "float32", "none"]

# NVIDIA H100 SXM5, data sheet (https://www.nvidia.com/en-us/data-center/h100/): bytes and dense
# operations a second. Three TF32 products stand for one of float32.
BANDWIDTH = 3.35e12
RATES: dict[Unit, float] = {
    "int8": 1979e12,
    "float16": 989e12,
    "tf32x3": 495e12 / 3,
    "float32": 67e12,
    "none": math.inf,
}


@dataclass
class Work:
    """What one kind of kernel does in a step."""

    unit: Unit = "none"
    calls: int = 0
    bytes: int = 0
    operations: int = 0

    @property
    def seconds(self) -> float:
        """The least time it can take."""
        return max(self.bytes / BANDWIDTH, self.operations / RATES[self.unit])


@dataclass
class Ledger:
    """Work by kernel."""

    work: dict[str, Work] = field(default_factory=dict)

    def add(self, name: str, unit: Unit, operations: int, *tensors: Tensor | None) -> None:
        """Count one call that reads or writes each of these tensors once."""
        entry = self.work.setdefault(name, Work(unit))
        entry.calls += 1
        entry.operations += operations
        entry.bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)

    @property
    def seconds(self) -> float:
        """The least time of all kernels, one after another."""
        return sum(entry.seconds for entry in self.work.values())


def _unit(x: Tensor) -> Unit:
    return "tf32x3" if x.dtype == torch.float32 else "float16"


class PaperBackend(Backend):
    """Computes nothing; writes down what it would have to do."""

    name = "paper"
    asynchronous = True
    rounded_dtype = torch.float16

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def accumulate(self, buffer: Tensor, terms: Terms) -> Tensor:
        packed = None if terms.codes is None else terms.codes.packed
        weight = terms.buffer_weight
        read = buffer if isinstance(weight, Tensor) or weight else None
        self.ledger.add("accumulate", "none", 0, read, buffer, packed, terms.grad)
        return torch.empty(buffer.shape[:-1], dtype=torch.float64, device="meta")

    def update_codes(
        self, terms: Terms, *, packed: Tensor, scales: Tensor, out: Tensor | None = None,
        out_weights: tuple[float, float] = (1.0, 0.0),
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        codes, grad = terms.codes_and_grad()
        self.ledger.add("update_codes", "none", 0, codes.packed, grad, packed, out)
        squares, out_squares = (
            torch.empty(grad.shape[:-1], dtype=torch.float64, device="meta") for _ in range(2)
        )
        return squares, out_squares

    def quantize(
        self, x: Tensor, codebook: Codebook, layout: CodeLayout, *, packed: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        *rows, columns = x.shape
        packed = torch.empty(*rows, layout.row_bytes(columns), dtype=torch.uint8, device="meta")
        scales = torch.empty(*rows, layout.blocks(columns), device="meta")
        self.ledger.add("quantize", "none", 0, x, packed)
        return packed, scales

    def encode(
        self, x: Tensor, scales: Tensor, codebook: Codebook, layout: CodeLayout, *,
        packed: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return self.quantize(x, codebook, layout)[0]

    def rotate(self, x: Tensor, *, inverse: bool = False) -> None:
        self.ledger.add("rotate", "none", 0, x, x)

    def code_gram(self, codes: PackedCodes) -> Tensor:
        b, m, _ = codes.packed.shape
        out = torch.empty(b, m, m, device="meta")
        # one triangle of the m x m sums, each a product and a sum
        self.ledger.add("code_gram", "int8", b * m * m * codes.columns, codes.packed, out)
        return out

    def code_product(
        self, a: Tensor, codes: PackedCodes, *, out: Tensor | None = None, beta: float = 0.0
    ) -> Tensor:
        b, k, m = a.shape
        out = torch.empty(b, k, codes.columns, device="meta")
        operations = 2 * 2 * b * k * m * codes.columns  # two limbs
        self.ledger.add("code_product", "int8", operations, a, codes.packed, out)
        return out

    def product(
        self, a: Tensor, b: Tensor, *, out: Tensor | None = None, addend: Tensor | None = None,
        alpha: float | Tensor = 1.0, beta: float = 0.0, active: Tensor | None = None,
        rounded: bool = False, diagonal: int | None = None,
    ) -> Tensor:  # fmt: skip
        shape = (*a.shape[:-1], b.shape[-1])
        if out is None:
            out = torch.empty(shape, dtype=a.dtype, device="meta")
        if active is not None:  # returns at once
            self.ledger.add("inactive", "none", 0)
            return out
        operations = 2 * math.prod(shape) * a.shape[-1]
        read = (out if addend is None else addend) if beta else None
        self.ledger.add(f"product {_unit(a)}", _unit(a), operations, a, b, read, out)
        return out

    def symmetric_product(
        self, a: Tensor, b: Tensor | None = None, *, addend: Tensor | None = None,
        alpha: float = 1.0, beta: float = 1.0, other: Tensor | None = None, gamma: float = 1.0,
        identity: float = 0.0, out: Tensor | None = None, active: Tensor | None = None,
        rounded: bool = False,
    ) -> Tensor:  # fmt: skip
        shape = (*a.shape[:-1], a.shape[-2])
        if out is None:
            out = torch.empty(shape, dtype=a.dtype, device="meta")
        if active is not None:
            self.ledger.add("inactive", "none", 0)
            return out
        operations = math.prod(shape) * a.shape[-1]  # one triangle
        unit: Unit = "float16" if rounded else _unit(a)
        name = "symmetric rounded" if rounded else f"symmetric {unit}"
        self.ledger.add(name, unit, operations, a, b, addend, other, out)
        return out

    def combined(
        self, coefficients: Sequence[Sequence[float]], terms: Sequence[Tensor], *,
        out: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:  # fmt: skip
        results = [torch.empty_like(terms[0]) for _ in coefficients] if out is None else list(out)
        self.ledger.add("combined", "none", 0, *terms, *results)
        return results

    def scaled(self, x: Tensor, factor: Tensor, *, out: Tensor) -> Tensor:
        self.ledger.add("scaled", "none", 0, x, out)
        return out

    def update_weight(
        self, weight: Tensor, update: Tensor, *, decay: Tensor, step_size: Tensor,
        seed: Tensor | None = None, cautious: bool = False,
    ) -> None:  # fmt: skip
        self.ledger.add("update_weight", "none", 0, weight, update, weight)


# Operations that move nothing.
_FREE = {
    "alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided", "expand",
    "new_empty", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
    "transpose", "unbind", "unsqueeze", "view", "_unsafe_view",
}  # fmt: skip
# Of torch's matrix products: which argument the first factor is.
_TORCH_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}


class _TorchOperations(TorchDispatchMode):
    """Counts what torch's own operations read and write, and its products; views and empty tensors
    are free. What qr multiplies is not counted."""

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = str(func).split(".")[1]
        if name in _TORCH_PRODUCTS:
            factor = args[_TORCH_PRODUCTS[name]]
            unit: Unit = "float32" if factor.dtype == torch.float32 else "float16"
            operations = 2 * result.numel() * factor.shape[-1]
            self.ledger.add(f"torch product {unit}", unit, operations, *tensors)
        elif name not in _FREE:
            self.ledger.add("torch", "none", 0, *tensors)
        return result


@contextlib.contextmanager
def on_paper(ledger: Ledger) -> Iterator[None]:
    """Optimizers with backend="auto" take a `PaperBackend`."""
    get_backend.cache_clear()
    try:
        with mock.patch("lowbit_muon.backends._automatic", return_value=PaperBackend(ledger)):
            yield
    finally:
        get_backend.cache_clear()


def step_on_paper(
    shape: tuple[int, int],
    state_format: str,
    *,
    count: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **options: Any,
) -> Ledger:
    """What one step of `count` matrices has to do; gradients and weights in `dtype`."""
    ledger = Ledger()
    params = [nn.Parameter(torch.empty(shape, dtype=dtype, device="meta")) for _ in range(count)]
    for param in params:
        param.grad = torch.empty_like(param)
    if PRESETS[state_format].normalize:
        options.setdefault("nesterov", False)
    optimizer = Muon(params, state_format=state_format, **options)
    with on_paper(ledger):
        optimizer.step()  # creates the state
        ledger.work.clear()
        with _TorchOperations(ledger), torch.no_grad():
            optimizer._step_parameters(optimizer.param_groups[0], range(count))
    return ledger


def torch_step_on_paper(shape: tuple[int, int], dtype: torch.dtype = torch.bfloat16) -> Ledger:
    """The same of torch.optim.Muon."""
    ledger = Ledger()
    param = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
    param.grad = torch.empty_like(param)
    optimizer = torch.optim.Muon([param])
    optimizer.step()
    with _TorchOperations(ledger):
        optimizer.step()
    return ledger


PAPER_FORMATS = ("spectral4", "mulaw4", "linear8", "fp32")
PAPER_SHAPES = ((2048, 8192), (4096, 4096), (4096, 11008))
PEER = "torch.optim.Muon"


def all_ledgers() -> dict[tuple[int, int], dict[str, Ledger]]:
    """One step of one bfloat16 matrix: by shape, by format."""
    return {
        shape: {name: step_on_paper(shape, name) for name in PAPER_FORMATS}
        | {PEER: torch_step_on_paper(shape)}
        for shape in PAPER_SHAPES
    }


def markdown() -> str:
    """Least times of whole steps, and the kernels of `spectral4` for the largest shape."""
    ledgers = all_ledgers()
    names = (*PAPER_FORMATS, PEER)
    lines = ["| estimate, ms | " + " | ".join(f"`{name}`" for name in names) + " |"]
    lines.append("|---" * (1 + len(names)) + "|")
    for shape, by_name in ledgers.items():
        times = (f"{by_name[name].seconds * 1e3:.1f}" for name in names)
        lines.append(f"| {shape[0]}x{shape[1]} | " + " | ".join(times) + " |")
    shape = PAPER_SHAPES[-1]
    lines += [
        "",
        f"| `spectral4`, {shape[0]}x{shape[1]} | calls | MiB | G operations | of | least us |",
        "|---|---|---|---|---|---|",
    ]
    kernels = dict(ledgers[shape]["spectral4"].work)
    fused = ledgers[shape]["linear8"].work["update_codes"]
    kernels["update_codes, in `linear8`"] = fused  # spectral formats have no use for it
    work = sorted(kernels.items(), key=lambda item: -item[1].seconds)
    for name, entry in work:
        if entry.seconds:
            lines.append(
                f"| {name} | {entry.calls} | {entry.bytes / 2**20:.0f} | "
                f"{entry.operations / 1e9:.0f} | {entry.unit} | {entry.seconds * 1e6:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
