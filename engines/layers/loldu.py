"""The diagonal of a lower-diagonal-upper factorisation is trained.

Source: LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient Fine-Tuning.
"""

from __future__ import annotations

import torch
from torch import nn

from engines.layers.core import Diagonal

EXACT = ("lu", "uniform", "normal", "constant")
"""Starts from which the model is unchanged: the residual is taken with the diagonal that is set."""

STARTS = EXACT + ("s_uniform", "s_normal", "ones", "zeros")


def ldu(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """W = l diag(d) u with l [out, k] a permuted unit lower and u [k, in] a unit upper triangle, k the smaller side; float64.

    A pivot under a millionth of its row, as pruned or dependent rows leave it, becomes 0 with a unit row in u: dividing by it
    would fill u with huge numbers. Only what these rows held is then missing from the product.
    """
    p, lower, upper = torch.linalg.lu(weight.detach().double())
    lower = lower[p.argmax(dim=1)]                    # P L, without the product
    d = torch.diagonal(upper).clone()
    k = d.shape[0]
    dead = d.abs() <= 1e-6 * upper.abs().amax(dim=1)
    u = upper / torch.where(dead, torch.ones_like(d), d)[:, None]
    u[dead] = torch.eye(k, upper.shape[1], dtype=u.dtype, device=u.device)[dead]
    return lower, torch.where(dead, torch.zeros_like(d), d), u


class LoLdu(Diagonal):
    """W - sigma0 l diag(z0) u + sigma l diag(z) u with the first ``rank`` columns of l and rows of u in the order of the pivots.

    Args:
        sigma: value of the scale at the start.
        start: how z begins, one of ``STARTS``; z0 equals it for those in ``EXACT``, and is the pivots for the others.
        train_scale: sigma is trained beside z.
        generator: for the random starts.
    """

    def __init__(self, base, rank: int, sigma: float, start: str = "lu", train_scale: bool = True, generator=None, *, mask=None):
        weight = base.weight if isinstance(base, nn.Linear) else base.weight.t()
        lower, d, upper = ldu(weight)
        super().__init__(base, upper[:rank], lower[:, :rank], mask=mask)
        pivots = d[:rank].float()
        z = _begin(pivots, start, generator)
        self.z = nn.Parameter(z.clone())
        scale = torch.tensor([sigma], device=z.device)
        self.sigma = nn.Parameter(scale.clone()) if train_scale else None
        self.register_buffer("fixed", None if train_scale else scale)
        # The product of the start, to be subtracted: the same numbers in the same order, so that the start is exact.
        self.register_buffer("start", scale * (z if start in EXACT else pivots))

    def scale(self) -> torch.Tensor:
        return self.fixed if self.sigma is None else self.sigma

    def difference(self):
        return self.scale() * self.z - self.start


def _begin(d: torch.Tensor, start: str, generator) -> torch.Tensor:
    if start == "lu":
        return d.clone()
    mean = d.mean()
    if start in ("constant", "ones", "zeros"):
        return torch.full_like(d, {"constant": float(mean), "ones": 1.0, "zeros": 0.0}[start])
    if start in ("uniform", "s_uniform"):
        even = torch.rand(d.shape, generator=generator).to(d.device)
        return (even - 0.5) * mean.abs() if start == "uniform" else 2 * even - 1
    normal = torch.randn(d.shape, generator=generator).to(d.device)
    spread = d.std() if d.numel() > 1 else torch.zeros_like(mean)
    return mean + spread * normal if start == "normal" else normal
