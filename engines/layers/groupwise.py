"""Asymmetric integers with one scale and zero point for each group of entries of a flattened tensor; zero stays exactly zero.

The quantiser of Q-GaLore's weights (8 bits) and projections (4 bits, two in a byte). A group's range is extended to contain zero:
the published formula clamps the zero point, and a group of one sign would saturate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 256


def groups(size: int) -> int:
    return -(-size // GROUP)


def quantize(values: torch.Tensor, bits: int, stochastic: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of ``values`` (any shape, taken in row order) with a fresh scale and zero point for each group.

    Args:
        stochastic: round up with the probability of the fraction, so that the mean over many roundings is the value.

    Returns:
        (uint8 [entries], float32 scales [groups], uint8 zero points [groups]); value = scale * (integer - zero point).
    """
    top, size = 2**bits - 1, values.numel()
    flat = values.detach().float().reshape(-1)
    rows = F.pad(flat, (0, groups(size) * GROUP - size)).view(-1, GROUP)
    low, high = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
    scale = ((high - low) / top).clamp_(min=1e-12)
    zero = (-(low / scale).round()).clamp_(0, top)
    steps = rows / scale[:, None]
    steps = steps.add_(torch.rand_like(steps)).floor_() if stochastic else steps.round_()
    codes = steps.add_(zero[:, None]).clamp_(0, top).to(torch.uint8)
    return codes.view(-1)[:size], scale, zero.to(torch.uint8)


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Values [entries] of ``quantize``."""
    size = codes.numel()
    rows = F.pad(codes, (0, groups(size) * GROUP - size)).view(-1, GROUP)
    return (rows.to(torch.float32).sub_(zero[:, None].float()).mul_(scale[:, None])).view(-1)[:size].to(dtype)


def pack4(codes: torch.Tensor) -> torch.Tensor:
    """4-bit integers [entries] as uint8 [half of them, rounded up]."""
    codes = F.pad(codes, (0, codes.numel() % 2))
    return codes[0::2] | (codes[1::2] << 4)


def unpack4(packed: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:size]
