"""A full-rank update made of random bases that all layers share.

Source: RandLoRA: Full-rank parameter-efficient fine-tuning of large models.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter

KINDS = ("uniform", "sparse", "very-sparse")


def bases(rank: int, smaller: int, larger: int, kind: str, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The fixed bases, each divided by its standard deviation: a [rank, 1, smaller] and b [larger, count, rank], float32.

    Drawn on the CPU in float32, so that a key gives the same numbers everywhere.

    Args:
        smaller, larger: the largest sides that any layer needs; a layer takes slices.
        kind: ``uniform`` (Kaiming), ``sparse`` (-1, 0, 1 with 1/6, 2/3, 1/6) or ``very-sparse`` (each sign with
            1 / (2 sqrt(smaller))).
    """
    generator = torch.Generator().manual_seed(key)

    def draw(*shape):
        while True:
            made = torch.rand(shape, generator=generator)
            if kind == "uniform":
                made = 2 * made - 1      # the bound of Kaiming's distribution goes out with the division
            else:
                edge = 1 / 6 if kind == "sparse" else 1 / (2 * math.sqrt(smaller))
                made = (made > 1 - edge).float() - (made < edge).float()
            spread = made.std() if made.numel() > 1 else made.abs().max()
            if spread > 0:
                return made / spread

    return draw(rank, 1, smaller), draw(larger, math.ceil(smaller / rank), rank)


def _scaled(a, lam, gamma):
    """Rows (k, j) = lam[k, j] a[k] gamma[j]: [rank * count, side]."""
    return (lam[:, :, None] * a * gamma[None]).flatten(0, 1)


def _changed(weight, a, b, lam, gamma, scale: float, turned: bool, mask, dtype):
    """The changed weight as [out, in] in ``dtype``, in which the update is also made; ``turned`` when the input is the larger side."""
    w, scaled = weight.to(dtype), _scaled(a, lam, gamma * scale).to(dtype)
    new = torch.addmm(w.t(), b.to(dtype), scaled).t() if turned else torch.addmm(w, b.to(dtype), scaled)
    return new if mask is None else new * mask


class _RandLinear(torch.autograd.Function):
    """x (W + mask * delta)^T + bias; keeps x alone and makes basis and weight again in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, lam, gamma, a, b, scale, turned, mask):
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, _changed(weight, a, b, lam, gamma, scale, turned, mask, x.dtype), bias)
        ctx.save_for_backward(flat, weight, lam, gamma, a, b, mask)
        ctx.scale, ctx.turned, ctx.shape = scale, turned, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, lam, gamma, a, b, mask = ctx.saved_tensors
        grad, b = grad.reshape(-1, grad.shape[-1]), b.to(grad.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _changed(weight, a, b, lam, gamma, ctx.scale, ctx.turned, mask, grad.dtype)).view(ctx.shape)
        dense = flat.t() @ grad if ctx.turned else grad.t() @ flat      # [larger, smaller]
        if mask is not None:
            dense = dense * (mask.t() if ctx.turned else mask)
        pulled = (b.t() @ dense).float().mul_(ctx.scale).view(*lam.shape, -1).mul_(a)      # [rank, count, side]
        grad_lam = torch.einsum("kjs,js->kj", pulled, gamma)
        grad_gamma = torch.einsum("kjs,kj->js", pulled, lam)
        return grad_x, None, None, grad_lam, grad_gamma, None, None, None, None, None


class RandLora(Adapter):
    """W + scale * sum_j b_j diag(lam[:, j]) a diag(gamma[j]), with the diagonals on the smaller side of W.

    Args:
        rank: width of one basis; ceil(smaller side / rank) bases together reach full rank.
        scale: what the sum is multiplied with.

    ``share`` gives the bases, which are no part of the state: they follow from their key.
    """

    def __init__(self, base, rank: int, scale: float, *, mask=None):
        super().__init__(base, mask=mask)
        side, self.rank, self.scale = min(self.out, self.inp), rank, scale
        self.turned = self.inp > self.out
        self.number = math.ceil(side / rank)
        self.lam = nn.Parameter(torch.zeros(rank, self.number))
        self.gamma = nn.Parameter(torch.full((self.number, side), 1.0 / max(self.number, side)))

    def share(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take this layer's slices of the bases made by ``bases``."""
        side, larger = min(self.out, self.inp), max(self.out, self.inp)
        # Plain attributes: every layer looks into the same two tensors. The columns of b stand in the order (basis, column)
        # and the scaled rows of a in the order (column, basis), as in the authors' code: a fixed permutation of equal
        # random columns.
        self.a, self.b = a[:, :, :side], b[:larger, :self.number].flatten(1)

    def effective(self):
        return _changed(self.weight, self.a, self.b, self.lam, self.gamma, self.scale, self.turned, None, torch.float32)

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            return _RandLinear.apply(x.to(dtype), self.weight, bias.to(dtype) if bias is not None else None, self.lam, self.gamma,
                                     self.a, self.b, self.scale, self.turned, self.mask)
