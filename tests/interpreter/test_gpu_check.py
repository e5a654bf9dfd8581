"""What `bench.gpu_check` runs on a GPU, in the interpreter: checks and whole optimizer steps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.gpu import correctness
from bench.gpu.correctness import CHECKS, CODED, Check, Sizes
from lowbit_muon.backends import get_backend

SIZES = Sizes(
    matrices=((1, 1), (5, 129)), products=((1, 1, 1), (9, 20, 33)), step_formats=("spectral4",)
)


# Offload adds copies to the steps, and no kernel; it takes the interpreter half a minute.
CHECKS_OF_KERNELS = [check for check in CHECKS if check.name != "host offload"]


# Every format's kernels have tests of their own; here the script is tested. One format has scales
# of rows and fields of 3 bits, the other blocks.
FEW = ("spectral3", "linear8")


@pytest.mark.parametrize("formats", [FEW, pytest.param(CODED, marks=pytest.mark.long)])
@pytest.mark.parametrize("check", CHECKS_OF_KERNELS, ids=lambda check: check.name)
def test_the_checks_of_the_gpu_script(
    check: Check, formats: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(correctness, "CODED", formats)
    backend = get_backend("triton", torch.device("cpu"))
    assert check.run(backend, torch.device("cpu"), SIZES) > 0


@pytest.mark.long  # the step of other formats, whose kernels have tests of their own
@pytest.mark.parametrize("name", ["mulaw4", "linear8"])
def test_steps_of_other_formats(name: str) -> None:
    backend = get_backend("triton", torch.device("cpu"))
    sizes = dataclasses.replace(SIZES, step_formats=(name,))
    (check,) = (check for check in CHECKS if check.name == "optimizer steps")
    assert check.run(backend, torch.device("cpu"), sizes) > 0
