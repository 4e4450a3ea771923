"""A frozen matrix with a short list of changed entries, and the exchange of entries during training.

Source: Scaling Sparse Fine-Tuning to Large Language Models (SpIEL).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter


def scattered(weight, index, values):
    """``weight`` ([out, in], any strides) as a new row-major tensor with ``values`` added at the flat places ``index``."""
    new = weight.clone(memory_format=torch.contiguous_format)
    flat = new.view(-1)
    flat.index_copy_(0, index, (flat[index].float() + values).to(new.dtype))
    return new


class _Sparse(torch.autograd.Function):
    """x (W + scatter(values))^T + bias; the sum is made again in the backward pass, the dense gradient lives for a moment only."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, index, layer):
        flat = x.reshape(-1, x.shape[-1])
        y = F.linear(flat, scattered(weight, index.long(), values), bias)
        ctx.save_for_backward(flat, weight, values, index)
        ctx.layer, ctx.shape = layer, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        flat, weight, values, index = ctx.saved_tensors
        index, grad = index.long(), grad.reshape(-1, grad.shape[-1])
        dense = grad.t() @ flat
        if ctx.layer.mask is not None:
            dense.mul_(ctx.layer.mask)
        grad_values = dense.reshape(-1)[index].to(values.dtype)
        if ctx.layer.watching:
            ctx.layer.observe(dense)
        del dense
        grad_x = (grad @ scattered(weight, index, values)).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, grad_values, None, None


class SparseDelta(Adapter):
    """W + scatter(values, index): ``values`` [k] is trained (float32, zero at the start), ``index`` [k] are places in [out, in].

    While ``watching`` it keeps statistics of the gradient at ``k`` candidate places: the largest of the first micro-batch that it sees
    with ``fresh`` set.
    """

    def __init__(self, base, index: torch.Tensor, *, mask=None):
        super().__init__(base, mask=mask)
        k = len(index)
        self.values = nn.Parameter(torch.zeros(k))
        self.register_buffer("index", index.to(torch.int32))
        self.register_buffer("candidates", torch.zeros(k, dtype=torch.int32))
        self.register_buffer("sums", torch.zeros(k))
        self.register_buffer("squares", torch.zeros(k))
        self.values.layer = self      # an optimizer that works by rows and columns asks for the places
        self.watching = self.fresh = False
        self.step_sums = self.step_squares = None
        """Of the micro-batches of the present step."""

    def effective(self):
        weight = self.weight.detach().float()
        return weight.reshape(-1).index_add(0, self.index.long(), self.values).view(weight.shape)

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            return _Sparse.apply(x.to(dtype), self.weight.to(dtype), bias.to(dtype) if bias is not None else None, self.values, self.index,
                                 self)

    # -- statistics of a window ----------------------------------------------------------------------------
    def open(self) -> None:
        """A new window begins with the next micro-batch."""
        self.sums.zero_()
        self.squares.zero_()

    def begin(self, watching: bool, fresh: bool) -> None:
        """A step begins."""
        self.watching, self.fresh = watching, fresh
        self.step_sums = torch.zeros_like(self.sums) if watching else None
        self.step_squares = torch.zeros_like(self.sums) if watching else None

    @torch.no_grad()
    def observe(self, dense) -> None:
        """Take notice of one micro-batch's gradient, [out, in]."""
        flat = dense.reshape(-1)
        if self.fresh:
            self.candidates.copy_(torch.topk(flat.abs(), len(self.values)).indices)
            self.fresh = False
        seen = flat[self.candidates.long()].float()
        self.step_sums += seen
        self.step_squares += seen.square()

    @torch.no_grad()
    def settle(self, micro: int) -> None:
        """A step of ``micro`` micro-batches ended, whose losses were divided by their number: count their own gradients."""
        self.sums.add_(self.step_sums, alpha=micro)
        self.squares.add_(self.step_squares, alpha=micro**2)
        self.step_sums = self.step_squares = None


def exchange(index, values, candidates, scores, n: int):
    """(slots, new places, positions among the candidates) of an exchange of at most ``n`` entries.

    The ``n`` entries of least |value| may leave; the best candidates that are not among the entries that stay come in. What would
    both leave and come in is left alone. All arguments are [k]; ``candidates`` are distinct flat places with their ``scores``.
    """
    slots = torch.argsort(values.abs(), stable=True)[:n]
    stays = torch.ones(len(index), dtype=torch.bool, device=index.device)
    stays[slots] = False
    free = (~torch.isin(candidates, index[stays])).nonzero().view(-1)
    grown = free[torch.argsort(scores[free], descending=True, stable=True)[:n]]
    slots, grown = slots[~torch.isin(index[slots], candidates[grown])], grown[~torch.isin(candidates[grown], index[slots])]
    count = min(len(slots), len(grown))
    return slots[:count], candidates[grown[:count]], grown[:count]


def best_products(rows, columns, index, n: int, mask=None):
    """The at most ``n`` flat places outside ``index`` with the largest rows[i] columns[j]."""
    scores = torch.outer(rows, columns).view(-1)
    scores[index] = -1.0
    if mask is not None:
        scores[~mask.reshape(-1)] = -1.0
    n = min(n, scores.numel() - len(index))
    found = torch.topk(scores, n)
    return found.indices[found.values >= 0]
