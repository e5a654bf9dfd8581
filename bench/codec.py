"""Throughput of the fused codec against a copy moving the same bytes.

    python -m bench.codec [--quick] [--json FILE] [--isas LEVEL ...] [--threads N ...]

quantize reads fp32 and writes packed codes and scales; dequantize does the reverse. Their bytes are
fp32 + packed + scales; the copy they are compared with reads half as many and writes the other
half. "warm" repeats one matrix, whose roof is a copy within the L2 cache (nearer than it is unless
the matrix is small); "cold" walks through many, as an optimizer step does: the roof is a copy from
memory. bitsandbytes' nf4 in blocks of 64 on the CPU is a peer, where it is installed.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from bench.harness import Record, Run, add_options, runs
from bench.machine_peaks import roofs
from lowbit_muon.backends.base import Backend
from lowbit_muon.backends.codes import PackedCodes, Terms
from lowbit_muon.backends.cpu.adapter import CpuBackend
from lowbit_muon.formats.presets import PRESETS
from lowbit_muon.tools.benchmark.cases import Case, Prepared, UnavailableError
from lowbit_muon.tools.benchmark.counts import FROM_MEMORY, IN_L2
from lowbit_muon.tools.benchmark.gates import GateError, Passed, allowed_stored_error, expect_close
from lowbit_muon.tools.benchmark.measure import Result, measure_cases
from lowbit_muon.tools.benchmark.momentum import decaying_matrix

SHAPES = ((576, 1536), (1024, 4096))
COLD_BYTES = 192 * 2**20  # of fp32 matrices: more than common last-level caches hold
FORMATS = ("spectral2", "spectral3", "spectral4", "linear8", "nf4")
OPERATIONS = ("quantize", "dequantize")
CACHES = ("warm", "cold")
ROOFS = {"warm": IN_L2, "cold": FROM_MEMORY}
Calls = list[Callable[[], object]]


def encode(backend: CpuBackend, x: Tensor, name: str) -> PackedCodes:
    """x [m, n] in the codes and scales of the format `name`, without the rest of the format."""
    state_format = PRESETS[name]
    codebook, layout = state_format.code_book(), state_format.code_layout()
    return PackedCodes(*backend.quantize(x, codebook, layout), codebook, layout, x.shape[1])


def check(backend: CpuBackend, x: Tensor, name: str) -> Passed:
    """The decoded matrix beside x; raises GateError unless codes are those of the reference."""
    reference = Backend()
    codes = encode(backend, x, name)
    expected = reference.encode(x, codes.scales, codes.codebook, codes.layout)
    found, wanted = torch.empty_like(x), torch.empty_like(x)
    backend.accumulate(found, Terms(codes=codes))
    reference.accumulate(wanted, Terms(codes=codes))
    if not torch.equal(codes.packed, expected) or not torch.equal(found, wanted):
        raise GateError(f"codes of {name} differ from the reference")
    return expect_close("decoded matrix", found, x, allowed_stored_error(PRESETS[name]))


def in_turn(calls: Calls) -> Callable[[], object]:
    """A call of the next of `calls` each time, round and round."""
    endless = itertools.cycle(calls)
    return lambda: next(endless)()


def prepare_codec(matrices: list[Tensor], name: str, operation: str, roof: str) -> Prepared:
    """quantize, dequantize, or a copy of as many bytes, over the matrices in turn."""
    backend = CpuBackend()
    calls: Calls = []
    moved = 0

    def add(x: Tensor) -> None:
        nonlocal moved
        codes = encode(backend, x, name)
        packed, scales = codes.packed, codes.scales
        moved = x.nbytes + packed.nbytes + scales.nbytes
        if operation == "quantize":
            calls.append(
                lambda: backend.quantize(
                    x, codes.codebook, codes.layout, packed=packed, scales=scales
                )
            )
        elif operation == "dequantize":
            buffer = x.clone()
            calls.append(lambda: backend.accumulate(buffer, Terms(codes=codes)))
        else:
            source = torch.ones(moved // 2, dtype=torch.uint8)
            target = source.clone()
            calls.append(lambda: target.copy_(source))

    passed = None if operation == "copy" else check(backend, matrices[0], name)
    for x in matrices:
        add(x)
    return Prepared(in_turn(calls), passed, work={roof: float(moved)})


def prepare_bitsandbytes(matrices: list[Tensor], operation: str, roof: str) -> Prepared:
    """Its codes of four bits; one error for a block of 64, as in our nf4."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # other kernels
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise UnavailableError(f"{error}; pip install bitsandbytes") from error
    quantize = partial(functional.quantize_4bit, blocksize=64, quant_type="nf4")
    packed, state = quantize(matrices[0])
    decoded = functional.dequantize_4bit(packed, state)
    allowed = allowed_stored_error(PRESETS["nf4"])
    passed = expect_close("decoded matrix", decoded, matrices[0], allowed)
    moved = matrices[0].nbytes + packed.nbytes + state.absmax.nbytes
    calls: Calls = [partial(quantize, x) for x in matrices]
    if operation == "dequantize":  # into new memory: on a CPU it takes no `out`
        calls = [
            partial(functional.dequantize_4bit, packed.clone(), copy.deepcopy(state))
            for _ in matrices
        ]
    return Prepared(in_turn(calls), passed, work={roof: float(moved)})


def cases(matrices: list[Tensor], name: str, cache: str, isa: str) -> list[Case]:
    """Every operation of one format in one state of the caches, and its roof."""
    roof = ROOFS[cache]
    baseline = f"copy {cache} {name}"
    found = [
        Case(
            f"copy {cache}", partial(prepare_codec, matrices, name, "copy", roof), format=name,
            peer=True,
        )
    ]  # fmt: skip
    for operation in OPERATIONS:
        prepare = partial(prepare_codec, matrices, name, operation, roof)
        ours = Case(f"{operation} {cache}", prepare, format=name, baseline=baseline, isa=isa)
        found.append(ours)
        if name == "nf4":
            theirs = partial(prepare_bitsandbytes, matrices, operation, roof)
            peer = f"{operation} {cache} bitsandbytes"
            found.append(Case(peer, theirs, baseline=baseline, peer=True))
    return [*found, *roofs([roof])]


def measure(run: Run, shape: tuple[int, int], repeats: int, pool_bytes: int) -> list[Result]:
    """One shape, warm and cold. Formats are not interleaved: their pools would not fit together."""
    matrix = decaying_matrix(*shape, torch.Generator().manual_seed(0))
    pool = [matrix.roll(i, 1) for i in range(max(1, pool_bytes // matrix.nbytes))]
    results = []
    with run.applied():
        for cache, name in itertools.product(CACHES, FORMATS):
            matrices = pool if cache == "cold" else pool[:1]
            results += measure_cases(cases(matrices, name, cache, run.isa), shape, repeats)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Throughput of the codec against a copy.")
    add_options(parser, threads=(1, torch.get_num_threads()))
    options = parser.parse_args(arguments)
    repeats = options.repeats or (7 if options.quick else 41)
    record = Record(options.json)
    for run in runs(options):
        for shape in SHAPES[: 1 if options.quick else None]:
            record.add(measure(run, shape, repeats, COLD_BYTES))
    record.close()


if __name__ == "__main__":
    main()
