"""The update rules under their published names, with the arguments of their public packages.

Each class is `Muon` (`NAMO` and `NAMOD`: `MuonWithAuxAdam`) with a rule of `lowbit_muon.RULES`. Its
arguments are those of the public package, in their order and with their defaults, without what
changes no update (ranks, kernels); the options of `Muon` are taken by keyword. Groups may set what
they may set there, and what groups of `Muon` may.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.optim.optimizer import ParamsT

from lowbit_muon.backends.tensors import error_context
from lowbit_muon.optimizers.muon import Muon
from lowbit_muon.optimizers.muon_adamw import MuonWithAuxAdam
from lowbit_muon.step.options import (
    GROUP_DEFAULTS,
    OPTIONS,
    AuxAdam,
    MuonOptions,
    PolarOptions,
    StateOptions,
    check_values,
    plain_options,
    why_refused,
)
from lowbit_muon.step.rules.direction import ExactPolar, Polar, Rows, Signs
from lowbit_muon.step.rules.momentum import TwoDecays
from lowbit_muon.step.rules.recipes import RULES
from lowbit_muon.step.rules.rule import UpdateRule
from lowbit_muon.step.rules.scaling import (
    ColumnSignalToNoise,
    ElementMoment,
    FixedNorm,
    Scaling,
    SignalToNoise,
    VectorMoment,
)
from lowbit_muon.step.rules.stage import expect
from lowbit_muon.step.rules.step_size import Bounded, StepSize

if TYPE_CHECKING:
    from typing_extensions import Unpack

Options = dict[str, Any]

_NAMES = {option.name for option in OPTIONS}
_BY_KEYWORD = MuonOptions.__annotations__.keys() - {"rule"}


class _Published(Muon):
    """`Muon` with arguments that a function translates, in its constructor and in its groups."""

    # Of arguments that Muon lacks, or that mean something else there: Muon's options for them.
    _translate: ClassVar[Callable[..., Options]]

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        """arguments: those of the class's own constructor, by name."""
        options = arguments["options"]
        _check_options(type(self), options)
        names = inspect.signature(self._translate).parameters
        self._own = {name: arguments[name] for name in names}
        made = self._translated(self._own)
        for name in options.keys() & made.keys():
            raise TypeError(f"{name}: expected no such argument of {type(self).__name__}")
        shared = {n: arguments[n] for n in arguments if n in _NAMES and n not in names}
        super().__init__(arguments["params"], **{**shared, **options, **made})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own": self._own}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as of `Muon`, which may set the class's own arguments."""
        if isinstance(param_group, dict) and self._own.keys() & param_group.keys():
            own = {name: param_group.get(name, value) for name, value in self._own.items()}
            others = {key: value for key, value in param_group.items() if key not in own}
            param_group = {**self._translated(own), **others}
        super().add_param_group(param_group)

    def _translated(self, own: Options) -> Options:
        call = ", ".join(f"{name}={value!r}" for name, value in own.items())
        with error_context(f"{type(self).__name__}({call})"):
            made = type(self)._translate(**own)
            check_values(OPTIONS, plain_options({**GROUP_DEFAULTS, **made}))
        return made


class NorMuon(_Published):
    """NorMuon (arXiv 2510.05491): every row of the update over its second moment's root.

    Arguments of zichongli5/NorMuon (SingleDeviceNorMuon); nesterov and ns_steps are fixed there.
    beta2: decay of the second moments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        beta2: float = 0.95,
        *,
        nesterov: bool = True,
        ns_steps: int = 5,
        **options: Unpack[PolarOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(beta2: float) -> Options:
        return {"rule": replace(RULES["normuon"], scaling=(VectorMoment(beta=beta2),))}


class AdaMuon(_Published):
    """AdaMuon (arXiv 2507.11005): the polar factor of signs, over second moments of its elements.

    Arguments of Chongjie-Si/AdaMuon without `rank` and `world_size`; the second moments decay by
    `momentum`, too. An older version there has `beta2` and takes no signs; pytorch-optimizer's and
    timm's differ as well. eps: beside the root of the second moments.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        eps: float = 1e-8,
        **options: Unpack[PolarOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(momentum: float, eps: float) -> Options:
        scaling = (ElementMoment(momentum, eps), FixedNorm("rms"))
        return {"rule": replace(RULES["adamuon"], scaling=scaling), "momentum": momentum}


class RMNP(_Published):
    """RMNP (arXiv 2603.20527): rows of the momentum brought to norm one, without Newton-Schulz.

    Arguments of Dominator-Index/RMNP.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate() -> Options:
        return {"rule": RULES["rmnp"]}


class PolarGrad(_Published):
    """PolarGrad (arXiv 2505.21799): the polar factor times the nuclear norm.

    Arguments of timlautk/polargrad. polar_first: the momentum of polar factors, in place of the
    polar factor of the momentum. method: "qdwh" and "zolo-pd" are an exact polar factor here, by a
    singular value decomposition, whatever `inner_steps` says (two iterations of QDWH, the default
    there, leave singular values between 0.7 and 1); "ns" is Newton-Schulz of that many steps with
    (a, b, c), "polar_express" Polar Express.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.02,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        polar_first: bool = False,
        method: str = "qdwh",
        inner_steps: int = 2,
        a: float = 3.4445,
        b: float = -4.7750,
        c: float = 2.031,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(
        polar_first: bool, method: str, inner_steps: int, a: float, b: float, c: float
    ) -> Options:
        exact, iterated = ("qdwh", "zolo-pd"), ("ns", "polar_express")
        if method in exact:
            return {"rule": RULES["polargrad_polar_first" if polar_first else "polargrad"]}
        expect(not polar_first, "method", f"one of {exact} with polar_first", method)
        expect(method in iterated, "method", f"one of {(*exact, *iterated)}", method)
        return {
            "rule": replace(RULES["polargrad"], direction=Polar()),
            "ns_coefficients": (a, b, c) if method == "ns" else method,
            "ns_steps": inner_steps,
        }


class Scion(_Published):
    """Scion (arXiv 2502.07529): W <- (1 - lr) W - lr scale O, with O by the norm of each group.

    Arguments of LIONS-EPFL/scion. momentum: the gradient's share, 1 minus Muon's. norm: "Auto" and
    "Spectral" are the polar factor times sqrt(rows / columns), "Sign", "ColNorm" and "RowNorm" as
    there, with their `norm_kwargs`; "RowNorm" needs normalized=False. unconstrained: without the
    (1 - lr). Convolutions are taken as matrices [out, in * k * k]: Scion's "SpectralConv" divides
    their update by k once more.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 1.0,
        norm: str = "Auto",
        norm_kwargs: dict[str, Any] | None = None,
        scale: float = 1.0,
        unconstrained: bool = False,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(
        momentum: float,
        norm: str,
        norm_kwargs: dict[str, Any] | None,
        scale: float,
        unconstrained: bool,
    ) -> Options:
        expect(norm in _SCION_NORMS, "norm", f"one of {sorted(_SCION_NORMS)}", norm)
        made = _SCION_NORMS[norm](**norm_kwargs or {})
        return {
            "adjust_lr_fn": "none",
            **made,
            "rule": replace(made["rule"], step_size=StepSize(scale)),
            "momentum": 1 - momentum,
            "nesterov": False,
            "weight_decay": 0.0 if unconstrained else 1.0,
        }


class MuonH(_Published):
    """MuonH (arXiv 2603.28743): steps relative to the weights' norm, which stays.

    Arguments of MuonH in microsoft/dion, dion/muonh.py; microsoft/ArchScale has it as
    Muon(use_muonh=True). Matrices have no weight decay. normalization: "neuron" as NorMuon, for
    each row; "short_axis" for each row or column, whichever there are more of; their second moments
    decay by `muon_beta2`. use_polar_express: False for dion's own coefficients.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.01,
        mu: float = 0.95,
        muon_beta2: float = 0.95,
        normalization: str | None = None,
        epsilon: float = 1e-8,
        nesterov: bool = False,
        use_polar_express: bool = True,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(
        mu: float,
        muon_beta2: float,
        normalization: str | None,
        epsilon: float,
        use_polar_express: bool,
    ) -> Options:
        axes = {"neuron": "row", "short_axis": "long"}
        known = (None, *axes)
        expect(normalization in known, "normalization", f"one of {known}", normalization)
        moment = [VectorMoment(axes[normalization], muon_beta2)] if normalization else []
        return {
            "rule": replace(RULES["muonh"], scaling=tuple(moment)),
            "momentum": mu,
            "eps": epsilon,
            "ns_coefficients": "polar_express" if use_polar_express else "quintic",
        }


class Lion(_Published):
    """Lion (arXiv 2302.06675): signs of a momentum; for matrices alone.

    Arguments of google/automl, lion_pytorch.py, and lucidrains/lion-pytorch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[StateOptions],
    ) -> None:
        super().__init__(locals())

    @staticmethod
    def _translate(betas: tuple[float, float]) -> Options:
        beta, momentum = betas
        return {"rule": replace(RULES["lion"], momentum=TwoDecays(beta)), "momentum": momentum}


class _Namo(MuonWithAuxAdam):
    """NAMO and NAMO-D, which have the matrices and what AdamW takes in two arguments."""

    def __init__(self, rule: UpdateRule, scaling: Scaling, arguments: Mapping[str, Any]) -> None:
        """arguments: those of the class's own constructor, by name."""
        given = arguments
        _check_options(type(self), given["options"])
        rule = replace(
            rule, scaling=(scaling,), step_size=Bounded(5 * given["scale_coeff"], highest=1.0)
        )
        if given["use_exact_svd"]:
            rule = replace(rule, direction=ExactPolar())
        muon = {"weight_decay": given["wd"], "momentum": given["momentum"]}
        aux_wd = given["wd"] if given["adamw_wd"] is None else given["adamw_wd"]
        aux = {"betas": given["adamw_betas"], "eps": given["adamw_eps"], "weight_decay": aux_wd}
        groups = [
            {"params": list(given["muon_params"] or ()), "use_muon": True, **muon},
            {"params": list(given["adamw_params"] or ()), "use_muon": False, **aux},
        ]
        groups = [group for group in groups if group["params"]]
        expect(bool(groups), "muon_params", "parameters, by this name", given["muon_params"])
        lr = given["lr"]
        for group in groups:
            group["lr"] = lr.clone() if isinstance(lr, Tensor) else lr
        super().__init__(
            groups,
            aux_adam=given["aux_adam"],
            nesterov=given["nesterov"],
            ns_steps=given["ns_steps"],
            rule=rule,
            **given["options"],
        )
        self.defaults.update(lr=lr, **muon)  # of groups that are added later
        self._given |= muon.keys()


class NAMO(_Namo):
    """NAMO (arXiv 2602.17080): the learning rate of a matrix by its signal over its noise.

    Arguments of minxin-zhg/namo (src/namo.py), which takes matrices and what AdamW takes in two
    arguments; groups that are added say `use_muon`, as of `MuonWithAuxAdam`. mu2: decay of the
    gradients' squared norms; scale_coeff: in place of 0.2 in match_rms_adamw.
    """

    def __init__(
        self,
        lr: float | Tensor = 1e-2,
        wd: float = 0.1,
        muon_params: Iterable[Tensor] | None = None,
        momentum: float = 0.95,
        mu2: float = 0.99,
        adamnorm_eps: float = 1e-8,
        nesterov: bool = True,
        ns_steps: int = 5,
        use_exact_svd: bool = False,
        scale_coeff: float = 0.2,
        adamw_params: Iterable[Tensor] | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
        *,
        aux_adam: AuxAdam = "auto",
        **options: Unpack[PolarOptions],
    ) -> None:
        with error_context(f"NAMO(mu2={mu2!r}, adamnorm_eps={adamnorm_eps!r})"):
            scaling = SignalToNoise(mu2, adamnorm_eps)
        super().__init__(RULES["namo"], scaling, locals())


class NAMOD(_Namo):
    """NAMO-D (arXiv 2602.17080): the learning rate of every column by its signal over its noise.

    Arguments of NAMO_D in minxin-zhg/namo: those of `NAMO`, and col_state_clamp_c, which keeps the
    columns within [c * mean, mean / c].
    """

    def __init__(
        self,
        lr: float | Tensor = 1e-2,
        wd: float = 0.1,
        muon_params: Iterable[Tensor] | None = None,
        momentum: float = 0.95,
        mu2: float = 0.99,
        adamnorm_eps: float = 1e-8,
        nesterov: bool = True,
        ns_steps: int = 5,
        use_exact_svd: bool = False,
        scale_coeff: float = 0.2,
        col_state_clamp_c: float = 0.75,
        adamw_params: Iterable[Tensor] | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        adamw_wd: float | None = None,
        *,
        aux_adam: AuxAdam = "auto",
        **options: Unpack[PolarOptions],
    ) -> None:
        numbers = f"mu2={mu2!r}, col_state_clamp_c={col_state_clamp_c!r}"
        with error_context(f"NAMOD({numbers}, adamnorm_eps={adamnorm_eps!r})"):
            scaling = ColumnSignalToNoise(mu2, col_state_clamp_c, adamnorm_eps)
        super().__init__(RULES["namo_d"], scaling, locals())


def _check_options(cls: type, options: Mapping[str, Any]) -> None:
    """Raise TypeError naming a keyword argument that is no option of the class."""
    for name in options.keys() - _BY_KEYWORD:
        why = "Muon(rule=...) takes any" if name == "rule" else ""
        why = why or (why_refused(OPTIONS, name) if name not in _NAMES else "")
        expected = f"an argument of {cls.__name__}, or an option such as state_format"
        raise TypeError(f"{name}: expected {expected}{why and f'; {why}'}")


# Scion's norms: their arguments there, and what they are here.


def _spectral(max: bool = False, normalized: bool = True, steps: int = 5) -> Options:
    expect(bool(normalized), "normalized", "True of norm='Spectral'", normalized)
    adjust = "original" if max else "spectral_unclamped"
    return {"rule": RULES["scion"], "adjust_lr_fn": adjust, "ns_steps": steps}


def _sign(zero_init: bool = False, normalized: bool = True) -> Options:
    return {"rule": replace(RULES["scion_sign"], direction=Signs(by_columns=normalized))}


def _columns(normalized: bool = False, transpose: bool = False) -> Options:
    expect(not normalized, "normalized", "False of norm='ColNorm'", normalized)
    direction = Rows("row" if transpose else "column", rms=True)
    return {"rule": replace(RULES["scion_columns"], direction=direction)}


def _rows(normalized: bool = True, transpose: bool = False) -> Options:
    expect(not normalized, "normalized", "False of norm='RowNorm'", normalized)
    direction = Rows("column" if transpose else "row")
    return {"rule": replace(RULES["scion_columns"], direction=direction)}


_SCION_NORMS: dict[str, Callable[..., Options]] = {
    "Auto": _spectral,
    "Spectral": _spectral,
    "Sign": _sign,
    "ColNorm": _columns,
    "RowNorm": _rows,
}
