"""Every Triton kernel, compiled for GPUs that are not here, with the launches of the adapter.

The adapter is called with CPU tensors and its launches are recorded instead of run; each becomes
machine code for three NVIDIA architectures and an AMD one, without a driver. The compiler's report
must stay within `triton_budget.json`: no spills, and not more registers or shared memory than
there. After a change that is meant to cost more,

    python tests/backends/test_triton_compilation.py --write

writes the budget anew (set TRITON_INTERPRET to nothing).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("kernels are interpreted in this process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

from lowbit_muon.backends.codes import PackedCodes, Terms  # noqa: E402
from lowbit_muon.backends.memory import Checks  # noqa: E402
from lowbit_muon.backends.triton import (  # noqa: E402
    dense_products,
    device,
    integer_products,
    unavailable_reason,
)
from lowbit_muon.backends.triton.backend import TritonBackend  # noqa: E402
from lowbit_muon.backends.triton.kernels.codes import NIBBLE_LEVELS_PTX  # noqa: E402
from lowbit_muon.formats.presets import PRESETS  # noqa: E402
from lowbit_muon.formats.state_format import nearest_codebook  # noqa: E402

BUDGET_FILE = Path(__file__).with_name("triton_budget.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Instructions of matrix units, by target.
MATRIX_UNITS = {
    "sm_80": r"\b[IH]MMA\b",
    "sm_90": r"\b([IH]MMA|[IHQ]GMMA)\b",
    "sm_100": r"\b([IH]MMA|UTC[IHQ]MMA)\b",
    "gfx942": r"\bv_mfma_",
}
M, N = 256, 4096


class Launch(NamedTuple):
    kernel: Any  # a triton.JITFunction
    arguments: dict[str, Any]  # by parameter
    options: dict[str, Any]  # of the compiler


@contextlib.contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Launches of the adapter, which takes CPU tensors for tensors on a GPU of this kind."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        constants = {key: keywords.pop(key) for key in kernel.arg_names if key in keywords}
        launches.append(Launch(kernel, arguments | constants, keywords))

    kind = device.target(torch.device("cpu"))  # nothing that only NVIDIA has
    if TARGETS[target].backend == "cuda":
        kind = device.nvidia_target((TARGETS[target].arch // 10, TARGETS[target].arch % 10))
    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(TritonBackend, "checks", Checks("cpu")),
        mock.patch.object(integer_products, "target", return_value=kind),
        mock.patch.object(dense_products, "target", return_value=kind),
    ):
        yield launches


def coded(preset: str, columns: int = N) -> PackedCodes:
    layout = PRESETS[preset].code_layout()
    return PackedCodes(
        torch.zeros(M, layout.row_bytes(columns), dtype=torch.uint8),
        torch.zeros(M, layout.blocks(columns)),
        PRESETS[preset].code_book(),
        layout,
        columns,
    )


def update(preset: str, grad: Tensor, out: torch.dtype | None = None) -> Callable[..., object]:
    codes = coded(preset, grad.shape[1])
    return lambda backend: backend.update_codes(
        Terms(0.0, codes, 0.95, grad),
        packed=torch.zeros_like(codes.packed),
        scales=torch.zeros_like(codes.scales),
        out=None if out is None else torch.zeros(grad.shape, dtype=out),
        out_weights=(0.95, 1.0),
    )


def weight_update(
    weight: Tensor, update: Tensor, *, seed: bool = False, cautious: bool = False
) -> Callable[..., object]:
    one = torch.ones(1)
    seeds = torch.ones(1, dtype=torch.int32) if seed else None
    return lambda backend: backend.update_weight(
        weight, update, decay=one, step_size=one, seed=seeds, cautious=cautious
    )


def of(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


ACTIVE = torch.ones(2, dtype=torch.bool)
BF16, FP32 = torch.bfloat16, torch.float32
# What is compiled, by name. Element by element: contraction would change bits.
ELEMENTWISE: dict[str, Callable[[TritonBackend], object]] = {
    "accumulate-4": lambda b: b.accumulate(
        of(FP32, M, N), Terms(0.5, coded("spectral4"), grad=of(BF16, M, N))
    ),
    "accumulate-3-tall": lambda b: b.accumulate(
        of(FP32, M, N), Terms(codes=coded("spectral3"), grad=of(FP32, N, M).T)
    ),
    "accumulate-by-matrix": lambda b: b.accumulate(
        of(FP32, 2, M, N), Terms(of(torch.float64, 2), grad=of(BF16, 2, M, N))
    ),
    "accumulate-blocks": lambda b: b.accumulate(of(FP32, M, N), Terms(codes=coded("nf4"))),
    "update-4": update("spectral4", of(FP32, M, N), BF16),
    "update-4-tall": update("spectral4", of(BF16, N, M).T, BF16),
    "update-3": update("spectral3", of(BF16, M, N), FP32),
    "update-2": update("spectral2", of(FP32, M, N)),
    "update-blocks-4": update("nf4", of(FP32, M, N), FP32),
    "update-blocks-8": update("linear8", of(FP32, M, N), FP32),
    "quantize-4": lambda b: b.quantize(of(FP32, M, N), *book("spectral4")),
    "encode-3": lambda b: b.encode(of(FP32, M, N), of(FP32, M, 1), *book("spectral3")),
    "rotate": lambda b: b.rotate(of(FP32, M, N)),
    "rotate-two-parts": lambda b: b.rotate(of(FP32, M, 12288), inverse=True),
    "rotate-two-rounds": lambda b: b.rotate(of(FP32, 2, 65536)),
    "scaled": lambda b: b.scaled(of(FP32, 2, M, N), of(FP32, 2), out=of(BF16, 2, M, N)),
    "weight": weight_update(of(FP32, N, M).T, of(BF16, M, N)),
    "weight-cautious": weight_update(of(BF16, M, N), of(torch.float16, M, N), cautious=True),
    "weight-stochastic": weight_update(of(BF16, M, N), of(BF16, M, N), seed=True),
    "limbs": lambda b: b.code_product(of(FP32, M, M), coded("spectral4")),
    "levels-3": lambda b: b.code_gram(coded("spectral3", 100)),
    "combined": lambda b: b.combined(
        [[1.0, 0.5, 0.25, -0.5, 2.0]] * 3, [of(FP32, M, M) for _ in range(5)]
    ),
}
PRODUCTS: dict[str, Callable[[TritonBackend], object]] = {
    "gram-4": lambda b: b.code_gram(coded("spectral4")),
    "gram-3": lambda b: b.code_gram(coded("spectral3")),
    "gram-2": lambda b: b.code_gram(coded("spectral2")),
    "gram-8": lambda b: b.code_gram(coded("linear8", 2048)),
    "gram-blocks-8": lambda b: b.code_gram(coded("linear8")),
    "product-4": lambda b: b.code_product(of(FP32, M, M), coded("spectral4")),
    "product-3": lambda b: b.code_product(of(FP32, M, M), coded("spectral3")),
    "product-tail": lambda b: b.code_product(of(FP32, M, M), coded("spectral4", 100)),
    "dense-float32": lambda b: b.product(of(FP32, 2, M, M), of(FP32, 2, M, N), active=ACTIVE),
    "dense-bfloat16": lambda b: b.product(of(BF16, 2, M, M), of(BF16, 2, M, N), active=ACTIVE),
    "dense-bfloat16-added": lambda b: b.product(
        of(BF16, M, M), of(BF16, M, N), addend=of(BF16, M, N), beta=0.5
    ),
    "symmetric-float32": lambda b: b.symmetric_product(of(FP32, M, N)),
    "dense-rounded": lambda b: b.product(
        of(FP32, M, M), of(FP32, M, N), rounded=True, diagonal=-64
    ),
    "symmetric-float32-added": lambda b: b.symmetric_product(
        of(FP32, M, M), of(FP32, M, M), addend=of(FP32, M, M), other=of(FP32, M, M)
    ),
    "symmetric-rounded": lambda b: b.symmetric_product(
        of(FP32, M, M), of(FP32, M, M), addend=of(FP32, M, M), other=of(FP32, M, M), rounded=True
    ),
    "symmetric-bfloat16": lambda b: b.symmetric_product(
        of(BF16, M, M), of(BF16, M, M), addend=of(BF16, M, M)
    ),
}


def book(preset: str) -> tuple[Any, Any]:
    return PRESETS[preset].code_book(), PRESETS[preset].code_layout()


def launch_of(name: str, target: str) -> Launch:
    """The launch that a name stands for: what a product does first, elsewhere the last."""
    with recorded(target) as launches:
        (ELEMENTWISE | PRODUCTS)[name](backend())
    return launches[0 if name in ("limbs", "levels-3") else -1]


def backend() -> TritonBackend:
    """One that does not ask for a GPU."""
    return object.__new__(TritonBackend)


def compiled(launch: Launch, target: str) -> Any:
    """The launch's machine code, specialised as a first call at run time would be."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        special = not parameter.do_not_specialize
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if parameter.is_constexpr or (special and is_int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(index,)] = value
            continue
        signature[parameter.name] = mangle_type(value)
        aligned = value.data_ptr() if isinstance(value, Tensor) else value if is_int else 1
        if special and aligned % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=TARGETS[target], options=launch.options)


class Report(NamedTuple):
    registers: int
    shared: int  # bytes
    spills: int  # instructions or registers
    assembly: str


@functools.cache
def report(name: str, target: str) -> Report:
    kernel = compiled(launch_of(name, target), target)
    shared = int(kernel.metadata.shared)
    if target.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        registers, spills = (
            int(re.findall(rf"\.{key}:\s*(\d+)", text)[-1])
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        return Report(registers, shared, spills, text)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers, stack, local = (
        int(re.search(rf"{key}:(\d+)", usage)[1])  # type: ignore[index]
        for key in ("REG", "STACK", "LOCAL")
    )
    spills = stack + local + len(re.findall(r"\b(?:STL|LDL)\b", code))
    return Report(registers, shared, spills, kernel.asm["ptx"] + code)


@pytest.fixture(autouse=True, scope="module")
def own_cache() -> Iterator[None]:
    """Nothing compiled before counts, and nothing stays."""
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=folder),
    ):
        yield


NAMES = [*ELEMENTWISE, *PRODUCTS]
# Sums of floats after the integers: `base.Backend` says in which order they are rounded.
EXACT_PRODUCTS = [name for name in PRODUCTS if "dense" not in name and "symmetric" not in name]
# Quotients rounded to nearest are found by fused steps (Markstein), so fused operations show there.
DIVIDING = [n for n in ELEMENTWISE if n.startswith(("update", "quantize", "encode", "limbs"))]


# Kernels that go element by element are much alike on all NVIDIA GPUs, and products for sm_80 are
# those for sm_90 without its asynchronous ones.
OFTEN = {True: ("sm_90", "gfx942"), False: ("sm_90", "sm_100", "gfx942")}
# On sm_100 a kernel of each kind: how it decodes its codes is the same as for sm_90.
ON_SM_100 = ("gram-4", "gram-blocks-8", "product-3", "dense-float32", "dense-bfloat16",
             "symmetric-rounded")  # fmt: skip


def is_usual(name: str, target: str) -> bool:
    return target in OFTEN[name in ELEMENTWISE] and (target != "sm_100" or name in ON_SM_100)


def compilations(names: Sequence[str]) -> pytest.MarkDecorator:
    """Every kernel for every target; what is much like another of them is long."""
    pairs = [
        pytest.param(
            name,
            target,
            marks=[] if is_usual(name, target) else [pytest.mark.long],
        )
        for name, target in itertools.product(names, TARGETS)
    ]
    return pytest.mark.parametrize(("name", "target"), pairs)


@compilations(NAMES)
def test_resources(name: str, target: str, record_property: Callable[[str, object], None]) -> None:
    found = report(name, target)
    record_property("spills", found.spills)  # bench/versions.py reads it
    assert found.spills == 0
    budget = json.loads(BUDGET_FILE.read_text())
    if budget["triton"] != triton.__version__:
        pytest.skip(f"the budget is of triton {budget['triton']}, this is {triton.__version__}")
    allowed = budget[target][name]
    assert found.registers <= allowed["registers"]
    assert found.shared <= allowed["shared"]


@compilations(PRODUCTS)
def test_products_take_matrix_units(name: str, target: str) -> None:
    assert re.search(MATRIX_UNITS[target], report(name, target).assembly)


@compilations([*ELEMENTWISE, *EXACT_PRODUCTS])
def test_nothing_is_contracted_or_flushed(name: str, target: str) -> None:
    """Every product and sum of float32 is rounded by itself, and subnormal numbers stay."""
    text = report(name, target).assembly
    if target.startswith("gfx"):
        fused = r"\bv_(fma|fmac|mad|mac|pk_fma)\w*_f32"
        assert name in DIVIDING or not re.search(fused, text)
        return
    assert not re.search(r"\b(fma|mad)\.\w+\.f32", text)  # in PTX
    assert not re.search(r"\.ftz", text)
    assert name in DIVIDING or not re.search(r"\bFFMA\b", text)  # in machine code


@pytest.mark.parametrize("name", ["update-4", "update-blocks-8", "quantize-4", "encode-3", "limbs"])
def test_quotients_and_roots_are_rounded_to_nearest(name: str) -> None:
    ptx = report(name, "sm_90").assembly
    assert not re.search(r"\b(div|rcp|sqrt)\.(approx|full)", ptx)
    assert "div.rn.f32" in ptx


@pytest.mark.long
def test_matrices_of_one_element() -> None:
    """An argument of 1 is a constant to the compiler, which each kernel must take."""
    one = torch.ones(1)
    codes = [coded(name, 1).row_slice(slice(0, 1)) for name in ("spectral3", "linear8")]
    x = of(FP32, 1, 1)
    with recorded("sm_90") as launches:
        b = backend()
        for c in codes:
            b.accumulate(x, Terms(1.0, c, grad=x.clone()))
            b.update_codes(
                Terms(codes=c, grad=x),
                packed=c.packed.clone(),
                scales=c.scales.clone(),
                out=x.clone(),
            )
            b.code_gram(c)
            b.code_product(x, c, out=x.clone(), beta=1.0)
        b.rotate(x)
        b.scaled(of(FP32, 1, 1, 1), one, out=of(FP32, 1, 1, 1))
        b.update_weight(x, x.clone(), decay=one, step_size=one)
        b.symmetric_product(x, addend=x)
        b.product(x, x, out=x.clone(), beta=1.0, active=torch.ones(1, dtype=torch.bool))
    assert len({launch.kernel.__name__ for launch in launches}) == 10
    for launch in launches:
        assert compiled(launch, "sm_90").asm["cubin"]


def run_ptx(text: str, operands: dict[str, int]) -> dict[str, int]:
    """Carry out the few instructions that `NIBBLE_LEVELS_PTX` consists of, on 32-bit numbers."""

    def permute(low: int, high: int, selector: int) -> int:
        data = (low | high << 32).to_bytes(8, "little")
        picks = [selector >> (4 * i) & 15 for i in range(4)]
        assert not any(pick & 8 for pick in picks), "the sign would be replicated"
        return int.from_bytes(bytes(data[pick] for pick in picks), "little")

    operations: dict[str, Callable[..., int]] = {
        "and.b32": lambda a, b: a & b,
        "or.b32": lambda a, b: a | b,
        "shr.u32": lambda a, b: a >> b,
        "prmt.b32": permute,
    }
    registers = dict(operands)
    for line in re.findall(r"^([a-z]+\.[a-z0-9]+) (.*);$", text, flags=re.MULTILINE):
        target, *sources = line[1].split(", ")
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = operations[line[0]](*values) & 0xFFFFFFFF
    return registers


def test_inline_assembly_decodes_every_byte() -> None:
    """The interpreter cannot run it, so its instructions are carried out here."""
    codebook = nearest_codebook([-127, -90, -77, *range(-5, 7), 126])
    words = [word & 0xFFFFFFFF for word in integer_products._level_words(codebook)]
    table = {f"${3 + 4 * i}": word for i, word in enumerate(words)}
    levels = [int(level) for level in codebook.levels]
    assert len(levels) == 16
    for start in range(256):
        data = bytes((start + step) % 256 for step in (0, 85, 17, 131))
        found = run_ptx(NIBBLE_LEVELS_PTX, {"$2": int.from_bytes(data, "little")} | table)
        for register, shift in (("$0", 0), ("$1", 4)):
            signed = [b - 256 if b > 127 else b for b in found[register].to_bytes(4, "little")]
            assert signed == [levels[byte >> shift & 15] for byte in data]


def test_inline_assembly_gets_the_table_in_order() -> None:
    """The four words are consecutive parameters of the kernel, lower half first."""
    ptx = report("gram-4", "sm_90").assembly
    uses = re.findall(
        r"prmt\.b32 lower, (%r\d+), (%r\d+), index;.*?prmt\.b32 upper, (%r\d+), (%r\d+), index;",
        ptx,
        flags=re.DOTALL,
    )
    assert len(set(uses)) == 1
    loads = r"ld\.param\.b32\s+{}, \[code_gram_kernel_param_(\d+)\]"
    places = [int(re.search(loads.format(register), ptx)[1]) for register in uses[0]]  # type: ignore[index]
    assert places == list(range(places[0], places[0] + 4))


def test_triton_is_imported_late() -> None:
    script = (
        "import sys, lowbit_muon, lowbit_muon.backends.triton as backend;"
        "backend.unavailable_reason();"
        "assert 'lowbit_muon.backends.triton.backend' not in sys.modules;"
        "assert not any(name.startswith('triton.language') for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)


def test_reasons() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert unavailable_reason() == "triton is not installed (pip install triton)"
    with (
        mock.patch("torch.cuda.is_available", return_value=False),
        mock.patch("torch.xpu.is_available", return_value=False),
        pytest.raises(RuntimeError, match=r"backend: 'triton' is not available: .* no GPU"),
    ):
        TritonBackend()


def main() -> None:
    """Write the budget."""
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"expected --write, got {sys.argv[1:]}")
    budget: dict[str, Any] = {"triton": triton.__version__}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        for target in TARGETS:
            found = {name: report(name, target) for name in NAMES}
            budget[target] = {
                name: {"registers": one.registers, "shared": one.shared}
                for name, one in found.items()
            }
            spilled = {name: one.spills for name, one in found.items() if one.spills}
            print(target, "spills:", spilled or "none")
    # one line a kernel, so that a change reads well
    text = re.sub(
        r"\{\s+(\"registers\": \d+),\s+(\"shared\": \d+)\s+\}",
        r"{\1, \2}",
        json.dumps(budget, indent=1),
    )
    BUDGET_FILE.write_text(text + "\n")


if __name__ == "__main__":
    main()
