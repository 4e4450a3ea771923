"""A frozen linear layer with a trainable low-rank update, with or without a mask, as single autograd functions.

Weights are [out, in] views; ``a`` is [rank, in], ``b`` is [out, rank]. All products run in the type of ``x``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _LowRank(torch.autograd.Function):
    """x W^T + bias + scale (x a^T) b^T; keeps x and x a^T, adds both parts of the input gradient in one buffer."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale):
        flat = x.reshape(-1, x.shape[-1])
        inner = flat @ a.t()
        y = F.linear(flat, weight, bias)
        y.addmm_(inner, b.t(), alpha=scale)
        ctx.save_for_backward(flat, inner, weight, a, b)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, inner, weight, a, b = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad @ b).mul_(ctx.scale)
        # A factor that was frozen on the way costs nothing more.
        grad_a = grad_inner.t() @ flat if ctx.needs_input_grad[3] else None
        grad_b = (grad.t() @ inner).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ weight).addmm_(grad_inner, a).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None


class _MaskedLowRank(torch.autograd.Function):
    """x (W + mask * scale (b a))^T + bias; the sum is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, mask):
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, _masked_sum(weight, a, b, scale, mask, x.dtype), bias)
        ctx.save_for_backward(flat, weight, a, b, mask)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, a, b, mask = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_a = grad_b = grad_x = None
        if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
            dense = (grad.t() @ flat).mul_(mask).to(a.dtype)
            grad_a, grad_b = (b.t() @ dense).mul_(ctx.scale), (dense @ a.t()).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _masked_sum(weight, a, b, ctx.scale, mask, grad.dtype)).view(ctx.shape)
        return grad_x, None, None, grad_a, grad_b, None, None


def _masked_sum(weight, a, b, scale, mask, dtype):
    # float32 as in the merge, so that training sees the weights that will be stored.
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale).mul_(mask).to(dtype) if mask is not None else weight


def product_type(x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Type in which a layer multiplies: autocast's, or else that of its weight."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def low_rank_linear(x, weight, bias, a, b, scale: float, *, mask=None, dropped=None):
    """A linear layer with weight W + scale (b a), or W + mask * scale (b a) where the masked entries of W are zero.

    Args:
        x: [..., in].
        weight: [out, in], frozen.
        a, b: [rank, in] and [out, rank], float32, trainable.
        mask: bool [out, in], True = may change.
        dropped: ``x`` after dropout for the low-rank part (no mask), or None.

    Returns:
        [..., out], in autocast's type or the weight's.
    """
    kind, dtype = x.device.type, product_type(x, weight)
    with torch.autocast(kind, enabled=False):
        x, w = x.to(dtype), weight.to(dtype)
        bias = bias.to(dtype) if bias is not None else None
        if mask is not None:
            if dropped is None:
                return _MaskedLowRank.apply(x, weight, bias, a, b, scale, mask)
            delta = (scale * (b @ a)).mul(mask).to(dtype)
            return F.linear(x, w, bias) + F.linear(dropped.to(dtype), delta)
        a, b = a.to(dtype), b.to(dtype)
        if dropped is None:
            return _LowRank.apply(x, w, bias, a, b, scale)
        return F.linear(x, w, bias) + F.linear(F.linear(dropped.to(dtype), a) * scale, b)


def masked_direction_linear(x, weight, bias, a, b, scale: float, magnitude, mask):
    """DoRA with a mask: rows of W + mask * scale (b a) are rescaled to ``magnitude`` ([out]); the norm gets no gradient."""
    kind, dtype = x.device.type, product_type(x, weight)
    with torch.autocast(kind, enabled=False):
        effective = direction(weight, a, b, scale, magnitude, mask)
        return F.linear(x.to(dtype), effective.to(dtype), bias.to(dtype) if bias is not None else None)


def direction(weight, a, b, scale: float, magnitude, mask):
    """The weight that DoRA with a mask uses and that a merge stores: [out, in], float32."""
    summed = weight.float() + (scale * (b.float() @ a.float())).mul(mask)
    norm = summed.detach().norm(dim=1).clamp_min(1e-12)
    return summed * (magnitude.float() / norm)[:, None]
