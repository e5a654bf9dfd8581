"""Interleaved timing: order, warm-up, repeats, budget, and events in place of the clock."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench import harness
from lowbit_muon.tools.benchmark import timing
from lowbit_muon.tools.benchmark.timing import interleaved, medians, spread


def test_rounds_alternate_and_the_warmup_does_not_count() -> None:
    called: list[str] = []
    rounds: list[int] = []
    seconds = interleaved(
        {name: lambda name=name: called.append(name) for name in "abc"},  # type: ignore[misc]
        3,
        warmup=1,
        on_round=lambda: rounds.append(len(called)),
    )
    assert "".join(called) == "abccbaabccba"
    assert rounds == [3, 6, 9, 12]
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 3)
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_after_the_deadline_there_is_one_round() -> None:
    called: list[int] = []
    seconds = interleaved(
        {"a": lambda: called.append(0)}, 5, warmup=1, deadline=time.perf_counter() - 1
    )
    assert len(seconds["a"]) == 1
    assert len(called) == 2


def test_short_calls_are_repeated_in_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []
    each = {"short": 1e-4, "long": 1.0, "instant": 0.0}

    def clock(call: Any, calls: int) -> float:
        taken.append((call(), calls))
        return each[call()]

    monkeypatch.setattr(timing, "_seconds", clock)
    cases = {name: lambda name=name: name for name in each}  # type: ignore[misc]
    interleaved(cases, 1, warmup=1, sample_seconds=1e-3)
    assert taken[:3] == [("short", 1), ("long", 1), ("instant", 1)]
    assert dict(taken[3:]) == {"short": 10, "long": 1, "instant": timing.MOST_CALLS}


def test_a_sample_is_the_mean_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing, "timer", lambda: now[0])

    def call() -> None:
        now[0] += 2.0

    assert timing._seconds(call, 5) == 2.0


def test_an_accelerator_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own clock, before and behind the calls of a sample."""
    events: list[str] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: events.append("wait"))
    interleaved({"a": lambda: events.append("call")}, 1, warmup=0)
    assert events == ["wait", "call", "wait"]


def test_medians_and_spread() -> None:
    seconds = {"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 4.0]}
    assert medians(seconds) == {"a": 2.0, "b": 4.0}
    assert spread([4.0]) is None
    assert spread([2.0, 2.0]) == 0.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("repeats", "warmup"), [(0, 1), (1, -1)])
def test_counts_are_checked(repeats: int, warmup: int) -> None:
    with pytest.raises(ValueError, match=rf"got {repeats}, {warmup}"):
        interleaved({}, repeats, warmup)


def test_benchmarks_share_the_packages_timing() -> None:
    assert harness.interleaved is interleaved
