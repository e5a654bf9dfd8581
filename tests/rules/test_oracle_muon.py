"""The oracle of Muon against torch.optim.Muon."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle_runs import SHAPES, close, draw, gradients, make, run
from oracles.maps import MUON, Triple, newton_schulz
from torch import Tensor

shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def torch_muon(weight: Tensor, grads: list[Tensor], **parameters: Any) -> Tensor:
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([parameter], **parameters)
    for grad in grads:
        parameter.grad = grad.clone()
        optimizer.step()
    return parameter.detach()


@shapes
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_muon_is_torch_s_but_for_rounding(
    shape: tuple[int, int], nesterov: bool, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's Newton-Schulz iteration in float64."""

    def iterate(grad: Tensor, triple: Triple, steps: int, eps: float) -> Tensor:
        return newton_schulz([triple], steps, eps)(grad)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iterate)
    weight, grads = draw(*shape), gradients(shape, 10)
    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "nesterov": nesterov}
    oracle = make("muon", weight, scale=scale, polar=newton_schulz([MUON], 5), **options)
    close(run(oracle, grads), torch_muon(weight, grads, adjust_lr_fn=scale, **options))


def bfloat16_error(u: Tensor) -> float:
    """Bound of the Frobenius error of one Newton-Schulz step of u in bfloat16.

    The start, with three roundings (u's, its norm's and the division's), is off by e = 3 r of its
    norm 1, r = 2^-8. The step takes that to at most L e, with L the greatest of |p'(s)| and p(s)/s,
    p the step's polynomial, over singular values s from the least less e to the greatest plus e:
    the factors of the derivative are p's divided differences, which are means of these. Its own
    roundings, to first order and in Frobenius norms but for ||.||_2:
      S = XX^T       |dS| <= r |S|, as sums are in float32;
      B = bS + cS^2  |dB| <= r (2 |bS| + 3 |cS^2|) + (|b| + 2 |c| ||S||_2) |dS|;
      aX + BX        r (2 |aX| + 3 |BX|) + |dB| ||X||_2.
    A tenth for the orders above the first.
    """
    a, b, c = MUON
    r = 2.0**-8
    s = torch.linalg.svdvals(u)
    s = s / s.norm()
    top = float(s.max()) + 3 * r
    grid = torch.linspace(max(float(s.min()) - 3 * r, 0.0), top, 1001, dtype=torch.float64)
    slope = (a + 3 * b * grid**2 + 5 * c * grid**4).abs().maximum(a + b * grid**2 + c * grid**4)
    of_s = r * float(s.square().norm())
    of_b = r * float(2 * abs(b) * s.pow(2).norm() + 3 * abs(c) * s.pow(4).norm())
    of_b += (abs(b) + 2 * abs(c) * top**2) * of_s
    own = r * float(2 * abs(a) * s.norm() + 3 * (b * s**3 + c * s**5).norm()) + of_b * top
    return 1.1 * (float(slope.max()) * 3 * r + own)


@pytest.mark.parametrize("shape", [(64, 4), (4, 64), (16, 128), (24, 24)], ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_is_torch_s_within_bfloat16(shape: tuple[int, int], nesterov: bool) -> None:
    """Of one Newton-Schulz step: the worst case of five is longer than the result."""
    weight, grads = draw(*shape), gradients(shape, 20)
    exact = newton_schulz([MUON], 1)
    errors: list[float] = []

    def iterate(u: Tensor) -> Tensor:
        step = exact(u)
        errors.append(bfloat16_error(u))
        assert errors[-1] < 0.06 * float(step.norm())  # the bound says something
        return step

    options: dict[str, Any] = {"lr": 0.03, "weight_decay": 0.2, "nesterov": nesterov}
    oracle = make("muon", weight, polar=iterate, **options)
    difference = run(oracle, grads) - torch_muon(weight, grads, ns_steps=1, **options)
    assert 1e-6 < float(difference.norm()) < 0.03 * oracle.factor * sum(errors)
