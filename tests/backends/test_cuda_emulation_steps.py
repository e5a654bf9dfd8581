"""What `bench.gpu_check` runs on a GPU, over the emulated CUDA kernels: checks and whole steps."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation import COMPILER, GIVEN_LIBRARY, forwards, library
from device_reference import stand_in

from bench.gpu.correctness import CHECKS, Check, Sizes
from lowbit_muon.backends.cuda.adapter import CudaBackend

if COMPILER is None and GIVEN_LIBRARY is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

__all__ = ["forwards", "library"]  # fixtures

SIZES = Sizes(
    matrices=((1, 1), (5, 129)),
    products=((1, 1, 1), (9, 20, 33)),
    step_formats=("spectral4", "mulaw4", "linear8"),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_the_checks_of_the_gpu_script(
    check: Check, forwards: CudaBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, forwards, "cuda")
    assert check.run(forwards, torch.device("cpu"), SIZES) > 0
