"""Block-affine changes of a frozen weight. Source: Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter
from engines.layers.core import FrozenDown


def changed(weight, blocks, mask=None):
    """W with every r x r block W[o, i] replaced by W[o, i] + W[o, i] D[o] + D[o], masked: [out, in], float32.

    Args:
        weight: [out, in].
        blocks: D, [out / r, r, r], float32.
        mask: bool [out, in], or None.
    """
    rows, r, _ = blocks.shape
    # D[o] acts on the last r columns of each block, so a row of blocks is one tall matrix as it lies in memory.
    cut = weight.float().reshape(rows, -1, r)
    new = torch.baddbmm(cut, cut, blocks).view(rows, r, -1, r).add_(blocks[:, :, None]).view(weight.shape)
    return new if mask is None else new * mask


class _BatLinear(torch.autograd.Function):
    """x W'^T + bias with the changed weight W', which is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, blocks, mask):
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, changed(weight, blocks, mask).to(x.dtype), bias)
        ctx.save_for_backward(flat, weight, blocks, mask)
        ctx.shape = x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, blocks, mask = ctx.saved_tensors
        grad, (rows, r, _) = grad.reshape(-1, grad.shape[-1]), blocks.shape
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ changed(weight, blocks, mask).to(grad.dtype)).view(ctx.shape)
        dense = (grad.t() @ flat).float()
        if mask is not None:
            dense.mul_(mask)
        guided = weight.float().reshape(rows, -1, r).transpose(1, 2) @ dense.view(rows, -1, r)
        return grad_x, None, None, guided.add_(dense.view(rows, r, -1, r).sum(2)), None


class Bat(Adapter):
    """Every r x r block W[o, i] becomes W[o, i] + W[o, i] D[o] + D[o]; D is [out / r, r, r] and starts at zero."""

    def __init__(self, base, rank: int, *, mask=None):
        super().__init__(base, mask=mask)
        self.blocks = nn.Parameter(torch.zeros(self.out // rank, rank, rank))

    def effective(self):
        return changed(self.weight, self.blocks)

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            return _BatLinear.apply(x.to(dtype), self.weight, bias.to(dtype) if bias is not None else None, self.blocks, self.mask)


class Miss(FrozenDown):
    """Column j r + k of W gets row k of D, which is [r, out] and starts at zero: an update of rank r at most.

    The sum of the input's shards is what is kept of the input, never the input itself.
    """

    def __init__(self, base, rank: int, *, mask=None):
        super().__init__(base, mask=mask)
        self.blocks = nn.Parameter(torch.zeros(rank, self.out))
        # The fixed factor: which row of D a column takes.
        place = torch.zeros(rank, self.inp)
        place[torch.arange(self.inp) % rank, torch.arange(self.inp)] = 1.0
        self.register_buffer("place", place)

    def factors(self):
        return self.place, self.blocks.t(), 1.0
