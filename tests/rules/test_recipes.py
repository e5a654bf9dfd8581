"""Every recipe against its oracle: the equations in float64, written apart from the library."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from oracles import ORACLES
from oracles.gains import GAINS
from oracles.maps import exact_polar, newton_schulz, sinkhorn, spectral
from test_stages import draw
from torch import Tensor, nn

from lowbit_muon import RULES, Muon, UpdateRule
from lowbit_muon.linalg.coefficients import resolve_coefficients
from lowbit_muon.state.stored import Kept
from lowbit_muon.step.rules.coded import (
    decoded_factor,
    encoded_factor,
)
from lowbit_muon.step.rules.direction import (
    DirectionMap,
    ExactPolar,
    LowRankPolar,
    Polar,
    Sinkhorn,
)
from lowbit_muon.step.rules.eigenbasis import MomentumBasisAdam
from lowbit_muon.step.rules.kronecker import KroneckerWhitened
from lowbit_muon.step.rules.precondition import Equilibrate
from lowbit_muon.step.rules.recipes import fismo, pion
from lowbit_muon.step.rules.rotation import Rotated
from lowbit_muon.step.rules.scaling import VectorMoment
from lowbit_muon.step.rules.stage import Matrices, uniform
from lowbit_muon.step.rules.subspace import LeadingAdam
from lowbit_muon.step.rules.weight_decay import Cautious

SHAPES = ((24, 40), (40, 24), (32, 32), (1, 12), (12, 1))
STEPS = 20
# A learning rate with which weights of 0.1 move by several times themselves, for those that clamp.
LR, WEIGHT_DECAY = 0.02, 0.1


def first_basis(columns: int, rank: int) -> Tensor:
    return uniform(torch.zeros(1, 1, 1), columns, rank)[0]


def clear_polar(x: Tensor) -> Tensor:
    """Without what is below 1e-4 of the largest singular value.

    What is left of a momentum when its leading part is taken out has zeros, which float32 knows to
    1e-7 of that part, ten times as large here; what is above zero is above 1e-2.
    """
    return spectral(x, lambda s: (s > 1e-4 * s.max()).to(s.dtype))


@dataclass(frozen=True)
class ClearPolar(DirectionMap):
    kind: ClassVar[str] = "clear_polar_of_the_tests"

    def apply(self, x: Tensor, matrices: Matrices) -> Tensor:
        return torch.stack([clear_polar(each.double()).float() for each in x])


# rule -> (its name among the oracles, what the oracle is told beside the rule's own options)
ORACLE_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "scion_columns": ("scion_col", {}),
    "cosmos": ("cosmos", {"start": first_basis, "polar": clear_polar}),
    "cautious_decay": ("muon", {"decay": "cautious"}),
    # (a sketch of more columns than these matrices have rows takes all directions)
    "low_rank_muon": ("muon", {}),
    "adago": ("adago", {"scale": "none"}),
    # (the mask is of the momentum, with and without a look-ahead)
    "cautious_muon": ("cautious_muon", {"nesterov": False}),
    "spectral_sphere": (
        "spectral_sphere",
        {"inner": newton_schulz(resolve_coefficients("polar_express", 8), 8)},
    ),
}
# Rules whose weight decay is a part of them, and no option; or zero where it is left at 0.1.
FIXED_DECAY = {
    *("scion", "scion_sign", "scion_columns", "muonh", "muon_ball", "spectral_sphere"),
    *GAINS,
}


def gradients(shape: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """With a common part; the seventh is zero, and sizes differ."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    common = torch.randn(rows, 3, generator=generator) @ torch.randn(
        3, columns, generator=generator
    )
    grads = [
        (0.5 + 0.1 * step) * (common + torch.randn(shape, generator=generator))
        for step in range(STEPS)
    ]
    grads[6].zero_()
    return grads


def with_exact_polar(rule: UpdateRule) -> UpdateRule:
    """The rule with the exact polar factor in the place of Newton-Schulz, as its oracle has it."""
    exact = ClearPolar() if rule.name == "cosmos" else ExactPolar()
    return replace(rule, direction=exact) if type(rule.direction) is Polar else rule


def ours(rule: UpdateRule, weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    param = nn.Parameter(weight.clone())
    optimizer = Muon([param], lr=LR, rule=rule, state_format="fp32", **options)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach().double()


def theirs(name: str, weight: Tensor, grads: list[Tensor], **options: Any) -> Tensor:
    oracle = ORACLES[name](weight, lr=LR, **options)
    for grad in grads:
        oracle.step(grad.double())
    return oracle.weight


def assert_close(found: Tensor, expected: Tensor) -> None:
    """1e-4 of the weights, as the project asks for.

    float32 leaves 2^-24 of each of some ten operations a step; a singular value that is s of the
    largest takes 1/s of that into the polar factor, and no matrix here has one below 1e-3:
    20 * 10 * 2^-24 * 1e3 = 1e-2 at worst, for all errors with one sign. They are seen to be 1e-6.
    """
    assert float((found - expected).norm()) <= 1e-4 * float(expected.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", sorted(set(RULES) - {"soap", "soap_muon", "mousse"}))
def test_a_recipe_does_what_its_equations_say(name: str, shape: tuple[int, int]) -> None:
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grads = gradients(shape)
    oracle, told = ORACLE_OF.get(name, (name, {}))
    decay = {} if name in FIXED_DECAY else {"weight_decay": WEIGHT_DECAY}
    found = ours(with_exact_polar(RULES[name].with_state_bits(32)), weight, grads, **decay)
    assert_close(found, theirs(oracle, weight, grads, **decay, **told))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_cosmos_of_any_rank_does_what_its_equations_say(rank: int, shape: tuple[int, int]) -> None:
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grads = gradients(shape)
    leading = LeadingAdam(rank=rank, bits=32)
    rule = replace(RULES["cosmos"], precondition=(leading,), direction=ClearPolar())
    found = ours(rule, weight, grads)
    told = {"rank": rank, "start": first_basis, "polar": clear_polar}
    assert_close(found, theirs("cosmos", weight, grads, **told))


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["soap", "soap_muon"])
def test_soap_does_what_its_equations_say(name: str, shape: tuple[int, int], number: int) -> None:
    """Both begin with the same eigenvectors: where the first gradient has no directions any will
    do. Parameters take turns: the fourth has its second decomposition three steps earlier. (Of one
    row or column ten gradients leave directions of twelve open: there is no second one here.)"""
    grads = gradients(shape)
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(number)]
    param = nn.Parameter(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    rule, every = with_exact_polar(RULES[name].with_state_bits(32)), 25 if 1 in shape else 10
    if name == "soap":
        rule = replace(rule, direction=replace(rule.direction, every=every))
    else:
        rule = replace(rule, precondition=(replace(rule.precondition[0], every=every),))
    optimizer = Muon([*params, param], lr=LR, rule=rule, state_format="fp32", weight_decay=0.01)
    oracle = ORACLES[name](param, lr=LR, number=number, every=every, weight_decay=0.01)
    for step, grad in enumerate(grads):
        param.grad = grad.clone()
        optimizer.step()
        oracle.step(grad.double())
        if not step:
            state = optimizer.state[param]
            found = [state[f"rule.{side}_basis"].double() for side in ("rows", "columns")]
            for basis, theirs_, factor in zip(found, oracle.bases, oracle.factors, strict=True):
                identity = torch.eye(len(basis), dtype=torch.float64)
                torch.testing.assert_close(basis.mT @ basis, identity, rtol=0, atol=1e-5)
                values = [(q.mT @ factor @ q).diagonal() for q in (basis, theirs_)]
                torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5 * float(factor.norm()))
            oracle.bases = found
    assert_close(param.detach().double(), oracle.weight)


@pytest.mark.parametrize("number", [0, 3])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_conda_with_more_than_one_basis(shape: tuple[int, int], number: int) -> None:
    """The fourth parameter has its next decompositions three steps earlier."""
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(number)]
    param = nn.Parameter(0.1 * torch.ones(shape))
    rule = replace(RULES["conda"], direction=MomentumBasisAdam(every=8, bits=32))
    optimizer = Muon([*params, param], lr=LR, rule=rule, state_format="fp32", weight_decay=0.1)
    oracle = ORACLES["conda"](param, lr=LR, number=number, every=8, weight_decay=0.1)
    for grad in gradients(shape):
        param.grad = grad.clone()
        optimizer.step()
        oracle.step(grad)
    assert_close(param.detach().double(), oracle.weight)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
@pytest.mark.parametrize("name", ["soap", "conda"])
def test_pytorch_optimizer_ends_beside_ours(name: str, shape: tuple[int, int]) -> None:
    """Where it is installed ('.[peers]'). Seen are 5e-6 at most, where sums are float32's."""
    peers = pytest.importorskip("pytorch_optimizer")
    start = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    params = [nn.Parameter(start.clone()) for _ in range(2)]
    told = {"scale": 0.25, "betas": (0.9, 0.99)} if name == "conda" else {}
    made = peers.Conda if name == "conda" else peers.SOAP
    theirs_ = made([params[0]], lr=LR, weight_decay=0.0, **told)
    mine = Muon(
        [params[1]],
        lr=LR,
        rule=RULES[name].with_state_bits(32),
        state_format="fp32",
        weight_decay=0.0,
    )
    for step, grad in enumerate(gradients(shape)):
        for param, optimizer in zip(params, (theirs_, mine), strict=True):
            param.grad = grad.clone()
            optimizer.step()
        if name == "soap" and not step:  # where there are no directions any eigenvectors will do
            state = mine.state[params[1]]
            bases = [state[f"rule.{side}_basis"].clone() for side in ("rows", "columns")]
            theirs_.state[params[0]]["Q"] = bases
    found, expected = (param.detach().double() for param in reversed(params))
    assert float((found - expected).norm()) <= 1e-5 * float(expected.norm())


@pytest.mark.parametrize(("number", "largest"), [(0, 10000), (3, 10000), (0, 32)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mousse_does_what_its_equations_say(
    shape: tuple[int, int], number: int, largest: int
) -> None:
    """The fourth parameter has its second decomposition three steps earlier.

    eps = 0.01: float32 knows an eigenvalue to 1e-7 of the largest, which may be 40 of the mean, or
    4e-4 of eps; the power -1/8 makes 5e-5 of that, in directions that no gradient had.
    """
    params = [nn.Parameter(torch.zeros(2, 2)) for _ in range(number)]
    param = nn.Parameter(0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    rule = with_exact_polar(RULES["mousse"].with_state_bits(32))
    stage = rule.precondition[0]
    assert isinstance(stage, KroneckerWhitened)
    whitened = replace(stage, eps=0.01, largest=largest)
    rule = replace(rule, precondition=(whitened,))
    optimizer = Muon([*params, param], lr=LR, rule=rule, state_format="fp32", weight_decay=0.1)
    settings = {"number": number, "eps": 0.01, "largest": largest}
    oracle = ORACLES["mousse"](param, lr=LR, weight_decay=0.1, **settings)
    for grad in gradients(shape):
        param.grad = grad.clone()
        optimizer.step()
        oracle.step(grad.double())
    assert_close(param.detach().double(), oracle.weight)


def test_mousse_s_small_eigenvalues_survive_eight_bits() -> None:
    """Of gradients whose directions differ by 1e3 in size, and eigenvalues by 1e6, each is known.
    In its basis P^T L P is nearly diagonal: sqrt(L_ii L_jj) times a correlation, of 400 samples or
    more, whose eigenvalues are above (1 - sqrt(24 / 400))^2 = 0.57. Codes are wrong by up to
    1 / 65534 of that root, uniformly, 24 of them along a direction; those of 20 steps add up as
    (1 - 0.95^40) / (1 - 0.95^2) squares of it. Two of such standard deviations; and twice, behind
    the tenth and the twentieth step, what `_solved` leaves on both sides of P^T L P: the square of
    P^T P - I, in which columns that are wrong by e = 4 / (254 sqrt(3)) are 4 e at most."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q
    sizes = torch.logspace(0, -3, 24).unsqueeze(1)
    params = [nn.Parameter(torch.zeros(24, 400)) for _ in range(2)]
    rules = [RULES["mousse"].with_state_bits(bits) for bits in (8, 32)]
    optimizers = [Muon([p], rule=r, lr=0.01) for p, r in zip(params, rules, strict=True)]
    for _ in range(20):
        grad = basis @ (sizes * torch.randn(24, 400, generator=generator))
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
    coded, full = (
        optimizer.state[param]["rule.rows_powers"]
        for param, optimizer in zip(params, optimizers, strict=True)
    )
    error = math.sqrt(24 / 3) / 65534 * math.sqrt((1 - 0.95**40) / (1 - 0.95**2)) / 0.57
    rebased = 2 * 2 * (4 * 4 / (254 * math.sqrt(3))) ** 2
    torch.testing.assert_close(coded, full, rtol=0.125 * (2 * error + rebased), atol=0)


def test_a_factor_in_codes_is_known_to_a_65534th() -> None:
    """Of the root of both diagonal elements, for all kinds of S_ij, and though S_ij is not S_ji to
    the last bit, as of products of matrices."""
    wide = torch.linspace(-1, 1, 2 * 32767 + 1).view(1, -1)
    for size in (1e-12, 1.0, 1e12):
        first, other = size, 3 * size
        s = torch.zeros(wide.numel(), 2, 2)
        s[:, 0, 0], s[:, 1, 1] = first, other
        s[:, 0, 1] = s[:, 1, 0] = wide[0] * math.sqrt(first * other)
        s[:, 1, 0] *= 1 + 2**-22
        kept = encoded_factor("s", s, 8)
        assert kept["s"].dtype == torch.int8
        found = decoded_factor(kept, "s", 8)
        assert torch.equal(found, found.mT)
        assert torch.equal(found.diagonal(dim1=1, dim2=2), s.diagonal(dim1=1, dim2=2))
        error = (found[:, 0, 1] - s[:, 0, 1]).abs().max()
        # (and float32's own rounding of the quotient, 2^-22)
        assert float(error) <= (1 / 65534 + 2**-22) * math.sqrt(first * other)
    zeros = {"s": torch.zeros(1, 3, 3, dtype=torch.int8), "s_scales": torch.zeros(1, 1, 3)}
    assert not decoded_factor(zeros, "s", 8).any()


@pytest.mark.parametrize("rule", ["conda", "mousse", "soap", "soap_muon"])
def test_bases_stay_to_the_bit_where_another_s_turn_is(rule: str) -> None:
    """Though a batch is kept as a whole: the second matrix is due one step before the first."""
    params = [nn.Parameter(draw(24, 40)) for _ in range(2)]
    stage = next(s for s in RULES[rule].stages() if hasattr(s, "every"))
    found = replace(stage, every=3)
    changed = {"direction": found} if stage is RULES[rule].direction else {"precondition": (found,)}
    optimizer = Muon(params, rule=replace(RULES[rule], **changed))
    turned = []
    for step in range(4):
        before = [bases_of(optimizer, param) for param in params]
        for index, param in enumerate(params):
            param.grad = draw(24, 40, seed=2 * step + index)
        optimizer.step()
        if step:
            turned.append(
                [b != bases_of(optimizer, p) for b, p in zip(before, params, strict=True)]
            )
    assert [sum(each) for each in turned] in ([1, 1, 0], [0, 1, 1], [1, 0, 1])


def bases_of(optimizer: Muon, param: nn.Parameter) -> list[Any]:
    """Codes of all bases of a matrix, as lists."""
    state = optimizer.state[param]
    return [value.tolist() for key, value in state.items() if key.endswith("basis")]


@pytest.mark.parametrize("rank", [1, 4, 24])
@pytest.mark.parametrize("rule", ["mousse", "soap", "soap_muon"])
def test_factors_in_eight_bits_stay_finite(rule: str, rank: int) -> None:
    """Gradients of few directions and of any size, whose small eigenvalues are rounding."""
    generator = torch.Generator().manual_seed(0)
    param = nn.Parameter(torch.zeros(24, 40))
    optimizer = Muon([param], rule=rule, lr=0.02)
    for _ in range(60):
        size = 10 ** torch.randn((), generator=generator)
        left, right = (torch.randn(s, generator=generator) for s in ((24, rank), (rank, 40)))
        param.grad = size * left @ right
        optimizer.step()
        tensors = [v for v in optimizer.state[param].values() if isinstance(v, Tensor)]
        assert all(bool(tensor.isfinite().all()) for tensor in (param, *tensors))


# (by the long side R is not determined where the momentum has no directions)
@pytest.mark.parametrize(
    ("side", "shape"),
    [("row", (24, 40)), ("row", (32, 32)), ("column", (40, 24)), ("column", (32, 32))],
    ids=str,
)
@pytest.mark.parametrize("f", ["sinkhorn", "row", "sign"])
def test_aro_by_either_side_and_any_map(f: str, side: str, shape: tuple[int, int]) -> None:
    weight, grads = 0.1 * torch.ones(shape), gradients(shape)
    rule = replace(RULES["aro"], direction=Rotated(f, side, bits=32))
    found = ours(rule, weight, grads, weight_decay=WEIGHT_DECAY)
    assert_close(found, theirs("aro", weight, grads, weight_decay=WEIGHT_DECAY, f=f, side=side))


def test_cosmos_finds_the_leading_directions_that_the_official_start_has() -> None:
    """From random numbers, too, each step takes (s_4 / s_3)^2 off what is wrong of the basis."""
    common = gradients((24, 3))[0] @ gradients((3, 40))[0]
    grads = [grad + 30 * common for grad in gradients((24, 40))[:5]]
    param = nn.Parameter(torch.zeros(24, 40))
    rule = replace(RULES["cosmos"], precondition=(LeadingAdam(rank=3, bits=32),))
    optimizer = Muon([param], lr=LR, rule=rule, state_format="fp32")
    official = ORACLES["cosmos"](param, rank=3)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        official.step(grad.double())
    found = optimizer.state[param]["rule.leading"].double()
    assert float(torch.linalg.svdvals(found.mT @ official.p).min()) > 1 - 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_pion_does_what_its_equations_say(k: int, shape: tuple[int, int]) -> None:
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grads = gradients(shape)
    found = ours(pion(k), weight, grads, weight_decay=WEIGHT_DECAY)
    assert_close(found, theirs("pion", weight, grads, weight_decay=WEIGHT_DECAY, k=k))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fismo_does_what_its_equations_say(shape: tuple[int, int]) -> None:
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grads = gradients(shape)
    found = ours(
        with_exact_polar(fismo(0.9, 0.1).with_state_bits(32)),
        weight,
        grads,
        weight_decay=WEIGHT_DECAY,
    )
    assert_close(found, theirs("fismo", weight, grads, weight_decay=WEIGHT_DECAY))


def test_fismo_has_no_numbers_of_its_own() -> None:
    with pytest.raises(ValueError, match=r"decay: expected a number in \(0, 1\), got 0"):
        fismo(0, 0.1)
    with pytest.raises(ValueError, match="damping: expected a number > 0, got 0"):
        fismo(0.9, 0)


@pytest.mark.parametrize("axes", ["row", "column"])
def test_equilibration_by_either_axis(axes: str) -> None:
    weight, grads = torch.randn(24, 40), gradients((24, 40))
    rule = replace(RULES["muoneq"], precondition=(Equilibrate(axes),), direction=ExactPolar())
    found = ours(rule, weight, grads, weight_decay=0.0)
    assert_close(found, theirs("muoneq", weight, grads, weight_decay=0.0, axes=axes))


@pytest.mark.parametrize("decay", ["cautious", "cautious_lr2"])
@pytest.mark.parametrize("scaled", [False, True])
def test_cautious_decay_of_any_rule(decay: str, scaled: bool) -> None:
    weight, grads = torch.randn(40, 24), gradients((40, 24))
    stage = Cautious(scaled=scaled, squared=decay == "cautious_lr2")
    rule = UpdateRule("x", direction=ExactPolar(), weight_decay=stage)
    found = ours(rule, weight, grads, weight_decay=WEIGHT_DECAY)
    told = {"decay": decay, "scaled_decay": scaled, "weight_decay": WEIGHT_DECAY}
    assert_close(found, theirs("muon", weight, grads, **told))


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)], ids=str)
def test_sinkhorn_balances_rows_and_columns(shape: tuple[int, int]) -> None:
    weight, grads = torch.zeros(shape), gradients(shape)[:1]

    def moved_by(direction: Sinkhorn) -> Tensor:
        rule = UpdateRule("x", direction=direction, options=(("adjust_lr_fn", "none"),))
        return ours(rule, weight, grads, weight_decay=0.0) / LR

    assert_close(moved_by(Sinkhorn(2)), -sinkhorn(grads[0].double(), rounds=2))
    moved = moved_by(Sinkhorn(30))
    # thirty rounds of a positive matrix (its squares) converge far below float32
    torch.testing.assert_close(
        moved.square().mean(dim=1), torch.ones(shape[0], dtype=torch.float64), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(
        moved.square().mean(dim=0), torch.ones(shape[1], dtype=torch.float64), rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (33, 33)], ids=str)
@pytest.mark.parametrize("name", ["normuon", "normuon_speedrun", "nanochat", "muon_plus"])
def test_newton_schulz_takes_the_place_of_the_polar_factor(
    name: str, shape: tuple[int, int]
) -> None:
    """With the recipe's own coefficients, against the same iteration in float64."""
    weight, grads = torch.zeros(shape), gradients(shape)[:6]
    options = dict(RULES[name].options)
    coefficients = resolve_coefficients(options.get("ns_coefficients", "muon"), 5)
    found = ours(RULES[name], weight, grads, weight_decay=0.0)
    expected = theirs(name, weight, grads, weight_decay=0.0, polar=newton_schulz(coefficients, 5))
    # float32 Newton-Schulz is within 2.4e-3 of float64
    assert float((found - expected).norm()) <= 2.4e-3 * float(expected.norm())


def test_rows_of_a_wide_polar_factor_have_norm_one() -> None:
    """Why speedruns have NorMuon's vector on the long side: the other has no differences."""
    x = torch.randn(24, 90, dtype=torch.float64)
    assert float((exact_polar(x).norm(dim=1) - 1).abs().max()) < 1e-12
    assert VectorMoment(axis="long").state((24, 90)) == {"vector_moment": Kept((1, 90))}
    assert VectorMoment(axis="long").state((90, 24)) == {"vector_moment": Kept((90, 1))}
    assert VectorMoment(axis="short").state((90, 24)) == {"vector_moment": Kept((1, 24))}
    assert math.prod(VectorMoment().state((90, 24))["vector_moment"].shape) == 90


def test_a_sketch_finds_the_largest_directions() -> None:
    """Of rank 8 in a sketch of 16 nothing is lost; of full rank the update has rank 16."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(60, 8, generator=generator, dtype=torch.float64)
    low = left @ torch.randn(8, 90, generator=generator, dtype=torch.float64)
    full = torch.randn(60, 90, generator=generator)
    rule = UpdateRule("x", direction=LowRankPolar(16), options=(("adjust_lr_fn", "none"),))
    moved = ours(rule, torch.zeros(60, 90), [low.float()], weight_decay=0.0) / -LR
    torch.testing.assert_close(moved, exact_polar(low), rtol=0, atol=1e-5)
    values = torch.linalg.svdvals(ours(rule, torch.zeros(60, 90), [full], weight_decay=0.0) / LR)
    torch.testing.assert_close(values[:16], torch.ones(16, dtype=torch.float64), rtol=1e-5, atol=0)
    assert float(values[16]) < 1e-5
    # another step has other numbers
    numbers = [uniform(torch.full((1, 1, 1), float(t)), 90, 16) for t in (1, 2)]
    assert not bool((numbers[0] == numbers[1]).any())
    # 1440 of them: mean and correlation within five deviations, sqrt(1/3 / 1440) and 1/3 of it
    assert abs(float(numbers[0].mean())) < 5 * math.sqrt(1 / 3 / 1440)
    assert abs(float((numbers[0] * numbers[1]).mean())) < 5 / 3 / math.sqrt(1440)
    assert -1 <= float(numbers[0].min()) < -0.9
    assert 0.9 < float(numbers[0].max()) < 1


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (16, 16)], ids=str)
def test_a_sketch_of_all_directions_is_the_whole_polar_factor(shape: tuple[int, int]) -> None:
    """At (20, 12) random signs lost a direction from the fifth step on: theirs were singular."""
    weight, grads = 0.1 * torch.ones(shape), gradients(shape)
    rule = replace(RULES["low_rank_muon"], direction=LowRankPolar(min(shape)))
    found = ours(rule, weight, grads, weight_decay=WEIGHT_DECAY)
    assert_close(found, theirs("muon", weight, grads, weight_decay=WEIGHT_DECAY))


@pytest.mark.parametrize("columns", [2, 6, 12])
def test_sketches_have_full_rank(columns: int) -> None:
    """Of signs one in four of 12 x 12 is singular, one pair of columns in 2^11 one direction."""
    steps = torch.arange(1, 2001).view(-1, 1, 1).float()
    values = torch.linalg.svdvals(uniform(steps, 12, columns).double())
    # The smallest of 12 x 12 is below d / sqrt(12) of an element's deviation with a chance of about
    # d (Edelman, 1988); one in 2000 below 5e-4 of it is what is to be expected, zero is not.
    assert float(values[:, -1].min()) > 1e-6 * float(values[:, 0].max())


def test_directions_below_float32_are_left_out() -> None:
    """Muon^2's first step has signs, which are singular here but for the eps in their divisor.

    That leaves one singular value of 1e-9 of the largest, whose direction float32 does not have:
    errors of its rounding's size turn that of the oracle's own polar factor round.
    """
    shape = (16, 16)
    weight = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    grads = gradients(shape)
    seen: list[Tensor] = []

    def polar(x: Tensor) -> Tensor:
        seen.append(x)
        return spectral(x, lambda s: (s > 1e-6 * s.max()).double())

    found = ours(
        with_exact_polar(RULES["muon2"].with_state_bits(32)),
        weight,
        grads,
        weight_decay=WEIGHT_DECAY,
    )
    assert_close(found, theirs("muon2", weight, grads, weight_decay=WEIGHT_DECAY, polar=polar))
    values = torch.linalg.svdvals(seen[0])
    assert float(values[-1]) < 2**-24 * float(values[0]) < 1e-2 * float(values[-2])
    generator = torch.Generator().manual_seed(0)
    noise = 2.0**-24 * (2 * torch.rand(10, *shape, generator=generator, dtype=torch.float64) - 1)
    moved = [exact_polar(seen[0] * (1 + each)) - exact_polar(seen[0]) for each in noise]
    assert max(float(each.norm()) for each in moved) == pytest.approx(2, rel=1e-3)
