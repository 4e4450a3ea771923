"""Linear layers of which a dense slice of columns or rows is trained, with only that slice's part of the graph.

Source: S2FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter


class _Columns(torch.autograd.Function):
    """x W^T + bias + x[..., s:e] delta^T; of the input only x[..., s:e] is kept."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, start, mask):
        flat, end = x.reshape(-1, x.shape[-1]), start + delta.shape[1]
        # A copy: a view would keep the whole input alive.
        part = flat[:, start:end].clone() if delta.shape[1] < flat.shape[1] else flat
        y = F.linear(flat, weight, bias)
        y.addmm_(part, delta.t())
        ctx.save_for_backward(part, weight, delta, mask)
        ctx.start, ctx.shape = start, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        part, weight, delta, mask = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_delta = grad.t() @ part
        if mask is not None:
            grad_delta.mul_(mask)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ weight
            grad_x[:, ctx.start:ctx.start + delta.shape[1]] += grad @ delta
            grad_x = grad_x.view(ctx.shape)
        return grad_x, None, None, grad_delta, None, None


class _Rows(torch.autograd.Function):
    """x W^T + bias, and x delta^T added to the outputs s:e."""

    @staticmethod
    def forward(ctx, x, weight, bias, delta, start, mask):
        flat, end = x.reshape(-1, x.shape[-1]), start + delta.shape[0]
        y = F.linear(flat, weight, bias)
        y[:, start:end] += flat @ delta.t()
        ctx.save_for_backward(flat, weight, delta, mask)
        ctx.start, ctx.shape = start, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, delta, mask = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        part = grad[:, ctx.start:ctx.start + delta.shape[0]]
        grad_delta = part.t() @ flat
        if mask is not None:
            grad_delta.mul_(mask)
        grad_x = (grad @ weight).addmm_(part, delta).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_delta, None, None


class Slice(Adapter):
    """A frozen weight and the trained change of ``count`` neighbouring columns (inputs) or rows (outputs) from ``start`` on.

    Args:
        columns: True: columns; ``delta`` is [out, count]. False: rows; ``delta`` is [count, in]. Zero at the start, float32.
    """

    def __init__(self, base, start: int, count: int, *, columns: bool, mask=None):
        super().__init__(base, mask=mask)
        self.start, self.columns = start, columns
        self.delta = nn.Parameter(torch.zeros((self.out, count) if columns else (count, self.inp)))

    @property
    def count(self) -> int:
        return self.delta.shape[1] if self.columns else self.delta.shape[0]

    def part(self, weight):
        """The slice of a [out, in] tensor: a view."""
        return weight.narrow(1 if self.columns else 0, self.start, self.count)

    def effective(self):
        new = self.weight.detach().float().clone()
        self.part(new).add_(self.delta)
        return new

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        mask = None if self.mask is None else self.part(self.mask)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            # Masked entries of delta get no gradient and stay at zero, so that the sum needs no mask.
            return (_Columns if self.columns else _Rows).apply(
                x.to(dtype), self.weight.to(dtype), bias.to(dtype) if bias is not None else None, self.delta.to(dtype), self.start, mask)


@torch.no_grad()
def permute(module, conv1d: bool, order: torch.Tensor, *, out: bool) -> None:
    """Bring the output features (weight and bias) or input features of a linear module into ``order`` (int64), in place.

    New tensors in the place of the old ones would lie scattered over what earlier work has left of the heap and keep all of it resident.
    """
    order = order.to(module.weight.device)
    module.weight.data.copy_(module.weight.data.index_select(int(out == conv1d), order))
    if out and module.bias is not None:
        module.bias.data.copy_(module.bias.data.index_select(0, order))
