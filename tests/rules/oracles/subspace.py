"""Rules in a basis that follows the gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from oracles.base import Oracle
from oracles.maps import sinkhorn


@dataclass(kw_only=True, eq=False)
class Cosmos(Oracle):
    """COSMOS (arXiv 2502.17410; lliu606/COSMOS, COSMOS_optim.py), M sum with Nesterov:

    P' = qr(b P S + (1 - b) G^T G P), S <- b T^T S T + (1 - b) (G P')^T G P', T = P^T P';
    V <- b V + (1 - b) (G P')^2; u = (G + mu M) / (1 + mu (1 - mu^t) / (1 - mu));
    A = (u P' / (sqrt(V / (1 - b^t)) + eps)) P'^T; B = polar(u - u P' P'^T); with B brought to the
    norm gamma sqrt(mn), W <- W - eta ratio sqrt(mn) (A + B) / ||A + B||.

    The official P starts as the `rank` leading eigenvectors of the first G^T G and S as (1 - b)
    (G P)^T G P. start: of (columns, rank), numbers that the iteration begins with instead.
    """

    lr: float = 1e-3
    momentum: float = 0.9
    form: str = "sum"
    scale: str = "none"
    rank: int = 64
    b: float = 0.999
    eps: float = 1e-8
    gamma: float = 0.2
    ratio: float = 0.1
    start: Callable[[int, int], Tensor] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        rank = min(self.rank, *self.weight.shape)
        self.p = torch.zeros(())
        self.s = torch.zeros(rank, rank, dtype=torch.float64)
        self.v = torch.zeros(self.weight.shape[0], rank, dtype=torch.float64)

    def direction(self, grad: Tensor) -> Tensor:
        self.turn(grad)
        self.v = self.b * self.v + (1 - self.b) * (grad @ self.p).square()
        mu, t = self.momentum, self.steps
        u = self.accumulate(grad) / (1 + mu * (1 - mu**t) / (1 - mu))
        inside = u @ self.p
        leading = inside / ((self.v / (1 - self.b**t)).sqrt() + self.eps) @ self.p.T
        rest = u - inside @ self.p.T
        size = math.sqrt(grad.numel())
        update = leading
        if rest.norm() > 1e-10 * u.norm():  # (else P has all directions)
            polar = self.polar(rest)
            update = leading + self.gamma * size * polar / polar.norm()
        return self.ratio * size * update / max(float(update.norm()), 1e-30)

    def turn(self, grad: Tensor) -> None:
        rank = len(self.s)
        if self.steps == 1 and self.start is None:
            self.p = torch.linalg.svd(grad.T @ grad)[0][:, :rank]
            new = grad @ self.p
            self.s = (1 - self.b) * new.T @ new
            return
        old = self.p
        if self.steps == 1 and self.start is not None:
            old = self.start(grad.shape[1], rank).double()
        along = self.b * old @ self.s + (1 - self.b) * grad.T @ (grad @ old)
        self.p = torch.linalg.qr(along)[0]
        turned, new = old.T @ self.p, grad @ self.p
        self.s = self.b * turned.T @ self.s @ turned + (1 - self.b) * new.T @ new


@dataclass(kw_only=True, eq=False)
class Aro(Oracle):
    """ARO (arXiv 2602.09006): M EMA; R <- QR(M f(R^T M)^T).Q, R_0 = I; O = R f(R^T M), brought to
    the norm 0.2 sqrt(mn). side: which side is m: "row", "column" (of M^T), or the "short" one.
    f: "sinkhorn" (5 rounds), "row", "sign". Rows of R^T M below 1e-6 of the whole are zeros.
    """

    lr: float = 1e-3
    nesterov: bool = False
    scale: str = "none"
    f: str = "sinkhorn"
    side: str = "short"

    def __post_init__(self) -> None:
        super().__post_init__()
        rows, columns = self.weight.shape
        self.turned = {"row": False, "column": True, "short": rows >= columns}[self.side]
        self.r = torch.eye(columns if self.turned else rows, dtype=torch.float64)

    def direction(self, grad: Tensor) -> Tensor:
        m = self.accumulate(grad)
        m = m.T if self.turned else m
        if not m.any():
            return torch.zeros_like(grad)
        self.r = torch.linalg.qr(m @ self.map(self.r.T @ m).T)[0]
        o = self.r @ self.map(self.r.T @ m)
        return 0.2 * math.sqrt(grad.numel()) * (o.T if self.turned else o) / o.norm()

    def map(self, x: Tensor) -> Tensor:
        x = x * (x.norm(dim=1, keepdim=True) > 1e-6 * x.norm())
        if self.f == "sinkhorn":
            return sinkhorn(x, rounds=5)
        return x.sign() if self.f == "sign" else x / x.norm(dim=1, keepdim=True).clamp_min(1e-300)


@dataclass(kw_only=True, eq=False)
class Soap(Oracle):
    """SOAP (arXiv 2409.11321; nikhilvyas/SOAP), M EMA, t counted from the second gradient on:

    V <- b V + (1 - b) (P^T G Q)^2; W <- W - eta sqrt(1 - b^t) / (1 - mu^t) P (P^T M Q / (sqrt(V) +
    eps)) Q^T, then W <- (1 - eta lambda) W; L <- c L + (1 - c) G G^T and R alike; each `every`
    steps P <- qr(L P), columns and V's rows in the order of diag(P^T L P), and Q alike. The first
    gradient gives L, R and their eigenvectors P, Q; officially that step does not decay, either.
    number: is added to t where it is to be a multiple of `every`, officially 0.
    """

    lr: float = 3e-3
    weight_decay: float = 0.01
    nesterov: bool = False
    scale: str = "none"
    b: float = 0.95
    c: float = 0.95
    eps: float = 1e-8
    every: int = 10
    number: int = 0
    largest: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factors = [torch.zeros(m, m, dtype=torch.float64) for m in self.weight.shape]
        self.bases: list[Tensor] = []
        self.v = torch.zeros_like(self.weight)

    def step(self, grad: Tensor) -> None:
        grad, t = grad.double(), self.steps
        self.steps += 1
        if t:
            p, q = self.bases
            self.v = self.b * self.v + (1 - self.b) * (p.T @ grad @ q).square()
            rotated = p.T @ self.accumulate(grad) @ q / (self.v.sqrt() + self.eps)
            correction = math.sqrt(1 - self.b**t) / (1 - self.momentum**t)
            self.weight = self.weight - self.lr * correction * p @ rotated @ q.T
        self.weight = (1 - self.lr * self.weight_decay) * self.weight
        self.turn(grad, t)

    def turn(self, grad: Tensor, t: int) -> None:
        for axis, square in enumerate((grad @ grad.T, grad.T @ grad)):
            self.factors[axis] = self.c * self.factors[axis] + (1 - self.c) * square
        if not t:
            self.bases = [torch.linalg.eigh(factor)[1].flip(1) for factor in self.factors]
        elif (t + self.number) % self.every == 0:
            self.bases = [self.turned(axis) for axis in (0, 1)]

    def turned(self, axis: int) -> Tensor:
        along = self.factors[axis] @ self.bases[axis]
        order = (self.bases[axis] * along).sum(dim=0).argsort(descending=True)
        self.v = self.v.index_select(axis, order)
        return torch.linalg.qr(along[:, order])[0]


@dataclass(kw_only=True, eq=False)
class SoapMuon(Soap):
    """SOAP-Muon of modded-nanogpt's track 3: u of Muon; but for the first step

    V <- b V + (1 - b) (P^T u Q)^2, u <- P (P^T u Q / (sqrt(V) + eps)) Q^T; P and Q of SOAP.
    """

    lr: float = 0.02
    weight_decay: float = 0.0
    nesterov: bool = True
    scale: str = "original"
    b: float = 0.9
    c: float = 0.9

    step = Oracle.step

    def direction(self, grad: Tensor) -> Tensor:
        u = self.accumulate(grad)
        if self.bases:
            p, q = self.bases
            rotated = p.T @ u @ q
            self.v = self.b * self.v + (1 - self.b) * rotated.square()
            u = p @ (rotated / (self.v.sqrt() + self.eps)) @ q.T
        self.turn(grad, self.steps - 1)
        return self.polar(u)


@dataclass(kw_only=True, eq=False)
class Conda(Oracle):
    """Conda (jie040109/Conda; arXiv 2509.24218): M EMA; in the first step and each `every`-th P the
    left singular vectors of M (of M^T where it is tall or square); V <- b V + (1 - b) (P^T G)^2;
    W <- W - eta sqrt(1 - b^t) / (1 - mu^t) 0.25 P (P^T M / (sqrt(V) + eps)), then
    W <- (1 - eta lambda) W. number: is added to t where it is to be a multiple, officially 0.
    """

    lr: float = 6e-3
    momentum: float = 0.9
    nesterov: bool = False
    scale: str = "none"
    b: float = 0.99
    eps: float = 1e-8
    every: int = 2000
    number: int = 0
    factor: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tall = self.weight.shape[0] >= self.weight.shape[1]
        self.p = torch.zeros(())
        self.v = torch.zeros_like(self.weight.T if self.tall else self.weight)

    def step(self, grad: Tensor) -> None:
        self.steps += 1
        t, grad = self.steps, grad.double()
        m = self.accumulate(grad)
        m, grad = (m.T, grad.T) if self.tall else (m, grad)
        if t == 1 or (t + self.number) % self.every == 0:
            self.p = torch.linalg.svd(m, full_matrices=False)[0]
        self.v = self.b * self.v + (1 - self.b) * (self.p.T @ grad).square()
        update = self.factor * self.p @ (self.p.T @ m / (self.v.sqrt() + self.eps))
        update *= math.sqrt(1 - self.b**t) / (1 - self.momentum**t)
        self.weight = self.weight - self.lr * (update.T if self.tall else update)
        self.weight = (1 - self.lr * self.weight_decay) * self.weight


@dataclass(kw_only=True, eq=False)
class Fismo(Oracle):
    """FISMO (arXiv 2601.21750), P_0 = I and Q_0 = I (not published, as gamma and mu):

    P' = gamma P + (1 - gamma) (G Q^-1 G^T / n + mu tr(P) / m I), P <- m sym(P') / tr(P'), Q alike
    by the new P; M EMA of P^-1/2 G Q^-1/2; O = P^-1/2 polar(M) Q^-1/2.
    """

    lr: float = 0.02
    nesterov: bool = False
    scale: str = "none"
    gamma: float = 0.9
    mu: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.p, self.q = (torch.eye(m, dtype=torch.float64) for m in self.weight.shape)

    def direction(self, grad: Tensor) -> Tensor:
        m, n = grad.shape
        self.p = self.next(self.p, grad @ torch.linalg.inv(self.q) @ grad.T / n)
        self.q = self.next(self.q, grad.T @ torch.linalg.inv(self.p) @ grad / m)
        left, right = inverse_root(self.p), inverse_root(self.q)
        return left @ self.polar(self.accumulate(left @ grad @ right)) @ right

    def next(self, before: Tensor, seen: Tensor) -> Tensor:
        m = len(before)
        seen = seen + self.mu * before.trace() / m * torch.eye(m, dtype=torch.float64)
        new = self.gamma * before + (1 - self.gamma) * seen
        return m * (new + new.T) / 2 / new.trace()


def inverse_root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return vectors / values.sqrt() @ vectors.T


@dataclass(kw_only=True, eq=False)
class Mousse(Oracle):
    """Mousse (arXiv 2603.09697; Anti-Entrophic/Mousse): M sum; L <- b L + (1 - b) G G^T and R of
    G^T G; in the first step and each `every`-th, of m L / tr(L) = Q D Q^T, S_L = Q (D + eps)^-alpha
    Q^T, S_R alike; O = polar(S_L M S_R), W <- (1 - eta lambda) W - eta sqrt(m/n) ||O|| S_L O S_R /
    ||S_L O S_R||. number: is added to t where it is to be a multiple of `every`. Of more rows or
    columns than `largest` S is I, as with SOAP. Officially eps is 1e-10 and on top of the least
    eigenvalue in float32.
    """

    lr: float = 0.01
    weight_decay: float = 0.01
    form: str = "sum"
    nesterov: bool = False
    scale: str = "spectral_unclamped"
    b: float = 0.95
    alpha: float = 0.125
    eps: float = 1e-6
    every: int = 10
    number: int = 0
    largest: int = 10000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.factors = [torch.zeros(m, m, dtype=torch.float64) for m in self.weight.shape]
        self.roots: list[Tensor] = []

    def direction(self, grad: Tensor) -> Tensor:
        for axis, square in enumerate((grad @ grad.T, grad.T @ grad)):
            self.factors[axis] = self.b * self.factors[axis] + (1 - self.b) * square
        if self.steps == 1 or (self.steps + self.number) % self.every == 0:
            self.roots = [self.root(factor) for factor in self.factors]
        left, right = self.roots
        o = self.polar(left @ self.accumulate(grad) @ right)
        new = left @ o @ right
        return o.norm() * new / max(float(new.norm()), 1e-300)

    def root(self, factor: Tensor) -> Tensor:
        if len(factor) > self.largest:
            return torch.eye(len(factor), dtype=factor.dtype)
        values, vectors = torch.linalg.eigh(len(factor) * factor / factor.trace().clamp_min(1e-300))
        return vectors @ torch.diag((values.clamp_min(0) + self.eps) ** -self.alpha) @ vectors.T
