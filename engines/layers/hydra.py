"""Two low-rank branches on one frozen layer: one reads the layer's input, the other its output.

Source: Hydra: Multi-head Low-rank Adaptation for Parameter Efficient Fine-tuning.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from engines.layers import lowrank
from engines.layers.adapter import LowRank


class Hydra(LowRank):
    """y = h + s B_p (A_p x) + s B_s (A_s h) with h = W x + b; both branches are linear, so they merge.

    Args:
        parallel: rank of the branch that reads x; 0: none.
        sequential: rank of the branch that reads h; 0: none.
        scale: s.
        biases: trained vectors in both branches, where the layer has a bias to merge them into.
        dropout: between the two factors of a branch, in training (none where there is a mask).
    """

    def __init__(self, base, parallel: int, sequential: int, scale: float, *, biases: bool = False, dropout: float = 0.0, generator=None,
                 mask=None):
        super().__init__(base, mask=mask)
        self.scale, self.dropout = scale, dropout
        self.a_p, self.b_p = nn.Parameter(torch.empty(parallel, self.inp)), nn.Parameter(torch.zeros(self.out, parallel))
        self.a_s, self.b_s = nn.Parameter(torch.empty(sequential, self.out)), nn.Parameter(torch.zeros(self.out, sequential))
        for factor in (self.a_p, self.a_s):
            if len(factor):
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        for name, size, rank in (("inner_p", parallel, parallel), ("outer_p", self.out, parallel),
                                 ("inner_s", sequential, sequential), ("outer_s", self.out, sequential)):
            wanted = biases and rank and base.bias is not None
            self.register_parameter(name, nn.Parameter(torch.zeros(size)) if wanted else None)

    def factors(self):
        if not len(self.a_s):
            return self.a_p, self.b_p, self.scale
        # In the weight's own type, so that the backward pass keeps the weight itself and no copy of it.
        through = (self.a_s.to(self.weight.dtype) @ self.weight).float()
        return torch.cat([self.a_p, through]), torch.cat([self.b_p, self.b_s], dim=1), self.scale

    def shift(self) -> torch.Tensor | None:
        """What the branches add to the bias: [out], float32, differentiable; None: nothing."""
        if self.base.bias is None:
            return None
        found = self.b_s @ (self.a_s @ self.base.bias.float())
        for b, inner, outer in ((self.b_p, self.inner_p, self.outer_p), (self.b_s, self.inner_s, self.outer_s)):
            if inner is not None:
                found = found + b @ inner + outer
        return self.scale * found if len(self.a_s) or self.inner_p is not None else None

    def changed_bias(self):
        shift = self.shift()
        return self.base.bias if shift is None else self.base.bias.float() + shift

    def forward(self, x):
        if self.training and self.dropout and self.mask is None:
            return self._dropped(x)
        kind = x.device.type
        with torch.autocast(kind, enabled=False):
            (a, b, scale), shift = self.factors(), self.shift()
        # The fused product takes its bias as frozen; what is trained of it is added by itself.
        y = lowrank.low_rank_linear(x, self.weight, self.base.bias, a, b, scale, mask=self.mask)
        return y if shift is None else y + shift.to(y.dtype)

    def _dropped(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            x, bias = x.to(dtype), self.base.bias
            h = F.linear(x, self.weight.to(dtype), None if bias is None else bias.to(dtype))
            y = h
            for source, a, b, inner, outer in ((x, self.a_p, self.b_p, self.inner_p, self.outer_p), (h, self.a_s, self.b_s, self.inner_s, self.outer_s)):
                if len(a):
                    thin = F.dropout(F.linear(source, a.to(dtype), None if inner is None else inner.to(dtype)), self.dropout)
                    y = y + self.scale * F.linear(thin, b.to(dtype), None if outer is None else outer.to(dtype))
            return y
