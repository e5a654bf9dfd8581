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
