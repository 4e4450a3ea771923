"""Linear layers that multiply only the channels which a thin estimate of the weight picks for the batch at hand.

Source: SparseLoRA: Accelerating LLM Fine-Tuning with Contextual Sparsity. Channels of W [out, in] are skipped on its output
(q, k, v, gate, up) or on its input (o, down); the skipped ones are gathered away before the product, in both passes.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from engines.layers import lowrank
from engines.layers.adapter import LowRank


class Shared:
    """What every layer of one model must know of the step."""

    def __init__(self, tail: float = 0.0):
        self.active, self.tail = False, tail
        self.keep = None
        """bool [rows, length], False = padding, or None when nothing is padded."""

    def border(self, length: int) -> int:
        """The position from which tokens are computed with every channel."""
        return length - round(self.tail * length)


# -- which channels ------------------------------------------------------------------------------------------
def thin(weight: torch.Tensor, bias, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors a [in, rank] and b [rank + 1, out] with [x a, 1] b near x W^T + bias; float32, without training.

    The decomposition is exact up to 768 rows or columns and randomised, from a fixed seed, above.
    """
    weight = weight.detach().float()
    rank = min(rank, *weight.shape)
    if min(weight.shape) <= 768:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
            v = v.t()
    root = s[:rank].sqrt()
    last = torch.zeros(weight.shape[0], device=weight.device) if bias is None else bias.detach().float()
    return (v[:rank].t() * root).contiguous(), torch.cat([(u[:, :rank] * root).t(), last[None]]).contiguous()


def lengths(gram: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Length of every column of z b from z^T z alone, so that the estimated activations are never held: [out]."""
    return ((gram @ b) * b).sum(dim=0).clamp_min(0).sqrt()


def kept_of(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Numbers of the channels with the highest scores, ascending; ``sparsity`` is the share that is skipped."""
    # The small addend keeps whole numbers whole in spite of rounding: 100 (1 - 0.9) is a little less than 10.
    count = int(scores.numel() * (1.0 - sparsity) + 1e-9)
    return scores.topk(count, sorted=False).indices.sort().values


def query_channels(kept: torch.Tensor, groups: int, head: int) -> torch.Tensor:
    """Channels of q, or inputs of o, that stand for channels of k or v when ``groups`` query heads share one key head."""
    first = (kept // head) * groups * head + kept % head
    return (first[:, None] + torch.arange(groups, device=kept.device) * head).flatten().sort().values


class Choice(nn.Module):
    """The channels of one group of matrices for the batch at hand; its thin factors are buffers.

    Args:
        parts: name -> (weight [out, in], bias or None) of the matrices whose outputs are estimated, in one input.
    """

    def __init__(self, shared: Shared, parts: dict, sparsity: float, rank: int):
        super().__init__()
        self.sparsity, self.kept = sparsity, {}
        object.__setattr__(self, "shared", shared)
        found = [thin(weight, bias, rank) for weight, bias in parts.values()]
        self.widths = [a.shape[1] for a, _ in found]
        self.register_buffer("a", torch.cat([a for a, _ in found], dim=1))
        for name, (_, b) in zip(parts, found):
            self.register_buffer(f"b_{name}", b)

    def thin_inputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """[x a, 1] of every part for rows ``x`` [tokens, in], float32."""
        z = (x @ self.a.to(x.dtype)).float()
        ones = torch.ones(len(z), 1, device=z.device)
        return [torch.cat([part, ones], dim=1) for part in z.split(self.widths, dim=1)]

    def choose(self, x: torch.Tensor) -> None:
        """Fill ``kept`` for the input ``x`` [..., length, in] of the group; no gradient."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self._choose(x.detach().reshape(-1, *x.shape[-2:]))

    def _choose(self, x) -> None:
        raise NotImplementedError


class AttentionChoice(Choice):
    """Channels of q and k by the product of their estimated lengths, of v and o by that of v; all tokens count.

    Args:
        head: width of one head.
        fused: q, k and v are the three parts of one matrix.
    """

    def __init__(self, shared, parts, sparsity, rank, head: int, fused: bool = False):
        super().__init__(shared, parts, sparsity, rank)
        self.head, self.fused = head, fused
        self.groups = self.b_q.shape[1] // self.b_k.shape[1]

    def _choose(self, x):
        keep = self.shared.keep
        rows = x.reshape(-1, x.shape[-1]) if keep is None else x[keep]
        q, k, v = (lengths(z.t() @ z, b) for z, b in zip(self.thin_inputs(rows), (self.b_q, self.b_k, self.b_v)))
        # Scores live on the width of k: query heads that share a key head are averaged.
        kv = len(k)
        q = q.view(kv // self.head, self.groups, self.head).mean(dim=1).flatten()
        keys, values = kept_of(q * k, self.sparsity), kept_of(v, self.sparsity)
        queries, inputs = (query_channels(j, self.groups, self.head) for j in (keys, values))
        self.kept = {"q": queries, "k": keys, "v": values, "o": inputs}
        if self.fused:
            width = kv * self.groups
            self.kept["qkv"] = torch.cat([queries, keys + width, values + width + kv])


class MlpChoice(Choice):
    """Channels of an MLP by the estimated length of its inner activation; a sequence counts as its mean hidden state."""

    def __init__(self, shared, parts, sparsity, rank, act):
        super().__init__(shared, parts, sparsity, rank)
        object.__setattr__(self, "act", act)

    def _choose(self, x):
        keep = self.shared.keep
        if keep is None:
            rows = x.float().mean(dim=1)
        else:
            share = keep.float() / keep.sum(dim=1, keepdim=True).clamp_min(1)
            rows = torch.einsum("bl,bli->bi", share, x.float())
        found = [z @ b for z, b in zip(self.thin_inputs(rows), (b for n, b in self.named_buffers() if n != "a"))]
        inner = self.act(found[0]) if len(found) == 1 else self.act(found[0]) * found[1]
        kept = kept_of(inner.norm(dim=0), self.sparsity)
        self.kept = {"up": kept, "down": kept}


# -- the products --------------------------------------------------------------------------------------------
class _Sparse(torch.autograd.Function):
    """x W^T + bias over the kept channels of one side, plus scale (x a^T) b^T over all; dense from position ``border`` on.

    x is [rows, length, in]. The backward pass is the exact gradient of this map.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, kept, outputs, border):
        dtype, length = x.dtype, x.shape[1]
        out = weight.shape[0]
        part = weight.index_select(0 if outputs else 1, kept).to(dtype)
        if a is None:
            inner, y = None, x.new_zeros(*x.shape[:-1], out)
        else:
            inner = x.reshape(-1, x.shape[-1]) @ a.t()
            y = (inner @ b.t()).mul_(scale).view(*x.shape[:-1], out)
        if border:
            seen = x[:, :border]
            if outputs:
                found = F.linear(seen, part, None if bias is None else bias.index_select(0, kept))
                _add(y, border, kept, found)
            else:
                y[:, :border] += F.linear(seen.index_select(2, kept), part, bias)
        if border < length:
            y[:, border:] += F.linear(x[:, border:], weight.to(dtype), bias)
        ctx.save_for_backward(x if a is not None else None, inner, weight if border < length else None, part, a, b, kept)
        ctx.scale, ctx.outputs, ctx.border, ctx.inp = scale, outputs, border, x.shape[-1]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, inner, weight, part, a, b, kept = ctx.saved_tensors
        border, grad_x, grad_a, grad_b = ctx.border, None, None, None
        flat = grad.reshape(-1, grad.shape[-1])
        if a is not None:
            grad_inner = (flat @ b).mul_(ctx.scale)
            grad_a, grad_b = grad_inner.t() @ x.reshape(-1, x.shape[-1]), (flat.t() @ inner).mul_(ctx.scale)
        if ctx.needs_input_grad[0]:
            shape = (*grad.shape[:-1], ctx.inp)
            grad_x = (grad_inner @ a).view(shape) if a is not None else grad.new_zeros(shape)
            if border:
                seen = grad[:, :border]
                if ctx.outputs:
                    grad_x[:, :border] += seen.index_select(2, kept) @ part
                else:
                    _add(grad_x, border, kept, seen @ part)
            if border < grad.shape[1]:
                grad_x[:, border:] += grad[:, border:] @ weight.to(grad.dtype)
        return grad_x, None, None, grad_a, grad_b, None, None, None, None


def _add(y, border: int, kept, found) -> None:
    """Add ``found`` [rows, border, kept] to the kept channels of the first positions of ``y`` [rows, length, width]."""
    if border == y.shape[1]:
        y.view(-1, y.shape[-1]).index_add_(1, kept, found.reshape(-1, found.shape[-1]))
    else:
        y[:, :border].index_add_(2, kept, found)


class SparseLinear(LowRank):
    """A frozen layer with or without a low-rank update (rank 0), sparse in training while its group's choice is active.

    Args:
        part: name of its channels in the choice: q, k, v, qkv and up are chosen on the output, o and down on the input.
    """

    def __init__(self, base, rank: int, scale: float, part: str, generator=None, *, mask=None):
        super().__init__(base, mask=mask)
        self.part, self.scale, self.leads = part, scale, False
        object.__setattr__(self, "choice", None)
        if rank:
            a = torch.empty(rank, self.inp)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.a, self.b = nn.Parameter(a), nn.Parameter(torch.zeros(self.out, rank))
        else:
            self.a = self.b = None

    def follow(self, choice: Choice, leads: bool) -> None:
        """Take the channels from ``choice``; the first layer of the group that is called leads and asks it to choose."""
        if leads:
            self.own_choice = choice
        object.__setattr__(self, "choice", choice)
        self.leads = leads

    @property
    def sparse(self) -> bool:
        return self.training and self.choice is not None and self.choice.shared.active

    def factors(self):
        if self.a is None:
            weight = self.weight
            return weight.new_zeros(0, self.inp, dtype=torch.float32), weight.new_zeros(self.out, 0, dtype=torch.float32), 1.0
        return self.a, self.b, self.scale

    def forward(self, x):
        kind, dtype, bias = x.device.type, lowrank.product_type(x, self.base.weight), self.base.bias
        if not self.sparse:
            if self.a is not None:
                return super().forward(x)
            with torch.autocast(kind, enabled=False):
                return F.linear(x.to(dtype), self.weight.to(dtype), None if bias is None else bias.to(dtype))
        if self.leads:
            self.choice.choose(x)
        kept, outputs = self.choice.kept[self.part], self.part not in ("o", "down")
        with torch.autocast(kind, enabled=False):
            x = x.to(dtype)
            whole = x.reshape(-1, *x.shape[-2:]) if x.dim() != 3 else x
            bias = None if bias is None else bias.to(dtype)
            a, b = (self.a.to(dtype), self.b.to(dtype)) if self.a is not None and self.mask is None else (None, None)
            border = self.choice.shared.border(whole.shape[1])
            y = _Sparse.apply(whole, self.weight, bias, a, b, self.scale, kept, outputs, border).view(*x.shape[:-1], self.out)
            if self.a is not None and self.mask is not None:
                y = y + F.linear(x, (self.scale * (self.b @ self.a)).mul(self.mask).to(dtype))
            return y


def gated_forward(mlp, x):
    """Forward of a gated MLP without updates of its own: only the kept channels are ever computed, in both passes.

    ``mlp`` has gate_proj, up_proj, down_proj, act_fn and an ``MlpChoice`` called ``own_choice``; it takes and gives [..., hidden].
    """
    choice = mlp.own_choice
    if not (mlp.training and choice.shared.active):
        return type(mlp).forward(mlp, x)
    choice.choose(x)
    kept, shape = choice.kept["up"], x.shape
    x = x.reshape(-1, *shape[-2:])
    border = choice.shared.border(x.shape[1])
    parts = []
    if border:
        gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        pick = lambda bias: None if bias is None else bias.index_select(0, kept)  # noqa: E731
        seen = x[:, :border]
        inner = (mlp.act_fn(F.linear(seen, gate.weight.index_select(0, kept), pick(gate.bias)))
                 * F.linear(seen, up.weight.index_select(0, kept), pick(up.bias)))
        parts.append(F.linear(inner, down.weight.index_select(1, kept), down.bias))
    if border < x.shape[1]:
        parts.append(type(mlp).forward(mlp, x[:, border:]))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(shape)
