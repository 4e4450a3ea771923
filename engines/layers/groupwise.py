"""Asymmetric integers with one scale and zero point for each group of entries of a flattened tensor; zero stays exactly zero.

The quantiser of Q-GaLore's weights (8 bits) and projections (4 bits, two in a byte). A group's range is extended to contain zero:
the published formula clamps the zero point, and a group of one sign would saturate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

GROUP = 256
PART = 1024
"""Groups that are worked on at a time: they stay in the cache, and no float32 copy of a large tensor is made."""


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
    flat, n = values.detach().reshape(-1), groups(values.numel())
    codes = torch.empty(n, GROUP, dtype=torch.uint8, device=flat.device)
    scales, zeros = torch.empty(n, device=flat.device), torch.empty(n, dtype=torch.uint8, device=flat.device)
    for at in range(0, n, PART):
        here = flat[at * GROUP:(at + PART) * GROUP].float()
        rows = (F.pad(here, (0, -here.numel() % GROUP)) if here.numel() % GROUP else here).view(-1, GROUP)
        low, high = rows.amin(1).clamp_(max=0), rows.amax(1).clamp_(min=0)
        scale = ((high - low) / top).clamp_(min=1e-12)
        zero = (-(low / scale).round()).clamp_(0, top)
        steps = rows / scale[:, None]
        steps = steps.add_(torch.rand_like(steps)).floor_() if stochastic else steps.round_()
        part = slice(at, at + PART)
        codes[part], scales[part], zeros[part] = steps.add_(zero[:, None]).clamp_(0, top), scale, zero
    return codes.view(-1)[:size], scales, zeros


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Values [entries] of ``quantize``."""
    size = codes.numel()
    found = torch.empty(size, dtype=dtype, device=codes.device)
    for at in range(0, scale.numel(), PART):
        here, part = slice(at * GROUP, min(size, (at + PART) * GROUP)), slice(at, at + PART)
        steps = codes[here].float()
        rows = (F.pad(steps, (0, -steps.numel() % GROUP)) if steps.numel() % GROUP else steps).view(-1, GROUP)
        found[here] = rows.sub_(zero[part, None]).mul_(scale[part, None]).view(-1)[:steps.numel()]
    return found


def pack4(codes: torch.Tensor) -> torch.Tensor:
    """4-bit integers [entries] as uint8 [half of them, rounded up]."""
    codes = F.pad(codes, (0, codes.numel() % 2))
    return codes[0::2] | (codes[1::2] << 4)


def unpack4(packed: torch.Tensor, size: int) -> torch.Tensor:
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)[:size]
