"""Planned bytes against the optimizers' real states and measured peaks."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.step import peak_bytes
from lowbit_muon import RULES, Muon, MuonWithAuxAdam, muon_param_groups
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.step.batches import DEVICE_ELEMENTS
from lowbit_muon.tools.plan import device_workspace, host_workspace
from lowbit_muon.tools.plan.memory import (
    MUON,
    AdamKind,
    Routing,
    adam_state_bytes,
    adam_step_bytes,
    fetched_bytes,
    muon_state_bytes,
    route,
    rule_state_bytes,
    torch_muon_step_bytes,
)

Shape = tuple[int, ...]

HAS_8BIT = importlib.util.find_spec("bitsandbytes") is not None
needs_8bit = pytest.mark.skipif(not HAS_8BIT, reason="bitsandbytes is not installed")
needs_extension = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason="the formulas are of the C++ backend"
)


@pytest.fixture(autouse=True)
def without_poison() -> None:
    """Filling what torch.empty returns takes memory in some of torch's operations."""
    torch.use_deterministic_algorithms(False)


def small_model() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(500, 96),
            "layers": nn.ModuleList([nn.Linear(96, 160), nn.Linear(160, 96, bias=False)]),
            "norm": nn.LayerNorm(96),
        }
    )


def with_gradients(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    model.to(dtype)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def parameter(shape: Shape, dtype: torch.dtype) -> nn.Parameter:
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    param.grad = torch.randn_like(param)
    return param


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("aux", ["adamw", pytest.param("adamw8bit", marks=needs_8bit)])
def test_state_is_what_the_optimizer_allocates(name: str, aux: AdamKind) -> None:
    model = with_gradients(small_model(), torch.bfloat16)
    optimizer = MuonWithAuxAdam(
        muon_param_groups(model), state_format=name, aux_adam=aux, nesterov=name != "muonq4"
    )
    optimizer.step()
    routing = route(model)
    planned = muon_state_bytes(routing, PRESETS[name])
    planned += adam_state_bytes(routing.aux, torch.bfloat16, aux)
    # torch.optim.AdamW counts its steps in a float32 on the host for each parameter
    steps = 4 * routing.aux.total() if aux == "adamw" else 0
    assert optimizer.state_bytes() == planned + steps


@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if rule.state((2, 2))])
def test_state_of_a_rule_is_what_the_optimizer_allocates(name: str) -> None:
    model = small_model()
    model.experts = nn.Parameter(torch.zeros(3, 8, 24))  # matrices of a stack each keep their own
    optimizer = MuonWithAuxAdam(
        muon_param_groups(with_gradients(model, torch.float32)), rule=name, aux_adam="adamw"
    )
    optimizer.step()
    routing = route(model)
    planned = muon_state_bytes(routing, PRESETS["spectral4"])
    planned += rule_state_bytes(routing, RULES[name])
    planned += adam_state_bytes(routing.aux, torch.float32, "adamw") + 4 * routing.aux.total()
    assert optimizer.state_bytes() == planned


def torch_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, Tensor) and name != "step"
    }
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["adamw", pytest.param("adamw8bit", marks=needs_8bit)])
def test_adamw_state_and_step(kind: AdamKind, dtype: torch.dtype) -> None:
    shapes: Counter[Shape] = Counter({(512, 300): 1, (300, 257): 2, (4095,): 1, (1,): 1})
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes.elements()]
    for param in params:
        param.grad = torch.randn_like(param)
    if kind == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(params)
    else:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(params)
    optimizer.step()
    assert torch_state_bytes(optimizer) == adam_state_bytes(shapes, dtype, kind)
    measured = peak_bytes(optimizer.step)
    assert measured == pytest.approx(adam_step_bytes(shapes, dtype, kind, "cpu"), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_on_a_gpu_takes_the_roots_of_all_moments(dtype: torch.dtype) -> None:
    shapes: Counter[Shape] = Counter({(512, 300): 1, (300, 257): 2, (4095,): 1})
    params = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes.elements()]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = torch.optim.AdamW(params, foreach=True)  # the default on GPUs
    optimizer.step()
    planned = adam_step_bytes(shapes, dtype, "adamw", "cuda")
    assert peak_bytes(optimizer.step) == pytest.approx(planned, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(256, 384), (384, 256), (256, 256)])
def test_torch_muon(shape: Shape, dtype: torch.dtype) -> None:
    optimizer = torch.optim.Muon([parameter(shape, dtype)])
    optimizer.step()
    # Half-precision sums in torch's products take some float32 memory a thread on a CPU.
    measured = peak_bytes(optimizer.step)
    assert measured == pytest.approx(torch_muon_step_bytes(shape, dtype), rel=0.25)
    assert torch_state_bytes(optimizer) == dtype.itemsize * shape[0] * shape[1]


# In memory, square and not; taken by panels, with one panel and with two for a Gram matrix.
HOST_SHAPES = ((64, 64), (192, 576), (576, 192), (320, 4096), (64, 20000))


def measured_on_a_cpu(shape: Shape, dtype: torch.dtype, rule: str, state_format: str) -> int:
    nesterov = False if state_format == "muonq4" else None
    param = parameter(shape, dtype)
    optimizer = Muon([param], rule=rule, state_format=state_format, nesterov=nesterov)
    optimizer.step()
    return peak_bytes(optimizer.step)


def nearly(size: int, rel: float = 0.01) -> Any:
    """Everything that is allocated is counted, but for sums of rows and what integer products
    pack, a block or two of 16 KiB for each thread."""
    return pytest.approx(size, rel=rel, abs=2**15 * torch.get_num_threads())


@needs_extension
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", HOST_SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_on_a_cpu(name: str, shape: Shape, dtype: torch.dtype) -> None:
    planned = host_workspace.muon_step_bytes(shape, 1, PRESETS[name], dtype, MUON)
    assert planned == nearly(measured_on_a_cpu(shape, dtype, "muon", name))


# Not counted: what LAPACK takes for itself, and the float32 copy that torch makes of an operand of
# half precision beside one in float32. In each case one matrix of five or more.
DECOMPOSING = {"polargrad", "polargrad_polar_first", "spectra", "low_rank_muon"}
NARROW_OPERAND = {"cautious_muon"}


@needs_extension
@pytest.mark.parametrize("name", [n for n, rule in RULES.items() if not rule.is_fused])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rules_on_a_cpu(name: str, dtype: torch.dtype) -> None:
    shape = (96, 320) if dtype == torch.float32 else (320, 96)
    planned = host_workspace.muon_step_bytes(shape, 1, PRESETS["mulaw4"], dtype, RULES[name])
    inexact = name in DECOMPOSING or (name in NARROW_OPERAND and dtype == torch.bfloat16)
    measured = measured_on_a_cpu(shape, dtype, name, "mulaw4")
    assert planned == nearly(measured, rel=0.25 if inexact else 0.01)


@needs_extension
@pytest.mark.parametrize("name", ["dion_muon", "normuon", "muon2", "mars_m", "lion", "muonh"])
@pytest.mark.parametrize("state_format", ["spectral4", "linear8"])
def test_rules_with_a_large_matrix_on_a_cpu(name: str, state_format: str) -> None:
    """Taken by panels where the rule lets it, and orthogonalised from them."""
    shape, dtype = (320, 4096), torch.float32
    planned = host_workspace.muon_step_bytes(shape, 1, PRESETS[state_format], dtype, RULES[name])
    assert planned == nearly(measured_on_a_cpu(shape, dtype, name, state_format))


@needs_extension
@pytest.mark.parametrize("rule", ["muon", "normuon", "muon2"])
def test_step_of_a_stack_on_a_cpu(rule: str) -> None:
    param = nn.Parameter(torch.zeros(40, 64, 96))
    param.grad = torch.randn_like(param)
    group = {"params": [param], "batch_experts": True}
    optimizer = Muon([group], rule=rule, state_format="linear8")
    optimizer.step()
    planned = host_workspace.muon_step_bytes(
        param.shape, 1, PRESETS["linear8"], torch.float32, RULES[rule], stack=True
    )
    assert planned == nearly(peak_bytes(optimizer.step))


def test_live_bytes_are_those_of_storages() -> None:
    with device_workspace.LiveBytes() as memory:
        a = torch.empty(10, 100, device="meta")
        b = a @ a.mT
        assert memory.live == 4000 + 400
        part = b[:1]
        del a, b
        assert memory.live == 400
        del part
        assert (memory.live, memory.peak) == (0, 4400)
        half = torch.empty(100, dtype=torch.bfloat16, device="meta")
        half.sum(dtype=torch.float32)
        assert memory.peak == 4400
        big = torch.empty(2000, device="meta")
        big.sum(dtype=torch.float64)  # converts its argument first
        assert memory.peak == 200 + 8000 + 16000 + 8


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        *((name, "muon") for name in PRESETS),
        *(("linear8", r) for r in ("normuon", "muon2", "lion")),
    ],
)
def test_step_on_a_device_allocates_what_is_planned(
    name: str, rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same step with data, on the CPU, under torch's profiler.

    There torch converts half precision to float32 before it takes a norm, which GPUs do not: one
    float32 copy of the batch, less than the float32 matrices that are alive at other times.
    """
    shape, count, dtype = (64, 192), 3, torch.bfloat16
    chosen = (shape, count, PRESETS[name], dtype, RULES[rule])
    planned = device_workspace.muon_step_bytes(*chosen)
    monkeypatch.setattr(device_workspace, "META", torch.device("cpu"))

    class Profiled(device_workspace.LiveBytes):
        def __enter__(self) -> Profiled:
            return self

        def __exit__(self, *error: object) -> None:
            return None

    monkeypatch.setattr(device_workspace, "LiveBytes", Profiled)
    run = functools.partial(device_workspace.muon_step_bytes, *chosen)
    run()  # tables that are made once
    before = count * shape[0] * shape[1] * 2 * dtype.itemsize  # weights and gradients
    routing = Routing(Counter({(shape, False): count}), Counter())
    before += muon_state_bytes(routing, PRESETS[name]) + rule_state_bytes(routing, RULES[rule])
    measured = peak_bytes(run) - before
    assert planned == pytest.approx(measured, rel=0.25)


def test_a_batch_is_planned_once() -> None:
    def planned(count: int) -> int:
        return device_workspace.muon_step_bytes(
            (1024, 2048), count, PRESETS["linear8"], torch.bfloat16, MUON
        )

    full = DEVICE_ELEMENTS // (1024 * 2048)
    assert planned(1) < planned(full) == planned(10 * full)


def test_chunks_of_the_triton_kernels() -> None:
    pytest.importorskip("triton")
    from lowbit_muon.backends.triton.kernels import gram, levels, limbs

    assert device_workspace.CHUNK_COLUMNS == gram.CHUNK_COLUMNS
    assert device_workspace.LIMB_COLUMNS == limbs.PRODUCT_BLOCK_K
    assert device_workspace.LEVEL_COLUMNS == levels.BLOCK_N


@pytest.mark.parametrize("name", RULES)
def test_every_rule_is_planned_on_a_device(name: str) -> None:
    shape, count = (8, 24), 2
    planned = device_workspace.muon_step_bytes(
        shape, count, PRESETS["linear8"], torch.bfloat16, RULES[name]
    )
    plain = device_workspace.muon_step_bytes(shape, count, PRESETS["linear8"], torch.bfloat16, MUON)
    if RULES[name].is_fused:
        # other coefficients restart half-precision iterations at other steps; nothing else differs
        assert planned == pytest.approx(plain, rel=0.25)
    else:  # what the direction is made from is in float32, and so are the direction and gradients
        assert planned > 2 * 4 * count * shape[0] * shape[1]


@pytest.mark.parametrize("name", ["spectral4", "linear8", "fp32"])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_two_batches_of_offloaded_momentum_are_on_the_device(name: str, count: int) -> None:
    """What a step with `offload` holds more than one without: a batch and the next.

    The step of a single parameter of the last size fills a batch, see `batch_size`.
    """
    shape, state_format = (2048, 4096), PRESETS[name]
    number = count * device_workspace.batch_size(shape, state_format)
    one = (shape, state_format, torch.bfloat16, MUON)
    offloaded, usual = (
        device_workspace._step_bytes(*one, {"offload": chosen}, number) for chosen in (True, False)
    )
    routing = Routing(Counter({(shape, False): number}), Counter())
    planned = fetched_bytes(routing, state_format)
    # While a batch is computed one or two results of a few bytes a row may not be there yet.
    assert planned == pytest.approx(offloaded - usual, rel=1e-4)
    assert planned <= muon_state_bytes(routing, state_format)


@needs_extension
@pytest.mark.parametrize("state_format", ["spectral4", "linear8"])
@pytest.mark.parametrize("shape", HOST_SHAPES)
@pytest.mark.parametrize("rule", ["muon", "normuon"])
def test_step_with_compensation_on_a_cpu(shape: Shape, rule: str, state_format: str) -> None:
    param = parameter(shape, torch.bfloat16)
    optimizer = Muon([param], rule=rule, state_format=state_format, compensation=True)
    optimizer.step()
    chosen = (shape, 1, PRESETS[state_format], torch.bfloat16, RULES[rule])
    planned = host_workspace.muon_step_bytes(*chosen, compensation=True)
    # torch's meta functions make one float32 copy of a part of the weight more than its kernels do
    # (of about nine matrices of that size that are alive).
    assert planned == nearly(peak_bytes(optimizer.step), rel=1 / 9)
    assert planned > host_workspace.muon_step_bytes(*chosen)


def test_compensation_is_traced_on_a_device() -> None:
    """Small beside the step: four float32 or int32 matrices of one part of the weight."""
    chosen = ((1024, 2048), 1, PRESETS["bf16"], torch.bfloat16, RULES["signum"])
    usual = device_workspace.muon_step_bytes(*chosen)
    compensated = device_workspace.muon_step_bytes(*chosen, compensation=True)
    assert usual <= compensated <= usual + 6 * 4 * 2**20
