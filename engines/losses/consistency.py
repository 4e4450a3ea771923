"""Agreement of two predictions of the same inputs, each pulled towards the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def symmetric_kl(first, second) -> torch.Tensor:
    """0.5 (KL(p2 || p1) + KL(p1 || p2)) in nats, mean over rows of logits [rows, classes]; the target of each term gets no gradient."""
    a, b = F.log_softmax(first.float(), dim=-1), F.log_softmax(second.float(), dim=-1)
    def kl(learner, target):
        return F.kl_div(learner, target.detach(), log_target=True, reduction="batchmean")
    return 0.5 * (kl(a, b) + kl(b, a))


def chunked_symmetric_kl(first, second, weight, *, chunk: int = 2048) -> torch.Tensor:
    """``symmetric_kl`` of the logits x weight^T of hidden states [tokens, width]; ``chunk`` rows of logits at a time, made again backward."""
    def part(x, y):
        return symmetric_kl(F.linear(x, weight), F.linear(y, weight)) * len(x)
    pieces = [checkpoint(part, first[i: i + chunk], second[i: i + chunk], use_reentrant=False, preserve_rng_state=False)
              for i in range(0, len(first), chunk)]
    return torch.stack(pieces).sum() / len(first)
