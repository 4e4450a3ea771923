"""Block-affine changes of a frozen weight. Source: Bone: Block-Affine Adaptation of Large Language Models."""

from __future__ import annotations

import torch
from torch import nn

from engines.layers.adapter import Adapter, LowRank


class Bat(Adapter):
    """Every r x r block W[o, i] becomes W[o, i] + W[o, i] D[o] + D[o]; D is [out / r, r, r] and starts at zero."""

    def __init__(self, base, rank: int, *, mask=None):
        super().__init__(base, mask=mask)
        self.blocks = nn.Parameter(torch.zeros(self.out // rank, rank, rank))

    def effective(self):
        weight, (rows, r, _) = self.weight.float(), self.blocks.shape
        cut = weight.reshape(rows, r, self.inp // r, r).transpose(1, 2)            # [rows, columns, r, r]
        own = self.blocks[:, None]
        return (cut + cut @ own + own).transpose(1, 2).reshape(self.out, self.inp)


class Miss(LowRank):
    """Column j r + k of W gets row k of D, which is [r, out] and starts at zero: an update of rank r at most."""

    def __init__(self, base, rank: int, *, mask=None):
        super().__init__(base, mask=mask)
        self.blocks = nn.Parameter(torch.zeros(rank, self.out))
        # The fixed factor: which row of D a column takes.
        place = torch.zeros(rank, self.inp)
        place[torch.arange(self.inp) % rank, torch.arange(self.inp)] = 1.0
        self.register_buffer("place", place)

    def factors(self):
        return self.place, self.blocks.t(), 1.0
