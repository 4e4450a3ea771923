"""The arithmetic of GPTQ on one matrix: Hessian, inverse factor, column sweep with error compensation.

Source: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, and its released code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import RunFailed
from engines.layers.int4 import find_grid, to_grid


class Hessian:
    """Running mean over sequences of 2 x x^T for one layer's inputs; [in, in] in fp32 (or ``dtype``)."""

    def __init__(self, width: int, device="cpu", dtype=torch.float32):
        self.matrix = torch.zeros(width, width, device=device, dtype=dtype)
        self.sequences = 0

    def add(self, x: torch.Tensor, sequences: int = 1) -> None:
        """Take the inputs [..., in] of ``sequences`` sequences of equal length."""
        total = self.sequences + sequences
        x = x.reshape(-1, x.shape[-1]).to(self.matrix.dtype)
        self.matrix.mul_(self.sequences / total).addmm_(x.t(), x, alpha=2.0 / total)
        self.sequences = total


def upper_factor(hessian: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor, float]:
    """U with U^T U = inverse of the damped Hessian, U upper triangular.

    Damping adds its share of the mean diagonal; it grows tenfold (from at least 1e-6) as often as the factorization fails, or leaves
    a pivot that is no more than rounding (whether a singular matrix fails depends on the processor).

    Returns:
        (U, the damped Hessian, the damping that was used).

    Raises:
        RunFailed: not even with a damping of ten (the inputs are not finite).
    """
    mean = hessian.diagonal().mean()
    share, nothing = damping, hessian.shape[0] * torch.finfo(hessian.dtype).eps * mean
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed) and bool(lower.diagonal().square().min() > nothing):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damped, share
        share = max(share * 10, 1e-6)
        if share > 10:
            raise RunFailed("the calibration inputs of a layer give no usable Hessian", "Use more or other calibration sequences")


@dataclass
class Swept:
    """Result of ``sweep`` in the original order of the columns."""

    q: torch.Tensor
    """Integers [out, in], in the type of the weight."""
    scale: torch.Tensor
    """[out, groups]."""
    zero: torch.Tensor
    """[out, groups]."""
    loss: torch.Tensor
    """Sum over columns of (w - w^)^2 / U_jj^2 / 2; twice its sum is tr(dW H dW^T) with the damped H. [out]."""
    damped: torch.Tensor
    damping: float

    def dequantize(self) -> torch.Tensor:
        group = self.q.shape[1] // self.scale.shape[1]
        return (self.q - self.zero.repeat_interleave(group, 1)) * self.scale.repeat_interleave(group, 1)


def sweep(weight: torch.Tensor, hessian: torch.Tensor, *, bits: int = 4, group: int = 0, symmetric: bool = False, damping: float = 0.01,
          block: int = 128, act_order: bool = False, static_groups: bool = False, mse: bool = False, mask: torch.Tensor | None = None,
          stored: bool = True, grid: tuple[torch.Tensor, torch.Tensor] | None = None, floor: int = 0) -> Swept:
    """Quantize ``weight`` [out, in] column by column, each column's error compensated by the columns after it.

    Args:
        hessian: [in, in] as in ``Hessian.matrix``; neither it nor ``weight`` is changed.
        group: columns that share a grid; 0 is one grid per row.
        act_order: columns in order of falling Hessian diagonal; groups are then static, as the kernels need them.
        static_groups: every group's grid from the original weights, before the sweep.
        mask: [out, in], False where a weight was pruned and stays exactly zero (its compensation included).
        stored: scales as they are stored (five significant bits).
        grid: (scale [out, 1], zero-point [out, 1]) instead of grids found from the weights.
        floor: least integer of the grid (1 leaves out the lowest value of an 8-bit grid, so that int8 stays symmetric).

    Raises:
        RunFailed: see ``upper_factor``.
    """
    w, h = weight.clone(), hessian.clone()
    out, inp = w.shape
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    if mask is not None:
        w = w * mask
    width = group or inp
    groups = inp // width
    static = static_groups or act_order or not group or grid is not None

    def fresh(columns):
        return find_grid(columns, bits, symmetric, stored=stored, mse=mse)

    if grid is not None:
        scale, zero = (g.to(w).expand(out, groups).clone() for g in grid)
    elif static:
        s, z = fresh(w.reshape(-1, width))
        scale, zero = s.view(out, groups).clone(), z.view(out, groups).clone()
    else:
        scale, zero = torch.empty(out, groups, dtype=w.dtype, device=w.device), torch.empty(out, groups, dtype=w.dtype, device=w.device)

    order = torch.argsort(h.diagonal(), descending=True, stable=True) if act_order else torch.arange(inp, device=w.device)
    if act_order:
        w, h = w[:, order], h[order][:, order]
        mask = mask[:, order] if mask is not None else None
    belongs = (order // width).tolist()
    upper, damped, used = upper_factor(h, damping)

    q, loss = torch.zeros_like(w), torch.zeros(out, dtype=w.dtype, device=w.device)
    for begin in range(0, inp, block):
        end = min(begin + block, inp)
        part, factor = w[:, begin:end].clone(), upper[begin:end, begin:end]
        errors = torch.zeros_like(part)
        for j in range(end - begin):
            column, g = begin + j, belongs[begin + j]
            if not static and column % width == 0:
                # The group may reach beyond this block: the part inside has this block's corrections, the part outside
                # lacks them, so they are applied to a copy first.
                s, z = fresh(_current(w, part, errors, upper, begin, end, column, column + width))
                scale[:, g], zero[:, g] = s, z
            value = part[:, j]
            integers = to_grid(value, scale[:, g], zero[:, g], bits)
            if floor:
                integers.clamp_(min=floor)
            if mask is not None:
                integers = torch.where(mask[:, column], integers, zero[:, g])
            q[:, column] = integers
            difference = value - scale[:, g] * (integers - zero[:, g])
            diagonal = factor[j, j]
            loss += (difference / diagonal) ** 2 / 2
            errors[:, j] = difference / diagonal
            part[:, j:] -= errors[:, j: j + 1] * factor[j, j:]
        w[:, end:] -= errors @ upper[begin:end, end:]
    if act_order:
        back = torch.argsort(order)
        q, damped = q[:, back], damped[back][:, back]
    return Swept(q, scale, zero, loss, damped, used)


def _current(w, part, errors, upper, begin: int, end: int, first: int, last: int) -> torch.Tensor:
    """Columns first..last as all compensation so far leaves them."""
    inside = part[:, first - begin: min(last, end) - begin]
    if last <= end:
        return inside
    # Columns of errors not yet swept are zero, so the whole block's product is what has been found so far.
    return torch.cat([inside, w[:, end:last] - errors @ upper[begin:end, end:last]], 1)


def output_error(weight: torch.Tensor, quantized: torch.Tensor, hessian: torch.Tensor) -> float:
    """||(W - W^) X|| / ||W X|| from the Hessian of X."""
    delta = weight - quantized
    top, below = ((delta @ hessian) * delta).sum(), ((weight @ hessian) * weight).sum()
    return float((top.clamp_min(0) / below).sqrt()) if float(below) > 0 else 0.0
