"""A low-rank update with a few single entries beside it, and the decomposition that says where those are.

Source: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter

GROWTH = 5
"""Directions that a round adds."""
REACH = 496 / 768
"""Rank of the last round as a share of the smaller side, as 100 rounds of a matrix of BERT come to."""


def rounds_for(out: int, inp: int, most: int = 100) -> int:
    """Rounds of ``decompose`` for a matrix of this size: rank 1 + 5 (rounds - 1), at most ``REACH`` of the smaller side."""
    return max(1, min(most, (int(REACH * min(out, inp)) - 1) // GROWTH + 1))


def decompose(weight, rounds: int, generator=None, threshold: float = 0.01):
    """Greedy low-rank and sparse parts of ``weight`` ([out, in], float): (u, v, s) with W near u v + s.

    ``u`` has orthonormal columns, u v has rank 1 + 5 (rounds - 1) at most, and ``s`` is zero where the rest is below ``threshold``.
    """
    w = weight
    v = torch.randn(1, w.shape[1], generator=generator, dtype=w.dtype, device="cpu").to(w.device)
    for turn in range(rounds):
        s = torch.zeros_like(w)
        for _ in range(2):
            u = torch.linalg.qr((w - s) @ v.t()).Q
            v = u.t() @ (w - s)
            s = w - u @ v
            s = torch.where(s.abs() < threshold, 0.0, s)
        if turn + 1 < rounds:
            rest = torch.linalg.qr(w - u @ v - s).R[:GROWTH]
            v = torch.cat([v, rest])
    return u, v, s


def support(weight, count: int, how: str, generator=None, rounds: int = 100):
    """Flat places ([count], int64, ascending) of [out, in] that get an entry of their own.

    Args:
        how: ``decomposition`` (largest entries of the sparse part), ``magnitude`` (largest weights) or ``random``.
    """
    flat = weight.reshape(-1)
    if how == "random":
        return torch.randperm(flat.numel(), generator=generator)[:count].sort().values
    if how == "decomposition":
        u, v, _ = decompose(weight, rounds_for(*weight.shape, rounds), generator)
        # The sparse part is this rest where it passes the threshold: its order decides also where fewer than ``count`` do.
        flat = (weight - u @ v).reshape(-1)
    return torch.argsort(flat.abs(), descending=True, stable=True)[:count].sort().values.cpu()


class _LowRankAndEntries(torch.autograd.Function):
    """x W^T + bias + scale (x a^T) b^T + scale x S^T, S with ``values`` at (rows, columns): one pass over y, one over the gradient of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, values, scale, rows, columns):
        flat = x.reshape(-1, x.shape[-1])
        inner, picked = flat @ a.t(), flat.index_select(1, columns)
        y = F.linear(flat, weight, bias)
        y.addmm_(inner, b.t(), alpha=scale)
        entries = (scale * values).to(y.dtype)
        y.index_add_(1, rows, picked * entries)
        ctx.save_for_backward(flat, inner, picked, weight, a, b, entries, rows, columns)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, inner, picked, weight, a, b, entries, rows, columns = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner, hit = (grad @ b).mul_(ctx.scale), grad.index_select(1, rows)
        grad_a, grad_b = grad_inner.t() @ flat, (grad.t() @ inner).mul_(ctx.scale)
        grad_values = ctx.scale * (hit * picked).sum(dim=0, dtype=torch.float32)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, a).index_add_(1, columns, hit * entries).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_values, None, None, None


class Dsee(Adapter):
    """W + scale (b a + S): a [rank, in] ~ N(0, 0.02), b [out, rank] zero, and S with ``values`` [n] (zero) at flat places ``index``."""

    def __init__(self, base, rank: int, scale: float, index: torch.Tensor, generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, self.inp, generator=generator) * 0.02)
        self.b = nn.Parameter(torch.zeros(self.out, rank))
        self.values = nn.Parameter(torch.zeros(len(index)))
        self.register_buffer("index", index)

    def update(self):
        """scale (b a + S): [out, in], float32."""
        dense = self.scale * (self.b @ self.a)
        return dense.view(-1).index_add(0, self.index, self.scale * self.values).view(dense.shape)

    def effective(self):
        return self.weight.detach().float() + self.update()

    def forward(self, x):
        if self.mask is not None:
            return super().forward(x)
        if not len(self.values):
            return lowrank.low_rank_linear(x, self.weight, self.base.bias, self.a, self.b, self.scale)
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias, place = self.base.bias, self.index
            return _LowRankAndEntries.apply(x.to(dtype), self.weight.to(dtype), bias.to(dtype) if bias is not None else None, self.a.to(dtype),
                                            self.b.to(dtype), self.values, self.scale, place // self.inp, place % self.inp)

    def pairs(self):
        """(a, b) of rank + n with the scale in b, so that b a is the whole update."""
        n, place = len(self.values), self.index
        pick, put = torch.zeros(n, self.inp, device=place.device), torch.zeros(self.out, n, device=place.device)
        pick[torch.arange(n), place % self.inp] = 1.0
        put[place // self.inp, torch.arange(n)] = self.values.detach()
        return torch.cat([self.a.detach(), pick]), self.scale * torch.cat([self.b.detach(), put], dim=1)
