"""Plain float64 references ("oracles") of the update rules of the Muon family.

Written from the published equations, for one matrix at a time, with nothing but torch: slow, and
short enough to be checked by eye. `ORACLES[name](weight, ...)` makes one, `step(grad)` takes a
step, `weight` is what the rule made of it. Parameters not given have their published values; where
none is published or read, the docstring says so.

Notation: W, G [rows m, columns n]; M momentum, mu its decay; u what enters the map, O what leaves
it; eta the learning rate, lambda the weight decay; s the shape scale; ||.|| Frobenius.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]
Triple = tuple[float, float, float]

MUON: Triple = (3.4445, -4.7750, 2.0315)
PROMOTE: Triple = (1.875, -1.25, 0.375)
SUPPRESS: Triple = (0.0, 2.5, -1.5)


# Maps of a matrix.


def spectral(x: Tensor, function: Map) -> Tensor:
    """U f(S) V^T of x = U S V^T."""
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * function(values) @ vh


def exact_polar(x: Tensor) -> Tensor:
    """U V^T over the singular values that are not zero; zeros of a zero matrix."""
    return spectral(x, lambda s: ((s > 1e-12 * s.max()) & (s > 0)).double())


def newton_schulz(coefficients: Sequence[Triple], steps: int, eps: float = 1e-7) -> Map:
    """X <- aX + (bS + cS^2)X with S = XX^T, from X = u / max(||u||, eps), on the transpose of tall
    matrices. The last triple repeats when there are fewer than `steps`."""
    triples = [coefficients[min(i, len(coefficients) - 1)] for i in range(steps)]

    def iterate(x: Tensor) -> Tensor:
        if x.shape[0] > x.shape[1]:
            return iterate(x.mT).mT
        x = x.double() / max(float(x.double().norm()), eps)
        for a, b, c in triples:
            s = x @ x.mT
            x = a * x + (b * s + c * s @ s) @ x
        return x

    return iterate


def row_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of unit length; rows of zeros stay."""
    return x / x.norm(dim=1, keepdim=True).clamp_min(eps)


def col_norm(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Columns of unit length; columns of zeros stay."""
    return x / x.norm(dim=0, keepdim=True).clamp_min(eps)


def sinkhorn(x: Tensor, rounds: int = 5, eps: float = 1e-12) -> Tensor:
    """f of ARO (arXiv 2602.09006): rows to norm sqrt(n), then columns to norm sqrt(m), in rounds.

    At the fixed point both hold and elements have a root mean square of 1. The paper's own
    constant was not read; ARO divides by the norm of the result, so that it does not matter there.
    """
    rows, cols = x.shape
    for _ in range(rounds):
        x = math.sqrt(rows) * col_norm(math.sqrt(cols) * row_norm(x, eps), eps)
    return x


def soft_clip(x: Tensor, c: float) -> Tensor:
    """(I + XX^T/c^2)^(-1/2) X: singular values s -> s / sqrt(1 + s^2/c^2)."""
    return spectral(x, lambda s: s / (1 + (s / c) ** 2).sqrt())


def equilibrate(x: Tensor, axes: str, floor: float = 1e-6) -> Tensor:
    """Rows, columns or both scaled to equal norms, ||x||/sqrt(m) a row and ||x||/sqrt(n) a column.

    Of "both" the norms are those of x itself, so that they are equal only nearly.
    """
    result, norm = x, x.norm()
    if axes in ("row", "both"):
        of_row = x.norm(dim=1, keepdim=True).clamp_min(floor)
        result = result * (norm / math.sqrt(x.shape[0]) / of_row)
    if axes in ("column", "both"):
        of_col = x.norm(dim=0, keepdim=True).clamp_min(floor)
        result = result * (norm / math.sqrt(x.shape[1]) / of_col)
    return result


def shape_scale(name: str, shape: torch.Size) -> float:
    """The factor of the learning rate that depends on the shape."""
    rows, cols = shape
    return {
        "original": math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral_unclamped": math.sqrt(rows / cols),
        "megatron": math.sqrt(max(rows, cols)),
        "none": 1.0,
    }[name]


# Rules.


@dataclass(kw_only=True, eq=False)
class Oracle:
    """W <- decay(W) - eta s O with O = polar(u).

    Momentum: form "ema" M <- mu M + (1 - mu) G, or "sum" M <- mu M + G; u = (1 - mu) G + mu M or
    G + mu M with Nesterov, else M.

    Decay, with rate r = eta (times s if `scaled_decay`) unless the rule has its own:
    "decoupled" W (1 - lambda r); "per_column" the same with r a vector, never below 0;
    "cautious" W - lambda r W [step * W >= 0]; "cautious_lr2" the same with lambda eta r;
    "frank_wolfe" W (1 - eta).
    """

    weight: Tensor = field(kw_only=False)
    lr: float = 0.02
    weight_decay: float = 0.0
    momentum: float = 0.95
    form: str = "ema"
    nesterov: bool = True
    scale: str = "original"
    decay: str = "decoupled"
    scaled_decay: bool = False
    polar: Map = exact_polar

    def __post_init__(self) -> None:
        self.weight = self.weight.detach().double().clone()
        self.buffer = torch.zeros_like(self.weight)
        self.steps = 0

    @property
    def factor(self) -> float:
        return shape_scale(self.scale, self.weight.shape)

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        step, rate = self.change(grad.double())
        self.weight = self.decayed(step, rate) - step

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        """What to take off the weight, and the decay's rate."""
        step = self.lr * self.factor * self.direction(grad)
        return step, self.lr * (self.factor if self.scaled_decay else 1.0)

    def direction(self, grad: Tensor) -> Tensor:
        return self.polar(self.accumulate(grad))

    def accumulate(self, grad: Tensor) -> Tensor:
        """Take the gradient into M; u."""
        gain = {"ema": 1 - self.momentum, "sum": 1.0}[self.form]
        self.buffer = self.momentum * self.buffer + gain * grad
        return gain * grad + self.momentum * self.buffer if self.nesterov else self.buffer

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        if self.decay == "frank_wolfe":
            return self.weight * (1 - self.lr)
        amount = self.weight_decay * torch.as_tensor(rate, dtype=torch.float64)
        if self.decay == "decoupled":
            return self.weight * (1 - amount)
        if self.decay == "per_column":
            return self.weight * (1 - amount).clamp_min(0)
        agrees = step * self.weight >= 0
        if self.decay == "cautious":
            return self.weight - amount * self.weight * agrees
        if self.decay == "cautious_lr2":
            return self.weight - self.lr * amount * self.weight * agrees
        raise ValueError(f"unknown decay: {self.decay}")


@dataclass(kw_only=True, eq=False)
class Muon(Oracle):
    """Muon (Keller Jordan's blog and code; torch.optim.Muon): the base as it is."""


@dataclass(kw_only=True, eq=False)
class Moonlight(Oracle):
    """Moonlight (arXiv 2502.16982; examples/toy_train.py): M sum, Nesterov, s = 0.2 sqrt(max)."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    form: str = "sum"
    scale: str = "match_rms_adamw"


@dataclass(kw_only=True, eq=False)
class MuonClip(Moonlight):
    """Kimi K2's Muon (arXiv 2507.20534) without QK-clip: M sum, no Nesterov, s = 0.2 sqrt(max).

    The learning rate is Moonlight's; the paper's belongs to its schedule.
    """

    nesterov: bool = False


@dataclass(kw_only=True, eq=False)
class DionMuon(Oracle):
    """Muon of the Dion repository (dion/muon.py): M sum, no Nesterov, s = sqrt(m/n)."""

    lr: float = 0.01
    weight_decay: float = 0.01
    form: str = "sum"
    nesterov: bool = False
    scale: str = "spectral_unclamped"


@dataclass(kw_only=True, eq=False)
class NorMuon(Oracle):
    """NorMuon (arXiv 2510.05491, zichongli5/NorMuon):

    v <- beta2 v + (1 - beta2) mean(O^2) along each row; O / (sqrt(v) + eps), scaled back to ||O||
    ("keep"), or to 0.2 sqrt(mn) ("match_rms", the paper's algorithm, to be used with scale "none").
    `axis`: one v a "row", a "column", or a vector of the "long" or "short" side (rows if square).
    """

    beta2: float = 0.95
    eps: float = 1e-10
    axis: str = "row"
    norm: str = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, cols = self.weight.shape
        axis = {
            "long": "row" if rows >= cols else "column",
            "short": "column" if rows > cols else "row",
        }.get(self.axis, self.axis)
        self.mean_over = {"row": 1, "column": 0}[axis]
        self.v: Tensor = torch.zeros(())

    def direction(self, grad: Tensor) -> Tensor:
        return self.normalize(self.polar(self.accumulate(grad)))

    def normalize(self, o: Tensor) -> Tensor:
        mean = o.square().mean(dim=self.mean_over, keepdim=True)
        self.v = self.beta2 * self.v + (1 - self.beta2) * mean
        scaled = o * self.inverse_root(self.v)
        target = o.norm() if self.norm == "keep" else 0.2 * math.sqrt(o.numel())
        return scaled * (target / (scaled.norm() + self.eps))

    def inverse_root(self, v: Tensor) -> Tensor:
        return 1 / (v.sqrt() + self.eps)


@dataclass(kw_only=True, eq=False)
class NorMuonPaper(NorMuon):
    """NorMuon as in the paper's algorithm: the last step has the norm 0.2 eta sqrt(mn)."""

    scale: str = "none"
    norm: str = "match_rms"


@dataclass(kw_only=True, eq=False)
class NorMuonSpeedrun(NorMuon):
    """NorMuon of modded-nanogpt: v on the long side, beta2 0.9, O max(v, 1e-10)^(-1/2), ||O|| kept;
    W <- W - eta s O - lambda eta (eta s) W [O * W >= 0]: the decay takes one eta with the shape's
    scale and one without."""

    lr: float = 0.023
    weight_decay: float = 1.2
    beta2: float = 0.9
    axis: str = "long"
    decay: str = "cautious_lr2"
    scaled_decay: bool = True

    def inverse_root(self, v: Tensor) -> Tensor:
        return v.clamp_min(self.eps).rsqrt()


@dataclass(kw_only=True, eq=False)
class Nanochat(NorMuonSpeedrun):
    """nanochat's Muon (nanochat/optim.py): u with rows of equal norm, O = polar(u) scaled to
    ||O|| = sqrt(min(m, n)), NorMuon on the long side, cautious decay at the rate eta s lambda."""

    lr: float = 0.02
    weight_decay: float = 0.28
    decay: str = "cautious"

    def direction(self, grad: Tensor) -> Tensor:
        o = self.polar(equilibrate(self.accumulate(grad), "row"))
        return self.normalize(o * (math.sqrt(min(o.shape)) / o.norm().clamp_min(1e-6)))


@dataclass(kw_only=True, eq=False)
class AdaMuon(Oracle):
    """AdaMuon (arXiv 2507.11005, official code): O = polar(sign(u)); V <- beta V + (1 - beta) O^2
    by elements, beta = mu unless beta2 is given; O / (sqrt(V) + eps), scaled to the norm
    0.2 sqrt(mn). Without `sign` it is the variant of several packages."""

    weight_decay: float = 0.01
    scale: str = "none"
    sign: bool = True
    beta2: float | None = None
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        o = self.polar(u.sign() if self.sign else u)
        beta2 = self.momentum if self.beta2 is None else self.beta2
        self.v = beta2 * self.v + (1 - beta2) * o.square()
        o = o / (self.v.sqrt() + self.eps)
        return o * (0.2 * math.sqrt(o.numel()) / (o.norm() + self.eps))


@dataclass(kw_only=True, eq=False)
class Namo(Oracle):
    """NAMO (arXiv 2602.17080, src/namo.py): v <- mu2 v + (1 - mu2) ||G||^2,
    alpha = eta sqrt(1 - mu2^t) / (1 - mu^t + 1e-12) ||u|| / (sqrt(v) + eps),
    W <- W (1 - lambda min(alpha, 1)) - min(1, alpha s) polar(u), s = 0.2 sqrt(max)."""

    lr: float = 0.01
    weight_decay: float = 0.1
    mu2: float = 0.99
    eps: float = 1e-8
    scale: str = "match_rms_adamw"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v: Tensor = torch.zeros(())

    def alpha(self, grad: Tensor, u: Tensor) -> Tensor:
        """The adaptive learning rate; a vector [1, n] of columns in NAMO-D."""
        self.v = self.mu2 * self.v + (1 - self.mu2) * self.norms(grad).square()
        ratio = self.clamped(self.norms(u) / (self.v.sqrt() + self.eps))
        corrected = math.sqrt(1 - self.mu2**self.steps) / (1 - self.momentum**self.steps + 1e-12)
        return self.lr * corrected * ratio

    def norms(self, x: Tensor) -> Tensor:
        return x.norm()

    def clamped(self, ratio: Tensor) -> Tensor:
        return ratio

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        u = self.accumulate(grad)
        alpha = self.alpha(grad, u)
        return (alpha * self.factor).clamp_max(1) * self.polar(u), alpha.clamp_max(1)


@dataclass(kw_only=True, eq=False)
class NamoD(Namo):
    """NAMO-D (the same): V_j and s_j = ||u_j|| / (sqrt(V_j) + eps) of each column, s clamped to
    [c mean(s), mean(s)/c]; every column has its own alpha_j, step and decay."""

    c: float = 0.75
    decay: str = "per_column"

    def norms(self, x: Tensor) -> Tensor:
        return x.norm(dim=0, keepdim=True)

    def clamped(self, ratio: Tensor) -> Tensor:
        mean = float(ratio.mean())
        return ratio.clamp(self.c * mean, mean / self.c) if mean > 0 else ratio


@dataclass(kw_only=True, eq=False)
class AdaGO(Oracle):
    """AdaGO (arXiv 2509.02981): v^2 <- v^2 + min(||G||^2, gamma^2),
    W <- ... - s max(eps, eta min(||G||, gamma) / v) polar(M), no Nesterov.

    The defaults, v^2 at the start among them, are pytorch-optimizer's (which divides by v^2).
    """

    lr: float = 0.05
    nesterov: bool = False
    gamma: float = 10.0
    eps: float = 5e-4
    initial: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v2 = self.initial

    def change(self, grad: Tensor) -> tuple[Tensor, Tensor | float]:
        norm = min(float(grad.norm()), self.gamma)
        self.v2 += norm**2
        size = max(self.eps, self.lr * norm / math.sqrt(self.v2))
        return self.factor * size * self.direction(grad), self.lr


@dataclass(kw_only=True, eq=False)
class PolarGrad(Oracle):
    """PolarGrad, momentum first (arXiv 2505.21799, polar_grad.py): M EMA, U = polar(M),
    W <- (1 - eta lambda) W - eta <M, U> U; <M, U> is the nuclear norm."""

    nesterov: bool = False
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        m = self.accumulate(grad)
        u = self.polar(m)
        return (m * u).sum() * u


@dataclass(kw_only=True, eq=False)
class PolarGradPolarFirst(PolarGrad):
    """PolarGrad, polar first (the same): U = polar(G), nu = <G, U>, M EMA of U, step eta nu M."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.polar(grad)
        return (grad * u).sum() * self.accumulate(u)


@dataclass(kw_only=True, eq=False)
class RMNP(Oracle):
    """RMNP (arXiv 2603.20527, rmnp/rmnp.py): O = rows of u of unit length; M sum, Nesterov."""

    form: str = "sum"
    eps: float = 1e-12

    def direction(self, grad: Tensor) -> Tensor:
        return row_norm(self.accumulate(grad), self.eps)


@dataclass(kw_only=True, eq=False)
class AuON(Oracle):
    """AuON (arXiv 2509.24320, auon/optimizer.py): u / (r + 1e-8) with
    r = sqrt(mean(cosh(gamma u / (||u|| + 1e-7))^2))."""

    lr: float = 0.24
    scale: str = "none"
    gamma: float = 1.5

    def direction(self, grad: Tensor) -> Tensor:
        return self.brake(self.accumulate(grad))

    def brake(self, x: Tensor) -> Tensor:
        cosh = (self.gamma * x / (x.norm() + 1e-7)).cosh()
        return x / (cosh.square().mean().sqrt() + 1e-8)


@dataclass(kw_only=True, eq=False)
class AuONHybrid(AuON):
    """Hybrid-AuON (the same): the brake on polar(u)."""

    def direction(self, grad: Tensor) -> Tensor:
        return self.brake(self.polar(self.accumulate(grad)))


@dataclass(kw_only=True, eq=False)
class Scion(Oracle):
    """Scion (arXiv 2502.07529, scion.py) of hidden matrices: M <- mu M + (1 - mu) G with mu =
    1 - alpha, W <- (1 - eta) W - eta rho sqrt(m/n) polar(M). Unconstrained: decay "decoupled"."""

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    scale: str = "spectral_unclamped"
    decay: str = "frank_wolfe"
    radius: float = 50.0

    def direction(self, grad: Tensor) -> Tensor:
        return self.radius * self.lmo(self.accumulate(grad))

    def lmo(self, m: Tensor) -> Tensor:
        return self.polar(m)


@dataclass(kw_only=True, eq=False)
class ScionSign(Scion):
    """Scion of the output matrix: sign(M) / n."""

    scale: str = "none"
    radius: float = 3000.0

    def lmo(self, m: Tensor) -> Tensor:
        return m.sign() / m.shape[1]


@dataclass(kw_only=True, eq=False)
class ScionCol(Scion):
    """Scion's ColNorm: columns divided by their root mean square + 1e-8. No radius was read."""

    scale: str = "none"
    radius: float = 1.0

    def lmo(self, m: Tensor) -> Tensor:
        return m / (m.square().mean(dim=0, keepdim=True).sqrt() + 1e-8)


@dataclass(kw_only=True, eq=False)
class Lion(Oracle):
    """Lion (arXiv 2302.06675): W <- W - eta (sign(beta1 M + (1 - beta1) G) + lambda W), then
    M <- beta2 M + (1 - beta2) G; beta1 is `momentum`."""

    lr: float = 1e-4
    momentum: float = 0.9
    beta2: float = 0.99
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        u = self.momentum * self.buffer + (1 - self.momentum) * grad
        self.buffer = self.beta2 * self.buffer + (1 - self.beta2) * grad
        return u.sign()


@dataclass(kw_only=True, eq=False)
class Signum(Oracle):
    """Signum (arXiv 1802.04434): W <- W - eta (sign(M) + lambda W). Published mu: 0.9 to 0.95."""

    lr: float = 1e-3
    momentum: float = 0.9
    nesterov: bool = False
    scale: str = "none"

    def direction(self, grad: Tensor) -> Tensor:
        return self.accumulate(grad).sign()


@dataclass(kw_only=True, eq=False)
class MuonEq(Oracle):
    """MuonEq (arXiv 2603.28254): polar of u with "row", "column" or "both" norms made equal.

    Rows as in nanochat; of both, D_r^(-1/2) u D_c^(-1/2) with the squared norms of u itself, as
    the authors' code. Its defaults too: M sum, Nesterov, s = 0.2 sqrt(max), lambda 0.1.
    """

    lr: float = 1e-3
    weight_decay: float = 0.1
    form: str = "sum"
    scale: str = "match_rms_adamw"
    axes: str = "row"

    def direction(self, grad: Tensor) -> Tensor:
        return self.polar(equilibrate(self.accumulate(grad), self.axes))


@dataclass(kw_only=True, eq=False)
class MuonPlus(Oracle):
    """Muon+ (arXiv 2602.21545): a normalisation after the map.

    `renorm` "frobenius": ||O|| := sqrt(min(m, n)), as nanochat has it. "row", "column",
    "row_column" or "column_row", in this order: x / sqrt(sum(x^2) + 1e-7) over each. That is what
    the authors' code (K1seki221/MuonPlus) does, with s = sqrt(m/n), eta 1e-3, lambda 0.1.
    """

    renorm: str = "frobenius"

    def direction(self, grad: Tensor) -> Tensor:
        o = self.polar(self.accumulate(grad))
        if self.renorm == "frobenius":
            return o * (math.sqrt(min(o.shape)) / o.norm().clamp_min(1e-6))
        for axis in self.renorm.split("_"):
            sums = o.square().sum(dim={"row": 1, "column": 0}[axis], keepdim=True)
            o = o / (sums + 1e-7).sqrt()
        return o


@dataclass(kw_only=True, eq=False)
class MuonH(Oracle):
    """MuonH (arXiv 2603.28743, ArchScale): W' = W - eta ||W|| O / ||O||, W <- W' ||W|| / ||W'||.

    No weight decay and no shape scale. (ArchScale's defaults: M sum, no Nesterov.)
    """

    scale: str = "none"
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay:
            raise ValueError("the norm is fixed: no weight decay")

    def step(self, grad: Tensor) -> None:
        radius = self.weight.norm()
        super().step(grad)
        self.weight = self.weight * (radius / self.weight.norm().clamp_min(self.eps))

    def direction(self, grad: Tensor) -> Tensor:
        o = super().direction(grad)
        return o * (self.weight.norm() / o.norm().clamp_min(self.eps))


@dataclass(kw_only=True, eq=False)
class Pion(Oracle):
    """Pion, the spectral high-pass (arXiv 2605.19282): k steps of (1.875, -1.25, 0.375), then
    5 - k of (0, 2.5, -1.5), from M / ||M||; M sum, no Nesterov. k has no published default; `polar`
    is what k makes it."""

    k: int
    form: str = "sum"
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.polar = newton_schulz([PROMOTE] * self.k + [SUPPRESS] * (5 - self.k), 5)


@dataclass(kw_only=True, eq=False)
class Spectra(Oracle):
    """SPECTRA (arXiv 2603.14315, spectra.py) over momentum: W <- (1 - eta lambda) W - s eta H_c(M),
    H_c taking singular values to s / sqrt(1 + s^2/c^2). Here M is an EMA without Nesterov."""

    lr: float = 1e-3
    nesterov: bool = False
    c: float = 10.0

    def direction(self, grad: Tensor) -> Tensor:
        return soft_clip(self.accumulate(grad), self.c)


@dataclass(kw_only=True, eq=False)
class CautiousMuon(Oracle):
    """C-Muon (arXiv 2411.16085, C-Optim): polar(u [M * G > 0] / mean[M * G > 0])."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        mask = (self.buffer * grad > 0).double()
        return self.polar(u * mask / mask.mean().clamp_min(1e-3))


@dataclass(kw_only=True, eq=False)
class TurboMuon(Oracle):
    """thib-s/flash-newton-schulz: O = polar(D u), D_i = (sum_j |(u u^T)_ij|)^(-1/2), short side."""

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        u = u.mT if u.shape[0] > u.shape[1] else u
        u = u / (u @ u.mT).abs().sum(dim=1, keepdim=True).sqrt().clamp_min(1e-30)
        return self.polar(u if u.shape == self.weight.shape else u.mT)


@dataclass(kw_only=True, eq=False)
class Muon2(Oracle):
    """Muon^2 (arXiv 2604.09967, modded-nanogpt's track 3): V <- beta2 V + (1 - beta2) G^2 by
    elements, polar(u / (sqrt(V) + eps))."""

    beta2: float = 0.95
    eps: float = 1e-10

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad.square()
        return self.polar(u / (self.v.sqrt() + self.eps))


@dataclass(kw_only=True, eq=False)
class MarsM(Oracle):
    """MARS-M (AGI-Arena/MARS, mars_m.py): C = G + gamma mu / (1 - mu) (G - G_before) with G_before
    zero at first, C / max(1, ||C||) into M, no Nesterov, s = 0.2 sqrt(max)."""

    lr: float = 1e-3
    weight_decay: float = 0.1
    nesterov: bool = False
    scale: str = "match_rms_adamw"
    gamma: float = 0.025

    def __post_init__(self) -> None:
        super().__post_init__()
        self.before = torch.zeros_like(self.weight)

    def direction(self, grad: Tensor) -> Tensor:
        c = grad + self.gamma * self.momentum / (1 - self.momentum) * (grad - self.before)
        self.before = grad
        return super().direction(c / max(1.0, float(c.norm())))


@dataclass(kw_only=True, eq=False)
class Dion2(Oracle):
    """Dion2 (arXiv 2512.16928, dion/dion2.py): M <- M + G; of the rows, or columns of a tall
    matrix, the share `fraction` of the largest L1 norms moves by polar(M_selected), s = sqrt(m/n);
    M_selected <- mu M_selected."""

    lr: float = 0.01
    weight_decay: float = 0.01
    scale: str = "spectral_unclamped"
    fraction: float = 0.25

    def direction(self, grad: Tensor) -> Tensor:
        self.buffer = self.buffer + grad
        wide = self.weight.shape[0] <= self.weight.shape[1]
        m = self.buffer if wide else self.buffer.mT
        k = max(1, math.ceil(self.fraction * m.shape[0]))
        chosen = m.abs().sum(dim=1).argsort(descending=True)[:k]
        o = torch.zeros_like(m)
        o[chosen] = self.polar(m[chosen])
        m[chosen] *= self.momentum
        return o if wide else o.mT


@dataclass(kw_only=True, eq=False)
class NorDion2(Dion2):
    """NorDion2 (dion/nordion2.py): Dion2 by rows of any matrix, with NorMuon's v of those that are
    chosen: v <- beta2 v + (1 - beta2) mean(O^2), O / (sqrt(v) + eps), of the norm of O."""

    beta2: float = 0.95
    eps: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.v = torch.zeros(self.weight.shape[0], 1, dtype=torch.float64)

    def direction(self, grad: Tensor) -> Tensor:
        self.buffer = self.buffer + grad
        k = max(1, math.ceil(self.fraction * self.buffer.shape[0]))
        chosen = self.buffer.abs().sum(dim=1).argsort(descending=True)[:k]
        o = self.polar(self.buffer[chosen])
        self.buffer[chosen] *= self.momentum
        mean = o.square().mean(dim=1, keepdim=True)
        self.v[chosen] = self.beta2 * self.v[chosen] + (1 - self.beta2) * mean
        scaled = o / (self.v[chosen].sqrt() + self.eps)
        update = torch.zeros_like(self.weight)
        update[chosen] = scaled * (o.norm() / (scaled.norm() + self.eps))
        return update


def power_iteration(x: Tensor, rounds: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(s, u, v) of the largest singular value, on the short side, from u_i = frac(i phi) - 1/2."""
    if x.shape[0] > x.shape[1]:
        s, u, v = power_iteration(x.mT, rounds)
        return s, v, u
    golden = (math.sqrt(5) - 1) / 2
    u = torch.tensor([i * golden % 1 - 0.5 for i in range(1, x.shape[0] + 1)], dtype=x.dtype)
    for _ in range(rounds):
        u = x @ (x.mT @ u)
        u = u / u.norm().clamp_min(1e-30)
    v = x.mT @ u
    return v.norm(), u, v / v.norm().clamp_min(1e-30)


@dataclass(kw_only=True, eq=False)
class Lipschitz(Oracle):
    """Muon with weights of singular values below w_max (arXiv 2507.13338, modula/atom.py).

    The published projections start power iteration at random, and assume weights that are within
    reach; further ones are divided by their largest singular value first (`within`)."""

    w_max: float = 1.0

    def step(self, grad: Tensor) -> None:
        super().step(grad)
        self.weight = self.project(self.weight)

    @abstractmethod
    def project(self, w: Tensor) -> Tensor: ...

    def within(self, w: Tensor, limit: float) -> Tensor:
        return w / max(1.0, float(power_iteration(w)[0]) / limit)


@dataclass(kw_only=True, eq=False)
class SpectralBall(Lipschitz):
    """ "Spectral normalize": W / max(1, s_1 / w_max)."""

    def project(self, w: Tensor) -> Tensor:
        return self.within(w, self.w_max)


@dataclass(kw_only=True, eq=False)
class SpectralHammer(Lipschitz):
    """W + (w_max - s_1) u_1 v_1^T."""

    def project(self, w: Tensor) -> Tensor:
        s, u, v = power_iteration(w)
        return w + (self.w_max - s) * torch.outer(u, v)


def soft_cap_coupling(k: float, w_max: float) -> float:
    """The smallest root >= 0 of -k^9 a^4 + 3 k^7 a^3 - 3 k^5 a^2 + k - w_max; 0 below w_max."""
    if k <= w_max:
        return 0.0
    monic = torch.tensor([-3 / k**2, 3 / k**4, 0, -(k - w_max) / k**9], dtype=torch.float64)
    companion = torch.zeros(4, 4, dtype=torch.float64)
    companion[0] = -monic
    companion[1:, :-1] = torch.eye(3, dtype=torch.float64)
    roots = torch.linalg.eigvals(companion)
    return float(roots.real[(roots.imag.abs() < 1e-6 / k**2) & (roots.real >= 0)].min())


@dataclass(kw_only=True, eq=False)
class SoftCap(Lipschitz):
    """W (I - a W^T W), then W (I + a W^T W) with a by k = w_max (1 - eta lambda) + 1.145 * 1.05
    eta s."""

    def project(self, w: Tensor) -> Tensor:
        k = self.w_max * (1 - self.lr * self.weight_decay) + 1.145 * 1.05 * self.lr * self.factor
        a = soft_cap_coupling(k, self.w_max)
        w = spectral(self.within(w, k), lambda s: s - a * s**3)
        return w + a * w @ w.mT @ w


@dataclass(kw_only=True, eq=False)
class HardCap(Lipschitz):
    """Four odd polynomials, about min(s, w_max)."""

    def project(self, w: Tensor) -> Tensor:
        def polynomial(s: Tensor) -> Tensor:
            for a, b, c in (
                (0.805032, 0.206361, -0.019763),
                (0.649867, 0.162935, -0.011150),
                (1.810259, -0.200265, 0.008251),
                (1.004384, -0.183490, 0.014413),
            ):
                s = a * s + b * s**3 + c * s**5
            return s

        return self.w_max * spectral(self.within(w / self.w_max, 3.0), polynomial)


@dataclass(kw_only=True, eq=False)
class SpectralDecay(Oracle):
    """W - eta lambda s_1 u_1 v_1^T - eta s O (arXiv 2507.13338, where it has no eta)."""

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        s, u, v = power_iteration(self.weight)
        return self.weight - self.lr * self.weight_decay * s * torch.outer(u, v)


@dataclass(kw_only=True, eq=False)
class MuonBall(Oracle):
    """MuonBall (arXiv 2601.08393): W R / s_1(W) - eta R polar(u), R = sqrt(m/n)."""

    scale: str = "spectral_unclamped"

    def decayed(self, step: Tensor, rate: Tensor | float) -> Tensor:
        return self.weight * self.factor / power_iteration(self.weight)[0].clamp_min(1e-30)


@dataclass(kw_only=True, eq=False)
class SpectralSphere(MuonBall):
    """The spectral sphere optimizer (arXiv 2601.08393): polar(u / ||u|| + l T) with T = u_1 v_1^T
    of W and <T, polar(u / ||u|| + l T)> = 0 by bisection; zero for u = 0. `inner` is the polar
    factor of the bisection, as exact as the other one unless it is given: of square matrices the
    exact one jumps where u / ||u|| + l T is singular."""

    inner: Map = exact_polar

    def direction(self, grad: Tensor) -> Tensor:
        x = self.accumulate(grad)
        if not x.any():
            return x
        x = x / x.norm()
        _, left, right = power_iteration(self.weight)
        t = torch.outer(left, right)
        low, high = -2 * math.sqrt(min(x.shape)), 2 * math.sqrt(min(x.shape))
        for _ in range(60):
            middle = (low + high) / 2
            if float((t * self.inner(x + middle * t)).sum()) < 0:
                low = middle
            else:
                high = middle
        return self.polar(x + (low + high) / 2 * t)


ORACLES: dict[str, Callable[..., Oracle]] = {
    "muon": Muon,
    "moonlight": Moonlight,
    "muonclip": MuonClip,
    "dion_muon": DionMuon,
    "normuon": NorMuon,
    "normuon_paper": NorMuonPaper,
    "normuon_speedrun": NorMuonSpeedrun,
    "nanochat": Nanochat,
    "adamuon": AdaMuon,
    "namo": Namo,
    "namo_d": NamoD,
    "adago": AdaGO,
    "polargrad": PolarGrad,
    "polargrad_polar_first": PolarGradPolarFirst,
    "rmnp": RMNP,
    "auon": AuON,
    "auon_hybrid": AuONHybrid,
    "scion": Scion,
    "scion_sign": ScionSign,
    "scion_col": ScionCol,
    "lion": Lion,
    "signum": Signum,
    "muoneq": MuonEq,
    "muon_plus": MuonPlus,
    "muonh": MuonH,
    "turbo_muon": TurboMuon,
    "pion": Pion,
    "spectra": Spectra,
    "cautious_muon": CautiousMuon,
    "muon2": Muon2,
    "mars_m": MarsM,
    "dion2": Dion2,
    "nordion2": NorDion2,
    "soft_cap": SoftCap,
    "hard_cap": HardCap,
    "spectral_hammer": SpectralHammer,
    "spectral_ball": SpectralBall,
    "spectral_decay": SpectralDecay,
    "muon_ball": MuonBall,
    "spectral_sphere": SpectralSphere,
}
