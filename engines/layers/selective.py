"""A low-rank update that a trained score switches on and off as a whole.

Sources: Fine Tuning without Catastrophic Forgetting via Selective Low Rank Adaptation; Task Adaptive Parameter Sharing (the gate).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter, LowRank


class _Gated(torch.autograd.Function):
    """x W^T + bias + on * scale (x a^T) b^T. The score gets the gate's gradient whether it is on or off, the factors only when on."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, score, scale, on):
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        y = F.linear(flat, weight, bias)
        if on:
            y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(flat if on else None, inner, weight, a, b)
        ctx.scale, ctx.on, ctx.shape = scale, on, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, inner, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b).mul_(ctx.scale)
        # <dL/dy, scale B A x> over all tokens, without the product B A x itself.
        grad_score = (grad_inner * inner).sum(dtype=torch.float32)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if not ctx.on:
            return grad_x if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, grad_score, None, None
        grad_a, grad_b = grad_inner.t() @ flat, (grad.t() @ inner).mul_(ctx.scale)
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_inner, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, grad_score, None, None


class Gated(LowRank):
    """W + 1[score >= threshold] scale (b a): a [rank, in] Kaiming, b [out, rank] zero, score a number; all float32 and trained.

    The gradient of the gate goes straight through to the score; a and b get none while it is off (not zeros, which an optimizer with
    momentum would still move by).
    """

    def __init__(self, base, rank: int, scale: float, start: float, threshold: float, generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.scale, self.threshold = scale, threshold
        self.a, self.b = nn.Parameter(torch.empty(rank, self.inp)), nn.Parameter(torch.zeros(self.out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5), generator=generator)
        self.score = nn.Parameter(torch.tensor(float(start)))

    @property
    def on(self) -> bool:
        return bool(self.score >= self.threshold)

    def factors(self):
        """Of rank 0 while it is off."""
        return (self.a, self.b, self.scale) if self.on else (self.a[:0], self.b[:, :0], self.scale)

    def effective(self):
        on = self.on
        a, b = (self.a, self.b) if on else (self.a.detach(), self.b.detach())
        # Its value is exactly 1 or 0, its gradient that of the score.
        gate = float(on) + (self.score - self.score.detach())
        return self.weight.detach().float() + gate * self.scale * (b @ a)

    def forward(self, x):
        if self.mask is not None:
            return Adapter.forward(self, x)
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            return _Gated.apply(x.to(dtype), self.weight.to(dtype), bias.to(dtype) if bias is not None else None, self.a.to(dtype),
                                self.b.to(dtype), self.score, self.scale, self.on)
