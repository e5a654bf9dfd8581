"""Other optimizers, as near to torch.optim.Muon as their interfaces permit, for `bench.step`.

    pip install 'lowbit-muon[peers]'; pip install --no-deps gram-newton-schulz

Those are Muon, with full and with less state, and AdamW in 8 and 4 bits. Packages are imported when
an optimizer is made. None of them is asked for anything but lr 1e-3, momentum 0.95 with Nesterov,
five steps of Newton-Schulz and the storage of its state; what an interface does not offer
(coefficients, precision, batches of matrices, compilation) is left as it ships.

Left out, with the versions that were tried on a CPU: muonium 0.2.0 (its Triton kernels assert CUDA
tensors), muon-fsdp2 0.3.0 (its step for one device calls a function that it does not define),
adafactor8bit 0.4.6 (no momentum), fp16 state of adv-optm 2.5.16 (lerp_ refuses float32 gradients).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_muon.tools.benchmark.cases import UnavailableError
from lowbit_muon.tools.benchmark.gates import GateError, Passed
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

LR, MOMENTUM, STEPS = 1e-3, 0.95, 5
QUINTIC = (3.4445, -4.7750, 2.0315)  # torch.optim.Muon's

# Wide and tall: a peer that reshapes a matrix, or mistakes its sides, is found out. The smallest
# singular value of both is 0.0078 of the norm.
GATE_SHAPES = ((64, 160), (160, 64))
# Five steps lift singular values of at least 0.005 of the norm to f in [0.68, 1.16] with Muon's
# coefficients and into narrower ranges with those of Polar Express (arXiv 2505.16932) and of
# YouJiacheng, which peers have built in. A matrix with the singular vectors of the polar factor and
# values in [a, b] has a cosine with it of sum(f) / (sqrt(n) |f|), at least 2 sqrt(ab) / (a + b)
# (Polya-Szego), here 0.965. Half precision turns the update by about its error of 0.03 more:
# cos(acos(0.965) + 0.03) = 0.957. The gradient itself has 0.46.
LEAST_COSINE = 0.95


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package, and how it is made."""

    name: str
    package: str  # on PyPI
    target: str  # "module:class"
    options: Mapping[str, Any] = field(default_factory=dict)  # beside lr and weight_decay
    group: Mapping[str, Any] = field(default_factory=dict)  # of the one group of parameters
    muon: bool = True  # False: AdamW, which has no polar factor to be held to
    compiled: bool = False  # by torch.compile: 9 to 140 s before a first step
    python: tuple[int, int] = (3, 10)  # the oldest that it runs on
    install: str = "pip install"

    def make(self, params: list[nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
        """The optimizer. Raises UnavailableError where its package cannot be used."""
        optimizer = self._load()
        groups = [{"params": params, **self.group}]
        made: torch.optim.Optimizer = optimizer(
            groups, lr=LR, weight_decay=weight_decay, **self.options
        )
        return made

    def _load(self) -> Any:
        """Its class."""
        if sys.version_info < self.python:
            version = ".".join(map(str, self.python))
            raise UnavailableError(f"{self.package} needs Python {version} or newer")
        module, _, name = self.target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            if error.name != module.partition(".")[0]:
                raise UnavailableError(f"{self.package} misses a package: {error}") from error
            command = f"{self.install} {self.package}"
            raise UnavailableError(f"{self.package} is not installed: {command}") from error
        except Exception as error:  # whatever it does when it is imported
            raise UnavailableError(
                f"{self.package} cannot be imported: {type(error).__name__}: {error}"
            ) from error


def _adv(name: str, **options: Any) -> Peer:
    common = {"beta1": MOMENTUM, "nesterov": True, "ns_steps": STEPS, "rms_rescaling": False}
    return Peer(name, "adv-optm", "adv_optm:Muon_adv", common | options, group={"use_muon": True})


def _optimuon(name: str, **options: Any) -> Peer:
    plain = {
        "normuon": False, "cautious_wd": False, "gram_ns": False, "ns_coefficients": QUINTIC,
        "ns_norm_scale": 1.0, "ns_steps": STEPS, "momentum": MOMENTUM, "nesterov": True,
    }  # fmt: skip
    return Peer(name, "optimuon", "optimuon:Muon", plain | options, python=(3, 11))


def _heavyball(name: str, **options: Any) -> Peer:
    betas = (MOMENTUM, 0.99)  # Muon reads the first
    return Peer(
        name,
        "heavyball",
        "heavyball:Muon",
        {"betas": betas, "nesterov": True, **options},
        compiled=True,
        python=(3, 11),
    )


PEERS = (
    Peer("muon-optimizer", "muon-optimizer", "muon:SingleDeviceMuon", {"momentum": MOMENTUM}),
    Peer(
        "pytorch-optimizer Muon",
        "pytorch-optimizer",
        "pytorch_optimizer:Muon",
        {"momentum": MOMENTUM, "nesterov": True, "ns_steps": STEPS},
        group={"use_muon": True},
    ),
    Peer(
        "omnimuon Muon",
        "omnimuon",
        "omnimuon.muon:Muon",
        {"matrix_lr": LR, "momentum": MOMENTUM, "nesterov": True, "ns_steps": STEPS},
    ),
    _optimuon("optimuon Muon"),
    _optimuon("optimuon Muon, bf16 state", momentum_dtype=torch.bfloat16),
    _adv("adv-optm Muon_adv"),
    _adv("adv-optm Muon_adv, bf16_sr state", state_precision="bf16_sr"),
    _adv("adv-optm Muon_adv, int8_sr state", state_precision="int8_sr"),
    # 2.5.16 orthogonalises the matrix in another shape and leaves lr out: its gate refuses it.
    _adv("adv-optm Muon_adv, factored state", state_precision="factored"),
    Peer(
        "emerging-optimizers Muon",
        "emerging-optimizers",
        "emerging_optimizers.orthogonalized_optimizers:Muon",
        {"momentum": MOMENTUM, "nesterov": True, "num_ns_steps": STEPS},
        python=(3, 12),
    ),
    Peer(
        "gram-newton-schulz Muon",
        "gram-newton-schulz",
        "gram_newton_schulz:Muon",
        {
            "momentum": MOMENTUM,
            "nesterov": True,
            "adjust_lr": "spectral_norm",
            "ns_use_kernels": False,  # they need an H100; without them all is torch, in float16
            "gram_newton_schulz_restart_iterations": [2],  # its own default, which it says aloud
        },
        compiled=True,
        install="pip install --no-deps",  # it names GPU packages that are needed for kernels only
    ),
    _heavyball("heavyball Muon"),
    _heavyball("heavyball Muon, bf16 state", storage_dtype="bfloat16"),
    Peer("torch.optim.AdamW", "torch", "torch.optim:AdamW", muon=False),
    Peer("bitsandbytes AdamW8bit", "bitsandbytes", "bitsandbytes.optim:AdamW8bit", muon=False),
    Peer("torchao AdamW8bit", "torchao", "torchao.optim:AdamW8bit", muon=False, compiled=True),
    Peer("torchao AdamW4bit", "torchao", "torchao.optim:AdamW4bit", muon=False, compiled=True),
)


def check_direction(peer: Peer) -> Passed:
    """Hold a Muon's first step to the polar factors of its gradients.

    From a fresh state momentum and Nesterov's blend are multiples of the gradient, so the update
    must point where its polar factor does, whatever it is scaled by. The state that a step leaves
    is not looked at: how far codes of others may be off is theirs to say.
    The errors are what is left of the polar factor beside the update: the sine of the angle.
    Raises GateError.
    """
    generator = torch.Generator().manual_seed(0)
    params = []
    for shape in GATE_SHAPES:
        param = nn.Parameter(torch.randn(shape, generator=generator) * 0.02)
        param.grad = decaying_matrix(*shape, generator)
        params.append(param)
    before = [param.detach().clone() for param in params]
    polar = [polar_factor(param.grad) for param in params if param.grad is not None]
    peer.make(params, weight_decay=0.0).step()
    updates = [old - new.detach() for old, new in zip(before, params, strict=True)]
    cosines = [cosine(update, factor) for update, factor in zip(updates, polar, strict=True)]
    refused = [found for found in cosines if not found >= LEAST_COSINE]  # NaN, too
    if refused:
        raise GateError(
            "first update: expected a cosine with the gradient's polar factor of at least "
            f"{LEAST_COSINE}, got {refused[0]:.3f}"
        )
    return Passed(_sine(min(cosines)), _sine(LEAST_COSINE))


def polar_factor(x: Tensor) -> Tensor:
    """U V^T of x = U S V^T, float64 [rows, columns]."""
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    return left @ right


def cosine(x: Tensor, y: Tensor) -> float:
    """<x, y> / (|x| |y|) in float64; NaN if one of them is zero."""
    x, y = x.double(), y.double()
    return float((x * y).sum() / (x.norm() * y.norm()))


def _sine(cosine: float) -> float:
    return math.sqrt(max(0.0, 1 - cosine * cosine))


@contextlib.contextmanager
def contained() -> Iterator[None]:
    """Keep what packages print, warn of and set for the whole process to themselves."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_num_threads(threads)
