"""Updates whose input factor is a few columns of one orthogonal matrix that every adapter of this width shares.

Source: Orthogonal Adaptation for Modular Customization of Diffusion Models.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import nn

from engines.layers.core import FrozenDown


@functools.lru_cache(maxsize=2)
def _drawn(width: int, key: int) -> torch.Tensor:
    """The Q factor of a Gaussian square drawn on the CPU from ``key``, with the signs that make it evenly distributed: float64."""
    generator = torch.Generator().manual_seed(key)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def basis(width: int, columns: torch.Tensor, kind: str, key: int, dense: int = 2048) -> torch.Tensor:
    """Columns of the basis that all adapters with this key share: [width, rank], float32.

    Args:
        columns: their numbers, whole, below ``width``.
        kind: ``orthogonal``: columns of one orthogonal matrix; ``gaussian``: column j is drawn by itself with variance 1 / width, so
            that two of them are orthogonal only in expectation.
        dense: widths up to this one take an evenly drawn matrix (QR), wider ones a cosine basis, whose columns cost O(width) each.
    """
    if kind == "gaussian":
        drawn = [torch.randn(width, generator=torch.Generator().manual_seed((key * 1_000_003 + int(j)) % (2**63 - 1)), dtype=torch.float64)
                 for j in columns]
        return (torch.stack(drawn, dim=1) / math.sqrt(width)).float()
    if width <= dense:
        return _drawn(width, key)[:, columns].float()
    # The orthonormal cosine transform with random signs and frequencies: orthogonal like the other, but any column by itself.
    generator = torch.Generator().manual_seed(key)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    frequency = torch.randperm(width, generator=generator)[columns].double()
    rows = torch.arange(width, dtype=torch.float64)[:, None]
    cosines = torch.cos(math.pi / width * (rows + 0.5) * frequency) * math.sqrt(2.0 / width)
    cosines[:, frequency == 0] = math.sqrt(1.0 / width)
    return (signs[:, None] * cosines).float()


class Orthogonal(FrozenDown):
    """W + up a: ``a`` [rank, in] holds shared columns and never changes, ``up`` [out, rank] starts at zero and is trained."""

    def __init__(self, base, a: torch.Tensor, *, mask=None):
        super().__init__(base, mask=mask)
        self.register_buffer("a", a.contiguous())
        self.up = nn.Parameter(torch.zeros(self.out, a.shape[0]))

    def factors(self):
        return self.a, self.up, 1.0
