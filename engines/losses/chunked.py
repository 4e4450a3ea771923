"""Cross-entropy over a large vocabulary without ever holding all logits.

The gradient with respect to hidden states and head weight is made during the forward pass, chunk by
chunk, so the largest temporary is ``chunk`` rows of logits (idea of "Cut Your Losses in
Large-Vocabulary Language Models" and of Liger's fused linear cross-entropy, in plain torch).
"""

from __future__ import annotations

import torch


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, chunk):
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if ctx.needs_input_grad[1] else None
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for at in range(0, hidden.shape[0], chunk):
            part, target = hidden[at: at + chunk], labels[at: at + chunk]
            logits = torch.mm(part, cast.t()).float()
            top = logits.amax(dim=-1, keepdim=True)
            logits.sub_(top).exp_()
            norm = logits.sum(dim=-1, keepdim=True)
            # The probability of the target is read before the buffer is turned into the gradient.
            picked = logits.gather(1, target[:, None])
            total -= (picked / norm).clamp_min(1e-30).log().sum()
            logits.div_(norm)
            logits.scatter_add_(1, target[:, None], torch.full_like(picked, -1.0))
            logits.mul_(scale)
            grad = logits.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(grad, cast, out=grad_hidden[at: at + chunk])
            if grad_weight is not None:
                grad_weight += torch.mm(grad.t(), part)
            # Names that live on would keep one chunk's logits beside the next one's.
            del logits, grad, norm, top, picked
        ctx.grads = (grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype))
        return total * scale

    @staticmethod
    def backward(ctx, outer):
        grad_hidden, grad_weight = ctx.grads
        ctx.grads = None
        if grad_hidden is not None:
            grad_hidden.mul_(outer.to(grad_hidden.dtype))
        if grad_weight is not None:
            grad_weight.mul_(outer.to(grad_weight.dtype))
        return grad_hidden, grad_weight, None, None, None


def chunked_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, chunk: int = 2048) -> torch.Tensor:
    """Mean cross-entropy in nats.

    Args:
        hidden: [tokens, width], in the type of the matrix products.
        weight: [vocabulary, width] of the head (no bias).
        labels: int64 [tokens], every entry a token (no ignored ones).
        chunk: rows of logits held at a time.

    Returns:
        A scalar float32; gradients flow to ``hidden`` and ``weight``.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, 1.0 / labels.numel(), chunk)
