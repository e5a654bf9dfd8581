"""Muon as a drop-in for torch.optim.Muon, and MuonQ against the paper's equations."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from device_reference import DeviceReference
from torch import Tensor, nn

from lowbit_muon import PRESETS, Muon, NonFiniteGradientError
from lowbit_muon.formats.state_format import StateFormat
from lowbit_muon.linalg.coefficients import NS_COEFFICIENTS
from lowbit_muon.optimizers import muon as muon_module
from lowbit_muon.state import operands
from lowbit_muon.step.update import update_scale

SHAPES = [(24, 40), (40, 24), (32, 32), (1, 17), (17, 1)]
MUON = NS_COEFFICIENTS["muon"][0]


def newton_schulz_fp32(grad: Tensor, coefficients: tuple, steps: int, eps: float) -> Tensor:
    """torch.optim.Muon's iteration in float32 instead of bfloat16."""
    a, b, c = coefficients
    x = grad.float().mT if grad.shape[0] > grad.shape[1] else grad.float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if grad.shape[0] > grad.shape[1] else x


def gradients(steps: int, shape: tuple[int, int], seed: int = 1) -> list[Tensor]:
    """A steady signal and noise, as momentum meets them."""
    generator = torch.Generator().manual_seed(seed)
    signal = torch.randn(shape, generator=generator)
    return [signal + torch.randn(shape, generator=generator) for _ in range(steps)]


def run(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    steps: int = 12,
) -> tuple[Tensor, torch.optim.Optimizer]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    param = nn.Parameter(start.to(dtype))
    optimizer = make([param])
    for grad in gradients(steps, shape):
        param.grad = grad.to(dtype)
        optimizer.step()
    return param.detach(), optimizer


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", [None, "original", "match_rms_adamw"])
def test_fp32_state_follows_torch_muon_to_rounding(
    shape: tuple[int, int],
    nesterov: bool,
    adjust_lr_fn: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz_fp32)
    options = {"lr": 0.02, "weight_decay": 0.1, "nesterov": nesterov, "adjust_lr_fn": adjust_lr_fn}
    ours, _ = run(lambda p: Muon(p, state_format="fp32", **options), shape)
    theirs, _ = run(lambda p: torch.optim.Muon(p, **options), shape)
    # The Gram form and the standard one differ by rounding: measured at most 2.4e-3 of an update in
    # float32 (steep spectra; 1e-4 typical), updates have entries of size lr*scale.
    step = 12 * 0.02 * max(1.0, update_scale(adjust_lr_fn, shape))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2.4e-3 * step)


# In all of float32: norms below 1e-12 are brought to one before products square them, and eps with
# them. A momentum of norm eps/10 ends where the polynomial is not linear any more.
@pytest.mark.parametrize(
    ("norm", "eps"), [(1e-8, 1e-7), (1e-14, 1e-7), (1e-26, 1e-7), (0.1, 1.0), (1e-15, 1e-14)]
)
@pytest.mark.parametrize("shape", [(8, 20), (20, 8)], ids=str)
@pytest.mark.parametrize("name", ["fp32", "linear8", "mulaw4", "spectral4"])
@pytest.mark.parametrize("way", ["whole", "panels", "device"])
def test_gradients_below_eps_move_weights_as_in_torch_muon(
    way: str,
    name: str,
    shape: tuple[int, int],
    norm: float,
    eps: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By about norm/eps times what a gradient of another size does."""
    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", newton_schulz_fp32)
    if way == "panels":
        monkeypatch.setattr(operands, "SCRATCH_FLOATS", 3 * 20)
    elif way == "device":
        backend = DeviceReference()
        monkeypatch.setattr(muon_module, "get_backend", lambda *_: backend)
    param, peer = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(shape))
    ours = Muon([param], lr=1.0, eps=eps, state_format=name, ns_dtype="float32")
    theirs = torch.optim.Muon([peer], lr=1.0, eps=eps)
    grad = torch.randn(shape)
    param.grad = peer.grad = grad * (norm / (0.05 * 1.95 * grad.norm()))  # the look-ahead's factors
    ours.step()
    theirs.step()
    # Far below eps the polynomial multiplies by 3.4445^5 = 485.
    if norm < 1e-4 * eps:
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        assert float(peer.detach().norm()) == pytest.approx(485 * scale * norm / eps, rel=0.01)
    assert (param - peer).norm() <= 2.4e-3 * peer.norm()  # see above


def test_close_to_torch_muon_as_shipped() -> None:
    """bfloat16 Newton-Schulz is what separates them: 2.5e-2 to 2.5e-1 of an update."""
    ours, _ = run(lambda p: Muon(p, lr=0.02, state_format="fp32"), (32, 48))
    theirs, _ = run(lambda p: torch.optim.Muon(p, lr=0.02), (32, 48))
    start = torch.randn(32, 48, generator=torch.Generator().manual_seed(0))
    assert (ours - theirs).norm() <= 0.25 * (theirs - start).norm()


def test_signature_and_defaults_are_torch_muons() -> None:
    import inspect

    ours = inspect.signature(Muon.__init__).parameters
    theirs = inspect.signature(torch.optim.Muon.__init__).parameters
    positional = [n for n, p in ours.items() if p.kind is not p.KEYWORD_ONLY]
    assert positional == list(theirs)
    for name in positional:  # None: the rule's, or torch's
        assert ours[name].default in (None, theirs[name].default)
    made, peer = (cls([nn.Parameter(torch.zeros(2, 2))]) for cls in (Muon, torch.optim.Muon))
    assert {name: made.defaults[name] for name in peer.defaults} == peer.defaults
    assert {name: made.param_groups[0][name] for name in peer.defaults} == peer.defaults
    assert ours["state_format"].default == "spectral4"


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"lr": torch.ones(2)},
        {"momentum": -0.1},
        {"weight_decay": -1.0},
        {"adjust_lr_fn": "other"},
    ],
)
def test_rejects_what_torch_muon_rejects(options: dict) -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    for optimizer in (Muon, torch.optim.Muon):
        with pytest.raises(ValueError):  # noqa: PT011 - the wording differs
            optimizer([param], **options)
    name = next(iter(options))
    with pytest.raises(ValueError, match=name):
        Muon([param], **options)


@pytest.mark.parametrize(
    "options",
    [
        {"ns_steps": 0},
        {"ns_steps": 100},
        {"ns_coefficients": (1.0, 2.0)},
        {"eps": 0.0},
        {"nesterov": 1},
        {"ns_input": "both"},
        {"nonfinite": "ignore"},
        {"backend": "gpu"},
        {"state_format": "spectral5"},
        {"row_splits": (1,)},
        {"seed": -1},
        {"momentum": 1.0},
    ],
)
def test_bad_options_are_named_and_leave_groups_alone(options: dict) -> None:
    param = nn.Parameter(torch.zeros(2, 2))
    name = next(iter(options)).replace("ns_", "")
    with pytest.raises((ValueError, TypeError), match=name):
        Muon([param], **options)
    optimizer = Muon([param])
    with pytest.raises((ValueError, TypeError), match=name):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3, 3))], **options})
    assert len(optimizer.param_groups) == 1


def test_parameters_of_one_dimension_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"2 or more dimensions.*\(5,\)"):
        Muon([nn.Parameter(torch.zeros(5))])


@functools.cache
def run_format(
    name: str, shape: tuple[int, int], dtype: torch.dtype, nesterov: bool
) -> tuple[Tensor, torch.optim.Optimizer]:
    return run(
        lambda p: Muon(p, state_format=name, lr=0.02, nesterov=nesterov, weight_decay=0.0),
        shape,
        dtype,
    )


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (1, 9), (0, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_format_steps_near_the_full_precision_one(
    name: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    nesterov = not PRESETS[name].normalize
    ours, optimizer = run_format(name, shape, dtype, nesterov)
    exact, _ = run_format("fp32", shape, dtype, nesterov)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert bool(ours.isfinite().all())
    assert ours.dtype == dtype
    if ours.numel():
        change = (ours.float() - start).flatten()
        expected = (exact.float() - start).flatten()
        # Twelve steps point the same way: a random direction would have a cosine near 0.
        assert torch.dot(change, expected) > 0.8 * change.norm() * expected.norm()
    assert optimizer.state_bytes() > 0 or not ours.numel()


@pytest.mark.parametrize("name", ["spectral4", "mulaw4", "linear8"])
def test_stored_input_and_backends(name: str) -> None:
    stored, _ = run(lambda p: Muon(p, state_format=name, ns_input="stored"), (24, 40))
    exact, _ = run(lambda p: Muon(p, state_format=name), (24, 40))
    assert not torch.equal(stored, exact)
    assert (stored - exact).norm() < 0.5 * exact.norm()
    reference, _ = run(lambda p: Muon(p, state_format=name, backend="reference"), (24, 40))
    # Backends agree bit for bit except for the order of float64 sums.
    torch.testing.assert_close(reference, exact, rtol=0, atol=1e-5)


def test_first_step_does_not_depend_on_the_format() -> None:
    """The fresh momentum is orthogonalised before it is quantised."""
    results = [
        run(lambda p, n=n: Muon(p, state_format=n), (20, 30), steps=1)[0]
        for n in PRESETS
        if not PRESETS[n].normalize
    ]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-6)


def muonq_transcription(
    grads: list[Tensor], weight: Tensor, right: Tensor, lr: float, decay: float, weight_decay: float
) -> Tensor:
    """arXiv 2605.11396, Algorithm 1, written from its equations in float64: mu = 255, 4 bits."""
    mu, largest_code = 255.0, 7

    def through_codes(x: Tensor, dim: int | None) -> Tensor:
        companded = x.sign() * torch.log1p(mu * x.abs().clamp(max=1)) / math.log1p(mu)
        peak = companded.abs().max() if dim is None else companded.abs().amax(dim, keepdim=True)
        scale = peak / largest_code
        restored = (companded / scale).round() * scale
        return restored.sign() * torch.expm1(restored.abs() * math.log1p(mu)) / mu

    weight, right = weight.double(), through_codes(right.double(), 0)
    momentum = torch.zeros_like(weight)
    for grad in grads:
        g = grad.double()
        momentum = decay * momentum + g / (g.norm() + 1e-7)
        momentum = momentum / (momentum.norm() + 1e-7)
        q = right / (right.norm(dim=0, keepdim=True) + 1e-7)
        p, _ = torch.linalg.qr(momentum @ q)
        r = momentum.mT @ p
        x = momentum.mT if momentum.shape[0] > momentum.shape[1] else momentum
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.mT
            x = MUON[0] * x + (MUON[1] * gram + MUON[2] * gram @ gram) @ x
        update = x.mT if momentum.shape[0] > momentum.shape[1] else x
        weight = (1 - lr * weight_decay) * weight
        weight = weight - lr * 0.2 * math.sqrt(max(weight.shape)) * update
        right = through_codes(r, 0)
        momentum = through_codes(momentum - p @ r.mT, None) + through_codes(p, 0) @ right.mT
    return weight


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (64, 64)])
def test_muonq4_is_the_paper_over_20_steps(shape: tuple[int, int]) -> None:
    from lowbit_muon.linalg.power_iteration import random_right_factor

    grads = gradients(20, shape)
    start = torch.randn(shape)
    param = nn.Parameter(start.clone())
    options = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "nesterov": False}
    optimizer = Muon([param], state_format="muonq4", adjust_lr_fn="match_rms_adamw", **options)
    for grad in grads:
        param.grad = grad
        optimizer.step()
    right = random_right_factor(shape[1], min(shape) // 16, 0, start.device)
    right = right / right.norm(dim=0, keepdim=True)
    expected = muonq_transcription(grads, start, right, 0.01, 0.95, 0.1)
    change = (expected - start).norm()
    # float32 against float64: a value within rounding of a threshold takes the other code now and
    # then, which moves one element of some thousands by one of 15 levels: below 1% of the change.
    assert (param.detach().double() - expected).norm() <= 0.01 * change


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", PRESETS)
def test_one_bad_gradient_is_skipped_and_forgotten(name: str, bad: float) -> None:
    shape = (12, 20)
    clean, poisoned = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.zeros(shape))
    poisoned.data.copy_(clean.data)
    first, second = Muon([clean], state_format=name), Muon([poisoned], state_format=name)
    for index, grad in enumerate(gradients(5, shape)):
        if index == 2:
            spoiled = grad.clone()
            spoiled[3, 4] = bad
            before = copy.deepcopy(second.state_dict()["state"])
            weight = poisoned.detach().clone()
            poisoned.grad = spoiled
            with pytest.warns(RuntimeWarning, match="inf or nan"):
                second.step()
            assert torch.equal(poisoned.detach(), weight)
            after = second.state_dict()["state"]
            for key, value in before[0].items():
                if isinstance(value, Tensor):
                    assert torch.equal(after[0][key], value)
            assert after[0]["skipped"] == 1
            continue
        clean.grad, poisoned.grad = grad, grad.clone()
        first.step()
        second.step()
    assert torch.equal(clean.detach(), poisoned.detach())


def test_raise_leaves_every_parameter_alone() -> None:
    good, bad = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = Muon([("first", good), ("second", bad)], nonfinite="raise")
    good.grad, bad.grad = torch.ones(3, 4), torch.full((3, 4), math.nan)
    with pytest.raises(NonFiniteGradientError, match=r"'second'.*12 of 12"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(3, 4))
    assert not optimizer.state


def test_momentum_overflow_is_caught_too() -> None:
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = Muon([param], lr=0.1)
    param.grad = torch.full((4, 4), 3e38)
    with pytest.warns(RuntimeWarning, match="too large"):
        optimizer.step()
    assert torch.equal(param, torch.ones(4, 4))
    assert optimizer.state[param]["skipped"] == 1


@pytest.mark.parametrize("scale", [300.0, 1e-8])
def test_half_precision_gradients_of_extreme_size(scale: float) -> None:
    grad = torch.randn(16, 24)
    results = []
    for size in (1.0, scale):
        param = nn.Parameter(torch.zeros(16, 24, dtype=torch.float32))
        # eps is a floor of the norm in torch's Muon; it must not hide what is tested here.
        optimizer = Muon([param], lr=1.0, eps=1e-30)
        param.grad = (grad * size).bfloat16().float()
        optimizer.step()
        results.append(param.detach())
    # bfloat16 rounds the two gradients differently: 2^-9 each, amplified by at most 3.4445^5 in
    # the smallest directions, which are few; well below an update's own size.
    assert (results[0] - results[1]).norm() < 0.2 * results[0].norm()


def test_conv_kernels_and_experts() -> None:
    kernel = torch.randn(8, 3, 2, 2)
    conv, flat = nn.Parameter(kernel.clone()), nn.Parameter(kernel.flatten(1).clone())
    first, second = Muon([conv]), Muon([flat])
    grad = torch.randn(8, 3, 2, 2)
    conv.grad, flat.grad = grad, grad.flatten(1)
    first.step()
    second.step()
    assert torch.equal(conv.detach().flatten(1), flat.detach())

    stacked = nn.Parameter(torch.randn(3, 6, 10))
    singles = [nn.Parameter(expert.clone()) for expert in stacked.detach()]
    batched, separate = Muon([stacked], batch_experts=True), Muon(singles)
    for _ in range(3):
        stacked.grad = torch.randn(3, 6, 10)
        for single, grad in zip(singles, stacked.grad, strict=True):
            single.grad = grad.clone()
        batched.step()
        separate.step()
    for single, expert in zip(singles, stacked.detach(), strict=True):
        assert torch.equal(single.detach(), expert)


def test_row_splits_orthogonalise_each_part() -> None:
    fused = nn.Parameter(torch.randn(10, 6))
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split((6, 2, 2))]
    first, second = Muon([fused], row_splits=(6, 2, 2)), Muon(parts)
    fused.grad = torch.randn(10, 6)
    for part, grad in zip(parts, fused.grad.split((6, 2, 2)), strict=True):
        part.grad = grad.clone()
    first.step()
    second.step()
    assert torch.equal(fused.detach(), torch.cat([part.detach() for part in parts]))
    fused.grad[0, 0] = math.nan
    before = fused.detach().clone()
    with pytest.warns(RuntimeWarning):
        first.step()
    assert torch.equal(fused.detach(), before)  # as a whole, not only the split with the nan


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["spectral4", "spectral3", "mulaw4", "muonq4", "linear8"])
def test_same_codes_for_one_and_two_threads(name: str, threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        _, optimizer = run(lambda p: Muon(p, state_format=name), (192, 320), steps=4)
        torch.set_num_threads(1)
        _, single = run(lambda p: Muon(p, state_format=name), (192, 320), steps=4)
    finally:
        torch.set_num_threads(before)
    (ours,), (expected,) = optimizer.state.values(), single.state.values()
    for role, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(ours[role], value), role


def test_tensor_lr_closure_schedulers_and_missing_gradients() -> None:
    used, unused = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4, 6))
    optimizer = Muon([used, unused], lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (used**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 24.0
    scheduler.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    optimizer.step(closure)
    assert torch.equal(unused.detach(), torch.ones(4, 6))
    assert unused not in optimizer.state


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_like_the_original(duplicate: Callable) -> None:
    param = nn.Parameter(torch.randn(8, 12))
    optimizer = Muon([param], state_format="spectral4")
    param.grad = torch.randn(8, 12)
    optimizer.step()
    twin = duplicate(optimizer)
    twin_param = twin.param_groups[0]["params"][0]
    grad = torch.randn(8, 12)
    param.grad, twin_param.grad = grad, grad.clone()
    optimizer.step()
    twin.step()
    assert torch.equal(param.detach(), twin_param.detach())


def test_groups_override_options_and_weights_only_loads() -> None:
    params = [nn.Parameter(torch.randn(6, 10)) for _ in range(3)]
    optimizer = Muon(
        [
            {"params": [params[0]], "state_format": "linear8", "lr": 0.5},
            {"params": [params[1]], "ns_coefficients": "polar_express"},
        ]
    )
    optimizer.add_param_group({"params": [params[2]], "state_format": StateFormat("mine", 3)})
    for param in params:
        param.grad = torch.randn(6, 10)
    optimizer.step()
    names = [group["state_format"]["name"] for group in optimizer.param_groups]
    assert names == ["linear8", "spectral4", "mine"]
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def test_complex_and_sparse_are_rejected_as_by_torch() -> None:
    param = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    param.grad = torch.zeros(2, 2, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match="complex"):
        Muon([param]).step()
    param = nn.Parameter(torch.zeros(2, 2))
    param.grad = torch.zeros(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        Muon([param]).step()


def test_non_contiguous_gradients_are_not_changed() -> None:
    param, plain = nn.Parameter(torch.ones(10, 14)), nn.Parameter(torch.ones(10, 14))
    grad = torch.randn(14, 10).mT
    kept = grad.clone()
    first, second = Muon([param], nesterov=False), Muon([plain], nesterov=False)
    param.grad, plain.grad = grad, grad.contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first.step()
        second.step()
    assert torch.equal(param.detach(), plain.detach())
    assert torch.equal(param.grad, kept)  # torch.optim.Muon in bfloat16 normalises it in place
