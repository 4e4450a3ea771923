"""A low-rank update with a few single entries beside it, and the decomposition that says where those are.

Source: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models.
"""

from __future__ import annotations

import torch
from torch import nn

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
        y = lowrank.low_rank_linear(x, self.weight, self.base.bias, self.a, self.b, self.scale)
        if not len(self.values):
            return y
        with torch.autocast(x.device.type, enabled=False):
            rows, columns = self.index // self.inp, self.index % self.inp
            part = x.to(y.dtype).index_select(-1, columns) * (self.scale * self.values).to(y.dtype)
            return y.index_add(-1, rows, part)

    def pairs(self):
        """(a, b) of rank + n with the scale in b, so that b a is the whole update."""
        n, place = len(self.values), self.index
        pick, put = torch.zeros(n, self.inp, device=place.device), torch.zeros(self.out, n, device=place.device)
        pick[torch.arange(n), place % self.inp] = 1.0
        put[place // self.inp, torch.arange(n)] = self.values.detach()
        return torch.cat([self.a.detach(), pick]), self.scale * torch.cat([self.b.detach(), put], dim=1)
