"""Linear layers whose frozen weight is changed by a few trained parameters; one base class for every such method.

Weights are seen as [out, in] whatever the layer stores. A subclass says what the changed weight is (``effective``); when the
change has low rank it says its factors instead and gets the fused product of ``engines.layers.lowrank``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from engines.layers import lowrank


class Adapter(nn.Module):
    """A frozen linear layer and what is trained beside it.

    Args:
        base: the ``nn.Linear`` or Conv1D that is wrapped; it stays in the state dict as ``<name>.base``.
        mask: bool [out, in], True = may be non-zero (weights that an earlier stage pruned stay zero), or None.
    """

    def __init__(self, base: nn.Module, *, mask: torch.Tensor | None = None):
        super().__init__()
        self.base = base
        self.conv1d = not isinstance(base, nn.Linear)
        # Not a buffer: the pipeline owns masks, and a checkpoint already has them.
        object.__setattr__(self, "mask", mask)

    def get_base_layer(self) -> nn.Module:
        return self.base

    @property
    def weight(self) -> torch.Tensor:
        """The frozen weight as [out, in]."""
        return self.base.weight.t() if self.conv1d else self.base.weight

    @property
    def bias(self):
        return self.base.bias

    @property
    def out(self) -> int:
        return self.weight.shape[0]

    @property
    def inp(self) -> int:
        return self.weight.shape[1]

    def effective(self) -> torch.Tensor:
        """The changed weight before any mask: [out, in], float32, differentiable in what is trained."""
        raise NotImplementedError

    def masked(self) -> torch.Tensor:
        """The weight that is used and that a merge stores."""
        new = self.effective()
        return new if self.mask is None else new * self.mask

    def changed_bias(self):
        """The bias that is used and that a merge stores; most methods leave it alone."""
        return self.base.bias

    def forward(self, x):
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.changed_bias()
            return F.linear(x.to(dtype), self.masked().to(dtype), bias.to(dtype) if bias is not None else None)


class LowRank(Adapter):
    """W + scale (b a); ``factors`` may compute a and b from smaller trained parts."""

    def factors(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(a [rank, in], b [out, rank], scale), float32."""
        raise NotImplementedError

    def effective(self) -> torch.Tensor:
        a, b, scale = self.factors()
        return torch.addmm(self.weight.float(), b.float(), a.float(), alpha=scale)

    def drop(self, x):
        """The input of the low-rank part under dropout, or None when there is none."""
        return None

    def forward(self, x):
        # What a factor is computed from is multiplied in float32 as in a merge, or a start whose parts cancel would not cancel.
        with torch.autocast(x.device.type, enabled=False):
            a, b, scale = self.factors()
            bias = self.changed_bias()
        return lowrank.low_rank_linear(x, self.weight, bias, a, b, scale, mask=self.mask, dropped=self.drop(x))
