"""Linear layer with 4-bit (or 3- and 2-bit) weights in groups of columns, computed by the int4 kernels of torch.

On disk: integers packed as tightly as their bits allow, one bf16 scale and one 4-bit zero-point per row and group.
In memory on a CPU: only the kernel's own layout (always 4 bits per weight), from which the stored form is read back
when it is asked for. Value of an integer q: ``scale * (q - zero)``; scales carry five significant bits, so that the
kernel's form ``(q - 8) * scale + (8 - zero) * scale`` is exact in bf16 and a pruned weight stays exactly zero.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

GROUPS = (32, 64, 128, 256)
"""Group widths that the kernels know."""
MANY = 192
"""Rows from which one dequantization and a bf16 product are faster than the 4-bit kernel on a CPU."""


def storable(scale: torch.Tensor) -> torch.Tensor:
    """Round positive scales to five significant bits (at most 3 % away), which makes zero exact in bf16."""
    mantissa, exponent = torch.frexp(scale.clamp_min(1e-30))
    return torch.ldexp((mantissa * 32).round() / 32, exponent)


def find_grid(w: torch.Tensor, bits: int, symmetric: bool = False, stored: bool = True, mse: bool = False):
    """A uniform grid of 2**bits values for each row of ``w`` [rows, columns]; it always contains zero.

    Args:
        symmetric: zero-point in the middle; else the grid spans from the row's least to its greatest value.
        stored: round scales as they are stored (see ``storable``).
        mse: shrink each row's range to the share (1.00, 0.99 ... 0.21) with the least sum of |error|^2.4.

    Returns:
        (scale [rows], zero-point [rows], both of w's type; zero-points are whole numbers 0 .. 2**bits - 1).

    Source: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (and its code).
    """
    top = 2**bits - 1
    lo, hi = w.amin(1).clamp_max(0), w.amax(1).clamp_min(0)
    empty = (lo == 0) & (hi == 0)
    lo, hi = torch.where(empty, -torch.ones_like(lo), lo), torch.where(empty, torch.ones_like(hi), hi)

    def grid(share: float):
        if symmetric:
            scale = 2 * torch.maximum(-lo, hi) * share / top
            scale = storable(scale) if stored else scale
            return scale, torch.full_like(scale, (top + 1) / 2)
        scale = (hi - lo) * share / top
        scale = storable(scale) if stored else scale
        return scale, (-lo * share / scale).round().clamp_(0, top)

    scale, zero = grid(1.0)
    if mse:
        best = (project(w, scale[:, None], zero[:, None], bits) - w).abs().pow(2.4).sum(1)
        for i in range(1, 80):
            s, z = grid(1 - i / 100)
            error = (project(w, s[:, None], z[:, None], bits) - w).abs().pow(2.4).sum(1)
            better = error < best
            best, scale, zero = torch.where(better, error, best), torch.where(better, s, scale), torch.where(better, z, zero)
    return scale, zero


def to_grid(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The integers (in w's type) nearest to ``w``: clamp(round(w / scale) + zero, 0, 2**bits - 1)."""
    return (w / scale).round_().add_(zero).clamp_(0, 2**bits - 1)


def project(w: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """The grid's value nearest to ``w``: scale * (q - zero)."""
    return (to_grid(w, scale, zero, bits) - zero).mul_(scale)


def quantize_groups(weight: torch.Tensor, bits: int = 4, group: int = 64, symmetric: bool = False, mse: bool = False):
    """Round-to-nearest of a matrix [out, in] in groups of ``group`` columns.

    Returns:
        (integers uint8 [out, in], scales fp32 [out, in / group], zero-points uint8 of the same shape).
    """
    out, inp = weight.shape
    w = weight.detach().float().reshape(-1, group)
    scale, zero = find_grid(w, bits, symmetric, mse=mse)
    q = to_grid(w, scale[:, None], zero[:, None], bits)
    return q.to(torch.uint8).view(out, inp), scale.view(out, -1), zero.to(torch.uint8).view(out, -1)


def pack_bits(q: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 integers [rows, n] below 2**bits -> bytes [rows, ceil(n / 8) * bits]: 8 integers in ``bits`` bytes, least first."""
    if q.shape[1] % 8:
        q = F.pad(q, (0, -q.shape[1] % 8))
    eight = q.view(q.shape[0], -1, 8)
    if bits == 4:
        return (eight[..., 0::2] | (eight[..., 1::2] << 4)).reshape(q.shape[0], -1)
    word = sum(eight[..., i].to(torch.int32) << (bits * i) for i in range(8))
    return torch.stack([((word >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)], -1).reshape(q.shape[0], -1)


def unpack_bits(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of ``pack_bits``: uint8 [rows, n]."""
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).reshape(packed.shape[0], -1)[:, :n]
    parts = packed.view(packed.shape[0], -1, bits).to(torch.int32)
    word = sum(parts[..., i] << (8 * i) for i in range(bits))
    return torch.stack([((word >> (bits * i)) & (2**bits - 1)).to(torch.uint8) for i in range(8)], -1).reshape(packed.shape[0], -1)[:, :n]


@functools.cache
def _block() -> int | None:
    """Rows that the CPU kernel's layout interleaves on this processor; None if it is laid out in no known way."""
    q = torch.randint(0, 16, (176, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for block in (64, 32, 16):
        if torch.equal(_columns(packed, 176, 32, block), q.t().to(torch.uint8)):
            return block
    return None


def _columns(packed: torch.Tensor, out: int, inp: int, block: int | None) -> torch.Tensor:
    """Kernel layout -> uint8 [in, out]."""
    if block is None:
        # A product with the identity shows every integer: (q - 8) * 1 + 8, exact in bf16.
        group = next(g for g in (128, 64, 32) if inp % g == 0)
        grid = torch.stack([torch.ones(inp // group, out), torch.full((inp // group, out), 8.0)], -1).to(torch.bfloat16)
        eye = torch.eye(inp, dtype=torch.bfloat16)
        return torch.ops.aten._weight_int4pack_mm_for_cpu(eye, packed, group, grid).to(torch.uint8)
    flat, full = packed.flatten(), out // block * block
    columns = torch.empty(inp, out, dtype=torch.uint8)
    if full:
        part = flat[: full * inp // 2].view(full // block, inp, block // 2).transpose(0, 1)
        view = columns[:, :full].unflatten(1, (full // block, block))
        view[..., : block // 2], view[..., block // 2:] = part & 15, part >> 4
    if out > full:
        part = flat[full * inp // 2:].view(inp, -1)
        columns[:, full::2], columns[:, full + 1::2] = part & 15, part >> 4
    return columns


@functools.cache
def _tinygemm(device: torch.device) -> bool:
    """True where the CUDA int4 kernel is there (sm80 and later) and gives right numbers."""
    try:
        if torch.cuda.get_device_capability(device) < (8, 0):
            return False
        q = torch.arange(16, dtype=torch.uint8, device=device).repeat(64, 8)
        packed = torch.ops.aten._convert_weight_to_int4pack(q[:, ::2] << 4 | q[:, 1::2], 8)
        grid = torch.stack([torch.ones(1, 64), torch.full((1, 64), 8.0)], -1).to(device, torch.bfloat16)
        y = torch.ops.aten._weight_int4pack_mm(torch.eye(128, dtype=torch.bfloat16, device=device), packed, 128, grid)
        return bool((y == q.t()).all())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


class Int4Linear(nn.Module):
    """A linear layer with weights [out, in] of 2, 3 or 4 bits; the bias keeps its own type.

    Args:
        group: columns that share a scale; a multiple of 32 that divides ``inp``, or ``inp`` itself (a multiple of 32).
        bits: width of the stored integers. At run time they always take 4 bits.
        symmetric: every zero-point is 2**(bits - 1), and none is stored.
        conv1d: the layer it replaces stored its weight as [in, out] (GPT-2); only for taking it apart again.
    """

    kind = "int4"

    def __init__(self, inp: int, out: int, bias: bool = True, group: int = 64, bits: int = 4, symmetric: bool = False,
                 conv1d: bool = False, device=None):
        super().__init__()
        if group % 32 or inp % group:
            raise ValueError(f"a width of {inp} cannot be cut into groups of {group}")
        self.in_features, self.out_features, self.group, self.bits = inp, out, group, bits
        self.symmetric, self.conv1d = symmetric, conv1d
        groups = inp // group
        make = functools.partial(torch.zeros, dtype=torch.uint8, device=device)
        self.register_buffer("qweight", make(out, inp * bits // 8))
        self.register_buffer("scales", torch.ones(out, groups, dtype=torch.bfloat16, device=device))
        self.register_buffer("zeros", None if symmetric else make(out, (groups + 7) // 8 * 4 if groups > 1 else 1))
        self.register_buffer("_packed", None, persistent=False)
        self.register_buffer("_grid", None, persistent=False)
        self.bias = nn.Parameter(torch.zeros(out, device=device), requires_grad=False) if bias else None

    # -- filling and taking apart ------------------------------------------------------------------------
    def fill(self, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> None:
        """Take integers [out, in], scales and zero-points [out, in / group]."""
        self._unpack()
        self.qweight.copy_(pack_bits(q.to(torch.uint8), self.bits))
        self.scales.copy_(scale)
        if self.zeros is not None:
            zero = zero.to(torch.uint8)
            self.zeros.copy_(zero if zero.shape[1] == 1 else pack_bits(zero, 4))

    def _integers(self) -> torch.Tensor:
        if self.qweight is not None:
            return unpack_bits(self.qweight, self.bits, self.in_features)
        return _columns(self._packed, self._packed.shape[0], self.in_features, _block())[:, : self.out_features].t()

    def _zero_points(self) -> torch.Tensor:
        if self.zeros is None:
            return torch.full_like(self.scales, 2 ** (self.bits - 1))
        groups = self.scales.shape[1]
        return (self.zeros if groups == 1 else unpack_bits(self.zeros, 4, groups)).to(self.scales.dtype)

    def dequantize(self) -> torch.Tensor:
        """The matrix as fp32 [out, in], exact."""
        q = self._integers().float().reshape(self.out_features, -1, self.group)
        return ((q - self._zero_points().float()[..., None]) * self.scales.float()[..., None]).view(self.out_features, -1)

    # -- the kernel's own layout -------------------------------------------------------------------------
    def _kernel_grid(self, rows: int) -> tuple[int, torch.Tensor]:
        """(group that the kernel knows, scales and offsets bf16 [in / that group, rows, 2])."""
        known = self.group if self.group in GROUPS else next(g for g in reversed(GROUPS) if self.group % g == 0)
        scale = self.scales.repeat_interleave(self.group // known, 1)
        zero = self._zero_points().repeat_interleave(self.group // known, 1)
        grid = torch.stack([scale, (8 - zero) * scale], -1).transpose(0, 1)
        return known, F.pad(grid, (0, 0, 0, rows - self.out_features)).to(torch.bfloat16).contiguous()

    def _pack(self) -> None:
        """Keep only the layout that the CPU kernel reads; rows are padded to a multiple of 16."""
        rows = -(-self.out_features // 16) * 16
        with torch.inference_mode(False):   # what is kept must also serve outside an evaluation
            q = F.pad(self._integers(), (0, 0, 0, rows - self.out_features)).to(torch.int32).contiguous()
            self._known, self._grid = self._kernel_grid(rows)
            self._packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
            self.qweight = None

    def _pack_cuda(self) -> None:
        tiles = next((t for t in (8, 4, 2) if self.in_features % (16 * t) == 0), 2)
        rows = -(-self.out_features // 8) * 8
        with torch.inference_mode(False):
            q = F.pad(self._integers(), (0, 0, 0, rows - self.out_features))
            self._known, self._grid = self._kernel_grid(rows)
            self._packed = torch.ops.aten._convert_weight_to_int4pack((q[:, ::2] << 4 | q[:, 1::2]).contiguous(), tiles)

    def _unpack(self) -> None:
        """Back to the stored form alone."""
        with torch.inference_mode(False):
            if self.qweight is None:
                self.qweight = pack_bits(self._integers().contiguous(), self.bits)
        self._packed = self._grid = None

    def _apply(self, fn, recurse=True):
        self._unpack()   # the kernel's layout belongs to one device
        super()._apply(fn, recurse)
        self.scales = self.scales.to(torch.bfloat16)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.qweight is None:
            destination[prefix + "qweight"] = pack_bits(self._integers().contiguous(), self.bits)

    def _load_from_state_dict(self, *args, **kwargs):
        self._unpack()
        super()._load_from_state_dict(*args, **kwargs)

    # -- computing ---------------------------------------------------------------------------------------
    def _dense(self) -> torch.Tensor:
        """bf16 [in, out] from the CPU kernel's layout."""
        q = _columns(self._packed, self._packed.shape[0], self.in_features, _block()).to(torch.bfloat16)
        grid = self._grid
        w = q.sub_(8).view(grid.shape[0], -1, grid.shape[1]).mul_(grid[:, None, :, 0]).add_(grid[:, None, :, 1])
        return w.view(self.in_features, -1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, self.in_features)
        if x.requires_grad and torch.is_grad_enabled():
            y = F.linear(flat, self.dequantize().to(x.dtype))
        elif x.device.type == "cpu":
            if self._packed is None:
                self._pack()
            # The kernel is fast with bf16 only; other types run reference loops.
            half = flat.to(torch.bfloat16)
            if flat.shape[0] < MANY:
                y = torch.ops.aten._weight_int4pack_mm_for_cpu(half, self._packed, self._known, self._grid)
            else:
                y = half @ self._dense()
        elif x.is_cuda and self.in_features % 32 == 0 and _tinygemm(x.device):
            if self._packed is None:
                self._pack_cuda()
            y = torch.ops.aten._weight_int4pack_mm(flat.to(torch.bfloat16), self._packed, self._known, self._grid)
        else:
            y = F.linear(flat, self.dequantize().to(x.dtype))
        y = y[:, : self.out_features].to(x.dtype).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def describe(self) -> dict:
        """What ``engines.models.packed.rebuild`` needs to make this layer again."""
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "bias": self.bias is not None,
                "group": self.group, "bits": self.bits, "symmetric": self.symmetric, "conv1d": self.conv1d}

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bits={self.bits}, group={self.group}, bias={self.bias is not None}"
