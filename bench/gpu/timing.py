"""Interleaved timings on a GPU: codec, products of codes, and optimizer steps."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench.gpu.rows import Row
from lowbit_muon import PRESETS, Muon
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.tools.benchmark.measure import SAMPLE_SECONDS
from lowbit_muon.tools.benchmark.momentum import decaying_matrix
from lowbit_muon.tools.benchmark.timing import interleaved

# Decoder layers: q, k, v, o, gate, up, down as [out, in] (config.json of meta-llama/Llama-3.2-1B
# and of meta-llama/Llama-2-7b-hf).
LLAMA_1B = ((2048, 2048), (512, 2048), (512, 2048), (2048, 2048), (8192, 2048), (8192, 2048),
            (2048, 8192))  # fmt: skip
LLAMA_7B = ((4096, 4096), (4096, 4096), (4096, 4096), (4096, 4096), (11008, 4096), (11008, 4096),
            (4096, 11008))  # fmt: skip
KERNEL_SHAPES = ((2048, 2048), (2048, 8192), (4096, 4096), (4096, 11008))


def device_seconds(
    cases: Mapping[str, Callable[[], object]], *, budget: float
) -> dict[str, list[float]]:
    """Seconds of a call, in turn, for `budget` seconds in all: at most 50 rounds, after two that
    are not counted (compilation, caches). Short calls are queued in samples of some milliseconds,
    beside which launching the first and waiting for the last should take a percent.
    """
    deadline = time.perf_counter() + budget
    return interleaved(cases, 50, 2, deadline=deadline, sample_seconds=SAMPLE_SECONDS)


def timed_rows(
    group: str,
    label: str,
    cases: Mapping[str, Callable[[], object]],
    ours: str,
    *,
    budget: float,
    amount: float = 0.0,
    unit: str = "ms",
) -> Iterator[Row]:
    """A row for each case; the value is amount/seconds in `unit`, or milliseconds."""
    seconds = device_seconds(cases, budget=budget)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        spread = (max(seconds[name]) - min(seconds[name])) / value
        yield Row(
            group,
            f"{label}: {name}",
            "measured",
            f"{len(seconds[name])} rounds, spread {spread:.0%}",
            amount / value if amount else value * 1e3,
            unit,
            value / middle[ours],
            ours,
        )


@functools.cache
def _momentum(shape: tuple[int, int]) -> Tensor:
    """Float32 [m, n], kept: its decomposition takes seconds on a CPU."""
    return decaying_matrix(*shape, torch.Generator().manual_seed(0))


def stored_codes(backend: Backend, name: str, shape: tuple[int, int]) -> tuple[Tensor, PackedCodes]:
    """A matrix [m, n] that looks like a momentum, and its codes."""
    f = PRESETS[name]
    x = _momentum(shape).cuda()
    packed, scales = backend.quantize(x, f.code_book(), f.code_layout())
    return x, PackedCodes(packed, scales, f.code_book(), f.code_layout(), shape[1])


def codec_rows(backend: Backend, *, budget: float) -> Iterator[Row]:
    """GB/s (bytes read and written) of codec passes, against a copy on the device."""
    for shape in KERNEL_SHAPES:
        yield from _codec_rows(backend, shape, budget)


def _codec_rows(backend: Backend, shape: tuple[int, int], budget: float) -> Iterator[Row]:
    x, codes = stored_codes(backend, "spectral4", shape)
    target, grad = torch.empty_like(x), x.bfloat16()
    packed, scales = torch.empty_like(codes.packed), torch.empty_like(codes.scales)
    book, layout = codes.codebook, codes.layout

    def update_codes() -> object:
        terms = Terms(0.0, codes, 0.95, grad, 0.05)
        return backend.update_codes(terms, packed=packed, scales=scales, out=target)

    cases: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(x),
        "decode": lambda: backend.accumulate(target, Terms(codes=codes)),
        "quantize": lambda: backend.quantize(x, book, layout, packed=packed, scales=scales),
        "rotate": lambda: backend.rotate(target),
        "update_codes": update_codes,
    }
    bytes_each = {"copy": 8, "decode": 4.5, "quantize": 4.5, "rotate": 8, "update_codes": 7}
    seconds = device_seconds(cases, budget=budget)
    rates = {
        name: bytes_each[name] * x.numel() / statistics.median(values) / 1e9
        for name, values in seconds.items()
    }
    for name, rate in rates.items():
        label = f"{shape[0]}x{shape[1]}: {name}"
        yield Row("codec", label, "measured", "", rate, "GB/s", rate / rates["copy"], "copy")


def product_rows(backend: Backend, *, budget: float) -> Iterator[Row]:
    """Gram matrices and products of codes against torch.mm of decoded matrices."""
    for shape in KERNEL_SHAPES:
        yield from _product_rows(backend, shape, budget)


def _product_rows(backend: Backend, shape: tuple[int, int], budget: float) -> Iterator[Row]:
    m, n = shape
    x, codes = stored_codes(backend, "spectral4", shape)
    half, target = x.bfloat16(), torch.empty_like(x)
    batch = replace(codes, packed=codes.packed[None], scales=codes.scales[None])
    a = torch.randn(m, m, device=x.device) / m**0.5
    a_half = a.bfloat16()

    def decoded() -> Tensor:
        backend.accumulate(target, Terms(codes=codes))
        return target.bfloat16()

    def decoded_gram() -> Tensor:
        matrix = decoded()
        return matrix @ matrix.mT

    gram_cases: dict[str, Callable[[], object]] = {
        "code_gram": lambda: backend.code_gram(batch),
        "symmetric bf16": lambda: backend.symmetric_product(half),
        "symmetric fp32": lambda: backend.symmetric_product(x),
        "torch.mm bf16": lambda: half @ half.mT,
        "torch.mm fp32": lambda: x @ x.mT,
        "decode + torch.mm bf16": decoded_gram,
    }
    product_cases: dict[str, Callable[[], object]] = {
        "code_product": lambda: backend.code_product(a[None], batch),
        "torch.mm bf16": lambda: a_half @ half,
        "torch.mm fp32": lambda: a @ x,
        "decode + torch.mm bf16": lambda: a_half @ decoded(),
    }
    amount = 2 * m * m * n / 1e12
    for group, cases, ours in (
        ("gram", gram_cases, "code_gram"),
        ("product", product_cases, "code_product"),
    ):
        yield from timed_rows(
            group, f"{m}x{n}", cases, ours, budget=budget, amount=amount, unit="TFLOP/s"
        )


def muonq_in_torch(param: nn.Parameter, state: dict[str, Tensor], lr: float) -> None:
    """MuonQ's arithmetic (arXiv 2605.11396, Algorithm 1) in torch operations, bfloat16 iteration.

    Codes are rounded and kept as float32: what its memory saves is not modelled, its work is.
    """
    mu, levels = 255.0, 7

    def through_codes(x: Tensor, dim: int | None) -> Tensor:
        companded = torch.log1p(mu * x.abs().clamp(max=1)).copysign(x) / math.log1p(mu)
        peak = companded.abs().amax() if dim is None else companded.abs().amax(dim, keepdim=True)
        restored = (companded / peak * levels).round() * (peak / levels)
        return torch.expm1(restored.abs() * math.log1p(mu)).copysign(restored) / mu

    assert param.grad is not None
    grad = param.grad.float()
    momentum = 0.95 * state["momentum"] + grad / (grad.norm() + 1e-7)
    momentum /= momentum.norm() + 1e-7
    right = state["right"]
    left, _ = torch.linalg.qr(momentum @ (right / (right.norm(dim=0, keepdim=True) + 1e-7)))
    right = momentum.mT @ left
    x = momentum.bfloat16()
    x = x.mT if x.shape[0] > x.shape[1] else x
    for _ in range(5):
        gram = x @ x.mT
        x = torch.addmm(
            x, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445
        )
    update = x.mT if param.shape[0] > param.shape[1] else x
    param.add_(update, alpha=-lr * 0.2 * max(param.shape) ** 0.5)
    residual = through_codes(momentum - left @ right.mT, None)
    state["right"] = through_codes(right, 0)
    state["momentum"] = residual + through_codes(left, 0) @ state["right"].mT


class MuonQInTorch:
    """Its step over parameters."""

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self.params = params
        self.states = []
        for param in params:
            rank = max(1, min(param.shape) // 16)
            self.states.append({
                "momentum": torch.zeros(param.shape, device=param.device),
                "right": torch.randn(param.shape[1], rank, device=param.device),
            })  # fmt: skip

    @torch.no_grad()
    def step(self) -> None:
        """One step of every parameter."""
        for param, state in zip(self.params, self.states, strict=True):
            muonq_in_torch(param, state, 1e-3)


def step_rows(
    backend: str, name: str, shapes: Sequence[tuple[int, int]], *, budget: float
) -> Iterator[Row]:
    """Seconds and peak memory of a step, against the optimizers people use."""
    rows: list[Row] = []
    cases: dict[str, Callable[[], object]] = {}
    for label, make in _optimizers(backend).items():
        try:
            optimizer = make(_parameters(shapes))
            optimizer.step()
        except Exception as error:  # whatever a peer does; its row says so and others go on
            message = " ".join(str(error).split())[:200]
            rows.append(Row("step", f"{name}: {label}", "skipped", message))
            continue
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        torch.cuda.synchronize()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        rows.append(Row("memory", f"{name}: {label}", "measured", "peak of a step", peak, "MiB"))
        cases[label] = optimizer.step
    yield from rows
    if cases:
        ours = "spectral4" if "spectral4" in cases else next(iter(cases))
        yield from timed_rows("step", name, cases, ours, budget=budget)


def _parameters(shapes: Sequence[tuple[int, int]]) -> list[nn.Parameter]:
    params = []
    for index, shape in enumerate(shapes):
        generator = torch.Generator(device="cuda").manual_seed(index)
        rows, columns = shape
        # a fast stand-in for a gradient whose spectrum falls: a thin product and noise
        thin = torch.randn(rows, 16, device="cuda", generator=generator)
        wide = torch.randn(16, columns, device="cuda", generator=generator)
        noise = torch.randn(shape, device="cuda", generator=generator)
        param = nn.Parameter(0.02 * torch.randn_like(noise).bfloat16())
        param.grad = (thin @ wide + noise).bfloat16()
        params.append(param)
    return params


def _optimizers(backend: str) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    def ours(state_format: str, **options: Any) -> Callable[[list[nn.Parameter]], Any]:
        return lambda params: Muon(params, state_format=state_format, backend=backend, **options)

    def bitsandbytes(params: list[nn.Parameter]) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=1e-3)

    made: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        name: ours(name) for name in ("spectral4", "spectral3", "mulaw4", "linear8", "fp32")
    }
    made["spectral4, stored"] = ours("spectral4", ns_input="stored")
    made["spectral4, stochastic rounding"] = ours("spectral4", stochastic_rounding=True)
    made["muonq4"] = ours("muonq4", nesterov=False)
    made["torch.optim.Muon"] = lambda params: torch.optim.Muon(params)
    made["MuonQ in torch"] = MuonQInTorch
    made["bitsandbytes AdamW8bit"] = bitsandbytes
    made["torch.optim.AdamW"] = lambda params: torch.optim.AdamW(params)
    return made


def graph_rows(backend: str) -> Iterator[Row]:
    """Whether a step can be captured in a CUDA graph, and what its replay saves."""
    params = _parameters(LLAMA_1B)
    optimizer = Muon(params, state_format="spectral4", backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    before = params[0].detach().clone()
    graph.replay()
    torch.cuda.synchronize()
    if torch.equal(before, params[0]):
        raise AssertionError("a replay of the captured step changed nothing")
    cases: dict[str, Callable[[], object]] = {"eager": optimizer.step, "replay": graph.replay}
    yield from timed_rows("graph", "Llama-3.2-1B layer", cases, "eager", budget=5.0)
