"""What a device step leaves to torch between the kernels, as `bench.gpu.roofline` counts it."""

from __future__ import annotations

import pytest

from bench.gpu.roofline import step_on_paper


@pytest.mark.parametrize(
    ("name", "calls", "mebibytes"), [("spectral4", 49, 431), ("linear8", 33, 390)]
)
def test_torch_has_little_to_do(name: str, calls: int, mebibytes: float) -> None:
    """For 4096x11008; upper bounds, to be lowered. (121 and 6716 for spectral4 once.)"""
    work = step_on_paper((4096, 11008), name).work["torch"]
    assert work.calls <= calls
    assert work.bytes <= mebibytes * 2**20


def test_sums_of_matrices_are_few() -> None:
    """The spectral encoder's own passes: five in its chain, three in its forms."""
    work = step_on_paper((4096, 11008), "spectral4").work["combined"]
    assert work.calls <= 8
    assert work.bytes <= 1920 * 2**20
