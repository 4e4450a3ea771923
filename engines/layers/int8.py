"""Layers whose weights are int8 with one scale per row, computed by integer kernels.

Which kernel runs was chosen by measurement (two CPU cores with AVX512-VNNI): up to ``FEW`` rows the fused
``aten::_weight_int8pack_mm`` on bf16 activations, above that ``torch._int_mm``. Weight-only mode keeps its
activations at 15 bits there by two integer products (a high and a low int8 part), which is more exact than bf16 and,
up to ``MANY`` rows, as fast as dequantizing the weight; with more rows the dequantized weight pays for itself.
Dynamic mode (W8A8) rounds each token to int8.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import nn

MODES = ("weight-only", "dynamic")
FEW = 8
"""Rows up to which the fused weight-only kernel is faster than two integer products."""
MANY = 64
"""Rows from which weight-only mode multiplies with a dequantized weight: scoring a data set has thousands."""
_CHUNK = 1 << 20
_LOW = 254.0   # the rounding error of the high part is at most half a step: 254 low steps cover one high step


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric round-to-nearest int8 of a matrix [out, in], one scale per row.

    The scale is rounded to bf16 before the integers are computed, so what is stored is what was rounded to.
    Zero stays exactly zero.

    Returns:
        (int8 [out, in], bf16 scales [out]).
    """
    w = weight.detach().float()
    scale = (w.abs().amax(1) / 127).to(torch.bfloat16)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    q = (w / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
    return q, scale


@functools.cache
def _fused(device: str) -> bool:
    """True where ``_weight_int8pack_mm`` is there and gives right numbers on this kind of device."""
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return False
    try:
        x = torch.ones(1, 64, dtype=torch.bfloat16, device=device)
        q = torch.ones(64, 64, dtype=torch.int8, device=device)
        s = torch.ones(64, dtype=torch.bfloat16, device=device)
        return bool((torch._weight_int8pack_mm(x, q, s) == 64).all())
    except (RuntimeError, NotImplementedError, AttributeError):
        return False


def _integer(x: torch.Tensor, rows: int, out: int) -> bool:
    """True where ``torch._int_mm`` serves this shape: always on a CPU; cuBLASLt wants M > 16, K and N multiples of 8."""
    if x.is_cuda:
        return rows > 16 and x.shape[-1] % 8 == 0 and out % 8 == 0
    return x.device.type == "cpu"


def _per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows, in] -> (x in steps, fp32 [rows, in]; fp32 step of each row [rows, 1])."""
    x = x.float()
    step = x.abs().amax(1, keepdim=True).clamp_(min=1e-12).div_(127)
    return x / step, step


def int8_linear(x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, mode: str = "weight-only") -> torch.Tensor:
    """x [rows, in] times the transposed matrix q [out, in] * scales[out]; the result has x's type.

    Args:
        x: floating point, any type; without gradient.
        q: int8 [out, in], contiguous.
        scales: bf16 [out].
        mode: ``weight-only`` or ``dynamic``.
    """
    rows, out = x.shape[0], q.shape[0]
    # _weight_int8pack_mm reads past the row and kills the process when the width is no multiple of 16.
    if mode == "weight-only" and (rows <= FEW or x.is_cuda) and q.shape[1] % 16 == 0 and _fused(x.device.type):
        y = torch._weight_int8pack_mm(x if x.dtype is torch.bfloat16 else x.to(torch.bfloat16), q, scales)
        return y if y.dtype is x.dtype else y.to(x.dtype)
    if mode == "weight-only" and rows >= MANY and not x.is_cuda:
        return _dequantized_product(x, q, scales)
    if not _integer(x, rows, out):
        return F.linear(x, q.to(x.dtype) * scales.to(x.dtype)[:, None])
    if rows * out > _CHUNK and not x.is_cuda:
        # Wide results (a head over a vocabulary) would travel through memory several times; parts stay in the cache.
        part = max(16, _CHUNK // out)
        return torch.cat([_integer_product(piece, q, scales, mode) for piece in x.split(part)])
    return _integer_product(x, q, scales, mode)


def _dequantized_product(x, q, scales):
    """x times the weight in x's type; wide weights (a head over a vocabulary) in parts, so that no second copy of all exists."""
    part = max(256, 4 * _CHUNK // q.shape[1])
    if q.shape[0] <= part:
        return F.linear(x, (q.float() * scales.float()[:, None]).to(x.dtype))
    y = x.new_empty(x.shape[0], q.shape[0])
    for at in range(0, q.shape[0], part):
        rows = slice(at, at + part)
        y[:, rows] = F.linear(x, (q[rows].float() * scales[rows].float()[:, None]).to(x.dtype))
    return y


def _integer_product(x, q, scales, mode):
    rows = x.shape[0]
    steps, step = _per_token(x)
    high = steps.round()
    if mode == "dynamic":
        y = torch._int_mm(high.to(torch.int8), q.t()).float()
    else:
        low = steps.sub_(high).mul_(_LOW).round_()
        both = torch._int_mm(torch.cat([high, low]).to(torch.int8), q.t())
        y = both[:rows].float().add_(both[rows:], alpha=1 / _LOW)
    return y.mul_(step).mul_(scales.float()).to(x.dtype)


class _Table(nn.Module):
    """An int8 matrix [rows, width] with a bf16 scale per row; ``scales`` stay bf16 under ``.to(dtype)``."""

    def __init__(self, rows: int, width: int, device=None):
        super().__init__()
        self.register_buffer("qweight", torch.zeros(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.ones(rows, dtype=torch.bfloat16, device=device))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        # bf16 -> fp32 -> bf16 is exact; fp16 would not be, but the kernels want bf16 anyway.
        self.scales = self.scales.to(torch.bfloat16)
        return self

    def fill(self, weight: torch.Tensor) -> None:
        """Quantize ``weight`` [rows, width] into the buffers."""
        q, s = quantize_rows(weight)
        self.qweight.copy_(q)
        self.scales.copy_(s)

    def dequantize(self) -> torch.Tensor:
        """The matrix as fp32 [rows, width]; products of an int8 and a bf16 are exact there."""
        return self.qweight.float() * self.scales.float()[:, None]


class Int8Linear(_Table):
    """A linear layer with int8 weights [out, in]; the bias keeps its own type.

    Args:
        mode: ``weight-only`` (activations as they are) or ``dynamic`` (activations int8 per token).
        conv1d: the layer it replaces stored its weight as [in, out] (GPT-2); only for taking it apart again.
    """

    kind, bits = "int8", 8

    def __init__(self, inp: int, out: int, bias: bool = True, mode: str = "weight-only", conv1d: bool = False, device=None):
        super().__init__(out, inp, device)
        self.in_features, self.out_features, self.mode, self.conv1d = inp, out, mode, conv1d
        self.bias = nn.Parameter(torch.zeros(out, device=device), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.qweight
        if x.requires_grad and torch.is_grad_enabled():
            # The integer kernels have no derivative; what flows through a frozen packed layer needs one.
            y = F.linear(x, q.to(x.dtype) * self.scales.to(x.dtype)[:, None])
        else:
            y = int8_linear(x.reshape(-1, self.in_features), q, self.scales, self.mode)
            y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def describe(self) -> dict:
        """What ``engines.models.packed.rebuild`` needs to make this layer again."""
        return {"kind": self.kind, "in": self.in_features, "out": self.out_features, "bias": self.bias is not None,
                "mode": self.mode, "conv1d": self.conv1d}

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}, mode={self.mode}"


class Int8Embedding(_Table):
    """A table of int8 rows [entries, width]; a lookup gives bf16 or whatever ``dtype`` says."""

    kind, bits = "int8-embedding", 8

    def __init__(self, entries: int, width: int, padding_idx: int | None = None, dtype=torch.bfloat16, device=None):
        super().__init__(entries, width, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = entries, width, padding_idx
        # Follows .to(dtype) of the model, so that activations have the type of the norms after it.
        self.register_buffer("_type", torch.empty(0, dtype=dtype, device=device), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = F.embedding(ids, self.qweight).float()
        return rows.mul_(F.embedding(ids, self.scales[:, None]).float()).to(self._type.dtype)

    def describe(self) -> dict:
        return {"kind": self.kind, "rows": self.num_embeddings, "width": self.embedding_dim, "padding_idx": self.padding_idx}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class TiedInt8Head(nn.Module):
    """An output layer that computes with the rows of an ``Int8Embedding``; it stores no weights of its own."""

    kind, bits = "int8-tied-head", 8

    def __init__(self, table: Int8Embedding, bias: bool = False, mode: str = "weight-only"):
        super().__init__()
        self._table = (table,)   # in a tuple, so that it is not registered (and not stored) a second time
        self.in_features, self.out_features, self.mode = table.embedding_dim, table.num_embeddings, mode
        self.bias = nn.Parameter(torch.zeros(self.out_features), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = self._table[0]
        if x.requires_grad and torch.is_grad_enabled():
            y = F.linear(x, table.qweight.to(x.dtype) * table.scales.to(x.dtype)[:, None])
        else:
            y = int8_linear(x.reshape(-1, self.in_features), table.qweight, table.scales, self.mode)
            y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dequantize(self) -> torch.Tensor:
        return self._table[0].dequantize()

    def describe(self) -> dict:
        return {"kind": self.kind, "bias": self.bias is not None, "mode": self.mode}
