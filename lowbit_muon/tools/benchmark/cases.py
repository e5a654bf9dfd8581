"""What is timed for one matrix: ours behind a gate each, and torch's beside it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon.backends import get_backend
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.linalg.newton_schulz import orthogonalize
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.state.coded_products import lut_gram
from lowbit_muon.state.parameter import matrix_views, read_matrix
from lowbit_muon.state.stored import QuantizedMatrix, orient, quantize
from lowbit_muon.step.update import update_scale
from lowbit_muon.tools.benchmark import counts
from lowbit_muon.tools.benchmark.counts import BF16_PRODUCT, FP32_PRODUCT
from lowbit_muon.tools.benchmark.gates import (
    Passed,
    allowed_gram_error,
    allowed_stored_error,
    allowed_update_error,
    exact_newton_schulz,
    exact_update,
    expect_close,
    newton_schulz,
)
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
COPY, PLAIN_GRAM, PLAIN_NEWTON_SCHULZ = "torch copy", "torch.mm Gram fp32", "Newton-Schulz fp32"
TORCH_MUON = "torch.optim.Muon"
MOMENTUM = 0.95


class UnavailableError(Exception):
    """A case that cannot run here, or not with this format; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One matrix [rows, columns] and how it is to be worked on."""

    shape: tuple[int, int]
    dtype_name: str  # of weights and gradients
    device: torch.device
    backend: str = "auto"

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and gradients."""
        return DTYPES[self.dtype_name]

    @cached_property
    def matrix(self) -> Tensor:
        """Float32, like a momentum."""
        generator = torch.Generator(device=self.device).manual_seed(0)
        return decaying_matrix(*self.shape, generator)

    @cached_property
    def grad(self) -> Tensor:
        """The matrix as a gradient. It is read only, so that all optimizers can share it."""
        return self.matrix.to(self.dtype)

    @cached_property
    def allowed_update_error(self) -> float:
        """See `gates.allowed_update_error`."""
        return allowed_update_error(self.matrix)

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n), the short one first."""
        return min(self.shape), max(self.shape)

    @property
    def elements(self) -> int:
        """m n."""
        return self.shape[0] * self.shape[1]

    @property
    def kernels(self) -> Backend:
        """Of our cases."""
        return get_backend(self.backend, self.device)

    def parameter(self) -> nn.Parameter:
        """A parameter with the gradient."""
        generator = torch.Generator(device=self.device).manual_seed(1)
        weight = torch.randn(self.shape, generator=generator, device=self.device)
        param = nn.Parameter(weight.mul_(0.02).to(self.dtype))
        param.grad = self.grad
        return param

    def quantized(self, name: str) -> QuantizedMatrix:
        """The matrix in a format."""
        return quantize(self.matrix, name, backend=self.backend)

    def decoded(self, stored: QuantizedMatrix) -> Tensor:
        """Float32 [rows, columns]."""
        return stored.dequantize(self.backend)


@dataclass(frozen=True)
class Prepared:
    """A call that is ready to be timed."""

    call: Callable[[], object]
    passed: Passed | None = None  # what its gate found; None for torch's
    state_bytes: int | None = None
    peak_bytes: int | None = None
    # What a call does, `counts`, by what limits it: the key of the case whose own work in a second
    # is the most there can be. Bytes are limited by copies, operations by products.
    work: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One row: `prepare` makes the call and holds it to its definition.

    It raises UnavailableError where the case cannot run. An error of a peer is a reason to leave
    it out; one of ours is a row of its own.
    """

    name: str
    prepare: Callable[[], Prepared] = field(repr=False)
    dtype: str = "fp32"  # of the tensors that are read and written
    format: str | None = None
    baseline: str | None = None  # key of another case
    peer: bool = False
    isa: str | None = None  # level of the CPU kernels that it takes

    @property
    def key(self) -> str:
        """Unique among the cases of a problem."""
        return self.name if self.format is None else f"{self.name} {self.format}"


PARTS = ("step", "orthogonalize", "quantize", "dequantize", "lut_gram")


def make_cases(
    problem: Problem, formats: Sequence[str], parts: Collection[str] = PARTS
) -> Iterator[Case]:
    """The cases of some parts of a problem, the peers that they are compared with first."""
    yield from _peers(problem, parts)
    isa = cpu.isa() if problem.kernels.name == "cpu" else None
    if "orthogonalize" in parts:
        yield Case(
            "orthogonalize",
            partial(_prepare_orthogonalize, problem),
            baseline=PLAIN_NEWTON_SCHULZ,
            isa=isa,
        )
    for operation, prepare, dtype, baseline in (
        ("step", _prepare_step, problem.dtype_name, TORCH_MUON),
        ("quantize", _prepare_quantize, "fp32", COPY),
        ("dequantize", _prepare_dequantize, "fp32", COPY),
        ("lut_gram", _prepare_gram, "fp32", PLAIN_GRAM),
    ):
        for name in formats if operation in parts else ():
            yield Case(operation, partial(prepare, problem, name), dtype, name, baseline, isa=isa)


def _peers(problem: Problem, parts: Collection[str]) -> Iterator[Case]:
    def peer(
        name: str, prepare: Callable[..., Prepared], argument: Any, dtype: str, baseline: str | None
    ) -> Case:
        return Case(name, partial(prepare, problem, argument), dtype, baseline=baseline, peer=True)

    if "quantize" in parts or "dequantize" in parts:
        yield peer(COPY, _prepare_copy, None, "fp32", None)
    for name in dict.fromkeys(("fp32", problem.dtype_name)) if "lut_gram" in parts else ():
        baseline = None if name == "fp32" else PLAIN_GRAM
        yield peer(f"torch.mm Gram {name}", _prepare_plain_gram, name, name, baseline)
    # bf16 is what torch.optim.Muon takes for every dtype
    for name in ("fp32", "bf16") if "orthogonalize" in parts else ():
        baseline = None if name == "fp32" else PLAIN_NEWTON_SCHULZ
        yield peer(f"Newton-Schulz {name}", _prepare_plain_newton_schulz, name, name, baseline)
    optimizers: Sequence[tuple[str, Callable[..., torch.optim.Optimizer]]] = (
        (TORCH_MUON, torch.optim.Muon),
        ("torch.optim.AdamW", torch.optim.AdamW),
        ("bitsandbytes AdamW8bit", _adamw8bit),
    )
    for name, make in optimizers if "step" in parts else ():
        baseline = None if name == TORCH_MUON else TORCH_MUON
        yield peer(name, _prepare_peer_step, make, problem.dtype_name, baseline)


def _work(
    problem: Problem, moved: float, operations: float | None = None, product: str = FP32_PRODUCT
) -> dict[str, float]:
    """Bytes, and operations where they are counted and there are any."""
    copy = counts.nearest_copy(moved, problem.device)
    return {copy: float(moved)} | ({product: operations} if operations else {})


def _prepare_copy(problem: Problem, _: None) -> Prepared:
    target = torch.empty_like(problem.matrix)
    return Prepared(lambda: target.copy_(problem.matrix), work=_work(problem, 8 * problem.elements))


def _prepare_plain_gram(problem: Problem, dtype: str) -> Prepared:
    x = orient(problem.matrix.to(DTYPES[dtype]))
    out = torch.mm(x, x.mT)
    m, n = problem.sides
    work = _work(
        problem,
        x.nbytes + out.nbytes,
        counts.product_operations(m, n, m),
        product=f"torch.mm {dtype}",
    )
    return Prepared(lambda: torch.mm(x, x.mT, out=out), work=work)


def _prepare_plain_newton_schulz(problem: Problem, dtype: str) -> Prepared:
    x = problem.matrix.to(DTYPES[dtype])
    newton_schulz(x)
    operations = counts.plain_newton_schulz_operations(*problem.sides)
    work = _work(problem, 2 * x.nbytes, operations, product=f"torch.mm {dtype}")
    return Prepared(lambda: newton_schulz(x), work=work)


def _prepare_peer_step(problem: Problem, make: Callable[..., torch.optim.Optimizer]) -> Prepared:
    optimizer = make([problem.parameter()], lr=1e-3)
    optimizer.step()
    kept = state_bytes(optimizer)
    operations = None
    if isinstance(optimizer, torch.optim.Muon):
        operations = counts.plain_newton_schulz_operations(*problem.sides)
    work = _work(problem, 2 * kept + 3 * problem.grad.nbytes, operations, product=BF16_PRODUCT)
    return Prepared(optimizer.step, state_bytes=kept, work=work)


def _adamw8bit(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    try:
        # It tries bitsandbytes out, without what its import has to say, and knows what is wrong.
        MuonWithAuxAdam([{"params": params, "use_muon": False}], aux_adam="adamw8bit")
    except RuntimeError as error:
        raise UnavailableError(str(error)) from error
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(params, lr=lr)
    return optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes that an optimizer's state really takes."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(storages.values())


def _prepare_orthogonalize(problem: Problem) -> Prepared:
    x = problem.matrix
    exact = exact_newton_schulz(x)
    passed = expect_close("result", orthogonalize(x), exact, problem.allowed_update_error)
    operations = counts.orthogonalize_operations(*problem.sides, problem.kernels)
    return Prepared(lambda: orthogonalize(x), passed, work=_work(problem, 2 * x.nbytes, operations))


def _stored(problem: Problem, name: str) -> tuple[QuantizedMatrix, Passed]:
    """The matrix in a format, close enough to itself."""
    stored = problem.quantized(name)
    allowed = allowed_stored_error(stored.state_format)
    return stored, expect_close("decoded matrix", problem.decoded(stored), problem.matrix, allowed)


def _prepare_quantize(problem: Problem, name: str) -> Prepared:
    stored, passed = _stored(problem, name)
    operations = counts.encode_operations(stored.state_format, *problem.sides, problem.kernels)
    work = _work(problem, problem.matrix.nbytes + stored.nbytes, operations)
    return Prepared(lambda: problem.quantized(name), passed, stored.nbytes, work=work)


def _prepare_dequantize(problem: Problem, name: str) -> Prepared:
    stored, passed = _stored(problem, name)
    operations = counts.decode_operations(stored.state_format, *problem.sides)
    work = _work(problem, problem.matrix.nbytes + stored.nbytes, operations)
    return Prepared(lambda: problem.decoded(stored), passed, stored.nbytes, work=work)


def _prepare_gram(problem: Problem, name: str) -> Prepared:
    stored = problem.quantized(name)

    def gram() -> Tensor:
        return lut_gram(stored, panel="s8", backend=problem.backend)

    try:
        found = gram()
    except ValueError as error:
        if not str(error).startswith("panel: "):
            raise
        raise UnavailableError(str(error)) from error
    decoded = orient(problem.decoded(stored)).double()
    allowed = allowed_gram_error(decoded, stored.state_format)
    passed = expect_close("Gram matrix", found, decoded @ decoded.mT, allowed)
    operations = counts.lut_gram_operations(stored.state_format, *problem.sides)
    work = _work(problem, stored.nbytes + found.nbytes, operations)
    return Prepared(gram, passed, stored.nbytes, work=work)


@torch.no_grad()
def _prepare_step(problem: Problem, name: str) -> Prepared:
    """A step, held to its definition given what the codes hold, after one that filled them."""
    state_format = PRESETS[name]
    nesterov = not state_format.normalize
    param = problem.parameter()
    before = param.detach().clone()
    optimizer = Muon(
        [param],
        lr=1e-3,
        momentum=MOMENTUM,
        nesterov=nesterov,
        state_format=name,
        backend=problem.backend,
    )
    (group,) = optimizer.param_groups
    first = problem.grad.flip((0, 1))  # another gradient, of the same spectrum
    param.grad = first
    optimizer.step()
    (view,) = matrix_views(param, group)
    momentum = problem.decoded(read_matrix(optimizer.state[param], view, state_format))
    size = float(first.float().norm()) if state_format.normalize else 1 / (1 - MOMENTUM)
    expect_close("stored momentum", momentum * size, first, allowed_stored_error(state_format))

    # From a weight of zeros at lr 1 the step leaves its update alone in the weight.
    param.zero_()
    param.grad = problem.grad
    group["lr"] = 1.0
    optimizer.step()
    update = param.detach() / -update_scale(group["adjust_lr_fn"], problem.shape)
    exact = exact_update(
        momentum, problem.grad.float(), state_format, decay=MOMENTUM, nesterov=nesterov
    )
    allowed = problem.allowed_update_error + torch.finfo(problem.dtype).eps
    passed = expect_close("update", update, exact, allowed)
    param.copy_(before)
    group["lr"] = 1e-3
    kept, m = optimizer.state_bytes(), min(problem.shape)
    operations = counts.step_operations(state_format, *problem.sides, problem.kernels)
    product = BF16_PRODUCT if counts.step_rounds(m, problem.kernels) else FP32_PRODUCT
    work = _work(problem, 2 * kept + 3 * problem.grad.nbytes, operations, product)
    return Prepared(optimizer.step, passed, kept, work=work)
