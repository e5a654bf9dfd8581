"""Throughput of the fused codec against a copy moving the same bytes.

    python -m bench.codec [--quick] [--json FILE] [--isas LEVEL ...] [--threads N ...]

quantize reads fp32 and writes packed codes and scales; dequantize does the reverse. Their bytes are
fp32 + packed + scales; the copy they are compared with reads half as many and writes the other
half. "warm" repeats one matrix; "cold" walks through many, as an optimizer step does.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.harness import interleaved, machine, medians, write_json
from lowbit_muon.backends import cpu
from lowbit_muon.backends.base import PackedCodes
from lowbit_muon.backends.cpu import CpuBackend
from lowbit_muon.backends.reference import ReferenceBackend
from lowbit_muon.presets import resolve_format

SHAPES = ((576, 1536), (1024, 4096))
COLD_BYTES = 192 * 2**20  # of fp32 matrices: more than common last-level caches hold
OPERATIONS = ("quantize", "dequantize")
FORMATS = ("spectral2", "spectral3", "spectral4", "linear8")


@dataclass(frozen=True)
class Result:
    isa: str
    threads: int
    shape: str
    codes: str  # the format whose codes and scales these are
    cache: str
    operation: str
    gigabytes_per_second: float
    copy_gigabytes_per_second: float

    @property
    def ratio(self) -> float:
        """Throughput against the copy."""
        return self.gigabytes_per_second / self.copy_gigabytes_per_second


def encode(backend: CpuBackend, x: Tensor, name: str) -> PackedCodes:
    """x [m, n] in the codes and scales of the format `name`, without the rest of the format."""
    state_format = resolve_format(name)
    codebook, layout = state_format.code_book(), state_format.code_layout()
    return PackedCodes(*backend.quantize(x, codebook, layout), codebook, layout, x.shape[1])


def check(backend: CpuBackend) -> None:
    """Raise unless the kernels agree with the reference on data like those they are timed with."""
    reference = ReferenceBackend()
    x = torch.randn(64, 1537)
    for name in FORMATS:
        codes = encode(backend, x, name)
        expected = reference.encode(x, codes.scales, codes.codebook, codes.layout)
        found, wanted = torch.empty_like(x), torch.empty_like(x)
        backend.accumulate(found, codes=codes)
        reference.accumulate(wanted, codes=codes)
        if not torch.equal(codes.packed, expected) or not torch.equal(found, wanted):
            raise RuntimeError(f"codes of {name} differ from the reference: not timed")


def in_turn(calls: list[Callable[[], object]]) -> Callable[[], object]:
    """A call of the next of `calls` each time, round and round."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def time_codec(
    backend: CpuBackend, matrices: list[Tensor], name: str, repeats: int
) -> dict[str, float]:
    """GB/s of quantize, dequantize and copy over the matrices in turn."""
    calls: dict[str, list[Callable[[], object]]] = {"quantize": [], "dequantize": [], "copy": []}
    moved = 0

    def add(x: Tensor) -> None:
        nonlocal moved
        codes = encode(backend, x, name)
        packed, scales, buffer = codes.packed, codes.scales, x.clone()
        moved = x.nbytes + packed.nbytes + scales.nbytes
        source = torch.ones(moved // 2, dtype=torch.uint8)
        target = source.clone()
        calls["quantize"].append(
            lambda: backend.quantize(x, codes.codebook, codes.layout, packed=packed, scales=scales)
        )
        calls["dequantize"].append(lambda: backend.accumulate(buffer, codes=codes))
        calls["copy"].append(lambda: target.copy_(source))

    for x in matrices:
        add(x)
    cases = {operation: in_turn(group) for operation, group in calls.items()}
    seconds = medians(interleaved(cases, repeats, warmup=2))
    return {operation: moved / seconds[operation] / 1e9 for operation in calls}


def measure(isa: str, threads: int, quick: bool) -> list[Result]:
    cpu.set_isa(isa)
    torch.set_num_threads(threads)
    backend = CpuBackend()
    check(backend)
    results = []
    for m, n in SHAPES[: 1 if quick else 2]:
        pool = [torch.randn(m, n) for _ in range(COLD_BYTES // (4 * m * n))]
        for name, cache in itertools.product(FORMATS, ("warm", "cold")):
            matrices = pool if cache == "cold" else pool[:1]
            speed = time_codec(backend, matrices, name, repeats=9 if quick else 41)
            results += [
                Result(
                    isa,
                    threads,
                    f"{m}x{n}",
                    name,
                    cache,
                    operation,
                    speed[operation],
                    speed["copy"],
                )
                for operation in OPERATIONS
            ]
    return results


def show(results: list[Result]) -> None:
    table = Table(title=f"codec, {machine()['cpu']}", box=None, pad_edge=False)
    for heading in (
        "ISA",
        "threads",
        "shape",
        "format",
        "cache",
        "operation",
        "GB/s",
        "copy",
        "ratio",
    ):
        table.add_column(heading)
    for r in results:
        speeds = (r.gigabytes_per_second, r.copy_gigabytes_per_second)
        table.add_row(
            r.isa,
            str(r.threads),
            r.shape,
            r.codes,
            r.cache,
            r.operation,
            *(f"{speed:.1f}" for speed in speeds),
            f"{r.ratio:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput of the codec against a copy.")
    parser.add_argument("--quick", action="store_true", help="one shape, few repeats")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--isas", nargs="+", metavar="LEVEL", default=cpu.supported_isas()[-1:])
    parser.add_argument("--threads", nargs="+", type=int, metavar="N", default=[1, 2])
    options = parser.parse_args()
    torch.manual_seed(0)
    results = []
    for isa, threads in itertools.product(options.isas, options.threads):
        results += measure(isa, threads, options.quick)
    show(results)
    if options.json:
        write_json(options.json, [{**asdict(r), "ratio": r.ratio} for r in results])


if __name__ == "__main__":
    main()
