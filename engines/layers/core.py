"""Updates of a frozen weight whose input factor is frozen too: of the layer's input only its thin product is kept.

The update is b a with a [rank, in] frozen; what is trained is b [out, rank], or parts of which b is made. Sources: SVFit, LoLDU,
LaMDA and NLoRA, which all have this shape.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter, LowRank


class _FrozenDown(torch.autograd.Function):
    """x W^T + bias + (x a^T) b^T, W and a frozen; keeps x a^T ([tokens, rank]) and never x."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b):
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        y = F.linear(flat, weight, bias)
        y.addmm_(inner, b.t())
        ctx.save_for_backward(inner if ctx.needs_input_grad[4] else None, weight, a, b)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inner, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_b = grad.t() @ inner if inner is not None else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad @ b, a).view(ctx.shape)
        return grad_x, None, None, None, grad_b


class _Diagonal(torch.autograd.Function):
    """x W^T + bias + (x a^T diag(d)) b^T with only d ([rank], float32) trained; keeps x a^T."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, d, b):
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        y = F.linear(flat, weight, bias)
        y.addmm_(inner * d.to(inner.dtype), b.t())
        ctx.save_for_backward(inner, weight, a, d, b)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        inner, weight, a, d, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        outer = grad @ b
        grad_d = (outer * inner).sum(dim=0, dtype=torch.float32)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(outer * d.to(outer.dtype), a).view(ctx.shape)
        return grad_x, None, None, None, grad_d, None


class _Built(torch.autograd.Function):
    """x (W + b diag(d) a)^T + bias with only d ([rank], float32) trained; keeps x and the changed weight, in the type of x."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, d, b):
        flat = x.reshape(-1, x.shape[-1])
        changed = torch.addmm(weight.to(x.dtype), (b * d).to(x.dtype), a.to(x.dtype))
        ctx.save_for_backward(flat, changed, a, b)
        ctx.shape = x.shape
        return F.linear(flat, changed, bias).view(*x.shape[:-1], changed.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, changed, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        dense = grad.t() @ flat
        # The diagonal of b^T (dense) a^T: one of the two products, and of the other only the sums that are needed.
        if dense.shape[0] >= dense.shape[1]:
            grad_d = ((b.t().to(dense.dtype) @ dense) * a).sum(dim=1, dtype=torch.float32)
        else:
            grad_d = (b * (dense @ a.t().to(dense.dtype))).sum(dim=0, dtype=torch.float32)
        grad_x = (grad @ changed).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, grad_d, None


class FrozenDown(LowRank):
    """W + scale (b a) with a frozen a; ``factors`` computes b from what is trained."""

    def forward(self, x):
        if self.mask is not None:
            return super().forward(x)
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            a, b, scale = self.factors()
            bias = self.base.bias
            return _FrozenDown.apply(x.to(dtype), self.weight.to(dtype), bias.to(dtype) if bias is not None else None,
                                     a.to(dtype), (b if scale == 1.0 else b * scale).to(dtype))


def thin(out: int, inp: int, rank: int) -> bool:
    """Whether the two factors are smaller than the matrix, which makes products through them cheaper."""
    return rank * (out + inp) <= out * inp


def apart(out: int, inp: int, rank: int, tokens: int) -> bool:
    """Whether W and the factors are multiplied one after the other instead of being summed first.

    Thin factors always are, so that the input is not kept; thick ones for few tokens, where forward and backward through them
    (2 tokens rank (out + in)) cost less than building the sum and the diagonal of its gradient.
    """
    return thin(out, inp, rank) or 2 * tokens * rank * (out + inp) < out * inp * (2 * rank + tokens)


class Diagonal(FrozenDown):
    """W + b diag(d) a with frozen a [rank, in] and b [out, rank]; ``difference`` is d, zero where W is unchanged.

    The factors are buffers, so a checkpoint holds them and a resume does not depend on a decomposition made twice.
    """

    def __init__(self, base, a: torch.Tensor, b: torch.Tensor, *, mask=None):
        super().__init__(base, mask=mask)
        self.register_buffer("a", a.float().contiguous())
        self.register_buffer("b", b.float().contiguous())

    def difference(self) -> torch.Tensor:
        """d: [rank], float32, differentiable."""
        raise NotImplementedError

    def factors(self):
        return self.a, self.b * self.difference(), 1.0

    def forward(self, x):
        if self.mask is not None:
            return Adapter.forward(self, x)
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias, rank = self.base.bias, self.a.shape[0]
            bias = bias.to(dtype) if bias is not None else None
            if apart(self.out, self.inp, rank, x.numel() // self.inp):
                return _Diagonal.apply(x.to(dtype), self.weight.to(dtype), bias, self.a.to(dtype), self.difference(), self.b.to(dtype))
            return _Built.apply(x.to(dtype), self.weight, bias, self.a, self.difference(), self.b)


class SingularValues(Diagonal):
    """The largest ``rank`` singular values of W are trained; their vectors and the rest of W stay. Source: SVFit.

    Written as W plus the change of those values: equal to the rest plus the scaled vectors, and exact at the start.
    """

    def __init__(self, base, rank: int, *, mask=None):
        probe = base.weight if isinstance(base, nn.Linear) else base.weight.t()
        u, s, v = torch.linalg.svd(probe.detach().float(), full_matrices=False)
        super().__init__(base, v[:rank], u[:, :rank], mask=mask)
        self.values = nn.Parameter(s[:rank].clone())
        self.register_buffer("start", s[:rank].clone())

    def difference(self):
        return self.values - self.start
