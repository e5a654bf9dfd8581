"""Run where only the package and torch are installed: three steps on the C++ backend.

Fails unless the compiled kernels are there, change the weights, and share torch's OpenMP runtime.
"""

import sys
from pathlib import Path

import torch

import lowbit_muon


def openmp_runtimes() -> set[str]:
    """The libraries of that name in this process."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return {line.split()[-1] for line in maps if "libgomp" in line}


def main() -> None:
    weight = torch.nn.Parameter(torch.randn(64, 96))
    before = weight.detach().clone()
    optimizer = lowbit_muon.Muon([weight], lr=1e-2, backend="cpu")
    for _ in range(3):
        weight.grad = weight.detach().sin()
        optimizer.step()
    assert bool(weight.isfinite().all())
    # An update's singular values are near one: no row of the weight stays as it was.
    assert bool((weight - before).detach().norm(dim=1).gt(0).all())
    # Two runtimes would each start threads, and torch.set_num_threads would reach one of them.
    (runtime,) = openmp_runtimes()
    assert Path(runtime).is_relative_to(Path(torch.__file__).parents[1]), runtime
    print(f"{lowbit_muon.__file__}: Python {sys.version.split()[0]}, torch {torch.__version__}")
    print(f"stepped; {optimizer.state_bytes()} bytes of state; OpenMP: {runtime}")


if __name__ == "__main__":
    main()
