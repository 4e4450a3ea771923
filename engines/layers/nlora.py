"""A small matrix between the two low-rank factors.

Source: NLoRA: Nyström-Initiated Low-Rank Adaptation for Large Language Models.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from engines.layers.adapter import LowRank
from engines.layers.core import FrozenDown


def nystroem(weight: torch.Tensor, rank: int, corner: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The factors taken from W, in its type: a [rank, in] its first rows, middle [rank, rank], b [out, rank] its first columns.

    Args:
        corner: ``copy`` takes the top left square of W itself as the middle; ``pinv`` its pseudo-inverse, with which b middle a
            is the Nyström approximation of W (singular values under a thousandth of the largest are left out).
    """
    square = weight[:rank, :rank]
    if corner == "pinv":
        square = torch.linalg.pinv(square.double(), rtol=1e-3).to(weight.dtype)
    # A transposed view would hand its strides on, and a resumed optimizer has its moments in plain order.
    return tuple(part.clone(memory_format=torch.contiguous_format) for part in (weight[:rank], square, weight[:, :rank]))


class Structured(FrozenDown):
    """W + scale b m a, or W + scale (b m a - b0 m0 a0) with a residual.

    Args:
        form: ``slora`` (a and m drawn, b zero), ``nlora`` (all three from W) or ``inttune`` (the same, only m trained).
        residual: subtract the product of the start, so that training begins at W.
    """

    def __init__(self, base, rank: int, scale: float, form: str = "nlora", corner: str = "copy", residual: bool = False,
                 generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.scale, self.only_middle = scale, form == "inttune"
        if form == "slora":
            a, middle, b = torch.empty(rank, self.inp), torch.empty(rank, rank), torch.zeros(self.out, rank)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            nn.init.kaiming_uniform_(middle, a=math.sqrt(5), generator=generator)
        else:
            a, middle, b = nystroem(self.weight.detach().float(), rank, corner)
        if residual:
            self.register_buffer("start", b @ middle)
            self.register_buffer("a0", None if self.only_middle else a.clone())
        else:
            self.start = None
        for name, value in (("a", a), ("b", b)):
            if self.only_middle:
                self.register_buffer(name, value)
            else:
                setattr(self, name, nn.Parameter(value))
        self.middle = nn.Parameter(middle)

    def factors(self):
        b = self.b @ self.middle
        if self.start is None:
            return self.a, b, self.scale
        if self.only_middle:
            return self.a, b - self.start, self.scale
        return torch.cat([self.a, self.a0]), torch.cat([b, -self.start], dim=1), self.scale

    def forward(self, x):
        # Only with a frozen may its input be forgotten.
        return super().forward(x) if self.only_middle else LowRank.forward(self, x)
