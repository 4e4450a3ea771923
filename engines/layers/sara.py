"""The smallest entries of a frozen weight, trained as one vector that lives in their places.

Source: SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import Adapter


class _Selected(torch.autograd.Function):
    """x W^T + bias; the gradient of W is made whole for a moment and only its chosen entries are kept, as that of ``values``."""

    @staticmethod
    def forward(ctx, x, weight, bias, values, index, conv1d):
        ctx.save_for_backward(x, weight, index)
        ctx.conv1d = conv1d
        return F.linear(x, weight.t() if conv1d else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, index = ctx.saved_tensors
        flat, rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
        whole = flat.t() @ rows if ctx.conv1d else rows.t() @ flat
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ (weight.t() if ctx.conv1d else weight)
        return grad_x, None, None, whole.reshape(-1)[index].float(), None, None


def nuclear(weight: torch.Tensor, index: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Nuclear norm of the matrix that holds ``values`` at ``index`` and zeros elsewhere, and its subgradient at ``index``.

    Args:
        weight: tells the shape. index: flat positions.
    """
    whole = torch.zeros(weight.numel(), device=weight.device).index_copy_(0, index, values.float()).view(weight.shape)
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    kept = s > s[0] * 1e-6
    return s.sum(), (u[:, kept] @ v[kept]).reshape(-1)[index]


def _entries(values: torch.Tensor) -> nn.Parameter:
    """Entries of a matrix as a trained vector, which a run's weight decay reaches as it reaches matrices."""
    made = nn.Parameter(values)
    made.decays = True
    return made


class Smallest(Adapter):
    """A weight whose entries at ``index`` are the trained vector ``values``; both in the order in which the layer stores its weight.

    Args:
        index: flat positions, int64, ascending.
    """

    def __init__(self, base, index: torch.Tensor, *, mask=None):
        super().__init__(base, mask=mask)
        self.register_buffer("index", index)
        flat = base.weight.detach().reshape(-1)
        self.values = _entries(flat[index].float().clone())
        self.register_buffer("settled_index", index.new_zeros(0))
        self.register_buffer("settled", torch.zeros(0, device=flat.device))
        object.__setattr__(self, "written", (id(self.values), self.values._version))

    @torch.no_grad()
    def write(self) -> None:
        """Put the vectors into their places of the weight that the products use."""
        # Through .data: what an earlier pass has saved for its backward is the same tensor, and is not to be called stale for values
        # that only an optimizer step or a restored checkpoint changes.
        flat = self.base.weight.data.view(-1)
        flat.index_copy_(0, self.settled_index, self.settled.to(flat.dtype))
        flat.index_copy_(0, self.index, self.values.detach().to(flat.dtype))

    def sync(self) -> None:
        """Write if the vector has changed since the last time; fused optimizers do not tell, so after their step ``write`` is called."""
        now = (id(self.values), self.values._version)
        if now != self.written:
            self.write()
            object.__setattr__(self, "written", now)

    @torch.no_grad()
    def choose_again(self, threshold: float) -> None:
        """Go on with the entries that are still below the threshold; the others keep what they have learned and are frozen."""
        small = self.values.abs() < threshold
        self.shrink(self.index[small], self.values[small].clone(), self.index[~small], self.values[~small].clone())

    @torch.no_grad()
    def shrink(self, index, values, settled_index, settled) -> None:
        """Take these vectors in the place of the present ones; the trained one is a new parameter."""
        # Not other data for the same parameter: a graph of an earlier step that is still alive would expect the old shape.
        self.index, self.settled_index, self.settled = index, settled_index, settled
        self.values = _entries(values)
        object.__setattr__(self, "written", None)

    def effective(self):
        self.sync()
        flat = self.base.weight.detach().float().reshape(-1).clone()
        flat[self.settled_index] = self.settled
        flat[self.index] = self.values.detach()
        whole = flat.view(self.base.weight.shape)
        return whole.t() if self.conv1d else whole

    def forward(self, x):
        self.sync()
        kind, dtype = x.device.type, lowrank.product_type(x, self.base.weight)
        with torch.autocast(kind, enabled=False):
            bias = self.base.bias
            return _Selected.apply(x.to(dtype), self.base.weight.to(dtype), bias.to(dtype) if bias is not None else None, self.values,
                                   self.index, self.conv1d)
