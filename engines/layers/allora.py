"""LoRA whose gradient is scaled row by row. Source: ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal Flaws."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import LowRank


def row_norms(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Length of every row of b a through the Gram matrix of a, without the product: [out], float32."""
    gram = a.float() @ a.float().t()
    return ((b.float() @ gram) * b.float()).sum(dim=1).clamp_min(0).sqrt()


class _Scaled(torch.autograd.Function):
    """x (W + mask * b a)^T + bias; gradients of a and b see the output's gradient times the factor, that of x does not.

    ``factor`` is [out], or None: then it is 1 / sqrt(|output of the adapter| + floor) for each token.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, factor, floor, mask):
        flat = x.reshape(-1, x.shape[-1])
        if mask is None:
            inner = flat @ a.t()
            y = F.linear(flat, weight, bias)
            y.addmm_(inner, b.t())
        else:
            inner, y = None, F.linear(flat, _masked(weight, a, b, mask, x.dtype), bias)
        ctx.save_for_backward(flat, inner, weight, a, b, factor, mask)
        ctx.floor, ctx.shape = floor, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, inner, weight, a, b, factor, mask = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = None
        if mask is None:
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight).addmm_(grad @ b, a).view(ctx.shape)
            if factor is None:
                scaled = grad * torch.rsqrt((inner @ b.t()).abs() + ctx.floor)
                return grad_x, None, None, (scaled @ b).t() @ flat, scaled.t() @ inner, None, None, None
            factor = factor[:, None].to(grad.dtype)
            return grad_x, None, None, (grad @ (b * factor)).t() @ flat, (grad.t() @ inner) * factor, None, None, None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _masked(weight, a, b, mask, grad.dtype)).view(ctx.shape)
        if factor is None:
            grad = grad * torch.rsqrt((flat @ (b @ a).mul(mask).t()).abs() + ctx.floor)
            dense = (grad.t() @ flat).mul_(mask)
        else:
            dense = (grad.t() @ flat).mul_(mask) * factor[:, None].to(grad.dtype)
        return grad_x, None, None, b.t() @ dense, dense @ a.t(), None, None, None


def _masked(weight, a, b, mask, dtype):
    return torch.addmm(weight.float(), b.float(), a.float()).mul_(mask).to(dtype)


class AlLora(LowRank):
    """W + b a, a drawn and b zero at the start, with adaptive gradients of both.

    Args:
        eta2: eta squared; the factor of a row that is still zero is eta.
        by: ``rows`` (length of the row of b a) or ``outputs`` (size of the adapter's output for each token).
    """

    def __init__(self, base, rank: int, eta2: float, by: str = "rows", generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.eta2, self.by = eta2, by
        a = torch.empty(rank, self.inp)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(self.out, rank))

    def factors(self):
        return self.a, self.b, 1.0

    def factor(self) -> torch.Tensor:
        """1 / sqrt(length of the row + 1 / eta squared) of each output row: [out], float32, no gradient."""
        with torch.no_grad():
            norms = row_norms(self.a, self.b) if self.mask is None else (self.b @ self.a).mul(self.mask).norm(dim=1)
            return torch.rsqrt(norms + 1.0 / self.eta2)

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            factor = self.factor() if self.by == "rows" and torch.is_grad_enabled() else None
            bias = bias.to(dtype) if bias is not None else None
            a, b = self.a.to(dtype), self.b.to(dtype)
            return _Scaled.apply(x.to(dtype), self.weight.to(dtype), bias, a, b, factor, 1.0 / self.eta2, self.mask)
