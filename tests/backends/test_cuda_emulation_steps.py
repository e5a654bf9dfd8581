"""What `bench.gpu_check` runs on a GPU, over the emulated CUDA kernels: checks and whole steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_emulation import COMPILER, GIVEN_LIBRARY, forwards, library

from bench.gpu.correctness import CHECKS, Check, Sizes
from lowbit_muon.backends import get_backend
from lowbit_muon.backends.cuda.adapter import CudaBackend
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.step import options as group_options

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
    def chosen(name: str, device: torch.device) -> Any:
        return forwards if name == "cuda" else get_backend(name, device)

    monkeypatch.setattr(muon_module, "get_backend", chosen)
    monkeypatch.setattr(group_options, "check_backend_name", lambda _: None)
    assert check.run(forwards, torch.device("cpu"), SIZES) > 0
