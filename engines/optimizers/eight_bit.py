"""Optimizer states in 8 bits, block by block. Source: 8-bit Optimizers via Block-wise Quantization.

Each block of 256 entries is divided by its largest magnitude; what remains is stored as the nearest of 256 values that are dense near
zero (a dynamic exponent with a linear fraction).
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

BLOCK = 256
LEAST = 4096
"""States of fewer entries stay float32."""
_CHUNK = 1 << 18
_LOW = 15
"""Last bits of a float32 that do not decide its group in ``_search``."""


@functools.cache
def values(signed: bool) -> torch.Tensor:
    """The 256 values in [-1, 1] or [0, 1], ascending."""
    found = [0.0, 1.0]
    for exponent in range(7):
        # A longer exponent leaves fewer bits to the fraction.
        edges = torch.linspace(0.1, 1.0, 2 ** (exponent + (0 if signed else 1)) + 1, dtype=torch.float64)
        means = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        found += means.tolist() + ([-m for m in means.tolist()] if signed else [])
    found += [0.0] * (256 - len(found))
    return torch.tensor(sorted(found), dtype=torch.float32)


@functools.cache
def _search(signed: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, their middles with a last one that is never passed, how many middles lie below each group of like floats).

    Floats of one sign, exponent and first 8 bits of fraction are a group; at most one middle lies in each, so that one
    comparison finds the nearest value: a tenth of the time of a binary search.
    """
    table = values(signed)
    middles = (table[:-1] + table[1:]) / 2
    groups = torch.arange(-(1 << 16), 1 << 16, dtype=torch.int32) << _LOW
    least = torch.where(groups < 0, groups | ((1 << _LOW) - 1), groups).view(torch.float32)
    below = torch.bucketize(least, middles, out_int32=True)
    return table.to(device), F.pad(middles, (0, 1), value=torch.inf).to(device), below.to(device)


def encode(x: torch.Tensor, signed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(uint8 of the shape of ``x``, float32 largest magnitude of each block)."""
    size, (_, middles, below) = x.numel(), _search(signed, x.device)
    rows = F.pad(x.reshape(-1), (0, -size % BLOCK)).view(-1, BLOCK)
    most = rows.abs().amax(1)
    codes = torch.empty(rows.shape, dtype=torch.uint8, device=x.device)
    for at in range(0, rows.shape[0], _CHUNK // BLOCK):
        part = slice(at, at + _CHUNK // BLOCK)
        scaled = (rows[part] / most[part, None].clamp(min=1e-30)).view(-1)
        found = below.index_select(0, (scaled.view(torch.int32) >> _LOW).add_(1 << 16))
        codes[part] = found.add_(scaled > middles.index_select(0, found)).view(-1, BLOCK)
    return codes.view(-1)[:size].view(x.shape), most


def decode(codes: torch.Tensor, most: torch.Tensor, signed: bool) -> torch.Tensor:
    """float32 of the shape of ``codes``."""
    size, table = codes.numel(), _search(signed, codes.device)[0]
    flat = F.pad(codes.reshape(-1), (0, -size % BLOCK))
    found = torch.empty(flat.shape, dtype=torch.float32, device=codes.device)
    for at in range(0, flat.numel(), _CHUNK):
        found[at:at + _CHUNK] = table.index_select(0, flat[at:at + _CHUNK].int())
    return found.view(-1, BLOCK).mul_(most[:, None]).view(-1)[:size].view(codes.shape)
