"""Plain low-rank factors with given start values, for the methods that differ from LoRA in where training begins or in the ranks."""

from __future__ import annotations

import torch
from torch import nn

from engines.layers.adapter import LowRank


class Factors(LowRank):
    """W + scale (b a), a and b trained.

    Args:
        a, b: [rank, in] and [out, rank], their values at the start.
        scale: factor on the product.
        dropout: share of the low-rank part's inputs that are dropped in training.
    """

    def __init__(self, base, a: torch.Tensor, b: torch.Tensor, scale: float, *, dropout: float = 0.0, mask=None):
        super().__init__(base, mask=mask)
        # A transposed view would hand its strides on, and a resumed optimizer has its moments in plain order.
        self.a = nn.Parameter(a.detach().float().clone(memory_format=torch.contiguous_format))
        self.b = nn.Parameter(b.detach().float().clone(memory_format=torch.contiguous_format))
        self.scale, self.dropout = scale, dropout

    def factors(self):
        return self.a, self.b, self.scale

    def drop(self, x):
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else None
