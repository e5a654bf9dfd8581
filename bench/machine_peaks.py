"""What this machine can do at most: multiply-adds in registers, copies, torch's bfloat16 product.

    python -m bench.machine_peaks [--quick] [--isas LEVEL ...] [--threads N ...] [--json FILE]

fp32, int16, int8 LEVEL  independent chains of the instructions that our matrix products of floats
                         and codes take on that instruction-set level (int8 only with VNNI), on
                         operands in registers; bench/csrc/peaks.cpp, compiled when first asked for
copy from memory, in L2  torch's copy of 128 MiB, and of 256 KiB a thread; bytes read and written
torch.mm bf16            a product of 1024 x 1024 matrices: the best seen in bfloat16, not a peak
                         (these three are of the package, tools/benchmark/peaks.py)

Other benchmarks time the roofs they need in the same rounds as everything else and take fractions
of them, so that both see the same clock and the same neighbours; here they stand alone. torch
chooses its own instructions when it is imported: its roof is the highest level's, unless
ONEDNN_MAX_CPU_ISA or MKL_ENABLE_INSTRUCTIONS keep it lower.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from bench.chains import multiply_adds
from bench.harness import Record, Run, add_options, runs
from lowbit_muon.backends.cpu import adapter as cpu
from lowbit_muon.tools.benchmark.cases import Case, Prepared, UnavailableError
from lowbit_muon.tools.benchmark.counts import BF16_PRODUCT, FP32_PRODUCT, FROM_MEMORY, IN_L2
from lowbit_muon.tools.benchmark.gates import GateError
from lowbit_muon.tools.benchmark.measure import Result, measure_cases
from lowbit_muon.tools.benchmark.peaks import peaks

TORCHS = (FROM_MEMORY, IN_L2, FP32_PRODUCT, BF16_PRODUCT)  # of `lowbit-muon bench`, too
ITERATIONS = 200_000  # of the chains: 0.3 to 3 ms
WORDS = {"fp32": "float32", "int16": "int16", "int8": "int8"}


def best_isa() -> str:
    """The highest level of this processor, which torch takes by itself."""
    return cpu.supported_isas()[-1]


def code_type(isa: str) -> str:
    """What the kernels of a level multiply codes as: "int8" or "int16"."""
    return "int8" if isa in ("avx512vnni", "avx512bf16", "amx") else "int16"


def roofs(keys: Iterable[str]) -> list[Case]:
    """The roofs of these names, each once: "fp32 avx2", `FROM_MEMORY`, ..."""
    return [_roof(key) for key in sorted(set(keys))]


def _roof(key: str) -> Case:
    if key in TORCHS:
        (case,) = peaks([key])
        return case
    dtype, isa = key.split()
    return Case(key, partial(_prepare_chains, dtype, isa), dtype, isa=isa)


def _prepare_chains(dtype: str, isa: str) -> Prepared:
    chains = partial(multiply_adds, isa, WORDS[dtype])
    try:
        products = chains(ITERATIONS)
    except RuntimeError as error:  # there is no compiler
        raise UnavailableError(str(error)) from error
    if products != ITERATIONS * chains(1):
        raise GateError(f"products: expected {ITERATIONS} times {chains(1)}, got {products}")
    return Prepared(lambda: chains(ITERATIONS), work={f"{dtype} {isa}": 2.0 * products})


def measure(run: Run, repeats: int, *, shared: bool) -> list[Result]:
    """Every roof of a level, and those that do not depend on it if `shared`."""
    keys = {f"fp32 {run.isa}", f"int16 {run.isa}", f"{code_type(run.isa)} {run.isa}"}
    keys |= {FROM_MEMORY, IN_L2, BF16_PRODUCT} if shared else set()
    with run.applied():
        return measure_cases(roofs(keys), (0, 0), repeats)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="What this machine can do at most.")
    add_options(parser, isas=cpu.supported_isas(), threads=(1, torch.get_num_threads()))
    options = parser.parse_args(arguments)
    repeats = options.repeats or (5 if options.quick else 15)
    record = Record(options.json)
    for run in runs(options):
        record.add(measure(run, repeats, shared=run.isa == options.isas[-1]))
    record.close()


if __name__ == "__main__":
    main()
