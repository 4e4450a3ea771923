"""Low-rank updates in triplet form that grow by pieces prepared in advance.

Source: IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import LowRank

RESERVE = 1e-5
"""The value that a piece in reserve is held at."""
SPREAD = 0.02


class _Tap(torch.autograd.Function):
    """Passes a layer's output on; in the backward pass the layer is told the gradient of its whole update, which is not kept."""

    @staticmethod
    def forward(ctx, y, x, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        ctx.layer.hear(grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]))
        return grad, None, None


def importance(update: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """sum |update * gradient| / sqrt(number of entries): a scalar."""
    # Row by row, so that only the sums leave half precision.
    return (update * gradient).abs_().sum(dim=1).float().sum() / math.sqrt(update.numel())


class Growing(LowRank):
    """W + scale b diag(e) a in pieces of one or more ranks; the last piece may be a reserve, whose e is held at 1e-5.

    Args:
        first: rank at the start. add: ranks of each later piece.
        alpha: numerator of the scale.
        fixed: its denominator, or 0 for the current rank without the reserve (which shrinks the update when it grows).
        seed: of the draws of this layer's pieces.
    """

    def __init__(self, base, first: int, add: int, alpha: float, fixed: int, seed: int, *, mask=None):
        super().__init__(base, mask=mask)
        self.add, self.alpha, self.fixed, self.seed = add, alpha, fixed, seed
        self.a, self.b, self.e = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        self.born: list[int] = []
        """For each piece the growth at which its a and b joined; 0: the start."""
        self.woken: list[int | None] = []
        """For each piece the growth from which on its e is trained; None: a reserve."""
        self.watched, self.heard = False, None
        self._piece(first, 0.0, 0)
        self.woken[0] = 0

    def _piece(self, rank: int, value: float, event: int) -> None:
        g = torch.Generator().manual_seed((self.seed * 1_000_003 + len(self.born)) % (2**63 - 1))
        device = self.base.weight.device
        self.a.append(nn.Parameter((torch.randn(rank, self.inp, generator=g) * SPREAD).to(device)))
        self.b.append(nn.Parameter((torch.randn(self.out, rank, generator=g) * SPREAD).to(device)))
        self.e.append(nn.Parameter(torch.full((rank,), value, device=device), requires_grad=value != RESERVE))
        self.born.append(event)
        self.woken.append(None)

    @property
    def rank(self) -> int:
        """Ranks that count: without the reserve."""
        return sum(len(e) for e, woken in zip(self.e, self.woken) if woken is not None)

    @property
    def most(self) -> int:
        return min(self.out, self.inp)

    def reserve(self, event: int) -> None:
        """Append a piece in reserve, whose a and b are trained from now on."""
        self._piece(self.add, RESERVE, event)

    def wake(self, event: int) -> None:
        """The reserve becomes a part of the update: its e is trained from now on."""
        self.e[-1].requires_grad_(True)
        self.woken[-1] = event

    def retire(self) -> list:
        """Take the reserve out; its parameters."""
        if self.woken[-1] is not None:
            return []
        gone = [self.a[-1], self.b[-1], self.e[-1]]
        self.a, self.b, self.e = self.a[:-1], self.b[:-1], self.e[:-1]
        self.born.pop()
        self.woken.pop()
        return gone

    def joined(self, event: int) -> list:
        """The parameters that training got at this growth."""
        found = []
        for a, b, e, born, woken in zip(self.a, self.b, self.e, self.born, self.woken):
            found += [a, b] if born == event else []
            found += [e] if woken == event else []
        return found

    def whole(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All rows [ranks, in] and columns [out, ranks], the reserve's included."""
        return torch.cat(list(self.a)), torch.cat(list(self.b), dim=1)

    def factors(self):
        a, b = self.whole()
        return a * torch.cat(list(self.e))[:, None], b, self.alpha / ((self.fixed or self.rank) + 1e-5)

    def hear(self, gradient: torch.Tensor) -> None:
        """Add the importance under this gradient [out, in] of one part of the step."""
        a, b, scale = self.factors()
        # In the type of the gradient: a score is no place for the last digits, and a pass over the matrix is what it costs.
        update = (b * scale).to(gradient.dtype) @ a.to(gradient.dtype)
        found = importance(update if self.mask is None else update * self.mask, gradient)
        self.heard = found if self.heard is None else self.heard + found

    def forward(self, x):
        if not (self.watched and self.training and torch.is_grad_enabled()):
            return super().forward(x)
        x = x.to(lowrank.product_type(x, self.base.weight))
        return _Tap.apply(super().forward(x), x, self)


def orthogonality(layers) -> torch.Tensor:
    """Mean over layers and sides of ||a a^T - I||_F and ||b^T b - I||_F, reserves included."""
    found = []
    for layer in layers:
        a, b = layer.whole()
        eye = torch.eye(len(a), device=a.device)
        found += [torch.linalg.matrix_norm(a @ a.t() - eye), torch.linalg.matrix_norm(b.t() @ b - eye)]
    return torch.stack(found).mean()
