"""A trained square between a frozen input projection and an output projection that freezes gradually.

Source: LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from engines.layers.core import FrozenDown


def energy(values: torch.Tensor, rank: int) -> float:
    """Share of the energy of the first 2 ``rank`` singular values that the first ``rank`` hold; low for a flat spectrum."""
    squares = values.double().square()
    whole = squares[:2 * rank].sum()
    return float(squares[:rank].sum() / whole) if whole > 0 else 1.0


class LamDa(FrozenDown):
    """W + scale (up core - up0 core0) down: down [rank, in] is frozen, core [rank, rank] trained, up [out, rank] at first too.

    With the spectral start down, up and scale core hold the largest singular triplets, so that W without the subtracted product
    is the paper's frozen residual. With the random start up is zero and nothing is subtracted.

    Args:
        start: ``svd`` or ``random``.
    """

    def __init__(self, base, rank: int, scale: float, start: str = "svd", generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.scale, self.settled = scale, False
        if start == "svd":
            u, s, v = torch.linalg.svd(self.weight.detach().float(), full_matrices=False)
            down, up, core = v[:rank].contiguous(), u[:, :rank].contiguous(), torch.diag(s[:rank]) / scale
        else:
            down, up, core = torch.empty(rank, self.inp), torch.zeros(self.out, rank), torch.empty(rank, rank)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            nn.init.kaiming_uniform_(core, a=math.sqrt(5), generator=generator)
        self.register_buffer("down", down)
        self.register_buffer("start", up @ core)
        self.up, self.core = nn.Parameter(up), nn.Parameter(core)

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def factors(self):
        # Once settled, up gets no gradient at all; it stays a parameter, so that checkpoints go on holding it.
        up = self.up.detach() if self.settled else self.up
        return self.down, up @ self.core - self.start, self.scale
