"""A linear layer whose weight is trained while it exists only as 8-bit integers. Used for Q-GaLore."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from engines.layers import groupwise

HOLDER = torch.float8_e4m3fn
"""Type in which autograd is shown the integers, byte for byte: a leaf that is to be trained must be of a floating type."""


class _Product(torch.autograd.Function):
    """x W' with W dequantized in each pass and not kept; the gradient of W is handed on and not kept either."""

    @staticmethod
    def forward(ctx, x, codes, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return x @ layer.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx, grad):
        (x,), layer = ctx.saved_tensors, ctx.layer
        grad = grad.to(x.dtype)
        back = grad @ layer.dequantize(x.dtype) if ctx.needs_input_grad[0] else None
        if layer.sink is not None:
            layer.sink(layer.codes, grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1]))
        return back, None, None


class TrainedInt8Linear(nn.Module):
    """Takes the place of a linear layer and holds its weight [out, in] as 8-bit integers in groups of 256.

    Args:
        base: ``nn.Linear`` or transformers' Conv1D; emptied, and filled again by ``restored``.
        mask: bool [out, in], False where the weight is to stay zero, or None.
    """

    def __init__(self, base, mask=None):
        super().__init__()
        from engines.models import weight
        self._base, self.mask, self.conv1d = (base,), mask, not isinstance(base, nn.Linear)
        w = weight(base).detach()
        self.kept_dtype = w.dtype
        self.codes = nn.Parameter(torch.empty(w.shape, dtype=torch.uint8, device=w.device).view(HOLDER))
        self.codes.owner = weakref.ref(self)
        n = groupwise.groups(w.numel())
        self.register_buffer("scales", torch.ones(n, device=w.device))
        self.register_buffer("zeros", torch.zeros(n, dtype=torch.uint8, device=w.device))
        self.fill(w)
        self.bias = base.bias
        base.weight.data = base.weight.data.new_empty(0)
        self.sink = None
        """Called with (codes, gradient [out, in]) in the backward pass."""

    def integers(self) -> torch.Tensor:
        """The uint8 integers [out, in], sharing their bytes with ``codes``."""
        return self.codes.detach().view(torch.uint8)

    @torch.no_grad()
    def fill(self, w: torch.Tensor, stochastic: bool = False) -> None:
        """Quantize ``w`` [out, in] with fresh scales."""
        if self.mask is not None:
            w = w * self.mask
        codes, scales, zeros = groupwise.quantize(w, 8, stochastic)
        self.integers().copy_(codes.view(self.codes.shape))
        self.scales.copy_(scales)
        self.zeros.copy_(zeros)

    @torch.no_grad()
    def dequantize(self, dtype=torch.float32) -> torch.Tensor:
        """The weight [out, in]."""
        return groupwise.dequantize(self.integers().reshape(-1), self.scales, self.zeros, dtype).view(self.codes.shape)

    def forward(self, x):
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        y = _Product.apply(x, self.codes, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def restored(self):
        """The plain layer with the dequantized weight."""
        base, w = self._base[0], self.dequantize().to(self.kept_dtype)
        base.weight.data = (w.t() if self.conv1d else w).contiguous()
        return base
