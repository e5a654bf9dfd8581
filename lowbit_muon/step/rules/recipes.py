"""The update rules by name, each as its stages that are not the default."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

from lowbit_muon.step.rules.constraint import FrobeniusSphere
from lowbit_muon.step.rules.direction import (
    ExactPolar,
    Itself,
    LowRankPolar,
    Rows,
    Signs,
    SoftClip,
)
from lowbit_muon.step.rules.eigenbasis import (
    EigenbasisAdam,
    EigenbasisMoment,
    MomentumBasisAdam,
    SkipFirst,
)
from lowbit_muon.step.rules.fisher import FisherUnwhitened, FisherWhitened
from lowbit_muon.step.rules.gains import AxisGains, RowGains
from lowbit_muon.step.rules.gradient import PolarFactor, RowFeedback, VarianceReduction
from lowbit_muon.step.rules.inputs import InputWhitened
from lowbit_muon.step.rules.kronecker import KroneckerUnwhitened, KroneckerWhitened
from lowbit_muon.step.rules.momentum import FeedbackMomentum, SumMomentum, TwoDecays
from lowbit_muon.step.rules.precondition import (
    Agreeing,
    AlmostOrthogonal,
    Equilibrate,
    SecondMoment,
    SelectedRows,
    Sign,
)
from lowbit_muon.step.rules.rotation import Rotated
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.sampling import Progressive
from lowbit_muon.step.rules.scaling import (
    Brake,
    ColumnSignalToNoise,
    ElementMoment,
    FixedNorm,
    GradientNorms,
    NuclearNorm,
    SelectedVectorMoment,
    SignalToNoise,
    VectorMoment,
)
from lowbit_muon.step.rules.spectral_constraint import (
    HardCap,
    SoftCap,
    SpectralBall,
    SpectralHammer,
    SpectralSphere,
)
from lowbit_muon.step.rules.step_size import (
    BeforeDecay,
    Bounded,
    Fading,
    RelativeToWeights,
    StepSize,
)
from lowbit_muon.step.rules.subspace import LeadingAdam, WithLeading
from lowbit_muon.step.rules.tangent import SpectralTangent
from lowbit_muon.step.rules.weight_decay import ByRate, Cautious, OfGains, Spectral

_SUM = SumMomentum()
_RMS = ("adjust_lr_fn", "match_rms_adamw")
_SPECTRAL = ("adjust_lr_fn", "spectral_unclamped")
_UNSCALED = ("adjust_lr_fn", "none")
_PLAIN = ("nesterov", False)
_UNDECAYED = ("weight_decay", 0.0)
_POLAR_EXPRESS = ("ns_coefficients", "polar_express")
_SCION = (("momentum", 0.9), _PLAIN, ("weight_decay", 1.0))
_LONG_SIDE = VectorMoment(axis="long", beta=0.9)


def _decoupled(name: str, axis: str) -> UpdateRule:
    return UpdateRule(
        name,
        gains=AxisGains(axis=axis),
        step_size=RelativeToWeights(),
        weight_decay=OfGains(),
        constraint=FrobeniusSphere(),
        options=(_UNDECAYED,),
    )


RULES: dict[str, UpdateRule] = {
    rule.name: rule
    for rule in (
        # torch.optim.Muon, KellerJordan/Muon
        UpdateRule("muon"),
        # MoonshotAI/Moonlight (arXiv 2502.16982)
        UpdateRule("moonlight", momentum=_SUM, options=(_RMS,)),
        # microsoft/dion, dion/muon.py
        UpdateRule("dion_muon", momentum=_SUM, options=(_PLAIN, _POLAR_EXPRESS, _SPECTRAL)),
        # Kimi K2's optimizer without QK-clip (arXiv 2507.20534)
        UpdateRule("muonclip", momentum=_SUM, options=(_PLAIN, _RMS)),
        # zichongli5/NorMuon (arXiv 2510.05491)
        UpdateRule("normuon", scaling=(VectorMoment(),)),
        # modded-nanogpt, train_gpt.py
        UpdateRule(
            "normuon_speedrun",
            scaling=(_LONG_SIDE,),
            weight_decay=Cautious(scaled=True, squared=True),
            options=(_POLAR_EXPRESS,),
        ),
        # karpathy/nanochat, nanochat/optim.py
        UpdateRule(
            "nanochat",
            precondition=(Equilibrate(),),
            scaling=(FixedNorm(), _LONG_SIDE),
            weight_decay=Cautious(scaled=True),
            options=(_POLAR_EXPRESS,),
        ),
        # thib-s/flash-newton-schulz
        UpdateRule(
            "turbo_muon",
            precondition=(AlmostOrthogonal(),),
            options=(("ns_coefficients", "turbo"), ("ns_steps", 4)),
        ),
        # in the 128 directions of a random sketch (after arXiv 2605.06884)
        UpdateRule("low_rank_muon", direction=LowRankPolar()),
        # arXiv 2510.12402; microsoft/dion's cautious_wd
        UpdateRule("cautious_decay", weight_decay=Cautious()),
        # arXiv 2603.28254
        UpdateRule("muoneq", momentum=_SUM, precondition=(Equilibrate(),), options=(_RMS,)),
        # Muon+ as nanochat and modded-nanogpt read it: one norm of the whole update
        UpdateRule("muon_plus", scaling=(FixedNorm(),)),
        # kyleliang919/C-Optim (arXiv 2411.16085)
        UpdateRule("cautious_muon", precondition=(Agreeing(),), options=(_PLAIN,)),
        # Chongjie-Si/AdaMuon (arXiv 2507.11005)
        UpdateRule(
            "adamuon",
            precondition=(Sign(),),
            scaling=(ElementMoment(), FixedNorm("rms")),
            options=(_UNSCALED,),
        ),
        # modded-nanogpt, records/track_3_optimization (arXiv 2604.09967)
        UpdateRule("muon2", precondition=(SecondMoment(),)),
        # minxin-zhg/namo (arXiv 2602.17080)
        UpdateRule(
            "namo",
            scaling=(SignalToNoise(),),
            step_size=Bounded(highest=1.0),
            weight_decay=ByRate(),
            options=(_RMS,),
        ),
        UpdateRule(
            "namo_d",
            scaling=(ColumnSignalToNoise(),),
            step_size=Bounded(highest=1.0),
            weight_decay=ByRate(),
            options=(_RMS,),
        ),
        # arXiv 2509.02981; its numbers are those of pytorch-optimizer
        UpdateRule(
            "adago",
            scaling=(GradientNorms(),),
            step_size=Bounded(lowest=5e-4),
            options=(_PLAIN, _UNSCALED),
        ),
        # AGI-Arena/MARS, MARS_M/optimizers/mars_m.py
        UpdateRule("mars_m", gradient=VarianceReduction(), options=(_PLAIN, _RMS)),
        # microsoft/dion, dion/dion2.py (arXiv 2512.16928), on one device
        UpdateRule(
            "dion2",
            gradient=RowFeedback(),
            momentum=FeedbackMomentum(),
            precondition=(SelectedRows(),),
            options=(_PLAIN, _POLAR_EXPRESS, _SPECTRAL),
        ),
        # microsoft/dion, dion/nordion2.py
        UpdateRule(
            "nordion2",
            gradient=RowFeedback(axis="row"),
            momentum=FeedbackMomentum(),
            precondition=(SelectedRows(),),
            scaling=(SelectedVectorMoment(),),
            options=(_PLAIN, _POLAR_EXPRESS, _SPECTRAL),
        ),
        # timlautk/polargrad (arXiv 2505.21799), momentum first
        UpdateRule(
            "polargrad",
            direction=ExactPolar(),
            scaling=(NuclearNorm(),),
            options=(_PLAIN, _UNSCALED),
        ),
        UpdateRule(
            "polargrad_polar_first",
            gradient=PolarFactor(),
            direction=Itself(),
            options=(_PLAIN, _UNSCALED),
        ),
        # lliu606/COSMOS (arXiv 2502.17410)
        UpdateRule(
            "cosmos",
            momentum=_SUM,
            precondition=(LeadingAdam(),),
            scaling=(FixedNorm("rms", rms=1.0), WithLeading(), FixedNorm("rms", rms=0.1)),
            options=(("momentum", 0.9), _UNSCALED, _UNDECAYED),
        ),
        # Anti-Entrophic/Mousse (arXiv 2603.09697)
        UpdateRule(
            "mousse",
            momentum=_SUM,
            precondition=(KroneckerWhitened(),),
            scaling=(KroneckerUnwhitened(),),
            options=(_PLAIN, _SPECTRAL, ("weight_decay", 0.01)),
        ),
        # arXiv 2602.09006, with Sinkhorn's function; weights' sides by their length, not their role
        UpdateRule(
            "aro",
            direction=Rotated(),
            scaling=(FixedNorm("rms"),),
            options=(_PLAIN, _UNSCALED),
        ),
        # modded-nanogpt, records/track_3_optimization, without contra-Muon and NorMuon behind it
        UpdateRule(
            "soap_muon",
            precondition=(EigenbasisMoment(),),
            options=(("ns_coefficients", "converging"), ("ns_steps", 12)),
        ),
        # jie040109/Conda (arXiv 2509.24218)
        UpdateRule(
            "conda",
            direction=MomentumBasisAdam(),
            step_size=BeforeDecay(),
            options=(("momentum", 0.9), _PLAIN, _UNSCALED, _UNDECAYED),
        ),
        # nikhilvyas/SOAP (arXiv 2409.11321)
        UpdateRule(
            "soap",
            gradient=SkipFirst(),
            direction=EigenbasisAdam(),
            step_size=BeforeDecay(),
            options=(_PLAIN, _UNSCALED, ("weight_decay", 0.01)),
        ),
        # Dominator-Index/RMNP (arXiv 2603.20527)
        UpdateRule("rmnp", momentum=_SUM, direction=Rows()),
        # ryyzn9/AuON (arXiv 2509.24320)
        UpdateRule("auon", direction=Itself(), scaling=(Brake(),), options=(_UNSCALED,)),
        UpdateRule("auon_hybrid", scaling=(Brake(),), options=(_UNSCALED,)),
        # LIONS-EPFL/scion (arXiv 2502.07529), constrained: W <- (1 - lr) W - lr * O, which is a
        # weight decay of one; hidden matrices, then heads and embeddings
        UpdateRule("scion", step_size=StepSize(50.0), options=(*_SCION, _SPECTRAL)),
        UpdateRule(
            "scion_sign",
            direction=Signs(by_columns=True),
            step_size=StepSize(3000.0),
            options=(*_SCION, _UNSCALED),
        ),
        UpdateRule(
            "scion_columns", direction=Rows("column", rms=True), options=(*_SCION, _UNSCALED)
        ),
        # arXiv 2302.06675
        UpdateRule(
            "lion",
            momentum=TwoDecays(),
            direction=Signs(),
            options=(("momentum", 0.99), _PLAIN, _UNSCALED),
        ),
        UpdateRule("signum", direction=Signs(), options=(("momentum", 0.9), _PLAIN, _UNSCALED)),
        # microsoft/ArchScale (arXiv 2603.28743)
        UpdateRule(
            "muonh",
            step_size=RelativeToWeights(),
            constraint=FrobeniusSphere(),
            options=(_UNDECAYED,),
        ),
        # arXiv 2605.10797 (kcc-lion/muown); arXiv 2606.23637 (fhueb/angular-muown)
        UpdateRule("muown", gains=RowGains(), weight_decay=OfGains(), options=(_RMS, _UNDECAYED)),
        UpdateRule(
            "angular_muown",
            gains=RowGains(keeps_sizes=False),
            momentum=_SUM,
            step_size=Fading(),
            weight_decay=OfGains(),
            options=(_POLAR_EXPRESS, _UNDECAYED),
        ),
        # swiss-ai/Megatron-LM-MoE (arXiv 2606.25971): directions on the sphere of the weights' norm
        # at the start, gains of rows, of columns, or of both
        _decoupled("md_rows", "row"),
        _decoupled("md_columns", "column"),
        _decoupled("md_decoupling", "both"),
        # arXiv 2510.02239, with Muon's steps: layers are taken in a share of the steps, which each
        # layer has of its own (`Progressive`); half is the mean of equal chances
        UpdateRule("drop_muon", sampling=Progressive(), options=(_PLAIN,)),
        # Arongil/lipschitz-transformers (arXiv 2507.13338): what its weights are brought to
        UpdateRule("soft_cap", constraint=SoftCap()),
        UpdateRule("hard_cap", constraint=HardCap()),
        UpdateRule("spectral_hammer", constraint=SpectralHammer()),
        UpdateRule("spectral_ball", constraint=SpectralBall()),
        UpdateRule("spectral_decay", weight_decay=Spectral()),
        # arXiv 2601.08393: the spectral sphere optimizer, and without its multiplier
        UpdateRule(
            "spectral_sphere",
            precondition=(SpectralTangent(),),
            constraint=SpectralSphere(),
            options=(_POLAR_EXPRESS, _SPECTRAL, _UNDECAYED),
        ),
        UpdateRule(
            "muon_ball",
            constraint=SpectralSphere(),
            options=(_POLAR_EXPRESS, _SPECTRAL, _UNDECAYED),
        ),
        # mlolab/llm-spectral-clipping on momentum (arXiv 2603.14315)
        UpdateRule("spectra", direction=SoftClip(), options=(_PLAIN,)),
    )
}


def pion(k: int, steps: int = 5) -> UpdateRule:
    """Pion's high-pass: singular values below a limit go to zero, others to one.

    arXiv 2605.19282: k steps of (1.875, -1.25, 0.375), then steps - k of (0, 2.5, -1.5). Relative
    to the momentum's norm the limit is about 0.5, 0.25, 0.13 and 0.06 for k = 1, 2, 3 and 4; which
    of them serves a task is not published.
    """
    if not (isinstance(k, int) and isinstance(steps, int) and 0 <= k <= steps and steps >= 1):
        raise ValueError(
            f"k: expected a whole number from 0 to steps, got k={k!r}, steps={steps!r}"
        )
    coefficients = ((1.875, -1.25, 0.375),) * k + ((0.0, 2.5, -1.5),) * (steps - k)
    options = (_PLAIN, ("ns_coefficients", coefficients), ("ns_steps", steps))
    return UpdateRule(f"pion({k}, {steps})", momentum=_SUM, options=options)


def newton_muon(every: int = 32) -> UpdateRule:
    """Newton-Muon: gradients are whitened by the second moment of what their layer reads.

    arXiv 2604.01472; zhehangdu/Newton-Muon. To be used with `attach_layer_inputs`, which collects
    that in every `every`-th step.
    """
    return UpdateRule(f"newton_muon({every})", gradient=InputWhitened(every=every))


def fismo(decay: float, damping: float) -> UpdateRule:
    """FISMO: Muon in a geometry that follows the Fisher information (arXiv 2601.21750).

    decay: of the factors' averages, in (0, 1). damping: a multiple of I, > 0. Neither is published.
    """
    return UpdateRule(
        f"fismo({decay}, {damping})",
        gradient=FisherWhitened(decay, damping),
        scaling=(FisherUnwhitened(damping),),
        options=(_PLAIN, _UNSCALED),
    )


# Rules that have numbers of their own: "pion(2)" in the place of a name.
_WITH_NUMBERS = {make.__name__: make for make in (pion, newton_muon, fismo)}


def resolve_rule(value: str | UpdateRule | Mapping[str, Any]) -> UpdateRule:
    """The rule meant by a name, given as it is, or as `UpdateRule.to_dict` made it.

    A name is one in `RULES`, or one of this module's functions with its numbers: "pion(2)".

    Raises ValueError for an unknown name or a bad field and TypeError for anything else.
    """
    if isinstance(value, UpdateRule):
        return value
    if isinstance(value, Mapping):
        return UpdateRule.from_dict(value)
    if not isinstance(value, str):
        raise TypeError(f"rule: expected a name or an UpdateRule, got {type(value).__name__}")
    if value in RULES:
        return RULES[value]
    call = _call(value)
    if call is None:
        raise ValueError(
            f"rule: expected one of {sorted(RULES)}, or pion(k), newton_muon() or "
            f"fismo(decay, damping) with numbers, got {value!r}"
        )
    try:
        return call()
    except TypeError as error:  # of its arguments' number
        raise ValueError(f"rule: {error}") from None


def _call(text: str) -> Callable[[], UpdateRule] | None:
    """What "pion(2)" means; None if it is no such call."""
    try:
        call = ast.parse(text, mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            return None
        args = [ast.literal_eval(each) for each in call.args]
        named = {each.arg: ast.literal_eval(each.value) for each in call.keywords if each.arg}
    except (SyntaxError, ValueError):
        return None
    make = _WITH_NUMBERS.get(call.func.id)
    return functools.partial(make, *args, **named) if make else None


@functools.lru_cache(maxsize=256)
def rule_of_json(text: str) -> UpdateRule:
    """`resolve_rule` of plain values, once for each of them."""
    return resolve_rule(json.loads(text))
