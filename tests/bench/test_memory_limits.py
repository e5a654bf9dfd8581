"""The benchmark of fine-tunes under memory limits, on the tiny model."""

from __future__ import annotations

from typing import Any

import pytest

from bench import memory_limits


def test_gradient_release_keeps_few_gradients() -> None:
    kept = memory_limits.run_here("spectral4", 0, 1, "tiny")
    released = memory_limits.run_here("spectral4, gradient release", 0, 1, "tiny")
    assert kept["gradient_bytes"] == kept["weight_bytes"]
    assert released["gradient_bytes"] < kept["gradient_bytes"] / 2
    assert released["state_bytes"] == kept["state_bytes"]


def test_what_fits_in_a_limit_is_not_run_again_in_a_larger_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = []

    def run(name: str, limit: float, steps: int, model: str) -> dict[str, Any]:
        ran.append(limit)
        return {"name": name, "limit_gib": limit, "completed": limit == 0 or limit >= 4}

    monkeypatch.setattr(memory_limits, "run_in_process", run)
    rows = memory_limits.ladder("AdamW", [16.0, 4.0, 8.0, 3.0], 1, "tiny")
    assert ran == [0, 3.0, 4.0]
    assert {row["limit_gib"]: row["completed"] for row in rows} == {
        0: True, 3.0: False, 4.0: True, 8.0: True, 16.0: True,
    }  # fmt: skip


def test_a_limit_that_is_too_low_is_a_row_with_the_reason() -> None:
    row = memory_limits.run_in_process("spectral4", 0.1, 1, "tiny")
    assert not row["completed"]
    assert row["reason"]
