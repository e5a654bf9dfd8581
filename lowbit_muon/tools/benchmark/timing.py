"""Interleaved timing and ratios of medians, on CPUs and GPUs.

Variants are timed in turn, round after round, so that a change of clock or a busy neighbour hits
all of them alike; only their ratios are worth quoting. A sample is timed by timeit and the clock of
torch.utils.benchmark, which waits for an accelerator. Timer.timeit there calls twice more before
each sample, and triton.testing.do_bench takes a tenth of a second for each and empties the cache:
neither takes part in rounds.
"""

from __future__ import annotations

import math
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence

from torch.utils.benchmark.utils.timer import timer

MOST_CALLS = 1000  # in one sample: a mistaken estimate costs no more than that


def interleaved(
    cases: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    *,
    deadline: float = math.inf,
    sample_seconds: float = 0.0,
    on_round: Callable[[], None] = lambda: None,
    on_case: Callable[[str], None] = lambda _: None,
) -> dict[str, list[float]]:
    """Seconds of a call, `repeats` for each case; one sample of every case in each round.

    Odd rounds run in reverse order, so that no case always profits from what ran before it.
    deadline: of `time.perf_counter()`; no round starts after it but the first.
    sample_seconds: calls much shorter than this are repeated until a sample takes about as long,
    counted in the last round of the warm-up, and the sample is their mean.
    on_round: is called after every round, warm-up included; on_case: with each name before its
    sample.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats, warmup: expected >= 1 and >= 0, got {repeats}, {warmup}")
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    calls = dict.fromkeys(cases, 1)
    names = list(cases)
    for round_ in range(warmup + repeats):
        if round_ > warmup and time.perf_counter() > deadline:
            break
        for name in names if round_ % 2 == 0 else reversed(names):
            on_case(name)
            elapsed = _seconds(cases[name], calls[name])
            if round_ >= warmup:
                seconds[name].append(elapsed)
            elif round_ == warmup - 1 and sample_seconds > 0:
                wanted = math.ceil(sample_seconds / max(elapsed, 1e-9))
                calls[name] = min(MOST_CALLS, wanted)
        on_round()
    return seconds


def _seconds(call: Callable[[], object], calls: int) -> float:
    """Of one of so many calls, in the mean."""
    return timeit.Timer(call, timer=timer).timeit(calls) / calls


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median seconds of each case."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> float | None:
    """Interquartile range divided by the median; None for a single value."""
    if len(values) < 2:
        return None
    lower, middle, upper = statistics.quantiles(values, n=4, method="inclusive")
    return (upper - lower) / middle
