"""Agreement of two predictions of the same inputs, each pulled towards the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def symmetric_kl(first, second) -> torch.Tensor:
    """0.5 (KL(p2 || p1) + KL(p1 || p2)) in nats, mean over rows of logits [rows, classes]; the target of each term gets no gradient."""
    a, b = F.log_softmax(first.float(), dim=-1), F.log_softmax(second.float(), dim=-1)
    def kl(learner, target):
        return F.kl_div(learner, target.detach(), log_target=True, reduction="batchmean")
    return 0.5 * (kl(a, b) + kl(b, a))


class _ChunkedSymmetricKL(torch.autograd.Function):
    """The gradient is made in the forward pass. With the targets held it is half of p1 - p2 for the first logits and its negative for
    the second, so that one product with the head serves both."""

    @staticmethod
    def forward(ctx, first, second, weight, chunk):
        cast, scale = weight.to(first.dtype), 0.5 / len(first)
        grad = torch.empty_like(first)
        total = torch.zeros((), dtype=torch.float32, device=first.device)
        for at in range(0, len(first), chunk):
            a, b = (F.log_softmax(F.linear(x[at: at + chunk], cast).float(), dim=-1) for x in (first, second))
            apart = a.exp().sub_(b.exp())
            total += a.sub_(b).mul_(apart).sum()
            torch.mm(apart.mul_(scale).to(first.dtype), cast, out=grad[at: at + chunk])
            del a, b, apart     # or one chunk's logits stay beside the next one's
        ctx.save_for_backward(grad)
        return total * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, outer):
        grad, = ctx.saved_tensors
        grad = grad * outer.to(grad.dtype)
        return grad, -grad, None, None


def chunked_symmetric_kl(first, second, weight, *, chunk: int = 256) -> torch.Tensor:
    """``symmetric_kl`` of the logits x weight^T of two sets of hidden states, of which ``chunk`` rows are held at a time.

    Args:
        first, second: [tokens, width], in the type of the matrix products.
        weight: [vocabulary, width] of a frozen head without bias; it gets no gradient.
    """
    return _ChunkedSymmetricKL.apply(first, second, weight.detach(), chunk)
